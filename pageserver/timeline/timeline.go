package timeline

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/holdfastdb/holdfast/internal/blob"
	"github.com/holdfastdb/holdfast/internal/pg"
)

// Timeline is one branch's history. All methods but Put are safe for concurrent use; Put is
// called by one goroutine, beside any number of readers.
type Timeline struct {
	cfg        Config
	generation uint64
	blocks     *blockCache
	hot        *hotCache
	notes      notes
	disk       *diskCache
	chores     *chores
	making     making
	cancelRing func()
	nextObject atomic.Uint64 // number of the next layer file
	nextLayer  atomic.Uint64 // id of the next handle

	ctx  context.Context // ends with Close, or when the timeline fails
	stop context.CancelFunc
	wg   sync.WaitGroup

	// putting is held by whoever changes which table is open, and while Put inserts.
	putting    chan struct{}
	compactNow chan chan error
	flushRate  atomic.Int64 // bytes a second of the last flush
	uses       atomic.Int64 // counts uses of layer files: their handles' clock
	openFiles  atomic.Int64

	commitMu sync.Mutex
	etag     blob.ETag // of the manifest; owned by commitMu

	mu struct {
		sync.Mutex
		err      error // once set, the answer of every call
		view     *view
		manifest *manifest
		handles  map[string]*handle // of the view's layers
		last     pg.LSN
		waiters  []waiter
		// changed is closed, and replaced, when frozen layers, durability or err change.
		changed chan struct{}
		pins    map[*pg.LSN]struct{}
		cutoff  pg.LSN // of the running compaction
	}
}

type waiter struct {
	lsn  pg.LSN
	done chan struct{}
}

// Create makes the branch, whose history begins at start, and opens it. It gives
// blob.ErrExists if the branch is there already.
func Create(ctx context.Context, cfg Config, start pg.LSN) (*Timeline, error) {
	cfg.EnsureDefaults()
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	if start == pg.InvalidLSN {
		return nil, fmt.Errorf("creating branch %s: LSN %s cannot be its start", cfg.Branch, start)
	}
	m := &manifest{Project: cfg.Project, Branch: cfg.Branch, Generation: 1,
		Start: lsnText(start), Durable: lsnText(start), Horizon: lsnText(start)}
	data, err := m.encode()
	if err != nil {
		return nil, err
	}
	// A write whose outcome is not known is not repeated: the caller looks by opening.
	if _, err := cfg.Store.Create(ctx, cfg.manifestKey(), bytes.NewReader(data), int64(len(data))); err != nil {
		return nil, fmt.Errorf("creating manifest %s: %w", cfg.manifestKey(), err)
	}
	return Open(ctx, cfg)
}

// Open opens the branch and takes it over from any other server that has it open. It gives
// blob.ErrNotFound if there is no such branch.
func Open(ctx context.Context, cfg Config) (*Timeline, error) {
	cfg.EnsureDefaults()
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	m, etag, err := takeOver(ctx, &cfg)
	if err != nil {
		return nil, fmt.Errorf("opening branch %s: %w", cfg.Branch, err)
	}
	t := &Timeline{cfg: cfg, generation: m.Generation, etag: etag,
		putting: make(chan struct{}, 1), compactNow: make(chan chan error),
		blocks: newBlockCache(cfg.BlockCacheBytes), hot: newHotCache(cfg.BlockCacheBytes / 4), chores: newChores()}
	t.ctx, t.stop = context.WithCancel(context.Background())
	t.disk = newDiskCache(cfg.Dir, cfg.DiskCacheBytes, cfg.Log, t.forget)
	t.mu.changed = make(chan struct{})
	t.mu.handles = make(map[string]*handle)
	t.mu.pins = make(map[*pg.LSN]struct{})
	t.mu.last = pg.LSN(m.Durable)
	t.mu.manifest = m
	t.mu.view = &view{open: &memtable{}}
	t.mu.Lock()
	t.installLocked(m)
	t.mu.Unlock()
	t.disk.adopt(m)

	t.cancelRing = cfg.Ring.OnShred(cfg.Project, cfg.Branch, t.shred)
	if err := t.checkKey(ctx, m); err != nil {
		t.Close()
		return nil, fmt.Errorf("opening branch %s: %w", cfg.Branch, err)
	}
	if err := t.loadCopies(ctx); err != nil {
		t.Close()
		return nil, fmt.Errorf("opening branch %s: reading which databases are copies: %w", cfg.Branch, err)
	}
	t.chores.add(func() { t.sweepOrphans(m) })
	t.wg.Go(t.runFlusher)
	t.wg.Go(t.runCompactor)
	t.wg.Go(func() { t.chores.run(t.ctx) })
	return t, nil
}

// checkKey sees that the project's key can be used, and so takes out the lease whose end
// calls shred. What it asks for is the DEK of the manifest's newest layer, or a new one.
func (t *Timeline) checkKey(ctx context.Context, m *manifest) (err error) {
	if n := len(m.Layers); n > 0 {
		d := &m.Layers[n-1]
		_, err = t.cfg.Ring.Open(ctx, t.cfg.sealContext(d.Object), d.Wrapped)
	} else {
		_, _, err = t.cfg.Ring.Generate(ctx, t.cfg.sealContext(t.newName(levelFlushed)))
	}
	return err
}

func (t *Timeline) newName(level int) string {
	return t.cfg.layerName(t.generation, t.nextObject.Add(1), level)
}

// LastLSN is the LSN up to which everything was put.
func (t *Timeline) LastLSN() pg.LSN {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.mu.last
}

// DurableLSN is the LSN up to which everything is in the bucket: after a restart the
// timeline has everything at or below it, and wants everything above it again.
func (t *Timeline) DurableLSN() pg.LSN {
	t.mu.Lock()
	defer t.mu.Unlock()
	return pg.LSN(t.mu.manifest.Durable)
}

// HorizonLSN is the least LSN that can be read.
func (t *Timeline) HorizonLSN() pg.LSN {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.mu.view.horizon
}

// Err is why the timeline can no longer be used, or nil. Done is closed at that time.
func (t *Timeline) Err() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.mu.err
}

// Done is closed when the timeline can no longer be used.
func (t *Timeline) Done() <-chan struct{} { return t.ctx.Done() }

// Pin keeps reads at lsn possible until it is released (P3).
func (t *Timeline) Pin(lsn pg.LSN) (release func(), err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.mu.err != nil {
		return nil, t.mu.err
	}
	if oldest := max(t.mu.view.horizon, t.mu.cutoff); lsn < oldest {
		return nil, fmt.Errorf("branch %s at %s: %w: it goes back to %s", t.cfg.Branch, lsn, ErrTooOld, oldest)
	}
	pin := &lsn
	t.mu.pins[pin] = struct{}{}
	return func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		delete(t.mu.pins, pin)
	}, nil
}

// Close stops the timeline and waits for what runs in it. What is not durable is not
// flushed: it comes again from the safekeepers. Call Flush before to spare that.
func (t *Timeline) Close() error {
	t.fail(fmt.Errorf("branch %s: %w", t.cfg.Branch, ErrClosed))
	t.cancelRing()
	t.wg.Wait()
	t.closeFiles()
	return nil
}

// fail ends the timeline: the first err is the answer of every later call, and what is
// in memory is wiped. Calls that are under way see the error before they give a result.
func (t *Timeline) fail(err error) (wiped remains) {
	t.mu.Lock()
	if t.mu.err != nil {
		t.mu.Unlock()
		return remains{}
	}
	t.mu.err = err
	v := t.mu.view
	for _, w := range t.mu.waiters {
		close(w.done)
	}
	t.mu.waiters = nil
	t.broadcastLocked()
	t.mu.Unlock()
	if !errors.Is(err, ErrClosed) {
		t.cfg.Log.Error("the timeline stopped", "error", err)
	}
	t.stop()
	for _, m := range append([]*memtable{v.open}, v.frozen...) {
		wiped.versions += m.wipe()
	}
	wiped.blocks, wiped.images = t.blocks.drop(), t.hot.drop()
	t.notes.drop()
	return wiped
}

func (t *Timeline) broadcastLocked() {
	close(t.mu.changed)
	t.mu.changed = make(chan struct{})
}

// WaitFor waits until LastLSN is lsn or more.
func (t *Timeline) WaitFor(ctx context.Context, lsn pg.LSN) error {
	t.mu.Lock()
	if t.mu.err != nil || t.mu.last >= lsn {
		defer t.mu.Unlock()
		return t.mu.err
	}
	w := waiter{lsn, make(chan struct{})}
	t.mu.waiters = append(t.mu.waiters, w)
	t.mu.Unlock()
	select {
	case <-w.done:
		return t.Err()
	case <-ctx.Done():
		t.dropWaiter(w)
		return fmt.Errorf("waiting for %s on branch %s, which has %s: %w", lsn, t.cfg.Branch, t.LastLSN(), ctx.Err())
	}
}

func (t *Timeline) dropWaiter(w waiter) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for i := range t.mu.waiters {
		if t.mu.waiters[i].done == w.done {
			t.mu.waiters = append(t.mu.waiters[:i], t.mu.waiters[i+1:]...)
			return
		}
	}
}

// advanceLocked sets LastLSN and wakes who waits for it.
func (t *Timeline) advanceLocked(lsn pg.LSN) {
	t.mu.last = lsn
	keep := t.mu.waiters[:0]
	for _, w := range t.mu.waiters {
		if w.lsn <= lsn {
			close(w.done)
		} else {
			keep = append(keep, w)
		}
	}
	t.mu.waiters = keep
}

// waitChange waits until cond, which runs under t.mu, is true.
func (t *Timeline) waitChange(ctx context.Context, cond func() bool) error {
	for {
		t.mu.Lock()
		err, ok, changed := t.mu.err, cond(), t.mu.changed
		t.mu.Unlock()
		if err != nil {
			return err
		}
		if ok {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// acquire takes a semaphore.
func acquire(ctx context.Context, sem chan struct{}) error {
	select {
	case sem <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// pause sleeps, but not longer than ctx lasts.
func pause(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-timer.C:
	}
}

// removeQuietly deletes a local file; one that stays is found at the next Open.
func removeQuietly(path string) { _ = os.Remove(path) }
