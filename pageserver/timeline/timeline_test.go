package timeline

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/holdfastdb/holdfast/internal/blob"
	"github.com/holdfastdb/holdfast/internal/blob/blobtest"
	"github.com/holdfastdb/holdfast/internal/blob/dirblob"
	"github.com/holdfastdb/holdfast/internal/keyring"
	"github.com/holdfastdb/holdfast/internal/keyring/keyringtest"
	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/pageserver/keyspace"
)

// filled makes a branch with some durable layers.
func filled(t *testing.T, change func(*Config)) *modelRun {
	t.Helper()
	r := newModelRun(t, 4)
	r.cfg.CompactAfter, r.cfg.FlushBytes, r.cfg.HistoryBytes, r.cfg.BlockCacheBytes = -1, 1<<30, 1<<30, 1
	r.cfg.OpenLayers, r.cfg.DiskCacheBytes, r.cfg.Dir = 100, 1<<30, t.TempDir()
	if change != nil {
		change(&r.cfg)
	}
	var err error
	if r.tl, err = Create(t.Context(), r.cfg, testStart); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.tl.Close() })
	for range 4 {
		r.putSome(5)
		if err := r.tl.Flush(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	return r
}

func (r *modelRun) putSome(n int) {
	r.t.Helper()
	for range n {
		entries, upTo := r.m.randomEntries(r.rng, r.keys)
		mustPut(r.t, r.tl, r.m, entries, upTo+8)
	}
}

func (r *modelRun) layers() []string { return r.store.keys(r.cfg.layerPrefix()) }

func TestSupersededServerStops(t *testing.T) {
	r := filled(t, func(c *Config) { c.Dir = "" })
	r.putSome(3)
	newer, err := Open(t.Context(), r.cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer newer.Close()
	durable := newer.DurableLSN()
	err = r.tl.Flush(t.Context())
	if !errors.Is(err, ErrSuperseded) {
		t.Fatalf("Flush of the older: %v, want ErrSuperseded", err)
	}
	for name, err := range everyCall(t.Context(), r.tl) {
		if !errors.Is(err, ErrSuperseded) {
			t.Errorf("%s of the older: %v, want ErrSuperseded", name, err)
		}
	}
	if newer.DurableLSN() != durable || newer.Err() != nil {
		t.Error("the newer one was disturbed")
	}
	// The older one read a layer that the newer one deleted: it finds out why.
	if err := newer.Compact(t.Context()); err != nil {
		t.Fatal(err)
	}
	r.m.forget(durable)
	checkAll(t, newer, r.m, r.rng)
}

func TestReadOfWhatANewerServerDeleted(t *testing.T) {
	r := filled(t, func(c *Config) { c.Dir = "" })
	newer, err := Open(t.Context(), r.cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer newer.Close()
	if err := newer.Compact(t.Context()); err != nil {
		t.Fatal(err)
	}
	waitUntil(t, "the L0 files to be deleted", func() bool {
		return !strings.Contains(strings.Join(r.layers(), " "), "-l0")
	})
	if _, err := r.tl.Get(t.Context(), pageKey(0), r.m.last); !errors.Is(err, ErrSuperseded) {
		t.Errorf("Get: %v, want ErrSuperseded", err)
	}
}

// everyCall calls everything that can fail.
func everyCall(ctx context.Context, tl *Timeline) map[string]error {
	errs := make(map[string]error)
	_, errs["Get"] = tl.Get(ctx, pageKey(0), testStart)
	errs["Scan"] = tl.Scan(ctx, pageKey(0), pageKey(9), testStart, func(keyspace.Key, Value) error { return nil })
	errs["Put"] = tl.Put(ctx, nil, tl.LastLSN()+8)
	errs["Flush"] = tl.Flush(ctx)
	errs["WaitFor"] = tl.WaitFor(ctx, tl.LastLSN())
	_, errs["Pin"] = tl.Pin(tl.LastLSN())
	errs["Compact"] = tl.Compact(ctx)
	errs["Err"] = tl.Err()
	return errs
}

// TestShred revokes the key while versions are in memory, frozen and in caches.
func TestShred(t *testing.T) {
	for name, end := range map[string]func(*keyringtest.Ring){"revoked": (*keyringtest.Ring).Revoke, "cut off": (*keyringtest.Ring).Cut} {
		t.Run(name, func(t *testing.T) {
			r := filled(t, func(c *Config) { c.BlockCacheBytes = 1 << 20 })
			ring := r.cfg.Ring.(*keyringtest.Ring)
			checkAll(t, r.tl, r.m, r.rng)
			r.putSome(3)
			open, waiting := r.tl.mu.view.open, make(chan error, 1)
			go func() { waiting <- r.tl.WaitFor(t.Context(), r.m.last+100) }()
			end(ring)
			for name, err := range everyCall(t.Context(), r.tl) {
				if !errors.Is(err, keyring.ErrRevoked) {
					t.Errorf("%s: %v, want ErrRevoked", name, err)
				}
			}
			if err := <-waiting; !errors.Is(err, keyring.ErrRevoked) {
				t.Errorf("WaitFor that waited: %v", err)
			}
			if _, err := Open(t.Context(), r.cfg); err == nil {
				t.Error("Open without the key succeeded")
			}
			if !open.mu.wiped || open.mu.arena != nil || len(r.tl.blocks.mu.blocks) != 0 || len(r.tl.hot.mu.images) != 0 {
				t.Error("plaintext is still in memory")
			}
			ring.Restore()
			r.reopen() // K3: all that was durable is there
			checkAll(t, r.tl, r.m, r.rng)
		})
	}
}

func TestMemtableWipeClearsTheArena(t *testing.T) {
	m := &memtable{}
	m.insert([]Entry{{pageKey(1), Value{LSN: 8, Kind: Image, Data: []byte("secret")}}})
	chunk := m.mu.arena[0]
	m.wipe()
	if bytes.Contains(chunk[:cap(chunk)], []byte("secret")) {
		t.Error("the data is still there")
	}
	if m.insert([]Entry{{pageKey(1), Value{LSN: 8, Kind: Image}}}) {
		t.Error("a wiped table took a version")
	}
}

// Flushing reads the sources of copies, which may be in the table that is flushed. A lock held
// meanwhile, and a wipe between its two holders, made Close wait for ever.
func TestAFrozenTableIsNotLockedWhileItIsFlushed(t *testing.T) {
	var m memtable
	var want []Entry
	for i := range 600 {
		size := 10 * i % 3000
		if i == 599 {
			size = 2 * lentBytes
		}
		want = append(want, Entry{pageKey(i / 200), Value{LSN: testStart + pg.LSN(i), Kind: Delta, Data: bytes.Repeat([]byte{byte(i)}, size)}})
	}
	m.insert(want)
	var have []Entry
	err := m.all(func(e Entry, _ int) error {
		if !m.mu.TryLock() {
			return errors.New("the table is locked")
		}
		m.mu.Unlock()
		e.Data = bytes.Clone(e.Data)
		have = append(have, e)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	same := func(a, b Entry) bool {
		return a.Key == b.Key && a.LSN == b.LSN && a.Kind == b.Kind && bytes.Equal(a.Data, b.Data)
	}
	if !slices.EqualFunc(want, have, same) {
		t.Errorf("the versions are not those that were put: %d, want %d", len(have), len(want))
	}
	err = m.all(func(Entry, int) error {
		m.wipe()
		return nil
	})
	if !errors.Is(err, errWiped) {
		t.Errorf("a table that is wiped meanwhile gives %v, want %v", err, errWiped)
	}
}

// stalledStore answers no read of a layer, and tells when one is asked for.
type stalledStore struct {
	*memStore
	asked func()
}

func (s stalledStore) GetRange(ctx context.Context, _ string, _ []byte, _ int64) (int, error) {
	s.asked()
	<-ctx.Done()
	return 0, ctx.Err()
}

// Opening reads the Copy keys from the layers. A server that ends must not wait for a bucket
// that does not answer.
func TestOpenEndsWithItsContext(t *testing.T) {
	r := filled(t, func(c *Config) { c.Dir = "" })
	end := r.tl.LastLSN() + 8
	note := Entry{keyspace.Copy(keyspace.Dir{Tablespace: 1663, Database: 5}), Value{LSN: end, Kind: Tombstone}}
	if err := errors.Join(r.tl.Put(t.Context(), []Entry{note}, end), r.tl.Flush(t.Context()), r.tl.Close()); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	r.cfg.Store = stalledStore{r.store, cancel}
	if _, err := Open(ctx, r.cfg); !errors.Is(err, context.Canceled) {
		t.Errorf("opening gives %v, want %v", err, context.Canceled)
	}
}

// TestBucketDown stops all writes for a while.
func TestBucketDown(t *testing.T) {
	var down atomic.Bool
	r := filled(t, func(c *Config) {
		c.MaxFrozen, c.FlushBytes = 2, 300
		c.Store = blobtest.NewFaulty(c.Store, func(op blobtest.Op, _ string) blobtest.Fault {
			if down.Load() && op != blobtest.OpGet {
				return blobtest.Lost
			}
			return blobtest.None
		})
	})
	durable := r.tl.DurableLSN()
	down.Store(true)
	var err error
	for i := 0; err == nil; i++ {
		if i > 100 {
			t.Fatal("Put never waited")
		}
		entries, upTo := r.m.randomEntries(r.rng, r.keys)
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Millisecond)
		if err = r.tl.Put(ctx, entries, upTo); err == nil {
			r.m.add(entries, upTo)
		}
		cancel()
	}
	if !errors.Is(err, context.DeadlineExceeded) || r.tl.DurableLSN() != durable {
		t.Fatalf("Put: %v; durable %s, was %s", err, r.tl.DurableLSN(), durable)
	}
	checkAll(t, r.tl, r.m, r.rng)
	down.Store(false)
	r.putSome(5)
	if err := r.tl.Flush(t.Context()); err != nil || r.tl.DurableLSN() != r.m.last {
		t.Fatalf("Flush: %v", err)
	}
	checkAll(t, r.tl, r.m, r.rng)
}

func TestPinHoldsHistory(t *testing.T) {
	r := filled(t, func(c *Config) { c.HistoryBytes = 1 })
	lsn := testStart + (r.m.last-testStart)/2
	release, err := r.tl.Pin(lsn)
	if err != nil {
		t.Fatal(err)
	}
	compact := func(want pg.LSN) {
		t.Helper()
		r.putSome(2)
		if err := errors.Join(r.tl.Flush(t.Context()), r.tl.Compact(t.Context())); err != nil {
			t.Fatal(err)
		}
		if want == 0 {
			want = r.m.last - 1
		}
		if h := r.tl.HorizonLSN(); h != want {
			t.Fatalf("horizon %s, want %s", h, want)
		}
	}
	compact(lsn)
	for _, key := range r.m.keys() {
		checkRead(t, r.tl, r.m, key, lsn)
	}
	release()
	compact(0)
	if _, err := r.tl.Pin(lsn); !errors.Is(err, ErrTooOld) {
		t.Errorf("Pin of what is gone: %v, want ErrTooOld", err)
	}
}

func TestPutRefuses(t *testing.T) {
	r := filled(t, nil)
	last, ctx := r.m.last, t.Context()
	at := func(lsn pg.LSN) Entry { return Entry{pageKey(1), Value{LSN: lsn, Kind: Image}} }
	for name, err := range map[string]error{
		"upTo goes back":    r.tl.Put(ctx, nil, last-8),
		"entry goes back":   r.tl.Put(ctx, []Entry{at(last - 8)}, last),
		"entry beyond upTo": r.tl.Put(ctx, []Entry{at(last + 16)}, last+8),
		"out of order":      r.tl.Put(ctx, []Entry{at(last + 16), at(last + 8)}, last+16),
		"no kind":           r.tl.Put(ctx, []Entry{{pageKey(1), Value{LSN: last + 8}}}, last+8),
		"too large":         r.tl.Put(ctx, []Entry{{pageKey(1), Value{LSN: last + 8, Kind: Image, Data: make([]byte, MaxValue+1)}}}, last+8),
	} {
		if err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	if r.tl.LastLSN() != last {
		t.Error("a refused Put advanced LastLSN")
	}
}

func TestImportAtOneLSN(t *testing.T) {
	r := newModelRun(t, 1)
	r.cfg.FlushBytes, r.cfg.CompactAfter = 2000, 2
	var err error
	if r.tl, err = Create(t.Context(), r.cfg, testStart); err != nil {
		t.Fatal(err)
	}
	defer func() { r.tl.Close() }()
	for i := range 50 { // the import's values all have the start's LSN, and come in many calls
		e := Entry{pageKey(i % 40), Value{LSN: testStart, Kind: Image, Data: fmt.Appendf(nil, "import %d %0200d", i, 0)}}
		mustPut(t, r.tl, r.m, []Entry{e}, testStart)
	}
	if err := r.tl.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	r.putSome(20)
	checkAll(t, r.tl, r.m, r.rng)
	r.reopen()
	checkAll(t, r.tl, r.m, r.rng)
}

func TestWaitFor(t *testing.T) {
	r := filled(t, nil)
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Millisecond)
	defer cancel()
	if err := r.tl.WaitFor(ctx, r.m.last+8); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("WaitFor: %v", err)
	}
	got := make(chan error, 1)
	go func() { got <- r.tl.WaitFor(t.Context(), r.m.last+8) }()
	waitUntil(t, "the waiter", func() bool { r.tl.mu.Lock(); defer r.tl.mu.Unlock(); return len(r.tl.mu.waiters) == 1 })
	if err := r.tl.Put(t.Context(), nil, r.m.last+8); err != nil {
		t.Fatal(err)
	}
	if err := <-got; err != nil {
		t.Error(err)
	}
}

func TestQuietBranchIsFlushedByAge(t *testing.T) {
	r := filled(t, func(c *Config) { c.FlushAge = 5 * time.Millisecond })
	r.putSome(1)
	waitUntil(t, "the flush", func() bool { return r.tl.DurableLSN() == r.m.last })
	// An LSN without versions needs no layer.
	n := len(r.layers())
	if err := r.tl.Put(t.Context(), nil, r.m.last+8); err != nil {
		t.Fatal(err)
	}
	waitUntil(t, "the flush", func() bool { return r.tl.DurableLSN() == r.m.last+8 })
	if len(r.layers()) != n {
		t.Error("an empty layer was written")
	}
}

func TestCreateAndOpenRefuse(t *testing.T) {
	r := filled(t, nil)
	if _, err := Create(t.Context(), r.cfg, testStart); !errors.Is(err, blob.ErrExists) {
		t.Errorf("Create of what exists: %v", err)
	}
	other := r.cfg
	other.Branch = "absent"
	if _, err := Open(t.Context(), other); !errors.Is(err, blob.ErrNotFound) {
		t.Errorf("Open of what is absent: %v", err)
	}
	for _, branch := range []string{"", "a/b", "..", strings.Repeat("x", 101)} {
		other.Branch = branch
		if _, err := Open(t.Context(), other); err == nil {
			t.Errorf("Open of %q succeeded", branch)
		}
	}
	r.tl.Close()
	for name, err := range everyCall(t.Context(), r.tl) {
		if !errors.Is(err, ErrClosed) {
			t.Errorf("%s after Close: %v", name, err)
		}
	}
}

// TestOrphans: a younger or equal generation's files, and strangers, are nobody's to sweep.
func TestOrphans(t *testing.T) {
	r := filled(t, nil)
	put := func(name string) string {
		blobtest.Put(t, r.store, name, "x")
		return name
	}
	old := put(r.cfg.layerName(1, 1000, 0))
	young := put(r.cfg.layerName(99, 1, 0))
	stranger := put(r.cfg.layerPrefix() + "notes.txt")
	r.reopen()
	waitUntil(t, "the orphan to be deleted", func() bool {
		_, err := r.store.Head(t.Context(), old)
		return errors.Is(err, blob.ErrNotFound)
	})
	for _, name := range []string{young, stranger} {
		if _, err := r.store.Head(t.Context(), name); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	checkAll(t, r.tl, r.m, r.rng)
}

// TestOrphansAreNotWhatAReadHolds merges an older generation's layers, while a read holds them,
// before the orphans are swept.
func TestOrphansAreNotWhatAReadHolds(t *testing.T) {
	r := filled(t, nil)
	r.reopen()
	r.tl.mu.Lock()
	opened, v := r.tl.mu.manifest, r.tl.holdLocked()
	r.tl.mu.Unlock()
	defer r.tl.release(v)
	if err := r.tl.Compact(t.Context()); err != nil {
		t.Fatal(err)
	}
	r.tl.sweepOrphans(opened)
	for i := range opened.Layers {
		if _, err := r.store.Head(t.Context(), opened.Layers[i].Object); err != nil {
			t.Errorf("layer %s: %v", opened.Layers[i].Object, err)
		}
	}
}

func TestOverADirectory(t *testing.T) {
	store, err := dirblob.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	r := filled(t, func(c *Config) { c.Store = store })
	if err := r.tl.Compact(t.Context()); err != nil {
		t.Fatal(err)
	}
	r.reopen()
	checkAll(t, r.tl, r.m, r.rng)
}

// TestHotKey reads a key after each of very many changes: no read takes more than a bounded
// number of them.
func TestHotKey(t *testing.T) {
	r := filled(t, func(c *Config) { c.ImageAfter, c.BlockCacheBytes = 4, 1<<20 })
	key, lsn := pageKey(100), r.m.last
	put := func(kind ValueKind, text string) {
		lsn += 8
		mustPut(t, r.tl, r.m, []Entry{{key, Value{LSN: lsn, Kind: kind, Data: []byte(text)}}}, lsn)
	}
	for round := range 3 {
		put(Image, "base")
		for i := range 200 {
			put(Delta, fmt.Sprint(",", i))
			checkRead(t, r.tl, r.m, key, lsn)
			checkRead(t, r.tl, r.m, key, lsn-pg.LSN(r.rng.IntN(100)*8))
			if h, err := r.tl.Get(t.Context(), key, lsn-8); err != nil || len(h.Changes) >= 4*flushImageAfter {
				t.Fatalf("%d changes, %v", len(h.Changes), err)
			}
		}
		if round < 2 && len(r.tl.hot.mu.images) == 0 {
			t.Error("no image was remembered")
		}
		put(Tombstone, "")
		checkRead(t, r.tl, r.m, key, lsn)
		put(Delta, "on nothing")
		checkRead(t, r.tl, r.m, key, lsn)
		if round == 1 {
			r.tl.hot.drop() // reads go on without
		}
	}
}

// TestRemember gives the timeline an image of a key: reads above it begin with it, others do not.
func TestRemember(t *testing.T) {
	r := filled(t, func(c *Config) { c.BlockCacheBytes = 1 << 20 })
	key, begin := pageKey(100), r.m.last
	for i := range pg.LSN(6) {
		v := Value{LSN: begin + 8*(i+1), Kind: Delta, Data: []byte(fmt.Sprint(",", i))}
		if i == 0 {
			v.Kind = Image
		}
		mustPut(t, r.tl, r.m, []Entry{{key, v}}, v.LSN)
	}
	image := func(lsn pg.LSN) []byte {
		h, err := r.tl.Get(t.Context(), key, lsn)
		if err != nil {
			t.Fatal(err)
		}
		return []byte(evaluate(h))
	}
	changes := func(lsn pg.LSN) int {
		checkRead(t, r.tl, r.m, key, lsn)
		h, err := r.tl.Get(t.Context(), key, lsn)
		if err != nil {
			t.Fatal(err)
		}
		return len(h.Changes)
	}
	r.tl.Remember(key, begin+32, image(begin+32))
	if n := changes(begin + 48); n != 2 {
		t.Errorf("%d changes are read above the image, want 2", n)
	}
	if n := changes(begin + 24); n != 2 {
		t.Errorf("%d changes are read below the image, want 2", n)
	}
	r.tl.Remember(key, begin+48, image(begin+48)) // more may come at the last LSN
	if n := changes(begin + 48); n != 2 {
		t.Errorf("%d changes are read: the image at the last LSN was kept", n)
	}
}
