package timeline

import (
	"errors"
	"time"

	"github.com/holdfastdb/holdfast/internal/keyring"
	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/pageserver/keyspace"
)

// runFlusher makes frozen tables into layer files, the oldest first, and freezes the open
// one when it is old.
func (t *Timeline) runFlusher() {
	if t.cfg.FlushAge > 0 {
		t.wg.Go(t.runAging)
	}
	for {
		var m *memtable
		err := t.waitChange(t.ctx, func() bool {
			if n := len(t.mu.view.frozen); n > 0 {
				m = t.mu.view.frozen[n-1]
			}
			return m != nil
		})
		if err != nil || !t.flush(m) {
			return
		}
	}
}

// runAging freezes the open table when it is old, so that the safekeepers need not keep
// the WAL of a quiet branch for long.
func (t *Timeline) runAging() {
	tick := time.NewTicker(max(t.cfg.FlushAge/4, time.Millisecond))
	defer tick.Stop()
	for {
		select {
		case <-t.ctx.Done():
			return
		case <-tick.C:
		}
		if acquire(t.ctx, t.putting) != nil {
			return
		}
		t.mu.Lock()
		if t.mu.err == nil && t.dirtyLocked() && time.Since(t.mu.view.open.born) >= t.cfg.FlushAge && len(t.mu.view.frozen) < t.cfg.MaxFrozen {
			t.freezeLocked()
		}
		t.mu.Unlock()
		<-t.putting
	}
}

// flush makes m durable; false if the timeline ended.
func (t *Timeline) flush(m *memtable) bool {
	for wait := t.cfg.backoff(); ; {
		start := time.Now()
		err := t.flushOnce(m)
		if err == nil {
			if d := time.Since(start); d > 0 && m.size() > 0 {
				t.flushRate.Store(int64(float64(m.size()) / d.Seconds()))
			}
			return true
		}
		if errors.Is(err, keyring.ErrRevoked) {
			t.revoked(err)
		}
		if !wait.sleep(t.ctx, err) {
			return false
		}
	}
}

func (t *Timeline) flushOnce(m *memtable) error {
	end := lsnText(t.frozenEnd(m))
	var layers []layerDesc
	if m.size() > 0 {
		d, err := t.writeFrozen(m)
		if err != nil {
			return err
		}
		layers = append(layers, d)
	}
	return t.commit(func(next *manifest) {
		next.replace(nil, layers)
		next.Durable = end
	}, func() {
		v := t.mu.view
		t.setViewLocked(v.with(v.open, v.frozen[:len(v.frozen)-1]))
	})
}

func (t *Timeline) frozenEnd(m *memtable) pg.LSN {
	t.mu.Lock()
	defer t.mu.Unlock()
	return m.end
}

// flushImageAfter makes flushing give images only to the keys for which they are
// about as large as their changes, as a multiple of Config.ImageAfter.
const flushImageAfter = 4

// writeFrozen uploads m as a layer file. Keys with very many changes end in an image.
func (t *Timeline) writeFrozen(m *memtable) (layerDesc, error) {
	t.mu.Lock()
	if t.mu.err != nil {
		defer t.mu.Unlock()
		return layerDesc{}, t.mu.err
	}
	v := t.holdLocked() // m is its oldest frozen table, so files alone are below it
	t.mu.Unlock()
	defer t.release(v)
	b, err := t.newBuilder(levelFlushed)
	if err != nil {
		return layerDesc{}, err
	}
	f := &folder{dirs: v.copies.plan(0), imageAfter: flushImageAfter * t.cfg.ImageAfter, materialize: t.cfg.Materialize, emit: b.add,
		below: func(key keyspace.Key, l *life) (History, error) {
			return t.below(t.ctx, v, key, l, func(c *collector) error { return t.collectFiles(t.ctx, v, key, maxLSN, c) })
		}}
	err = m.all(func(e Entry, ofKey int) error {
		if ofKey >= f.imageAfter {
			return f.add(e)
		}
		if err := f.end(); err != nil { // of a key before
			return err
		}
		return b.add(e) // too few to be folded: the folder need not gather them
	})
	if err == nil {
		err = f.end()
	}
	if err != nil {
		b.abort()
		return layerDesc{}, err
	}
	err = b.upload()
	return b.desc, err
}

// maxLSN is above every LSN.
const maxLSN = ^pg.LSN(0)
