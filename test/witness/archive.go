package witness

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"github.com/holdfastdb/holdfast/compute/boot"
	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/keyring"
	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/internal/seal"
	"github.com/holdfastdb/holdfast/internal/walclient"
	"github.com/holdfastdb/holdfast/internal/walrec"
)

// archive is a folder of WAL segment files, of which each but the last is whole. It follows the
// log all the time, since safekeepers keep only what is not in layers yet.
type archive struct {
	dir             string
	project, branch string
	source          *walclient.Client
	ring            keyring.Ring
	stop            context.CancelFunc
	done            chan struct{} // closed when nothing follows the log any more; err is valid then
	err             error

	mu struct {
		sync.Mutex
		end   pg.LSN        // the WAL up to here is in the files
		grown chan struct{} // closed when end moves
		// shutdown is the last checkpoint record of a shutdown; changed tells that records follow
		// it that are no messages of the agent.
		shutdown pg.LSN
		changed  bool
	}
	// The follower's.
	plain   []byte
	scanner *walrec.Scanner
}

// newArchive begins with what a start's plan shows of pg_wal before its first byte of WAL.
func newArchive(dir string, plan *boot.Plan, source *walclient.Client, ring keyring.Ring, cfg Config) (*archive, error) {
	a := &archive{dir: dir, project: cfg.Project, branch: cfg.Branch, source: source, ring: ring, done: make(chan struct{})}
	a.mu.end, a.mu.grown = plan.Begin, make(chan struct{})
	ctx, stop := context.WithCancel(context.Background())
	a.stop = stop
	if err := a.begin(plan); err != nil {
		stop()
		return nil, errors.Join(err, source.Close())
	}
	go func() {
		defer close(a.done)
		a.err = source.Follow(ctx, plan.Begin, func(chunks []*pb.SealedWAL, _ pg.LSN) error {
			for _, c := range chunks {
				if err := a.take(ctx, c); err != nil {
					return err
				}
			}
			return nil
		})
	}()
	return a, nil
}

func (a *archive) close() error {
	a.stop()
	<-a.done
	return a.source.Close()
}

func (a *archive) begin(plan *boot.Plan) error {
	if err := os.Mkdir(a.dir, 0o755); err != nil {
		return err
	}
	for _, f := range plan.Files {
		if filepath.Dir(f.Path) != "pg_wal" {
			continue
		}
		if err := a.write(filepath.Base(f.Path), f.Data, 0); err != nil {
			return err
		}
	}
	return nil
}

// write puts bytes into a segment file, which has a segment's size from the start.
func (a *archive) write(name string, b []byte, off int64) error {
	return writeSegment(a.dir, name, b, off)
}

func writeSegment(dir, name string, b []byte, off int64) (err error) {
	f, err := os.OpenFile(filepath.Join(dir, name), os.O_CREATE|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if err := f.Truncate(pg.WALSegmentSize); err != nil {
		return err
	}
	_, err = f.WriteAt(b, off)
	return err
}

// put writes WAL that begins at an LSN.
func put(dir string, at pg.LSN, wal []byte) error {
	for len(wal) > 0 {
		off := at - at.SegmentStart()
		n := min(len(wal), int(pg.WALSegmentSize-off))
		if err := writeSegment(dir, pg.WALFileName(at), wal[:n], int64(off)); err != nil {
			return err
		}
		wal, at = wal[n:], at+pg.LSN(n)
	}
	return nil
}

// wait waits until the WAL up to an LSN, which must be committed, is in the files.
func (a *archive) wait(ctx context.Context, until pg.LSN) error {
	for {
		a.mu.Lock()
		end, grown := a.mu.end, a.mu.grown
		a.mu.Unlock()
		if end >= until {
			return nil
		}
		select {
		case <-grown:
		case <-a.done:
			return fmt.Errorf("following the WAL ended at %v, before %v: %w", end, until, a.err)
		case <-ctx.Done():
			return fmt.Errorf("waiting for WAL up to %v, at %v: %w", until, end, ctx.Err())
		}
	}
}

func (a *archive) take(ctx context.Context, c *pb.SealedWAL) error {
	begin, end := pg.LSN(c.BeginLsn), pg.LSN(c.EndLsn)
	sc := seal.Context{Purpose: seal.PurposeWAL, Project: a.project, Branch: a.branch, Object: c.Object}
	key, err := a.ring.Open(ctx, sc, c.WrappedDek)
	if err != nil {
		return err
	}
	if a.plain, err = seal.OpenWAL(a.plain[:0], key, sc, begin, end, c.Counter, c.Ciphertext); err != nil {
		return err
	}
	if err := put(a.dir, begin, a.plain); err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if err := a.scanLocked(begin, end); err != nil {
		return err
	}
	if end > a.mu.end {
		a.mu.end = end
		close(a.mu.grown)
		a.mu.grown = make(chan struct{})
	}
	return nil
}

// scanLocked notes what the records of a chunk are, of which the files may have a part already.
func (a *archive) scanLocked(begin, end pg.LSN) error {
	if a.scanner == nil {
		a.scanner = walrec.NewScanner(a.mu.end)
	}
	if end <= a.mu.end {
		return nil
	}
	a.scanner.Feed(a.plain[a.mu.end-begin:])
	for {
		r, ok, err := a.scanner.Next()
		if err != nil || !ok {
			return err
		}
		rec, err := walrec.Parse(r.Data, r.LSN, r.End)
		if err != nil {
			return err
		}
		switch walrec.Name(rec.RmID, rec.Info) {
		case "XLOG/CHECKPOINT_SHUTDOWN":
			a.mu.shutdown, a.mu.changed = r.LSN, false
		case "LogicalMessage":
		default:
			a.mu.changed = true
		}
	}
}

// shutdownBefore is the checkpoint record of a shutdown with which the log, which nobody
// writes to, ends at end.
func (a *archive) shutdownBefore(end pg.LSN) (pg.LSN, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.mu.end != end || a.mu.shutdown == 0 || a.mu.changed {
		return 0, fmt.Errorf("the WAL, which is here up to %v, does not end with a shutdown at %v: the last one is at %v, with changes after it: %v",
			a.mu.end, end, a.mu.shutdown, a.mu.changed)
	}
	return a.mu.shutdown, nil
}

// copyWithStart makes an archive that ends with the record of a start: the WAL after it is not
// in there.
func (a *archive) copyWithStart(dir string, plan *boot.Plan) error {
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	files, err := os.ReadDir(a.dir)
	if err != nil {
		return err
	}
	for _, f := range files {
		start, ok := pg.ParseWALFileName(f.Name())
		if !ok {
			return fmt.Errorf("%s is no name of a WAL file", f.Name())
		}
		from, to := filepath.Join(a.dir, f.Name()), filepath.Join(dir, f.Name())
		switch {
		case start > plan.Begin:
		case start < plan.Begin.SegmentStart():
			err = os.Link(from, to)
		default:
			var b []byte
			if b, err = os.ReadFile(from); err == nil {
				err = writeSegment(dir, f.Name(), b[:plan.Begin-start], 0)
			}
		}
		if err != nil {
			return err
		}
	}
	return put(dir, plan.Begin, plan.WAL)
}
