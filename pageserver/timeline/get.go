package timeline

import (
	"context"
	"fmt"

	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/pageserver/keyspace"
	"github.com/holdfastdb/holdfast/pageserver/layer"
)

// Get gives what the key's value at lsn is made of. The caller owns it. lsn is at most
// LastLSN (ErrNotYet) and at least HorizonLSN (ErrTooOld).
func (t *Timeline) Get(ctx context.Context, key keyspace.Key, lsn pg.LSN) (History, error) {
	v, err := t.holdAt(lsn)
	if err != nil {
		return History{}, err
	}
	defer t.release(v)
	above, sources := v.copies.at(key, lsn)
	h, err := t.history(ctx, v, key, Source{Above: above, UpTo: lsn}, sources)
	if failed := t.Err(); failed != nil { // what was read may have been wiped meanwhile
		return History{}, failed
	}
	if err != nil {
		return History{}, fmt.Errorf("reading key %x at %s on branch %s: %w", key[:], lsn, t.cfg.Branch, err)
	}
	return h, nil
}

// history is what the versions of a key within the bounds of span make. If they have no base
// it stands on what sources have; span's Dir does not count.
func (t *Timeline) history(ctx context.Context, v *view, key keyspace.Key, span Source, sources []Source) (History, error) {
	c := collector{above: span.Above, floor: t.hot.get(key, span.UpTo)}
	if err := t.collect(ctx, v, key, span.UpTo, &c); err != nil {
		return History{}, err
	}
	h, err := t.complete(ctx, v, key, &c, sources)
	if err != nil {
		return History{}, err
	}
	return t.shorten(key, h), nil
}

// complete puts what was collected of a key on top of what sources have, if it needs that.
func (t *Timeline) complete(ctx context.Context, v *view, key keyspace.Key, c *collector, sources []Source) (History, error) {
	h := c.result()
	if c.whole || len(sources) == 0 {
		return h, nil
	}
	from := key.In(sources[0].Dir)
	below, err := t.history(ctx, v, from, sources[0], sources[1:])
	if below.Base != nil || len(below.Changes) > 0 {
		h.Origin = &Origin{from, below}
	} else {
		h.Origin = below.Origin
	}
	return h, err
}

// below is what the changes of a key in a life stand on: what collect finds of the key, and
// the sources.
func (t *Timeline) below(ctx context.Context, v *view, key keyspace.Key, l *life, collect func(*collector) error) (History, error) {
	var c collector
	var sources []Source
	if l != nil {
		c.above, sources = l.above, l.sources
	}
	if err := collect(&c); err != nil {
		return History{}, err
	}
	return t.complete(ctx, v, key, &c, sources)
}

// shorten makes one image of a very long history, and remembers it for the next read.
func (t *Timeline) shorten(key keyspace.Key, h History) History {
	n := len(h.Changes)
	if !h.hasBase() || t.cfg.Materialize == nil || n < flushImageAfter*t.cfg.ImageAfter {
		return h
	}
	data, err := t.cfg.Materialize(key, h)
	if err != nil {
		return h // the caller's own redo meets the error and can say more of it
	}
	image := &Value{LSN: h.Changes[n-1].LSN, Kind: Image, Data: data}
	t.Remember(key, image.LSN, data)
	return History{Base: image}
}

// Remember keeps an image of what Get gave at lsn, so that the next reads of the key need only the
// changes since. It copies data.
func (t *Timeline) Remember(key keyspace.Key, lsn pg.LSN, data []byte) {
	if lsn < t.LastLSN() { // else versions at lsn may be still to come
		t.hot.keep(key, &Value{LSN: lsn, Kind: Image, Data: data})
	}
}

// holdAt gives the current view if it can be read at lsn.
func (t *Timeline) holdAt(lsn pg.LSN) (*view, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.mu.err != nil {
		return nil, t.mu.err
	}
	if lsn > t.mu.last {
		return nil, fmt.Errorf("branch %s at %s: %w: it has %s", t.cfg.Branch, lsn, ErrNotYet, t.mu.last)
	}
	if h := t.mu.view.horizon; lsn < h {
		return nil, fmt.Errorf("branch %s at %s: %w: it goes back to %s", t.cfg.Branch, lsn, ErrTooOld, h)
	}
	return t.holdLocked(), nil
}

// collect looks through the view from new to old.
func (t *Timeline) collect(ctx context.Context, v *view, key keyspace.Key, lsn pg.LSN, c *collector) error {
	if v.open.collect(key, lsn, c); c.done {
		return nil
	}
	for _, m := range v.frozen {
		if m.collect(key, lsn, c); c.done {
			return nil
		}
	}
	return t.collectFiles(ctx, v, key, lsn, c)
}

func (t *Timeline) collectFiles(ctx context.Context, v *view, key keyspace.Key, lsn pg.LSN, c *collector) error {
	for _, h := range v.flushed {
		if err := t.collectLayer(ctx, h, key, lsn, c); err != nil || c.done {
			return err
		}
	}
	return t.collectPartition(ctx, v, key, lsn, c)
}

func (t *Timeline) collectPartition(ctx context.Context, v *view, key keyspace.Key, lsn pg.LSN, c *collector) error {
	p := v.partOf(key)
	for _, h := range p.stack {
		if err := t.collectLayer(ctx, h, key, lsn, c); err != nil || c.done {
			return err
		}
	}
	if p.base == nil {
		return nil
	}
	return t.collectLayer(ctx, p.base, key, lsn, c)
}

// collectLayer looks into one layer file, block by block towards older versions.
func (t *Timeline) collectLayer(ctx context.Context, h *handle, key keyspace.Key, lsn pg.LSN, c *collector) error {
	if !h.covers(key, lsn) {
		return nil
	}
	f, err := t.openFile(ctx, h)
	if err != nil {
		return err
	}
	defer f.release()
	if !f.MayContain(key) {
		return nil
	}
	for i := f.BlockOf(key, lsn); i >= 0; i-- {
		b, err := t.readBlock(ctx, h, i)
		if err != nil {
			return err
		}
		more := collectBlock(b.Block, key, lsn, c)
		b.release()
		if !more {
			return nil
		}
	}
	return nil
}

// collectBlock tells whether older versions may be in the block before.
func collectBlock(b *layer.Block, key keyspace.Key, lsn pg.LSN, c *collector) (more bool) {
	for j := b.After(key, lsn) - 1; j >= 0; j-- {
		e := b.Entry(j)
		if e.Key != key || c.add(e.LSN, ValueKind(e.Kind), e.Data) {
			return false
		}
	}
	return true
}
