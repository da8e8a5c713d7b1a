package timeline

import (
	"context"
	"fmt"
	"slices"

	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/pageserver/keyspace"
)

// Scan calls fn for each key of [from, to) that exists at lsn, in order, with its newest
// version, which is an Image (or Init); the caller owns its data. It is for keys whose values are never
// Deltas: one that is gives an error. An error of fn ends the scan.
func (t *Timeline) Scan(ctx context.Context, from, to keyspace.Key, lsn pg.LSN, fn func(keyspace.Key, Value) error) error {
	v, err := t.holdAt(lsn)
	if err != nil {
		return err
	}
	defer t.release(v)
	s := &scan{t: t, v: v, lsn: lsn, fn: fn, ctx: ctx}
	err = s.run(from, to)
	if failed := t.Err(); failed != nil {
		return failed
	}
	if err != nil {
		return fmt.Errorf("scanning keys %x to %x at %s on branch %s: %w", from[:], to[:], lsn, t.cfg.Branch, err)
	}
	return nil
}

// scan walks the tables in memory beside the merged files: a version in memory is newer than
// all in files.
type scan struct {
	t   *Timeline
	v   *view
	lsn pg.LSN
	fn  func(keyspace.Key, Value) error
	ctx context.Context // of the call to Scan

	inMemory []memHead
}

type memHead struct {
	keyHead
	table *memtable
}

func (s *scan) run(from, to keyspace.Key) error {
	if from.Compare(to) >= 0 {
		return nil
	}
	s.listMemory(from, to)
	// One partition after the other, so that few files are open at a time.
	for i := range s.v.parts {
		p := &s.v.parts[i]
		lo, hi := from, to
		if p.from.Compare(lo) > 0 {
			lo = p.from
		}
		if i+1 < len(s.v.parts) && s.v.parts[i+1].from.Compare(hi) < 0 {
			hi = s.v.parts[i+1].from
		}
		if lo.Compare(hi) >= 0 {
			continue
		}
		if err := s.partition(p, lo, hi); err != nil {
			return err
		}
	}
	return s.memoryBelow(to)
}

// listMemory lists the keys in memory, each with its newest version.
func (s *scan) listMemory(from, to keyspace.Key) {
	for _, m := range append([]*memtable{s.v.open}, s.v.frozen...) {
		for _, k := range m.between(from, to, s.lsn) {
			s.inMemory = append(s.inMemory, memHead{k, m})
		}
	}
	slices.SortStableFunc(s.inMemory, func(a, b memHead) int { return a.key.Compare(b.key) })
	s.inMemory = slices.CompactFunc(s.inMemory, func(a, b memHead) bool { return a.key == b.key })
}

func (s *scan) partition(p *partition, from, to keyspace.Key) error {
	var layers []*handle // oldest first
	if p.base != nil {
		layers = append(layers, p.base)
	}
	for _, list := range [][]*handle{p.stack, s.v.flushed} {
		for _, h := range slices.Backward(list) {
			if pg.LSN(h.desc.MinLSN) <= s.lsn {
				layers = append(layers, h)
			}
		}
	}
	m, err := s.t.newMerger(s.ctx, layers, from, to, false)
	if err != nil {
		return err
	}
	defer m.close()
	return m.newestUpTo(s.lsn, s.fileEntry)
}

func (s *scan) fileEntry(e Entry) error {
	if err := s.ctx.Err(); err != nil {
		return err
	}
	if err := s.memoryBelow(e.Key); err != nil {
		return err
	}
	if len(s.inMemory) > 0 && s.inMemory[0].key == e.Key {
		return nil // a newer version comes from memory
	}
	return s.visit(e.Key, e.Value)
}

// memoryBelow visits the keys in memory that are below to.
func (s *scan) memoryBelow(to keyspace.Key) error {
	for len(s.inMemory) > 0 && s.inMemory[0].key.Compare(to) < 0 {
		head := s.inMemory[0]
		s.inMemory = s.inMemory[1:]
		value, ok := head.table.value(head.head)
		if !ok {
			return errWiped
		}
		if err := s.visit(head.key, value); err != nil {
			return err
		}
	}
	return nil
}

func (s *scan) visit(key keyspace.Key, v Value) error {
	switch v.Kind {
	case Tombstone:
		return nil
	case Delta:
		return fmt.Errorf("key %x: its version of %s is a change, which a scan cannot apply", key[:], v.LSN)
	}
	return s.fn(key, v)
}
