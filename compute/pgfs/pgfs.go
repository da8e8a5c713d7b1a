// Package pgfs shows an unmodified PostgreSQL a data directory that is not there: a FUSE
// mount whose tree lives in memory and whose bytes live, sealed, in compute/scratch. What
// Postgres wrote is returned as it wrote it; what it has not written comes from the page
// server (Remote); what it writes into pg_wal also goes to the safekeepers (WAL), and an
// fsync there waits for their quorum. Every other fsync is a no-op: nothing local is durable
// by design.
//
// A file is one of three kinds. A relation's file starts as a size and a bound: blocks below
// the bound are at the page server, pages written here are in scratch. An SLRU segment is the
// same, except that what was written stays. All else is local. A page that Postgres wrote may
// leave scratch again, and be asked for at the page server, only by the rule in evict.go
// (invariant C1).
//
// The mount is three in fact, one inside the other: see view.
//
// Postgres is the only user of the mount and the kernel the only cache above it, so names,
// attributes and data are cached there without a time limit. The agent itself must never
// touch a path under the mountpoint: it would wait for itself. It uses MkdirAll, WriteFile,
// ReadFile, ReadAt and Walk.
package pgfs

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/holdfastdb/holdfast/compute/scratch"
	"github.com/holdfastdb/holdfast/internal/auxfile"
	"github.com/holdfastdb/holdfast/internal/pg"
)

// Config describes a mount.
type Config struct {
	// Mountpoint is the directory to mount on. It is made if it is missing.
	Mountpoint string
	// Scratch holds the bytes. It stays the caller's to wipe, or FS.Wipe does it.
	Scratch *scratch.Store
	// Remote has the pages that were not written here. Nil: everything is local.
	Remote Remote
	// WAL takes what is written to pg_wal. Nil: pg_wal holds ordinary local files.
	WAL WAL
	// Aux, if set, makes durable what becomes of files that WAL does not describe, before the
	// rename or unlink answers that does it; if it fails, so does that.
	Aux func(ctx context.Context, changes []auxfile.Change) error
	// History gives count pages of the WAL before StartLSN, from lsn on: see AddHistory.
	History func(ctx context.Context, lsn pg.LSN, count int) ([]byte, error)
	// Fail, if set, is told once that the local store failed under a write that Postgres
	// believes to be done. Everything fails from then on; Postgres must be killed.
	Fail func(error)
	// StartLSN is the LSN at which the endpoint started: pages that were never written here
	// are asked for as of it, or later.
	StartLSN pg.LSN
	// UID and GID own the files that the agent puts there and those at the page server.
	UID, GID uint32
	// CacheBytes bounds the relation pages kept in scratch, as far as the eviction rule
	// allows: what Postgres wrote lately stays beyond it. Default 1 GiB.
	CacheBytes int64
	// Past, if set, has each page that Postgres wrote and that is to leave compared with the
	// page server's: see verify.go. It is the page server of Remote.
	Past Past
	// Live, if set, tells whether what is here may be shown still. It is asked right before each
	// answer with a file's content.
	Live func() error
	// Log is where to say what goes wrong. Default slog.Default().
	Log *slog.Logger
}

const (
	defaultCacheBytes = 1 << 30
	minCacheBytes     = 1 << 20
)

// EnsureDefaults fills in what was left out.
func (c *Config) EnsureDefaults() {
	if c.CacheBytes == 0 {
		c.CacheBytes = defaultCacheBytes
	}
	if c.Log == nil {
		c.Log = slog.Default()
	}
}

// Validate tells what is missing or makes no sense.
func (c *Config) Validate() error {
	switch {
	case c.Scratch == nil:
		return errors.New("pgfs: no scratch store was given")
	case c.Mountpoint != "" && !filepath.IsAbs(c.Mountpoint):
		return fmt.Errorf("pgfs: the mountpoint %q is not an absolute path", c.Mountpoint)
	case c.CacheBytes < minCacheBytes:
		return fmt.Errorf("pgfs: a cache of %d bytes is too small: want at least %d", c.CacheBytes, minCacheBytes)
	case c.Past != nil && (c.Remote == nil || c.WAL == nil):
		return errors.New("pgfs: pages are to be compared with a page server's, but there is none, or no WAL")
	case c.Remote != nil && c.WAL != nil && c.StartLSN == pg.InvalidLSN:
		return errors.New("pgfs: pages come from a page server, but no start LSN was given")
	}
	return nil
}

// FS is the file system. Its methods are safe for concurrent use.
type FS struct {
	fuse.RawFileSystem // answers what we do not implement with ENOSYS

	cfg   Config
	store *scratch.Store
	// ctx ends when the mount ends or is wiped; every wait hangs on it.
	ctx      context.Context
	stop     context.CancelFunc
	wiped    atomic.Bool
	discards atomic.Bool // Discard was called

	// tree guards names: directories' children, link counts, paths.
	tree    sync.RWMutex
	root    *node
	nodes   registry
	handles handles // of open directories

	// pageLocks order the uses of one page of one file; see file.lock.
	pageLocks [512]sync.RWMutex

	cache        evictor
	verify       *verifier // nil: nothing is compared
	stats        counters
	aheadFetches atomic.Int64 // read-ahead calls under way
	room         struct {     // on the disk, for temporary files
		checked atomic.Int64 // when, Unix nanoseconds
		low     atomic.Bool
	}

	mount mountState
}

// New makes a file system whose tree is an empty root directory. It has to be closed with
// Unmount, even if it was never mounted.
func New(cfg Config) (*FS, error) {
	cfg.EnsureDefaults()
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	fs := &FS{RawFileSystem: fuse.NewDefaultRawFileSystem(), cfg: cfg, store: cfg.Scratch}
	fs.ctx, fs.stop = context.WithCancel(context.Background())
	fs.mount.done = make(chan struct{})
	fs.root = fs.newNode(syscall.S_IFDIR|0o700, cfg.UID, cfg.GID)
	fs.root.dir = newDir(nil, "")
	fs.root.links.Store(2)
	fs.cache.init(cfg.CacheBytes / pg.BlockSize)
	if cfg.Past != nil {
		fs.verify = newVerifier(cfg.Log)
	}
	if cfg.Remote != nil {
		go fs.evictLoop()
	}
	return fs, nil
}

// Wipe shreds everything local (invariant K2): the per-boot key is forgotten, and every
// operation from now on, those under way included, fails.
func (fs *FS) Wipe() error {
	fs.wiped.Store(true)
	fs.stop()
	return fs.store.Wipe()
}

// Stats is what the mount holds and has done.
type Stats struct {
	CleanPages   int64 // copies of pages of the page server, droppable at will
	DirtyPages   int64 // pages of relations and SLRUs that Postgres wrote
	EvictedPages int64 // dirty pages that were dropped by the eviction rule, ever
	FetchedPages int64 // pages that came from the page server, ever
	Fetches      int64 // calls that brought them
	Nodes        int64 // files and directories in memory
	Slots        scratch.Usage
}

type counters struct {
	clean, dirty, evicted, fetched, fetches atomic.Int64
}

// Stats tells what the mount holds and has done.
func (fs *FS) Stats() Stats {
	return Stats{
		CleanPages: fs.stats.clean.Load(), DirtyPages: fs.stats.dirty.Load(),
		EvictedPages: fs.stats.evicted.Load(), FetchedPages: fs.stats.fetched.Load(),
		Fetches: fs.stats.fetches.Load(), Nodes: fs.nodes.count.Load(), Slots: fs.store.Usage(),
	}
}

// String names the file system's type to the kernel: fuse.holdfast.
func (fs *FS) String() string { return "holdfast" }
