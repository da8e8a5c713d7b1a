package pageserver

import (
	"context"
	"log/slog"
	"maps"
	"slices"
	"sync"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/internal/walrec"
	"github.com/holdfastdb/holdfast/pageserver/keyspace"
	"github.com/holdfastdb/holdfast/pageserver/pageread"
	"github.com/holdfastdb/holdfast/pageserver/redo"
	"github.com/holdfastdb/holdfast/pageserver/timeline"
)

// verifier compares pages with the images that records carry under
// wal_consistency_checking. A nil verifier does nothing.
type verifier struct {
	log     *slog.Logger
	pending []checkable
	busy    sync.Mutex // held from before what was noted can be read until it is compared

	mu     sync.Mutex
	counts map[string]*pb.RedoCheck
}

type checkable struct {
	raw      []byte
	lsn, end pg.LSN
}

func newVerifier(log *slog.Logger) *verifier {
	return &verifier{log: log, counts: make(map[string]*pb.RedoCheck)}
}

func (v *verifier) begin() (end func()) {
	if v == nil {
		return func() {}
	}
	v.busy.Lock()
	return v.busy.Unlock
}

// note remembers a record that has something to compare with.
func (v *verifier) note(rec *walrec.Record) {
	const checkConsistency = 0x02 // XLR_CHECK_CONSISTENCY
	if v == nil || rec.Info&checkConsistency == 0 {
		return
	}
	v.pending = append(v.pending, checkable{slices.Clone(rec.Raw), rec.LSN, rec.End})
}

// check compares what was noted, now that it is in the timeline.
func (v *verifier) check(ctx context.Context, tl *timeline.Timeline) error {
	if v == nil {
		return nil
	}
	var rec walrec.Record
	for _, c := range v.pending {
		if err := walrec.ParseInto(&rec, c.raw, c.lsn, c.end); err != nil {
			return err
		}
		for i := range rec.Blocks {
			if err := v.block(ctx, tl, &rec, &rec.Blocks[i]); err != nil {
				return err
			}
		}
	}
	v.pending = nil
	return nil
}

func (v *verifier) block(ctx context.Context, tl *timeline.Timeline, rec *walrec.Record, b *walrec.Block) error {
	if !b.HasImage || b.ApplyImage {
		return nil
	}
	page, key := make([]byte, pg.BlockSize), keyspace.RelPage(b.Rel, b.Block)
	err := pageread.Page(ctx, tl, key, rec.End, page)
	if ctx.Err() != nil || needsReopen(err) {
		return err
	}
	if err != nil {
		v.count(rec, true, true, err)
		return nil
	}
	if b.Rel.Fork != pg.FSMFork { // whose image is more than the page
		tl.Remember(key, rec.End, page) // the next record of the page is applied to it, not to all before it again
	}
	checked, err := redo.Check(rec, b, page)
	v.count(rec, checked, false, err)
	return nil
}

func (v *verifier) count(rec *walrec.Record, checked, failed bool, err error) {
	if !checked && err == nil {
		return
	}
	name := walrec.Name(rec.RmID, rec.Info)
	v.mu.Lock()
	defer v.mu.Unlock()
	c := v.counts[name]
	if c == nil {
		c = &pb.RedoCheck{Record: name}
		v.counts[name] = c
	}
	c.Checked++
	if err == nil {
		return
	}
	if failed {
		c.Failed++
	} else {
		c.Mismatches++
	}
	if c.First == "" {
		c.First = err.Error()
		v.log.Error("redo disagrees with PostgreSQL", "record", name, "lsn", rec.LSN.String(), "err", err)
	}
}

// redoCounts gives what was compared so far, by record name. It covers all that can be read at
// the time.
func (v *verifier) redoCounts() []*pb.RedoCheck {
	if v == nil {
		return nil
	}
	v.busy.Lock()
	defer v.busy.Unlock()
	v.mu.Lock()
	defer v.mu.Unlock()
	var list []*pb.RedoCheck
	for _, name := range slices.Sorted(maps.Keys(v.counts)) {
		c := v.counts[name]
		list = append(list, &pb.RedoCheck{Record: name, Checked: c.Checked, Mismatches: c.Mismatches, Failed: c.Failed, First: c.First})
	}
	return list
}
