package keymgr

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/blob"
	"github.com/holdfastdb/holdfast/internal/boottime"
	"github.com/holdfastdb/holdfast/internal/rpc"
	"github.com/holdfastdb/holdfast/internal/seal"
	"github.com/holdfastdb/holdfast/keymgr/lease"
)

// Config configures a Server.
type Config struct {
	Dir       string     // of the audit log; it must exist
	BlobStore blob.Store // keeps the wrapped KEKs
	Provider  Provider   // holds the CMKs
	// CMKs are the only CMKs that projects may have; empty: any. Which one a project has is told by
	// an object in the bucket, and who can write to the bucket is not to choose under whose key
	// data is sealed from then on (K3).
	CMKs          []string
	CheckInterval time.Duration // how old the last good check of a CMK may be; 0: 5 s
	LeaseTTL      time.Duration // how long a node may hold DEKs unrenewed; 0: 10 s
	Logger        *slog.Logger  // nil: none
}

func (c *Config) ensureDefaults() {
	if c.CheckInterval == 0 {
		c.CheckInterval = 5 * time.Second
	}
	if c.LeaseTTL == 0 {
		c.LeaseTTL = 10 * time.Second
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
}

func (c *Config) validate() error {
	if c.Dir == "" || c.BlobStore == nil || c.Provider == nil {
		return errors.New("key manager: want a folder, a bucket and a KMS")
	}
	if c.CheckInterval < 0 || c.LeaseTTL < 0 {
		return fmt.Errorf("key manager: check interval %v and lease time %v cannot be negative", c.CheckInterval, c.LeaseTTL)
	}
	return nil
}

const (
	// providerTimeout bounds one call to the KMS.
	providerTimeout = 4 * time.Second
	// callTimeout bounds a call of this service whose caller set no earlier bound.
	callTimeout = 15 * time.Second
	// maxBatch bounds the DEKs in one call.
	maxBatch = 1024
	// maxNode bounds the name of a node, in bytes.
	maxNode = 256
)

// Server implements pb.KeyManagerServer.
type Server struct {
	pb.UnimplementedKeyManagerServer
	cfg   Config
	audit *auditLog
	stop  context.CancelFunc
	ctx   context.Context // ends with Close
	wg    sync.WaitGroup

	closing  sync.Once
	closeErr error

	mu struct {
		sync.Mutex
		machine  *lease.Machine
		projects map[string]*projectKeys
		// refused holds who was told no since the project's last check, so that the audit log
		// has it once.
		refused map[string]map[string]bool
	}
}

var _ pb.KeyManagerServer = (*Server)(nil)

// New opens a key manager.
func New(cfg Config) (*Server, error) {
	cfg.ensureDefaults()
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	audit, err := openAudit(cfg.Dir)
	if err != nil {
		return nil, err
	}
	s := &Server{cfg: cfg, audit: audit}
	s.ctx, s.stop = context.WithCancel(context.Background())
	s.mu.machine = lease.New(lease.Config{
		CheckInterval: cfg.CheckInterval,
		TTL:           cfg.LeaseTTL,
		RetryGap:      min(cfg.CheckInterval/10, 500*time.Millisecond),
		Idle:          cfg.LeaseTTL + cfg.CheckInterval,
	})
	s.mu.projects = make(map[string]*projectKeys)
	s.mu.refused = make(map[string]map[string]bool)
	s.wg.Add(1)
	go s.tick()
	return s, nil
}

// Close wipes all keys. Calls that are under way fail. Closing again does nothing.
func (s *Server) Close() error {
	s.closing.Do(func() { s.closeErr = s.close() })
	return s.closeErr
}

func (s *Server) close() error {
	s.stop()
	s.wg.Wait()
	s.mu.Lock()
	for _, p := range s.mu.projects {
		p.wipe()
	}
	s.mu.Unlock()
	return s.audit.Close()
}

// project is the in-memory state of a project's keys.
func (s *Server) project(name string) *projectKeys {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.mu.projects[name]
	if p == nil {
		p = newProjectKeys(name)
		s.mu.projects[name] = p
	}
	return p
}

// tick removes leases that ran out and forgets keys that nobody uses.
func (s *Server) tick() {
	defer s.wg.Done()
	every := time.NewTicker(max(min(s.cfg.LeaseTTL, s.cfg.CheckInterval)/2, 10*time.Millisecond))
	defer every.Stop()
	for {
		select {
		case <-s.ctx.Done():
			return
		case <-every.C:
		}
		if err := s.tickOnce(); err != nil && s.ctx.Err() == nil {
			s.cfg.Logger.Error("the end of leases could not be audited", "err", err)
		}
	}
}

func (s *Server) tickOnce() error {
	s.mu.Lock()
	expired, forget, gone := s.mu.machine.Tick(boottime.Now())
	var forgotten []string
	for _, name := range forget {
		if p := s.mu.projects[name]; p != nil && p.wipe() {
			forgotten = append(forgotten, name)
		}
	}
	for _, name := range gone {
		delete(s.mu.projects, name)
		delete(s.mu.refused, name)
	}
	s.mu.Unlock()
	var events []Event
	for _, l := range expired {
		events = append(events, Event{Event: "lease.expired", Outcome: "ok", Project: l.Project, Node: l.Node, Lease: l.ID})
	}
	for _, name := range forgotten {
		events = append(events, Event{Event: "kek.forgotten", Outcome: "ok", Project: name, Detail: "no lease and no fresh answer of the KMS"})
	}
	if len(events) == 0 {
		return nil
	}
	return s.audit.append(s.ctx, events...)
}

// CreateProject implements pb.KeyManagerServer.
func (s *Server) CreateProject(ctx context.Context, req *pb.CreateProjectRequest) (*pb.CreateProjectResponse, error) {
	if err := checkProject(req.Project); err != nil {
		return nil, rpc.Error(codes.InvalidArgument, nil, "%v", err)
	}
	if req.Cmk == "" || len(req.Cmk) > 2048 {
		return nil, rpc.Error(codes.InvalidArgument, nil, "creating project %s: the CMK's name has %d bytes, want 1..2048", req.Project, len(req.Cmk))
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	if err := s.allowed(req.Project, req.Cmk); err != nil {
		return nil, err
	}
	doc, err := loadDocument(ctx, s.cfg.BlobStore, req.Project)
	if errors.Is(err, blob.ErrNotFound) {
		doc, err = s.newProject(ctx, req.Project, req.Cmk)
	}
	if err != nil {
		return nil, s.callError(err)
	}
	if doc.CMK != req.Cmk {
		return nil, rpc.Error(codes.FailedPrecondition, nil, "project %s exists under CMK %s, not %s", req.Project, doc.CMK, req.Cmk)
	}
	return &pb.CreateProjectResponse{KekVersion: doc.Current}, nil
}

// allowed refuses a CMK that the configuration does not list.
func (s *Server) allowed(project, cmk string) error {
	if len(s.cfg.CMKs) == 0 || slices.Contains(s.cfg.CMKs, cmk) {
		return nil
	}
	return rpc.Error(codes.PermissionDenied, nil, "project %s under CMK %.200q: this key manager's configuration does not list that CMK", project, cmk)
}

func (s *Server) newProject(ctx context.Context, project, cmk string) (*document, error) {
	const version = 1
	ec := EncryptionContext{Project: project, KEKVersion: version}
	raw := make([]byte, seal.KeySize)
	rand.Read(raw) // never fails: crypto/rand
	payload := kekPayload(ec, raw)
	clear(raw)
	defer clear(payload)
	callCtx, cancel := context.WithTimeout(ctx, providerTimeout)
	defer cancel()
	w, err := s.cfg.Provider.Wrap(callCtx, cmk, ec, payload)
	event := Event{Event: "cmk.wrap", Project: project, CMK: cmk, KEKVersion: version, CMKVersion: w.Version, RequestID: w.RequestID}
	if err := s.auditProvider(ctx, event, err); err != nil {
		return nil, err
	}
	doc := &document{Format: documentFormat, Project: project, CMK: cmk, Current: version,
		KEKs: []wrapped{{Version: version, Wrapped: w.Ciphertext, CMKVersion: w.Version}}}
	if doc, err = createDocument(ctx, s.cfg.BlobStore, doc); err != nil {
		return nil, err
	}
	return doc, s.audit.append(ctx, Event{Event: "project.created", Outcome: "ok", Project: project, CMK: doc.CMK, KEKVersion: doc.Current})
}

// auditProvider records a call to the KMS and gives its error, or that of recording.
func (s *Server) auditProvider(ctx context.Context, e Event, err error) error {
	e.Outcome = "ok"
	if err != nil {
		outcome, id := outcomeOf(err)
		e.Outcome, e.RequestID, e.Detail = outcome.String(), id, err.Error()
	}
	// The KMS's log has the call, so this one has it even if the caller went away.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), callTimeout)
	defer cancel()
	if auditErr := s.audit.append(ctx, e); auditErr != nil {
		return auditErr
	}
	return err
}

func newLeaseID() string {
	id := make([]byte, 16)
	rand.Read(id)
	return hex.EncodeToString(id)
}
