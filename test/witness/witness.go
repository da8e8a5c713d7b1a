// Package witness is the second opinion on a branch: a stock PostgreSQL server, started from
// the branch's first state, recovers the WAL that the safekeepers hold, and the page server
// must give just what that server then has, byte for byte: every block of every relation and
// fork, the SLRUs, sizes, relation maps and two-phase state.
//
// It looks at two kinds of places. At the end of an orderly shutdown, the server goes on from
// where it was before. At any other LSN, a copy of it recovers up to there and then the checkpoint
// record that Holdfast fabricates for a start at that LSN: so a start without WAL and recovery of
// all WAL begin with the same pages.
package witness

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"time"

	"google.golang.org/grpc"

	"github.com/holdfastdb/holdfast/compute/boot"
	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/dekwire"
	"github.com/holdfastdb/holdfast/internal/keyring"
	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/internal/rpc"
	"github.com/holdfastdb/holdfast/internal/walclient"
	"github.com/holdfastdb/holdfast/test/datadir"
	"github.com/holdfastdb/holdfast/test/proc"
	"github.com/holdfastdb/holdfast/test/stock"
)

// Config says which branch is looked at, and how.
type Config struct {
	Dir             string // an empty folder for the server and the WAL
	Project, Branch string
	// Addresses of the roles.
	Keymgr, Pageserver string
	Safekeepers        []string
	// Settings of the endpoint: recovery needs to have as much of some things as the server
	// that wrote the WAL.
	Settings map[string]string
	Log      *slog.Logger
}

// Witness follows one branch.
type Witness struct {
	cfg    Config
	conns  []*grpc.ClientConn
	client pb.PageServerClient
	ring   keyring.Ring
	wal    *archive
	start  pg.LSN
	server *stock.Server
}

// New makes the server from what the page server has at the branch's first LSN, which must be in its
// history still. The roles must run.
func New(ctx context.Context, cfg Config, start pg.LSN) (w *Witness, err error) {
	w = &Witness{cfg: cfg, start: start}
	defer func() {
		if err != nil {
			err = errors.Join(err, w.Close())
			w = nil
		}
	}()
	keys, err := w.dial(cfg.Keymgr)
	if err != nil {
		return w, err
	}
	pages, err := w.dial(cfg.Pageserver)
	if err != nil {
		return w, err
	}
	w.ring = keyring.New(dekwire.Client(pb.NewKeyManagerClient(keys)), "witness")
	w.client = pb.NewPageServerClient(pages)
	source, err := walclient.New(cfg.Project, cfg.Branch, cfg.Safekeepers, cfg.Log)
	if err != nil {
		return w, err
	}
	plan, err := w.export(ctx)
	if err != nil {
		return w, errors.Join(fmt.Errorf("making a data directory from the branch's start %v: %w", start, err), source.Close())
	}
	w.wal, err = newArchive(filepath.Join(cfg.Dir, "wal"), plan, source, w.ring, cfg)
	return w, err
}

func (w *Witness) dial(addr string) (*grpc.ClientConn, error) {
	conn, err := rpc.Dial(addr)
	if err == nil {
		w.conns = append(w.conns, conn)
	}
	return conn, err
}

// Close ends what New began; the folder stays.
func (w *Witness) Close() error {
	var errs []error
	if w.wal != nil {
		errs = append(errs, w.wal.close())
	}
	if w.ring != nil {
		w.ring.Close()
	}
	for _, c := range w.conns {
		errs = append(errs, c.Close())
	}
	return errors.Join(errs...)
}

func (w *Witness) at(lsn pg.LSN) *pb.ReadPoint {
	return &pb.ReadPoint{Project: w.cfg.Project, Branch: w.cfg.Branch, Lsn: uint64(lsn)}
}

// plan is how Holdfast starts at an LSN.
func (w *Witness) plan(ctx context.Context, lsn pg.LSN) (*boot.Plan, error) {
	state, err := w.client.StartupState(ctx, &pb.StartupStateRequest{At: w.at(lsn)})
	if err != nil {
		return nil, err
	}
	settings := &boot.Settings{Listen: "127.0.0.1:1", AgentUser: "postgres", Extra: w.cfg.Settings}
	if err := settings.Validate(); err != nil {
		return nil, err
	}
	return boot.Make(boot.Input{End: lsn, State: state, Settings: settings, Now: time.Now()})
}

// AtShutdown lets the server recover the WAL up to end, where the endpoint was shut down in
// order, and compares. end must not be before that of an earlier call.
func (w *Witness) AtShutdown(ctx context.Context, end pg.LSN) (*Result, error) {
	if err := w.wal.wait(ctx, end); err != nil {
		return nil, err
	}
	shutdown, err := w.wal.shutdownBefore(end)
	if err != nil {
		return nil, err
	}
	return w.recoverAndCompare(ctx, w.server, w.wal.dir, shutdown, end)
}

// AtStart lets a copy of the server recover the WAL up to lsn, at which an endpoint could
// start, and the checkpoint record with which it would, and compares. lsn must not be before the last
// one that AtShutdown was called with.
func (w *Witness) AtStart(ctx context.Context, lsn pg.LSN) (res *Result, err error) {
	plan, err := w.plan(ctx, lsn)
	if err != nil {
		return nil, err
	}
	if err := w.wal.wait(ctx, lsn); err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp(w.cfg.Dir, "at-")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, proc.RemoveAll(dir)) }()
	if err := os.CopyFS(filepath.Join(dir, "data"), os.DirFS(w.server.Dir)); err != nil {
		return nil, err
	}
	// Its own WAL ends at lsn; a segment that the server restored goes further.
	if err := os.RemoveAll(filepath.Join(dir, "data", "pg_wal")); err != nil {
		return nil, err
	}
	if err := os.Mkdir(filepath.Join(dir, "data", "pg_wal"), 0o700); err != nil {
		return nil, err
	}
	if err := w.wal.copyWithStart(filepath.Join(dir, "wal"), plan); err != nil {
		return nil, err
	}
	server, err := stock.Open(filepath.Join(dir, "data"))
	if err != nil {
		return nil, err
	}
	return w.recoverAndCompare(ctx, server, filepath.Join(dir, "wal"), plan.Checkpoint, lsn)
}

// A Result is what a comparison found.
type Result struct {
	LSN      pg.LSN
	Recovery time.Duration
	Counts   datadir.Counts
	Problems []string
}

func (w *Witness) recoverAndCompare(ctx context.Context, s *stock.Server, wal string, checkpoint, at pg.LSN) (*Result, error) {
	began := time.Now()
	if err := s.Recover(ctx, wal, checkpoint); err != nil {
		return nil, err
	}
	res := &Result{LSN: at, Recovery: time.Since(began)}
	dir, err := datadir.Load(s.Dir)
	if err != nil {
		return nil, err
	}
	if dir.Control.CheckPoint != checkpoint {
		return nil, fmt.Errorf("recovery ended at the checkpoint %v, not at %v:\n%s", dir.Control.CheckPoint, checkpoint, tail(s.Log()))
	}
	c := &datadir.Comparison{Client: w.client, At: w.at(at), Want: dir, Mask: maskUnused}
	if res.Problems, err = c.Run(ctx); err != nil {
		return nil, err
	}
	_, files, err := c.Startup(ctx)
	if err != nil {
		return nil, err
	}
	res.Problems = append(res.Problems, files...)
	res.Counts = c.Counts
	return res, nil
}

// export writes the branch's first state as a data directory.
func (w *Witness) export(ctx context.Context) (*boot.Plan, error) {
	plan, err := w.plan(ctx, w.start)
	if err != nil {
		return nil, err
	}
	data := filepath.Join(w.cfg.Dir, "data")
	for _, d := range plan.Dirs {
		if err := os.MkdirAll(filepath.Join(data, d), 0o700); err != nil {
			return nil, err
		}
	}
	for _, f := range plan.Files {
		if filepath.Dir(f.Path) == "pg_wal" {
			continue // it comes from the safekeepers
		}
		if err := os.WriteFile(filepath.Join(data, f.Path), f.Data, 0o600); err != nil {
			return nil, err
		}
	}
	if err := w.exportPages(ctx, data); err != nil {
		return nil, err
	}
	w.server, err = stock.Open(data)
	return plan, err
}

func (w *Witness) exportPages(ctx context.Context, data string) error {
	state, err := w.client.StartupState(ctx, &pb.StartupStateRequest{At: w.at(w.start)})
	if err != nil {
		return err
	}
	var databases []pg.Oid
	for _, db := range state.Databases {
		databases = append(databases, pg.Oid(db))
	}
	sizes, err := datadir.List(ctx, w.client, w.at(w.start), databases)
	if err != nil {
		return err
	}
	for tag, blocks := range sizes {
		pages, err := datadir.Relation(ctx, w.client, w.at(w.start), tag, blocks)
		if err != nil {
			return err
		}
		const segmentBytes = pg.RelSegmentBlocks * pg.BlockSize
		for segment := 0; segment == 0 || len(pages) > 0; segment++ {
			n := min(len(pages), segmentBytes)
			if err := os.WriteFile(filepath.Join(data, pg.RelPath(tag, segment)), pages[:n], 0o600); err != nil {
				return err
			}
			pages = pages[n:]
		}
	}
	return w.exportSLRUs(ctx, data)
}

func (w *Witness) exportSLRUs(ctx context.Context, data string) error {
	for k := pg.CLog; k <= pg.CommitTS; k++ {
		r, err := w.client.ListSLRU(ctx, &pb.ListSLRURequest{At: w.at(w.start), Slru: uint32(k)})
		if err != nil {
			return err
		}
		files := map[string][]byte{}
		for _, n := range r.Pages {
			p, err := w.client.GetPages(ctx, &pb.GetPagesRequest{At: w.at(w.start), Slru: uint32(k), Block: n, Count: 1})
			if err != nil {
				return err
			}
			name, at := pg.SLRUPath(k, n)
			b := files[name]
			if need := int(at) + pg.BlockSize - len(b); need > 0 {
				b = append(b, make([]byte, need)...)
			}
			copy(b[at:], p.Pages)
			files[name] = b
		}
		for _, name := range slices.Sorted(maps.Keys(files)) {
			if err := os.WriteFile(filepath.Join(data, name), files[name], 0o600); err != nil {
				return err
			}
		}
	}
	return nil
}

// tail is the end of a log.
func tail(name string) []byte {
	b, err := os.ReadFile(name)
	if err != nil {
		return []byte(err.Error())
	}
	return b[max(0, len(b)-2000):]
}
