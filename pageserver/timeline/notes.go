package timeline

import (
	"context"
	"sync"
	"sync/atomic"

	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/pageserver/keyspace"
)

// maxNotes bounds the notes; one takes some 60 bytes.
const maxNotes = 1 << 16

// notes are small numbers that callers found out about keys: what a free space map says of a heap
// page, for which the page need not be made again while it has no newer version.
type notes struct {
	// cut is the highest LSN of a Tombstone, or of a copied folder. A note from before it counts no
	// more: compaction may drop a Tombstone, and nothing tells then that the key has changed.
	cut atomic.Uint64

	mu struct {
		sync.Mutex
		of      map[keyspace.Key]note
		dropped bool
	}
}

type note struct {
	lsn   pg.LSN
	value int32
}

// Note keeps a number that follows from what Get gave of a key at lsn.
func (t *Timeline) Note(key keyspace.Key, lsn pg.LSN, value int) {
	n := &t.notes
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.mu.dropped || n.mu.of[key].lsn > lsn {
		return
	}
	if n.mu.of == nil || len(n.mu.of) >= maxNotes {
		n.mu.of = make(map[keyspace.Key]note)
	}
	n.mu.of[key] = note{lsn, int32(value)}
}

// Noted gives the number if it is still right at lsn, which is as for Get.
func (t *Timeline) Noted(ctx context.Context, key keyspace.Key, lsn pg.LSN) (value int, ok bool) {
	t.notes.mu.Lock()
	n, ok := t.notes.mu.of[key]
	t.notes.mu.Unlock()
	if !ok || n.lsn > lsn || n.lsn <= pg.LSN(t.notes.cut.Load()) {
		return 0, false
	}
	if n.lsn == lsn {
		return int(n.value), true
	}
	v, err := t.holdAt(lsn)
	if err != nil {
		return 0, false
	}
	defer t.release(v)
	changed, err := t.changed(ctx, v, key, n.lsn, lsn)
	return int(n.value), err == nil && !changed && t.Err() == nil
}

// changed tells whether the key has a version above after, up to lsn.
func (t *Timeline) changed(ctx context.Context, v *view, key keyspace.Key, after, lsn pg.LSN) (bool, error) {
	c := collector{above: after, peek: true}
	if v.open.collect(key, lsn, &c); c.done {
		return c.met, nil
	}
	for _, m := range v.frozen {
		if m.collect(key, lsn, &c); c.done {
			return c.met, nil
		}
	}
	p := v.partOf(key)
	for _, list := range [][]*handle{v.flushed, p.stack, {p.base}} {
		for _, h := range list {
			if h == nil || pg.LSN(h.desc.MaxLSN) <= after {
				continue
			}
			if err := t.collectLayer(ctx, h, key, lsn, &c); err != nil || c.done {
				return c.met, err
			}
		}
	}
	return false, nil
}

// noteCut is told of what is about to be put.
func (n *notes) noteCut(entries []Entry) {
	for i := range entries {
		e := &entries[i]
		_, copied := e.Key.CopyDir()
		if (copied || e.Kind == Tombstone) && uint64(e.LSN) > n.cut.Load() {
			n.cut.Store(uint64(e.LSN))
		}
	}
}

// drop forgets all, for good.
func (n *notes) drop() {
	n.mu.Lock()
	defer n.mu.Unlock()
	clear(n.mu.of)
	n.mu.of, n.mu.dropped = nil, true
}
