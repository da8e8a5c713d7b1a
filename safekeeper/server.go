// Package safekeeper keeps the WAL of branches, sealed, on a Raft quorum. A commit is a
// commit because a majority of the safekeepers has it on its disk.
//
// A Server is one replica: a few Raft groups (package group), to which branches are mapped
// by their name, so that an idle branch costs nothing. The leader of a branch's group checks
// an append, seals it and proposes it (append.go); every replica serves what is committed
// (read.go), from its log or from the archive in the bucket.
//
// Upholds W1 (acknowledged means on a quorum's disks), W2 (only the newest epoch appends),
// W3 (the log is contiguous, CRC-valid, appends idempotent) and K1 (what rests or travels
// between replicas is ciphertext).
package safekeeper

import (
	"errors"
	"fmt"
	"hash/fnv"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"google.golang.org/grpc"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/blob"
	"github.com/holdfastdb/holdfast/internal/keyring"
	"github.com/holdfastdb/holdfast/safekeeper/group"
	"github.com/holdfastdb/holdfast/safekeeper/walstate"
	"github.com/holdfastdb/holdfast/safekeeper/walstore"
)

// groups is the number of Raft groups. It is part of the format: a branch stays in the group
// that its name gives.
const groups = 2

// Config of a safekeeper.
type Config struct {
	NodeID uint64
	Dir    string
	Peers  map[uint64]string // the addresses of all safekeepers by id, this one's included
	Ring   keyring.Ring
	Blob   blob.Store
	Logger *slog.Logger

	// What follows is for tests and rare needs; zero values are right.
	Store        walstore.Options
	Tick         time.Duration // of Raft's clock; 0: 50 ms, of which an election takes 20
	RetainBytes  int64         // of log kept though nobody needs it, per group; 0: 64 MiB
	ArchiveBytes int64         // of log from which on needed WAL is archived, per group; 0: 256 MiB
}

// Server is one safekeeper.
type Server struct {
	pb.UnimplementedSafekeeperServer
	cfg       Config
	log       *slog.Logger
	groups    [groups]*group.Group
	writers   [groups]groupWriters
	transport *transport
	unlock    func()
}

// New opens the safekeeper's directory and starts it. Its peers reach it, and it is of use, once it
// is registered with a gRPC server.
func New(cfg Config) (*Server, error) {
	if cfg.NodeID == 0 || cfg.Peers[cfg.NodeID] == "" {
		return nil, fmt.Errorf("safekeeper %d is not among its peers %v: check id and peers in the configuration", cfg.NodeID, cfg.Peers)
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	s := &Server{cfg: cfg, log: cfg.Logger}
	var err error
	if s.unlock, err = lockDir(cfg.Dir); err != nil {
		return nil, err
	}
	if s.transport, err = newTransport(cfg.NodeID, cfg.Peers, s.log); err != nil {
		s.unlock()
		return nil, err
	}
	voters := slices.Sorted(maps.Keys(cfg.Peers))
	for i := range s.groups {
		g, err := group.Open(group.Config{Group: uint64(i), NodeID: cfg.NodeID, Voters: voters,
			Dir: filepath.Join(cfg.Dir, fmt.Sprintf("group%d", i)), Store: cfg.Store, Blob: cfg.Blob, Transport: s.transport,
			Log: s.log, Tick: cfg.Tick, RetainBytes: cfg.RetainBytes, ArchiveBytes: cfg.ArchiveBytes})
		if err != nil {
			return nil, errors.Join(fmt.Errorf("safekeeper %d: %w", cfg.NodeID, err), s.Close())
		}
		s.groups[i] = g
	}
	return s, nil
}

// lockDir keeps a second safekeeper from the same directory.
func lockDir(dir string) (unlock func(), err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		f.Close()
		return nil, fmt.Errorf("directory %s is in use by another safekeeper", dir)
	}
	return func() { f.Close() }, nil
}

// Register makes the server answer calls that come to g.
func (s *Server) Register(g *grpc.Server) { pb.RegisterSafekeeperServer(g, s) }

// Close stops the safekeeper; where it leads, it hands over first.
func (s *Server) Close() error {
	for _, g := range s.groups {
		if g != nil {
			g.HandOver()
		}
	}
	return s.abort()
}

// abort stops the safekeeper without a word to its peers.
func (s *Server) abort() error {
	var errs []error
	s.transport.close()
	for _, g := range s.groups {
		if g != nil {
			errs = append(errs, g.Close())
		}
	}
	s.unlock()
	return errors.Join(errs...)
}

// groupOf tells which group a branch belongs to.
func (s *Server) groupOf(n walstate.Name) (*group.Group, *groupWriters) {
	h := fnv.New32a()
	h.Write([]byte(n.Project))
	h.Write([]byte{'/'})
	h.Write([]byte(n.Branch))
	i := h.Sum32() % groups
	return s.groups[i], &s.writers[i]
}
