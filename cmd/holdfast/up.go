package main

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/holdfastdb/holdfast/keymgr/localkms"
)

func newUp() *cobra.Command {
	var listen, passwordFile string
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
			return runUp(cmd, l, listen, passwordFile)
		},
	}
	cmd.Flags().StringVar(&listen, "listen", "127.0.0.1:55432", "where the first endpoint's Postgres listens")
	cmd.Flags().StringVar(&passwordFile, "password-file", "", "file with the superuser's first password (else one is made and printed once)")
	return cmd
}

func runUp(cmd *cobra.Command, l layout, listen, passwordFile string) error {
	if _, _, err := net.SplitHostPort(listen); err != nil {
		return fmt.Errorf("--listen %q: want HOST:PORT: %w", listen, err)
	}
	// Endpoints run as another user below this folder: it may be passed through, not read.
	if err := os.MkdirAll(l.dir, 0o711); err != nil {
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
		err = add(startManager(ctx, l.managerConfig(listen, passwordFile), log, progress, printPassword))
	}
	if err != nil {
		closeErr := closeAll()
		if ctx.Err() != nil {
			return closeErr // stopped by the user before it was ready
		}
		return errors.Join(err, closeErr)
	}
	fmt.Printf("ready: postgres://postgres@%s/postgres\n", listen)
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
