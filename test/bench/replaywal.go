package main

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/internal/walrec"
	"github.com/holdfastdb/holdfast/pageserver"
	"github.com/holdfastdb/holdfast/pageserver/redo"
)

// walRange is the WAL from start to the end of a server's last record.
type walRange struct {
	start, end pg.LSN
	bytes      []byte // from start on
	records    []walrec.RawRecord
}

// readWAL reads the WAL of a server that was shut down.
func readWAL(dir string, start pg.LSN) (*walRange, error) {
	ctl, err := readControl(dir)
	if err != nil {
		return nil, err
	}
	w := &walRange{start: start}
	s := walrec.NewScanner(start)
	for seg := start.SegmentStart(); w.end == 0; seg += pg.WALSegmentSize {
		b, err := os.ReadFile(filepath.Join(dir, "pg_wal", pg.WALFileName(seg)))
		if err != nil {
			return nil, err
		}
		if seg < start {
			b = b[start-seg:]
		}
		w.bytes = append(w.bytes, b...)
		s.Feed(b)
		for w.end == 0 {
			rec, ok, err := s.Next()
			if err != nil {
				return nil, err
			}
			if !ok {
				break
			}
			rec.Data = slices.Clone(rec.Data)
			w.records = append(w.records, rec)
			if rec.LSN == ctl.CheckPoint {
				w.end = rec.End
			}
		}
	}
	return w, nil
}

// chunks divides the WAL at ends of records.
func (w *walRange) chunks(fn func(begin, end pg.LSN, plain []byte) error) error {
	begin := w.start
	for i := range w.records {
		end := w.records[i].End
		if end-begin < chunkBytes && i+1 < len(w.records) {
			continue
		}
		if err := fn(begin, end, w.bytes[begin-w.start:end-w.start]); err != nil {
			return err
		}
		begin = end
	}
	return nil
}

// A pageName names a page of a relation, or of an SLRU area if that is not zero.
type pageName struct {
	rel   pg.RelTag
	slru  pg.SLRUKind
	block uint32
}

func (a pageName) compare(b pageName) int {
	return cmp.Or(cmp.Compare(a.slru, b.slru), cmp.Compare(a.rel.Tablespace, b.rel.Tablespace), cmp.Compare(a.rel.Database, b.rel.Database),
		cmp.Compare(a.rel.Relation, b.rel.Relation), cmp.Compare(a.rel.Fork, b.rel.Fork), cmp.Compare(a.block, b.block))
}

// pageRun is pages that follow one another.
type pageRun struct {
	pageName
	count uint32
}

// touched lists every page that recovery of the WAL changes, in order.
func (w *walRange) touched() ([]pageRun, error) {
	seen := make(map[pageName]struct{})
	var rec walrec.Record
	for _, raw := range w.records {
		if err := walrec.ParseInto(&rec, raw.Data, raw.LSN, raw.End); err != nil {
			return nil, err
		}
		if err := touches(&rec, func(n pageName) { seen[n] = struct{}{} }); err != nil {
			return nil, err
		}
	}
	return runsOf(slices.SortedFunc(maps.Keys(seen), pageName.compare)), nil
}

// runPages is the most pages that a page server gives in one call.
const runPages = 128

// runsOf joins pages, which are in order, to runs.
func runsOf(names []pageName) []pageRun {
	var runs []pageRun
	for _, n := range names {
		if i := len(runs) - 1; i >= 0 && runs[i].count < runPages && runs[i].after() == n {
			runs[i].count++
			continue
		}
		runs = append(runs, pageRun{n, 1})
	}
	return runs
}

// after is the page that would make the run longer.
func (r *pageRun) after() pageName {
	n := r.pageName
	n.block += r.count
	return n
}

// touches gives the pages that a record names, and those that it implies.
func touches(rec *walrec.Record, emit func(pageName)) error {
	for i := range rec.Blocks {
		emit(pageName{rel: rec.Blocks[i].Rel, block: uint32(rec.Blocks[i].Block)})
	}
	clears, err := redo.ImpliedVM(rec)
	if err != nil {
		return err
	}
	for _, c := range clears {
		emit(pageName{rel: pg.RelTag{RelFileNode: c.Rel, Fork: pg.VMFork}, block: uint32(redo.VMBlock(c.Heap))})
	}
	if b := redo.FreeSpaceBlock(rec); b != nil && b.Rel.Fork == pg.MainFork {
		page, _ := redo.FSMLocation(b.Block)
		emit(pageName{rel: pg.RelTag{RelFileNode: b.Rel.RelFileNode, Fork: pg.FSMFork}, block: uint32(page)})
	}
	pages, err := redo.SLRUPages(rec)
	for _, p := range pages {
		if p.Kind != pg.CommitTS { // it is off
			emit(pageName{slru: p.Kind, block: p.Page})
		}
	}
	return err
}

// get makes the run's pages and tells how many there are: none if the relation was dropped.
func (r *pageRun) get(ctx context.Context, srv *pageserver.Server, at *pb.ReadPoint) (int, error) {
	q := &pb.GetPagesRequest{At: at, Block: r.block, Count: r.count}
	if r.slru != 0 {
		q.Slru = uint32(r.slru)
	} else {
		q.Rel = &pb.RelFork{Tablespace: uint32(r.rel.Tablespace), Database: uint32(r.rel.Database), Relation: uint32(r.rel.Relation), Fork: uint32(r.rel.Fork)}
	}
	resp, err := srv.GetPages(ctx, q)
	if status.Code(err) == codes.NotFound {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("making %d pages of %v, SLRU area %d, from %d on: %w", r.count, r.rel, r.slru, r.block, err)
	}
	return len(resp.Pages) / pg.BlockSize, nil
}
