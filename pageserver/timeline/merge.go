package timeline

import (
	"container/heap"
	"context"

	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/pageserver/keyspace"
	"github.com/holdfastdb/holdfast/pageserver/layer"
)

// merger gives the versions of several layer files in the order of keys, LSNs, and age.
type merger struct {
	t       *Timeline
	to      keyspace.Key // exclusive
	endless bool         // to does not count
	sources mergeHeap
	started bool
}

type mergeSource struct {
	h    *handle
	file *openFile
	it   *layer.Iterator
	cur  layer.Entry
	rank int // older layers first
}

type mergeHeap []*mergeSource

func (h mergeHeap) Len() int      { return len(h) }
func (h mergeHeap) Swap(i, j int) { h[i], h[j] = h[j], h[i] }
func (h *mergeHeap) Push(x any)   { *h = append(*h, x.(*mergeSource)) }
func (h *mergeHeap) Pop() any {
	old := *h
	s := old[len(old)-1]
	*h = old[:len(old)-1]
	return s
}

func (h mergeHeap) Less(i, j int) bool {
	a, b := h[i], h[j]
	if c := a.cur.Key.Compare(b.cur.Key); c != 0 {
		return c < 0
	}
	if a.cur.LSN != b.cur.LSN {
		return a.cur.LSN < b.cur.LSN
	}
	return a.rank < b.rank
}

// newMerger merges layers, given from the oldest to the newest, from a key on.
func (t *Timeline) newMerger(ctx context.Context, layers []*handle, from, to keyspace.Key, endless bool) (*merger, error) {
	m := &merger{t: t, to: to, endless: endless}
	for rank, h := range layers {
		if h.desc.Last.key().Compare(from) < 0 || !endless && h.desc.First.key().Compare(to) >= 0 {
			continue
		}
		if err := m.addSource(ctx, h, from, rank); err != nil {
			m.close()
			return nil, err
		}
	}
	heap.Init(&m.sources)
	return m, nil
}

func (m *merger) addSource(ctx context.Context, h *handle, from keyspace.Key, rank int) error {
	f, err := m.t.openFile(ctx, h)
	if err != nil {
		return err
	}
	s := &mergeSource{h: h, file: f, rank: rank}
	if s.it, err = f.Iterate(from); err != nil {
		f.release()
		return m.t.suspect(h, f, err)
	}
	more, err := m.advance(s)
	if err != nil || !more {
		s.close()
		return err
	}
	m.sources = append(m.sources, s)
	return nil
}

// suspect throws the local copy away if it may be why f failed; the caller fails all the
// same, and works when it tries again.
func (t *Timeline) suspect(h *handle, f *openFile, err error) error {
	if f.local != nil && t.blamesFile(err) {
		t.dropCopy(h, err)
	}
	return err
}

func (m *merger) advance(s *mergeSource) (more bool, err error) {
	if s.cur, more, err = s.it.Next(); err != nil {
		return false, m.t.suspect(s.h, s.file, err)
	}
	return more && (m.endless || s.cur.Key.Compare(m.to) < 0), nil
}

func (s *mergeSource) close() {
	if s.it != nil {
		s.it.Close()
	}
	s.file.release()
}

// next gives the next version; its data is lent until the next call.
func (m *merger) next() (Entry, bool, error) {
	if m.started && len(m.sources) > 0 {
		top := m.sources[0]
		more, err := m.advance(top)
		if err != nil {
			return Entry{}, false, err
		}
		if more {
			heap.Fix(&m.sources, 0)
		} else {
			heap.Pop(&m.sources).(*mergeSource).close()
		}
	}
	m.started = true
	if len(m.sources) == 0 {
		return Entry{}, false, nil
	}
	e := m.sources[0].cur
	return Entry{e.Key, Value{LSN: e.LSN, Kind: ValueKind(e.Kind), Data: e.Data}}, true, nil
}

func (m *merger) close() {
	for _, s := range m.sources {
		s.close()
	}
	m.sources = nil
}

// newestUpTo gives, for each key, its newest version at or below lsn.
func (m *merger) newestUpTo(lsn pg.LSN, fn func(Entry) error) error {
	var cur Entry
	have := false
	for {
		e, more, err := m.next()
		if err != nil {
			return err
		}
		if have && (!more || e.Key != cur.Key) {
			if err := fn(cur); err != nil {
				return err
			}
			have = false
		}
		if !more {
			return nil
		}
		if e.LSN <= lsn {
			cur.Key, cur.LSN, cur.Kind = e.Key, e.LSN, e.Kind
			cur.Data = append([]byte(nil), e.Data...)
			have = true
		}
	}
}
