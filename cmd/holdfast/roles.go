package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"

	"github.com/holdfastdb/holdfast/compute"
	"github.com/holdfastdb/holdfast/compute/initdb"
	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/blob"
	"github.com/holdfastdb/holdfast/internal/blob/dirblob"
	"github.com/holdfastdb/holdfast/internal/config"
	"github.com/holdfastdb/holdfast/internal/dekwire"
	"github.com/holdfastdb/holdfast/internal/hardening"
	"github.com/holdfastdb/holdfast/internal/keyring"
	"github.com/holdfastdb/holdfast/internal/rpc"
	"github.com/holdfastdb/holdfast/keymgr"
	"github.com/holdfastdb/holdfast/keymgr/hook"
	"github.com/holdfastdb/holdfast/keymgr/kmsopen"
	"github.com/holdfastdb/holdfast/manager"
	"github.com/holdfastdb/holdfast/pageserver"
	"github.com/holdfastdb/holdfast/safekeeper"
)

// service is a role that runs: it serves calls until it is closed.
type service struct {
	server  *grpc.Server
	closers []func() error // in the order of opening; closed in reverse
	failed  chan error     // the server's end, when nobody asked for it
}

// serveGrace bounds how long open calls may go on when a role is closed.
const serveGrace = 250 * time.Millisecond

func (s *service) onClose(fn func() error) { s.closers = append(s.closers, fn) }

// serve begins to answer calls at addr.
func (s *service) serve(addr string, register func(*grpc.Server)) error {
	l, err := rpc.Listen(addr)
	if err != nil {
		return err
	}
	s.server, s.failed = rpc.NewServer(), make(chan error, 1)
	register(s.server)
	go func(l net.Listener) {
		if err := s.server.Serve(l); err != nil {
			s.failed <- fmt.Errorf("serving at %s: %w", addr, err)
		}
	}(l)
	return nil
}

func (s *service) close() error {
	if s.server != nil {
		done := make(chan struct{})
		go func() { s.server.GracefulStop(); close(done) }()
		select {
		case <-done:
		case <-time.After(serveGrace):
			s.server.Stop()
		}
	}
	var errs []error
	for i := len(s.closers) - 1; i >= 0; i-- {
		errs = append(errs, s.closers[i]())
	}
	return errors.Join(errs...)
}

func openBucket(dir string) (blob.Store, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	return dirblob.Open(dir)
}

// openRing connects a node to the key manager.
func (s *service) openRing(addr, node string) (keyring.Ring, error) {
	conn, err := rpc.Dial(addr)
	if err != nil {
		return nil, err
	}
	s.onClose(conn.Close)
	guard, err := processGuard()
	if err != nil {
		return nil, err
	}
	ring := keyring.Open(keyring.Config{Client: dekwire.Client(pb.NewKeyManagerClient(conn)), Node: node, Guard: guard.Slot()})
	s.onClose(func() error { ring.Close(); return nil })
	return ring, nil
}

// openProviders opens the services that hold the CMKs, and refuses a list of CMKs that none
// of them can have.
func openProviders(cfg *config.Keymgr) (*kmsopen.Providers, error) {
	if cfg.LocalKMS != "" {
		if _, err := os.Stat(cfg.LocalKMS); err != nil {
			return nil, fmt.Errorf("the development KMS: %w; `holdfast kms create` makes one", err)
		}
	}
	// The clients take what they need of the context now and keep none of it.
	providers, err := kmsopen.Open(context.Background(), cfg.LocalKMS, cfg.KMS)
	if err != nil {
		return nil, err
	}
	for _, cmk := range cfg.CMKs {
		if err := providers.CheckKey(cmk); err != nil {
			return nil, fmt.Errorf("cmks: %w", err)
		}
	}
	return providers, nil
}

func startKeymgr(cfg *config.Keymgr, log *slog.Logger) (*service, error) {
	s := &service{}
	store, err := openBucket(cfg.Bucket)
	if err != nil {
		return nil, err
	}
	provider, err := openProviders(cfg)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, err
	}
	srv, err := keymgr.New(keymgr.Config{Dir: cfg.Dir, BlobStore: store, Provider: provider, CMKs: cfg.CMKs,
		CheckInterval: cfg.CheckInterval, LeaseTTL: cfg.LeaseTTL, Grace: cfg.Grace, Logger: log.With("role", "keymgr")})
	if err != nil {
		return nil, err
	}
	s.onClose(srv.Close)
	if err := s.serve(cfg.Listen, func(g *grpc.Server) {
		pb.RegisterKeyManagerServer(g, dekwire.Server(srv))
		pb.RegisterKeyAdminServer(g, srv)
	}); err != nil {
		return nil, errors.Join(err, s.close())
	}
	if err := s.startHook(cfg.Hook, srv, log); err != nil {
		return nil, errors.Join(err, s.close())
	}
	return s, nil
}

// startHook listens for notices of keys, if that is configured.
func (s *service) startHook(cfg *config.KeyHook, srv *keymgr.Server, log *slog.Logger) error {
	if cfg == nil {
		return nil
	}
	h, err := hook.Start(hook.Config{Listen: cfg.Listen, TokenFile: cfg.TokenFile, CertFile: cfg.CertFile, KeyFile: cfg.KeyFile,
		CAFile: cfg.CAFile, Checker: srv, Logger: log.With("role", "keymgr", "part", "hook")})
	if err == nil {
		s.onClose(h.Close)
	}
	return err
}

func startSafekeeper(cfg *config.Safekeeper, log *slog.Logger) (*service, error) {
	s := &service{}
	store, err := openBucket(cfg.Bucket)
	if err != nil {
		return nil, err
	}
	node := fmt.Sprintf("safekeeper%d", cfg.ID)
	ring, err := s.openRing(cfg.Keymgr, node)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, errors.Join(err, s.close())
	}
	srv, err := safekeeper.New(safekeeper.Config{NodeID: cfg.ID, Dir: cfg.Dir, Peers: cfg.Peers, Ring: ring, Blob: store,
		Logger: log.With("role", node)})
	if err != nil {
		return nil, errors.Join(err, s.close())
	}
	s.onClose(srv.Close)
	if err := s.serve(cfg.Listen, srv.Register); err != nil {
		return nil, errors.Join(err, s.close())
	}
	return s, nil
}

func startPageserver(cfg *config.Pageserver, log *slog.Logger) (*service, error) {
	s := &service{}
	store, err := openBucket(cfg.Bucket)
	if err != nil {
		return nil, err
	}
	ring, err := s.openRing(cfg.Keymgr, cfg.Node)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, errors.Join(err, s.close())
	}
	conf := pageserver.Config{Dir: cfg.Dir, Blob: store, Ring: ring, Safekeepers: cfg.Safekeepers,
		NodeID: cfg.Node, VerifyRedo: cfg.VerifyRedo, Logger: log.With("role", "pageserver")}
	conf.Timeline.HistoryBytes = cfg.HistoryBytes
	srv, err := pageserver.New(conf)
	if err != nil {
		return nil, errors.Join(err, s.close())
	}
	s.onClose(srv.Close)
	if err := s.serve(cfg.Listen, srv.Register); err != nil {
		return nil, errors.Join(err, s.close())
	}
	return s, nil
}

// startManager also runs what the manager runs: it returns when the endpoints are ready.
func startManager(ctx context.Context, cfg *config.Manager, interactive bool, log *slog.Logger, progress func(string)) (*service, *manager.Manager, error) {
	s := &service{}
	store, err := openBucket(cfg.Bucket)
	if err != nil {
		return nil, nil, err
	}
	ring, err := s.openRing(cfg.Keymgr, "manager")
	if err != nil {
		return nil, nil, err
	}
	exe, err := os.Executable()
	if err != nil {
		return nil, nil, errors.Join(err, s.close())
	}
	m, err := manager.New(manager.Config{Manager: *cfg, Store: store, Ring: ring, Executable: exe,
		Log: log.With("role", "manager"), Progress: progress, Created: printPassword, Interactive: interactive,
		Ready: func(url string) { progress("ready: " + url) }})
	if err != nil {
		return nil, nil, errors.Join(err, s.close())
	}
	s.onClose(func() error {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		return m.Close(ctx)
	})
	if err := s.serve(cfg.Listen, m.Register); err != nil {
		return nil, nil, errors.Join(err, s.close())
	}
	if err := m.Start(ctx); err != nil {
		return nil, nil, errors.Join(err, s.close())
	}
	return s, m, nil
}

func newLogger() *slog.Logger { return slog.New(slog.NewTextHandler(os.Stderr, nil)) }

// newRoles are the commands that run one role as a process of its own.
func newRoles() []*cobra.Command {
	role := func(name, short string, run func(ctx context.Context, file string) (*service, error)) *cobra.Command {
		var file string
		cmd := &cobra.Command{
			Use: name + " --config FILE", Short: short, Args: cobra.NoArgs,
			RunE: func(cmd *cobra.Command, _ []string) error {
				hardening.Apply(newLogger())
				s, err := run(cmd.Context(), file)
				if err != nil {
					return err
				}
				select {
				case <-cmd.Context().Done():
				case err = <-s.failed:
				}
				return errors.Join(err, s.close())
			},
		}
		cmd.Flags().StringVar(&file, "config", "", "the role's configuration (YAML)")
		_ = cmd.MarkFlagRequired("config") // fails only for a flag that is not there
		return cmd
	}
	return []*cobra.Command{
		role("keymgr", "Run a key manager", fromFile(func(_ context.Context, cfg *config.Keymgr) (*service, error) {
			return startKeymgr(cfg, newLogger())
		})),
		role("safekeeper", "Run one replica of the WAL", fromFile(func(_ context.Context, cfg *config.Safekeeper) (*service, error) {
			return startSafekeeper(cfg, newLogger())
		})),
		role("pageserver", "Run a page server", fromFile(func(_ context.Context, cfg *config.Pageserver) (*service, error) {
			return startPageserver(cfg, newLogger())
		})),
		role("manager", "Run the manager and its endpoints", fromFile(func(ctx context.Context, cfg *config.Manager) (*service, error) {
			s, _, err := startManager(ctx, cfg, false, newLogger(), func(s string) { fmt.Fprintln(os.Stderr, s) })
			return s, err
		})),
		newCompute(),
	}
}

// fromFile starts a role with the configuration in a file.
func fromFile[C any, P interface {
	*C
	Validate() error
}](start func(context.Context, P) (*service, error)) func(context.Context, string) (*service, error) {
	return func(ctx context.Context, file string) (*service, error) {
		cfg := P(new(C))
		if err := config.Load(file, cfg); err != nil {
			return nil, err
		}
		return start(ctx, cfg)
	}
}

func printPassword(password string) {
	fmt.Println("password of user postgres (printed this once):", password)
}

func newCompute() *cobra.Command {
	var file string
	var isInit bool
	var reset []string
	cmd := &cobra.Command{
		Use: "compute --config FILE", Short: "Run one endpoint: the agent and its Postgres", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var cfg config.Compute
			if err := config.Load(file, &cfg); err != nil {
				return err
			}
			agent := computeConfig(&cfg, newLogger())
			if isInit {
				password, err := readPassword(os.Stdin)
				if err != nil {
					return err
				}
				_, err = initdb.InitBranch(cmd.Context(), agent, password)
				return err
			}
			agent.ResetSettings = reset
			guard, err := processGuard()
			if err != nil {
				return err
			}
			agent.Guard = guard.Slot()
			err = compute.Run(cmd.Context(), agent)
			switch {
			case errors.Is(err, compute.ErrFenced):
				return &exitError{status: manager.ExitFenced, err: err}
			case errors.Is(err, compute.ErrSetting):
				return &exitError{status: manager.ExitSetting, err: err}
			case compute.KeyLost(err):
				return &exitError{status: manager.ExitKey, err: err}
			}
			return err
		},
	}
	cmd.Flags().StringVar(&file, "config", "", "the endpoint's configuration (YAML)")
	cmd.Flags().BoolVar(&isInit, "init", false, "make the branch with initdb instead; the superuser's password is read from standard input")
	cmd.Flags().StringArrayVar(&reset, "reset-setting", nil, "a setting of ALTER SYSTEM to take back first, or all; may be repeated")
	_ = cmd.MarkFlagRequired("config")
	return cmd
}

func computeConfig(cfg *config.Compute, log *slog.Logger) compute.Config {
	return compute.Config{Project: cfg.Project, Branch: cfg.Branch, Name: cfg.Name, Dir: cfg.Dir, Listen: cfg.Listen,
		Safekeepers: cfg.Safekeepers, PageServer: cfg.Pageserver, KeyManager: cfg.Keymgr,
		ExtraSettings: cfg.Settings, CacheBytes: cfg.CacheBytes, VerifyPages: cfg.VerifyPages, Logger: log.With("role", "compute", "endpoint", cfg.Name)}
}

func readPassword(r io.Reader) (string, error) {
	line, err := bufio.NewReader(io.LimitReader(r, 4096)).ReadString('\n')
	if err != nil && !errors.Is(err, io.EOF) {
		return "", fmt.Errorf("reading the password from standard input: %w", err)
	}
	line = strings.TrimRight(line, "\r\n")
	if line == "" {
		return "", errors.New("want the superuser's password on standard input")
	}
	return line, nil
}
