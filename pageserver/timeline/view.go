package timeline

import (
	"slices"
	"sort"
	"sync/atomic"

	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/pageserver/keyspace"
)

// view is what a read works on: the tables and layers of one moment. It does not change, and
// what it names is neither wiped nor deleted while anyone holds it (P3). The current view
// is held by the timeline itself.
type view struct {
	refs    atomic.Int64
	open    *memtable
	frozen  []*memtable // newest first
	flushed []*handle   // newest first
	parts   []partition // in the order of keys
	horizon pg.LSN
	copies  copies
}

// partition is a range of keys: from its first key to that of the next partition.
type partition struct {
	from  keyspace.Key // the first partition's is the zero key
	stack []*handle    // levelChanges, newest first
	base  *handle      // levelBase, or nil
}

// partOf finds the partition of a key.
func (v *view) partOf(key keyspace.Key) *partition {
	i := sort.Search(len(v.parts), func(i int) bool { return v.parts[i].from.Compare(key) > 0 })
	return &v.parts[i-1]
}

// with is a view of the same layers and other tables.
func (v *view) with(open *memtable, frozen []*memtable) *view {
	return &view{open: open, frozen: frozen, flushed: v.flushed, parts: v.parts, horizon: v.horizon, copies: v.copies}
}

func (v *view) handles() []*handle {
	hs := slices.Clone(v.flushed)
	for i := range v.parts {
		hs = append(hs, v.parts[i].stack...)
		if v.parts[i].base != nil {
			hs = append(hs, v.parts[i].base)
		}
	}
	return hs
}

// partitionsOf divides the keys at the first keys of the bases.
func partitionsOf(bases []layerDesc) []keyspace.Key {
	bases = slices.Clone(bases)
	slices.SortFunc(bases, byFirst)
	froms := []keyspace.Key{{}}
	for i := 1; i < len(bases); i++ {
		froms = append(froms, bases[i].First.key())
	}
	return froms
}

// withLayers is a view of the same tables and the manifest's layers.
func (v *view) withLayers(m *manifest, handleOf func(*layerDesc) *handle) *view {
	n := &view{open: v.open, frozen: v.frozen, horizon: pg.LSN(m.Horizon), copies: v.copies}
	var bases []layerDesc
	for i := range m.Layers {
		if m.Layers[i].Level == levelBase {
			bases = append(bases, m.Layers[i])
		}
	}
	for _, from := range partitionsOf(bases) {
		n.parts = append(n.parts, partition{from: from})
	}
	for i := range slices.Backward(m.Layers) {
		d := &m.Layers[i]
		h := handleOf(d)
		switch p := n.partOf(d.First.key()); d.Level {
		case levelFlushed:
			n.flushed = append(n.flushed, h)
		case levelChanges:
			p.stack = append(p.stack, h)
		case levelBase:
			p.base = h
		}
	}
	return n
}

// installLocked makes m the manifest and its layers the view's.
func (t *Timeline) installLocked(m *manifest) {
	live := make(map[string]*handle, len(m.Layers))
	v := t.mu.view.withLayers(m, func(d *layerDesc) *handle {
		h := t.mu.handles[d.Object]
		if h == nil {
			h = &handle{id: t.nextLayer.Add(1), desc: *d}
			t.making.drop(d.Object)
		}
		h.wrapped.Store(&d.Wrapped)
		live[d.Object] = h
		return h
	})
	for name, h := range t.mu.handles {
		if live[name] == nil {
			h.obsolete.Store(true)
		}
	}
	t.mu.handles, t.mu.manifest = live, m
	t.setViewLocked(v)
}

// setViewLocked makes v the current view.
func (t *Timeline) setViewLocked(v *view) {
	v.refs.Store(1)
	v.open.refs.Add(1)
	for _, m := range v.frozen {
		m.refs.Add(1)
	}
	for _, h := range v.handles() {
		h.refs.Add(1)
	}
	old := t.mu.view
	t.mu.view = v
	t.broadcastLocked()
	if old.refs.Load() > 0 { // false only for the empty view that Open begins with
		t.release(old)
	}
}

// hold gives the current view.
func (t *Timeline) holdLocked() *view {
	t.mu.view.refs.Add(1)
	return t.mu.view
}

// release gives a view back; the last one that had an old layer lets go of it.
func (t *Timeline) release(v *view) {
	if v.refs.Add(-1) > 0 {
		return
	}
	v.open.release()
	for _, m := range v.frozen {
		m.release()
	}
	for _, h := range v.handles() {
		if h.refs.Add(-1) == 0 {
			h.close(t)
			if h.obsolete.Load() {
				t.chores.add(func() { t.deleteLayer(h.desc.Object) })
			}
		}
	}
}
