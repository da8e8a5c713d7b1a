package timeline

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/holdfastdb/holdfast/internal/keyring"
	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/pageserver/keyspace"
)

// runCompactor compacts when there are CompactAfter L0 files, or when asked to.
func (t *Timeline) runCompactor() {
	wait := t.cfg.backoff()
	for {
		t.mu.Lock()
		ended, changed := t.mu.err != nil, t.mu.changed
		due := t.cfg.CompactAfter > 0 && len(t.mu.view.flushed) >= t.cfg.CompactAfter
		t.mu.Unlock()
		if ended {
			return
		}
		var asked chan error
		if !due {
			select {
			case <-changed:
				continue
			case <-t.ctx.Done():
				return
			case asked = <-t.compactNow:
			}
		}
		err := t.compact()
		if asked != nil {
			asked <- err
			continue
		}
		if err == nil {
			wait = t.cfg.backoff()
		} else if !wait.sleep(t.ctx, err) {
			return
		}
	}
}

// Compact merges all L0 files into partitions now, whatever their number. It goes on if ctx
// ends.
func (t *Timeline) Compact(ctx context.Context) error {
	asked := make(chan error, 1)
	select {
	case t.compactNow <- asked:
	case <-t.ctx.Done():
		return t.Err()
	case <-ctx.Done():
		return ctx.Err()
	}
	select {
	case err := <-asked:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (t *Timeline) compact() error {
	c, err := t.newCompaction(t.ctx)
	if err != nil || c == nil {
		return err
	}
	defer c.close()
	if err = c.run(); errors.Is(err, keyring.ErrRevoked) {
		t.revoked(err)
	}
	if failed := t.Err(); failed != nil {
		return failed
	}
	return err
}

// compaction executes a plan. Its inputs are those of the view it holds.
type compaction struct {
	t       *Timeline
	ctx     context.Context
	v       *view
	cutoff  pg.LSN
	dirs    map[keyspace.Dir]dirPlan
	plan    compactionPlan
	handles map[string]*handle
	outputs []layerDesc

	builder *builder     // of the output under way, or nil
	last    keyspace.Key // that was given to it
	level   int
	resumed time.Time
	failed  int // keys whose changes could not be applied
}

// newCompaction plans, or gives nil if there is nothing to merge.
func (t *Timeline) newCompaction(ctx context.Context) (*compaction, error) {
	t.mu.Lock()
	if t.mu.err != nil || len(t.mu.view.flushed) == 0 {
		defer t.mu.Unlock()
		return nil, t.mu.err
	}
	c := &compaction{t: t, ctx: ctx, v: t.holdLocked(), handles: make(map[string]*handle), resumed: time.Now()}
	c.cutoff = t.cutoffLocked()
	t.mu.cutoff = c.cutoff
	layers := t.mu.manifest.Layers
	t.mu.Unlock()
	c.dirs = c.v.copies.plan(c.cutoff)
	for _, h := range c.v.handles() {
		c.handles[h.desc.Object] = h
	}
	var err error
	c.plan = planCompaction(layers, t.cfg.MaxStack, func(from, to keyspace.Key, endless bool) int64 {
		n, shareErr := c.share(from, to, endless)
		err = errors.Join(err, shareErr)
		return n
	})
	if err != nil {
		c.close()
		return nil, err
	}
	return c, nil
}

// cutoffLocked is the least LSN that must stay readable: that of the window, or of a pin (P3).
func (t *Timeline) cutoffLocked() pg.LSN {
	m := t.mu.manifest
	cutoff := max(pg.LSN(m.Durable), pg.LSN(t.cfg.HistoryBytes)) - pg.LSN(t.cfg.HistoryBytes)
	for pin := range t.mu.pins {
		cutoff = min(cutoff, *pin)
	}
	return max(cutoff, pg.LSN(m.Horizon))
}

func (c *compaction) close() {
	if c.builder != nil {
		c.builder.abort()
	}
	c.t.mu.Lock()
	c.t.mu.cutoff = 0
	c.t.mu.Unlock()
	c.t.release(c.v)
}

// share is about how many bytes the L0 files have of a range of keys.
func (c *compaction) share(from, to keyspace.Key, endless bool) (int64, error) {
	var sum int64
	for _, h := range c.v.flushed {
		f, err := c.t.openFile(c.ctx, h)
		if err != nil {
			return 0, err
		}
		first, end := f.BlockFrom(from), f.Blocks()
		if !endless {
			end = f.BlockFrom(to)
		}
		sum += int64(float64(h.desc.Size) * float64(end-first) / float64(f.Blocks()))
		f.release()
	}
	return sum, nil
}

func (c *compaction) run() error {
	out := make(map[string]bool)
	for _, name := range c.plan.flushed {
		out[name] = true
	}
	for i := range c.plan.parts {
		p := &c.plan.parts[i]
		if err := c.partition(p); err != nil {
			c.giveUp()
			return err
		}
		for _, name := range p.inputs {
			out[name] = true
		}
	}
	if c.failed > 0 {
		c.t.cfg.Log.Info("keys keep their changes since no image could be made of them", "keys", c.failed)
	}
	return c.t.commit(func(next *manifest) {
		next.replace(out, c.outputs)
		next.Horizon = max(next.Horizon, lsnText(c.cutoff))
	}, func() {})
}

// giveUp deletes what was uploaded and will not be used: no commit was tried.
func (c *compaction) giveUp() {
	for _, d := range c.outputs {
		c.t.making.drop(d.Object)
		c.t.chores.add(func() { c.t.deleteLayer(d.Object) })
	}
}

// partition merges one partition.
func (c *compaction) partition(p *partPlan) error {
	inputs := make([]*handle, 0, len(p.inputs)+len(c.plan.flushed))
	for _, name := range slices.Concat(p.inputs, c.plan.flushed) {
		inputs = append(inputs, c.handles[name])
	}
	m, err := c.t.newMerger(c.ctx, inputs, p.from, p.to, p.endless)
	if err != nil {
		return err
	}
	defer m.close()
	f := c.folder(p)
	for {
		e, more, err := m.next()
		if err != nil {
			return err
		}
		if !more {
			break
		}
		if err := f.add(e); err != nil {
			return err
		}
	}
	if err := f.end(); err != nil {
		return err
	}
	c.failed += f.failed
	return c.finishOutput()
}

func (c *compaction) folder(p *partPlan) *folder {
	f := &folder{cutoff: c.cutoff, dirs: c.dirs, lowest: p.fold, imageAfter: c.t.cfg.ImageAfter,
		materialize: c.t.cfg.Materialize, emit: c.emit}
	f.below = func(key keyspace.Key, l *life) (History, error) {
		return c.t.below(c.ctx, c.v, key, l, func(col *collector) error {
			if f.lowest {
				return nil
			}
			return c.t.collectPartition(c.ctx, c.v, key, maxLSN, col)
		})
	}
	c.level = levelBase
	if !p.fold {
		f.imageAfter *= flushImageAfter
		c.level = levelChanges
	}
	return f
}

// emit writes to the output under way. An output ends between two keys.
func (c *compaction) emit(e Entry) error {
	if c.builder != nil && e.Key != c.last && c.builder.w.Size() >= c.t.cfg.LayerBytes {
		if err := c.finishOutput(); err != nil {
			return err
		}
	}
	if c.builder == nil {
		b, err := c.t.newBuilder(c.level)
		if err != nil {
			return err
		}
		c.builder = b
	}
	c.last = e.Key
	c.yield()
	return c.builder.add(e)
}

func (c *compaction) finishOutput() error {
	b := c.builder
	if b == nil {
		return nil
	}
	c.builder = nil
	if err := b.upload(); err != nil {
		return err
	}
	c.outputs = append(c.outputs, b.desc)
	return c.ctx.Err()
}

// A compaction works for workSlice, then leaves the processor to reads and writes for as
// long; for a fifth of that when L0 files pile up.
const workSlice = 5 * time.Millisecond

func (c *compaction) yield() {
	if time.Since(c.resumed) < workSlice {
		return
	}
	rest := workSlice
	c.t.mu.Lock()
	if len(c.t.mu.view.flushed) >= 2*c.t.cfg.CompactAfter {
		rest /= 5
	}
	c.t.mu.Unlock()
	pause(c.ctx, rest)
	c.resumed = time.Now()
}
