package main

import (
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/holdfastdb/holdfast/internal/hardening"
	"github.com/holdfastdb/holdfast/keymgr/localkms"
	"github.com/holdfastdb/holdfast/manager"
)

func newUp() *cobra.Command {
	var f upFlags
	var settings []string
	var cacheSize string
	cmd := &cobra.Command{
		Use:   "up",
		Short: "Run a whole cluster in the foreground, over one directory",
		Long: `Run a whole cluster in the foreground: a key manager with a development KMS, three
safekeepers, a page server and the manager in this process, each endpoint as a child.
It prints "ready: postgres://..." when psql will work. Ctrl-C or SIGTERM stops it in
order; started again over the same directory it has all data.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			l, err := layoutOf(cmd)
			if err != nil {
				return err
			}
			if f.settings, err = parseSettings(settings); err != nil {
				return err
			}
			if f.cacheBytes, err = parseSize(cacheSize); err != nil {
				return fmt.Errorf("--cache-size: %w", err)
			}
			return runUp(cmd, l, f)
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&f.listen, "listen", "", "HOST:PORT where the first endpoint's Postgres listens (default "+manager.DefaultListen+", then as the last time)")
	flags.StringVar(&f.passwordFile, "password-file", "", "file with the superuser's first password (else one is made and printed once)")
	flags.StringArrayVar(&settings, "set", nil, "NAME=VALUE, a postgresql.conf setting of the endpoints; may be repeated")
	flags.StringVar(&cacheSize, "cache-size", "", "size of an endpoint's local sealed store, such as 4GB")
	return cmd
}

// upFlags is what a user may choose for a whole cluster; zero values mean the default.
type upFlags struct {
	listen       string
	passwordFile string
	settings     map[string]string
	cacheBytes   int64
}

func parseSettings(list []string) (map[string]string, error) {
	settings := make(map[string]string, len(list))
	for _, s := range list {
		name, value, ok := strings.Cut(s, "=")
		if name = strings.TrimSpace(name); !ok || name == "" {
			return nil, fmt.Errorf("--set %q: want NAME=VALUE, as in --set work_mem=64MB", s)
		}
		settings[name] = strings.TrimSpace(value)
	}
	return settings, nil
}

// parseSize reads a number of bytes with PostgreSQL's units; empty is 0.
func parseSize(s string) (int64, error) {
	if s == "" {
		return 0, nil
	}
	digits := strings.TrimRight(s, "kMGTB ")
	shift, ok := map[string]uint{"": 0, "B": 0, "kB": 10, "MB": 20, "GB": 30, "TB": 40}[strings.TrimSpace(s[len(digits):])]
	n, err := strconv.ParseInt(digits, 10, 64)
	if err != nil || !ok || n <= 0 || n > math.MaxInt64>>shift {
		return 0, fmt.Errorf("%q is no size: want a number above 0, with kB, MB, GB or TB", s)
	}
	return n << shift, nil
}

func runUp(cmd *cobra.Command, l layout, f upFlags) error {
	if f.listen != "" {
		if err := checkListen(f.listen); err != nil {
			return err
		}
	}
	if err := checkFUSE(); err != nil {
		return err
	}
	// Endpoints run as another user below this folder: it may be passed through, not read.
	if err := makeDataDir(l.dir); err != nil {
		return fmt.Errorf("making the data directory: %w", err)
	}
	unlock, err := lockDir(l.dir)
	if err != nil {
		return err
	}
	defer unlock()
	progress := func(s string) { fmt.Println(s) }
	if err := makeLocalKey(l); err != nil {
		return err
	}
	log, closeLog, err := openLog(l)
	if err != nil {
		return err
	}
	defer closeLog()
	hardening.Apply(log)

	var url, waits string
	var services []*service
	closeAll := func() error {
		var errs []error
		for i := len(services) - 1; i >= 0; i-- {
			errs = append(errs, services[i].close())
		}
		return errors.Join(errs...)
	}
	add := func(s *service, err error) error {
		if err == nil {
			services = append(services, s)
		}
		return err
	}
	ctx := cmd.Context()
	progress("starting the key manager, three safekeepers and the page server over " + l.dir)
	err = add(startKeymgr(l.keymgrConfig(), log))
	for id := uint64(1); err == nil && id <= replicas; id++ {
		err = add(startSafekeeper(l.safekeeperConfig(id), log))
	}
	if err == nil {
		err = add(startPageserver(l.pageserverConfig(), log))
	}
	if err == nil {
		computeDir, why := l.computeDir()
		if why != "" {
			progress(why)
			if err := makeElsewhere(computeDir); err != nil {
				return err
			}
		}
		s, m, startErr := startManager(ctx, l.managerConfig(f, computeDir), true, log, progress)
		if err = add(s, startErr); err == nil {
			url, err = m.URL()
			waits = m.Waits()
		}
	}
	if err != nil {
		closeErr := closeAll()
		if ctx.Err() != nil {
			return closeErr // stopped by the user before it was ready
		}
		return errors.Join(err, closeErr)
	}
	if waits == "" {
		fmt.Println("ready:", url)
	} else { // the manager says "ready: ..." in its time
		progress("not ready: " + waits + "; clients of " + url + " are told so")
	}
	failed := make(chan error, len(services))
	for _, s := range services {
		go func() { failed <- <-s.failed }()
	}
	select {
	case <-ctx.Done():
		progress("stopping")
	case err = <-failed:
	}
	return errors.Join(err, closeAll())
}

// checkListen finds out early, and in words, that an address cannot be had.
func checkListen(listen string) error {
	if _, _, err := net.SplitHostPort(listen); err != nil {
		return fmt.Errorf("--listen %q: want HOST:PORT: %w", listen, err)
	}
	// A Postgres of this cluster that was killed a moment ago may still be on its way out.
	deadline := time.Now().Add(5 * time.Second)
	for {
		s, err := net.Listen("tcp", listen)
		if err == nil {
			return s.Close()
		}
		if !errors.Is(err, syscall.EADDRINUSE) || time.Now().After(deadline) {
			return fmt.Errorf("--listen %s: %w", listen, err)
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// checkFUSE finds out early, and in words, that this machine cannot mount.
func checkFUSE() error {
	f, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	if err == nil {
		return f.Close()
	}
	return fmt.Errorf("%w: an endpoint's data directory is a FUSE mount. On a machine of your own: sudo modprobe fuse. "+
		"In a container: start it with --device /dev/fuse --cap-add SYS_ADMIN --security-opt apparmor=unconfined", err)
}

// lockDir keeps a second cluster from the same directory. The lock ends with the process,
// however it ends.
func lockDir(dir string) (unlock func(), err error) {
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		f.Close()
		return nil, fmt.Errorf("data directory %s is in use by another `holdfast up`", dir)
	}
	return func() { f.Close() }, nil
}

// makeLocalKey makes the development KMS and its key where there are none.
func makeLocalKey(l layout) error {
	if err := os.MkdirAll(filepath.Dir(l.localKMS()), 0o700); err != nil {
		return err
	}
	kms, err := localkms.Open(l.localKMS())
	if err != nil {
		return err
	}
	keys, err := kms.List()
	if err != nil {
		return err
	}
	if len(keys) > 0 {
		return nil
	}
	if held, err := os.ReadDir(l.bucket()); err == nil && len(held) > 0 {
		return fmt.Errorf("the development KMS %s has no key, but %s holds data: without the keys that were there it cannot be read; put the file back, or use another --data", l.localKMS(), l.bucket())
	}
	return kms.Create(cmk)
}

// openLog sends the roles' logs to a file: the terminal is for the user.
func openLog(l layout) (*slog.Logger, func(), error) {
	dir := l.path("log")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, nil, err
	}
	f, err := os.OpenFile(filepath.Join(dir, "holdfast.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, nil, err
	}
	return slog.New(slog.NewTextHandler(f, nil)), func() { f.Close() }, nil
}

// makeDataDir makes the data directory, if need be, whatever the umask.
func makeDataDir(dir string) error {
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return err
	}
	err := os.Mkdir(dir, 0o711)
	if errors.Is(err, os.ErrExist) {
		return os.MkdirAll(dir, 0o711) // says so if it is no directory
	}
	if err != nil {
		return err
	}
	return os.Chmod(dir, 0o711)
}
