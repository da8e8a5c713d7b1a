// Package pageserver serves pages, and what a compute needs to start, as of any LSN of a
// branch's history. It follows the committed WAL of the branches attached to it, files each
// record under the things that it changes (package ingest), keeps those versions in a
// timeline of sealed layers, and replays them when somebody asks (package pageread).
//
// It holds nothing that it could lose: what is not in layers in the bucket yet is read again
// from the safekeepers. A branch whose WAL cannot be understood stops, says so, and leaves
// the others alone. When the customer's KMS says no, a branch drops all it has and waits;
// when it says yes again, the branch goes on by itself.
package pageserver

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/blob"
	"github.com/holdfastdb/holdfast/internal/keyring"
	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/internal/rpc"
	"github.com/holdfastdb/holdfast/internal/walclient"
	"github.com/holdfastdb/holdfast/pageserver/timeline"
)

// WALSource is where a branch's committed WAL comes from: the safekeepers.
type WALSource interface {
	// Follow calls fn with what was committed from the chunk that holds from on, and goes on
	// for ever. It returns on ctx's end, with fn's error, or with a permanent one.
	Follow(ctx context.Context, from pg.LSN, fn func(chunks []*pb.SealedWAL, committed pg.LSN) error) error
	// ReportDurable tells that WAL below lsn is in layers in the bucket.
	ReportDurable(ctx context.Context, lsn pg.LSN) error
	Close() error
}

// Config says how a page server runs.
type Config struct {
	Dir         string // for local copies of sealed layers; may be deleted between runs
	Blob        blob.Store
	Ring        keyring.Ring
	Safekeepers []string // their addresses
	NodeID      string
	Logger      *slog.Logger

	// VerifyRedo compares each page with the image that its record carries when Postgres runs
	// with wal_consistency_checking. It is slow, and for tests.
	VerifyRedo bool
	// Timeline adjusts the sizes of layers; the fields that name the branch are set here.
	Timeline timeline.Config
	// NewSource overrides how the safekeepers are reached; nil: walclient.
	NewSource func(project, branch string) (WALSource, error)
	// WaitLimit bounds how long a read waits for WAL to be ingested; default 60 s.
	WaitLimit time.Duration
}

const (
	defaultWaitLimit = 60 * time.Second
	closeLimit       = 30 * time.Second
)

// Server is a page server.
type Server struct {
	pb.UnimplementedPageServerServer
	cfg    Config
	log    *slog.Logger
	ctx    context.Context
	cancel context.CancelFunc

	mu struct {
		sync.Mutex
		closed   bool
		branches map[branchName]*branch
		deleting map[branchName]bool // cannot be attached
	}
	imports sync.Mutex // one import at a time: each holds a data directory in memory
}

type branchName struct{ project, branch string }

// New makes a page server that serves no branch yet.
func New(cfg Config) (*Server, error) {
	if cfg.Blob == nil || cfg.Ring == nil {
		return nil, errors.New("pageserver: a bucket and a key ring are needed")
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.Default()
	}
	if cfg.WaitLimit == 0 {
		cfg.WaitLimit = defaultWaitLimit
	}
	if cfg.NewSource == nil {
		cfg.NewSource = func(project, branch string) (WALSource, error) {
			return walclient.New(project, branch, cfg.Safekeepers, cfg.Logger)
		}
	}
	s := &Server{cfg: cfg, log: cfg.Logger}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.mu.branches = make(map[branchName]*branch)
	s.mu.deleting = make(map[branchName]bool)
	return s, nil
}

// Register makes g answer the page server's calls.
func (s *Server) Register(g *grpc.Server) { pb.RegisterPageServerServer(g, s) }

// Close stops following WAL and lets all branches go.
func (s *Server) Close() error {
	s.mu.Lock()
	s.mu.closed = true
	list := make([]*branch, 0, len(s.mu.branches))
	for _, b := range s.mu.branches {
		list = append(list, b)
	}
	s.mu.Unlock()
	s.cancel()
	limit := time.After(closeLimit)
	for _, b := range list {
		select {
		case <-b.done:
		case <-limit:
			return errors.New("pageserver: a branch did not stop in time")
		}
	}
	return nil
}

// branch finds an attached branch.
func (s *Server) branch(project, id string) (*branch, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if b := s.mu.branches[branchName{project, id}]; b != nil {
		return b, nil
	}
	return nil, rpc.Error(codes.NotFound, nil, "branch %s of project %s is not attached to this page server", id, project)
}

// Attach makes the server serve a branch. It returns when the branch's layers can be read, or
// with the reason why they cannot.
func (s *Server) Attach(ctx context.Context, r *pb.AttachRequest) (*pb.AttachResponse, error) {
	b, err := s.attach(r.Project, r.Branch)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, s.cfg.WaitLimit)
	defer cancel()
	if _, err := b.timeline(ctx); err != nil {
		if errors.Is(err, blob.ErrNotFound) {
			s.forget(b)
		}
		return nil, b.status(err)
	}
	return &pb.AttachResponse{}, nil
}

func (s *Server) attach(project, id string) (*branch, error) {
	name := branchName{project, id}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.mu.closed {
		return nil, rpc.Error(codes.Unavailable, nil, "this page server is shutting down")
	}
	if s.mu.deleting[name] {
		return nil, rpc.Error(codes.Unavailable, nil, "branch %s is being deleted", id)
	}
	if b := s.mu.branches[name]; b != nil {
		return b, nil
	}
	cfg := s.timelineConfig(project, id)
	if err := cfg.Validate(); err != nil {
		return nil, rpc.Error(codes.InvalidArgument, nil, "%v", err)
	}
	source, err := s.cfg.NewSource(project, id)
	if err != nil {
		return nil, rpc.Error(codes.Unavailable, nil, "reaching the safekeepers of branch %s: %v", id, err)
	}
	b := newBranch(s, name, source)
	s.mu.branches[name] = b
	go b.run(s.ctx)
	return b, nil
}

// Flush makes durable what was ingested of a branch so far: its WAL is not read again.
func (s *Server) Flush(ctx context.Context, project, id string) error {
	b, err := s.branch(project, id)
	if err != nil {
		return err
	}
	tl, err := b.timeline(ctx)
	if err == nil {
		err = tl.Flush(ctx)
	}
	return b.status(err)
}

// forget drops a branch that is not in the bucket, so that a later Attach looks again.
func (s *Server) forget(b *branch) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.mu.branches[b.name] == b {
		delete(s.mu.branches, b.name)
	}
	b.stop()
}

// Status tells how far each branch is.
func (s *Server) Status(context.Context, *pb.PageServerStatusRequest) (*pb.PageServerStatusResponse, error) {
	s.mu.Lock()
	list := make([]*branch, 0, len(s.mu.branches))
	for _, b := range s.mu.branches {
		list = append(list, b)
	}
	s.mu.Unlock()
	resp := &pb.PageServerStatusResponse{}
	for _, b := range list {
		resp.Branches = append(resp.Branches, b.describe())
	}
	return resp, nil
}
