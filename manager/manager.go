// Package manager keeps which projects, branches and endpoints exist, in documents in the
// bucket, and runs the endpoints as child processes.
//
// It holds no data and no keys: without it running endpoints go on, and a new manager over
// the same bucket knows all that the old one knew.
package manager

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/blob"
	"github.com/holdfastdb/holdfast/internal/config"
	"github.com/holdfastdb/holdfast/internal/keyring"
	"github.com/holdfastdb/holdfast/internal/rpc"
)

// Config is what a manager needs. All fields are required, Progress excepted.
type Config struct {
	config.Manager
	Store blob.Store
	Ring  keyring.Ring // opens the sealed superuser password
	// Executable is the holdfast binary, run as `Executable compute --config FILE`.
	Executable string
	Log        *slog.Logger
	// Progress is told, in words for the user, what a long start is doing. May be nil.
	Progress func(string)
	// Created is told the superuser's generated password, once, when the first branch
	// is made. May be nil.
	Created func(password string)
	// Ready is told that an endpoint, by its URL, takes connections after it waited for its
	// key. May be nil.
	Ready func(url string)
	// Interactive is for `holdfast up`: Start makes the first endpoint run even if it was
	// stopped, and moves it to EndpointListen unless that is empty.
	Interactive bool
}

// DefaultListen is where the first endpoint's Postgres listens unless EndpointListen says
// otherwise.
const DefaultListen = "127.0.0.1:55432"

// Manager serves pb.Manager.
type Manager struct {
	pb.UnimplementedManagerServer
	cfg Config

	conns       []*grpc.ClientConn
	keymgr      pb.KeyManagerClient
	pageserver  pb.PageServerClient
	safekeepers []pb.SafekeeperClient
	keyAdmin    pb.KeyAdminClient

	stopAttach context.CancelFunc
	attachDone chan struct{}
	sweepDone  chan struct{}
	rotateDone chan struct{}

	started    chan struct{} // closed when the branches that an earlier manager left are known
	branchTurn chan struct{} // holds a token of who makes, removes or rehearses with a branch

	mu struct {
		sync.Mutex
		endpoints map[string]*supervisor
	}
}

// New connects a manager to the other roles; Start makes it act.
func New(cfg Config) (*Manager, error) {
	if cfg.Progress == nil {
		cfg.Progress = func(string) {}
	}
	if cfg.Created == nil {
		cfg.Created = func(string) {}
	}
	if cfg.Ready == nil {
		cfg.Ready = func(string) {}
	}
	if cfg.LogDir == "" {
		cfg.LogDir = cfg.Dir
	}
	m := &Manager{cfg: cfg, started: make(chan struct{}), branchTurn: make(chan struct{}, 1)}
	m.mu.endpoints = make(map[string]*supervisor)
	dial := func(addr string) (*grpc.ClientConn, error) {
		c, err := rpc.Dial(addr)
		if err == nil {
			m.conns = append(m.conns, c)
		}
		return c, err
	}
	kc, err := dial(cfg.Keymgr)
	if err != nil {
		return nil, errors.Join(err, m.closeConns())
	}
	pc, err := dial(cfg.Pageserver)
	if err != nil {
		return nil, errors.Join(err, m.closeConns())
	}
	m.keymgr, m.pageserver = pb.NewKeyManagerClient(kc), pb.NewPageServerClient(pc)
	m.keyAdmin = pb.NewKeyAdminClient(kc)
	for _, addr := range cfg.Safekeepers {
		c, err := dial(addr)
		if err != nil {
			return nil, errors.Join(err, m.closeConns())
		}
		m.safekeepers = append(m.safekeepers, pb.NewSafekeeperClient(c))
	}
	return m, nil
}

// Register offers the manager's calls on a server.
func (m *Manager) Register(s *grpc.Server) { pb.RegisterManagerServer(s, m) }

// Start makes the first project and branch where there are none, has the pageserver serve
// every branch, and starts the endpoints that are wanted. It returns when these are ready or
// wait for their keys: such an endpoint starts by itself when its key can be used.
func (m *Manager) Start(ctx context.Context) error {
	for _, dir := range []string{m.cfg.Dir, m.cfg.ComputeDir} {
		if err := os.MkdirAll(dir, 0o711); err != nil {
			return err
		}
	}
	c, err := m.bootstrap(ctx)
	if err != nil {
		return err
	}
	if m.cfg.Interactive {
		if c, err = m.adoptFirst(ctx); err != nil {
			return err
		}
	}
	if err := m.attachAll(ctx, c); err != nil { // a page server that comes late finds the rest of the start waiting
		m.cfg.Log.Warn("attaching branches", "error", err)
	}
	attachCtx, cancel := context.WithCancel(context.Background())
	m.stopAttach, m.attachDone, m.sweepDone, m.rotateDone = cancel, make(chan struct{}), make(chan struct{}), make(chan struct{})
	go m.keepAttached(attachCtx)
	go func() { defer close(m.sweepDone); m.sweep(attachCtx, c.Leftovers) }()
	go m.rotateWhenDue(attachCtx)
	close(m.started)

	var wanted []*supervisor
	m.mu.Lock()
	for _, doc := range c.Endpoints {
		s := m.newEndpoint(doc)
		m.mu.endpoints[doc.Name] = s
		if doc.Running {
			wanted = append(wanted, s)
		}
	}
	m.mu.Unlock()
	for _, s := range wanted {
		m.cfg.Progress("starting endpoint " + s.doc.Name)
		s.start()
	}
	for _, s := range wanted {
		if err := s.waitReady(ctx, true); err != nil && !errors.Is(err, errWaitsForKey) {
			return err
		}
	}
	return nil
}

// attachTimeout bounds one call: a branch whose key is gone keeps no other waiting.
const attachTimeout = 10 * time.Second

// attachAll tells the pageserver which branches to serve. It is idempotent.
func (m *Manager) attachAll(ctx context.Context, c *cluster) error {
	ctx, cancel := context.WithTimeout(ctx, attachTimeout)
	defer cancel()
	errs := make([]error, len(c.Branches))
	var all errgroup.Group
	all.SetLimit(attachAtOnce)
	for i, b := range c.Branches {
		all.Go(func() error {
			_, err := m.pageserver.Attach(ctx, &pb.AttachRequest{Project: b.Project, Branch: b.ID}, grpc.WaitForReady(true))
			if err != nil {
				errs[i] = fmt.Errorf("attaching branch %s to the pageserver: %w", b.Name, err)
			}
			return nil
		})
	}
	_ = all.Wait() // each error is in errs
	return errors.Join(errs...)
}

const attachAtOnce = 16

// attachInterval bounds how long a restarted pageserver serves nothing.
const attachInterval = 500 * time.Millisecond

// keepAttached attaches the branches again and again: a pageserver that was restarted
// knows none.
func (m *Manager) keepAttached(ctx context.Context) {
	defer close(m.attachDone)
	tick := time.NewTicker(attachInterval)
	defer tick.Stop()
	var last string
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		c, _, err := loadCluster(ctx, m.cfg.Store)
		if err == nil {
			err = m.attachAll(ctx, c)
		}
		if err != nil && ctx.Err() == nil && err.Error() != last {
			m.cfg.Log.Warn("attaching branches", "error", err)
			last = err.Error()
		}
		if err == nil {
			last = ""
		}
	}
}

// newEndpoint makes the supervisor of an endpoint that is not running yet.
func (m *Manager) newEndpoint(doc endpointDoc) *supervisor {
	dir := filepath.Join(m.cfg.ComputeDir, doc.Name)
	file := m.endpointFile(doc.Name)
	command := func(reset []string) (*exec.Cmd, error) {
		if err := config.Save(file, m.computeConfig(doc, dir)); err != nil {
			return nil, fmt.Errorf("writing the endpoint's configuration: %w", err)
		}
		args := []string{"compute", "--config", file}
		for _, name := range reset {
			args = append(args, "--reset-setting", name)
		}
		return m.child(args...), nil
	}
	grace := stopGrace
	if m.cfg.VerifyPages {
		grace = verifyGrace
	}
	certificate, err := refuseTLS(doc.Listen)
	if err != nil {
		m.cfg.Log.Warn("clients under TLS will not be told why an endpoint does not run", "endpoint", doc.Name, "error", err)
	}
	return newSupervisor(doc, supervised{
		command: command,
		log:     childLog{path: filepath.Join(m.cfg.LogDir, "endpoint-"+doc.Name+".log")},
		remove:  func() error { return removeDir(dir) },
		tell:    m.cfg.Progress,
		grace:   grace,
		ready:   func() { m.cfg.Ready(urlOf(doc)); go m.leaseAgain(doc) },
		key: keyWaiter{refuse: &refuser{listen: doc.Listen, tls: certificate}, ask: func(ctx context.Context) (*pb.KeyStatusResponse, error) {
			return m.keymgr.KeyStatus(ctx, &pb.KeyStatusRequest{Project: doc.Project, Branch: doc.Branch})
		}},
	}, m.cfg.Log)
}

// child is a command of this binary that dies with this process.
func (m *Manager) child(args ...string) *exec.Cmd {
	cmd := exec.Command(m.cfg.Executable, args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Pdeathsig: syscall.SIGKILL,
		Setpgid:   true, // a terminal's Ctrl-C is for the manager, which stops its children in order
	}
	return cmd
}

func (m *Manager) computeConfig(doc endpointDoc, dir string) *config.Compute {
	return &config.Compute{Project: doc.Project, Branch: doc.Branch, Name: doc.Name, Dir: dir, Listen: doc.Listen,
		Keymgr: m.cfg.Keymgr, Safekeepers: m.cfg.Safekeepers, Pageserver: m.cfg.Pageserver,
		Settings: m.cfg.Settings, CacheBytes: m.cfg.CacheBytes, VerifyPages: m.cfg.VerifyPages}
}

// Close stops every endpoint in order, then lets go of the other roles. What the user
// wants of each endpoint stays as it is.
func (m *Manager) Close(ctx context.Context) error {
	if m.stopAttach != nil {
		m.stopAttach()
		<-m.attachDone
		<-m.sweepDone
		<-m.rotateDone
	}
	m.mu.Lock()
	endpoints := make([]*supervisor, 0, len(m.mu.endpoints))
	for _, s := range m.mu.endpoints {
		endpoints = append(endpoints, s)
	}
	m.mu.Unlock()
	var errs []error
	for _, s := range endpoints {
		errs = append(errs, s.stop(ctx))
	}
	return errors.Join(append(errs, m.closeConns())...)
}

func (m *Manager) closeConns() error {
	var errs []error
	for _, c := range m.conns {
		errs = append(errs, c.Close())
	}
	return errors.Join(errs...)
}

func (m *Manager) find(name string) (*supervisor, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	s, ok := m.mu.endpoints[name]
	if !ok {
		return nil, rpc.Error(codes.NotFound, nil, "there is no endpoint %q; `holdfast endpoint list` names them", name)
	}
	return s, nil
}

func (m *Manager) want(ctx context.Context, name string, running bool) error {
	_, err := updateCluster(ctx, m.cfg.Store, func(c *cluster) error {
		e := c.endpoint(name)
		if e == nil {
			return fmt.Errorf("endpoint %q is not in the cluster's document", name)
		}
		e.Running = running
		return nil
	})
	return err
}
