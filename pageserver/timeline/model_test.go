package timeline

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/holdfastdb/holdfast/internal/blob/blobtest"
	"github.com/holdfastdb/holdfast/internal/keyring/keyringtest"
	"github.com/holdfastdb/holdfast/internal/pg"
)

var seedFlag = flag.Uint64("seed", 0, "run the model test with this seed only")

// modelRun drives a timeline and a model of it from a seed.
type modelRun struct {
	t     *testing.T
	rng   *rand.Rand
	store *memStore
	cfg   Config
	tl    *Timeline
	m     *model
	keys  int
}

func newModelRun(t *testing.T, seed uint64) *modelRun {
	rng := rand.New(rand.NewPCG(seed, 3))
	r := &modelRun{t: t, rng: rng, store: newMemStore(), m: newModel(), keys: 2 + rng.IntN(30)}
	r.cfg = testConfig(t, r.store, keyringtest.New())
	r.cfg.FlushBytes = int64(1000 + rng.IntN(20000))
	r.cfg.LayerBytes = int64(500 + rng.IntN(8000))
	r.cfg.CompactAfter = []int{-1, 1, 2, 4}[rng.IntN(4)]
	r.cfg.MaxStack = 1 + rng.IntN(4)
	r.cfg.ImageAfter = 1 + rng.IntN(6)
	r.cfg.HistoryBytes = int64(1 + rng.IntN(20000))
	r.cfg.BlockCacheBytes = int64(1 + rng.IntN(100000))
	r.cfg.OpenLayers = 1 + rng.IntN(10)
	r.cfg.DiskCacheBytes = int64(1 + rng.IntN(100000))
	if rng.IntN(4) == 0 {
		r.cfg.Dir = ""
	}
	return r
}

func (r *modelRun) step() {
	t, ctx := r.t, r.t.Context()
	switch n := r.rng.IntN(100); {
	case n < 50:
		entries, upTo := r.m.randomEntries(r.rng, r.keys)
		mustPut(t, r.tl, r.m, entries, upTo)
	case n < 80:
		checkRead(t, r.tl, r.m, pageKey(r.rng.IntN(r.keys)), randomLSN(r.rng, r.m)+pg.LSN(r.rng.IntN(2)*8))
	case n < 88:
		checkScan(t, r.tl, r.m, r.rng)
	case n < 94:
		if err := r.tl.Flush(ctx); err != nil {
			t.Fatalf("Flush: %v", err)
		}
		if d := r.tl.DurableLSN(); d != r.m.last {
			t.Fatalf("durable after Flush: %s, want %s", d, r.m.last)
		}
	case n < 98:
		if err := r.tl.Compact(ctx); err != nil {
			t.Fatalf("Compact: %v", err)
		}
	default:
		r.reopen()
	}
}

// reopen closes without a flush, as a crash would, and opens again.
func (r *modelRun) reopen() {
	if err := r.tl.Close(); err != nil {
		r.t.Fatal(err)
	}
	var err error
	if r.tl, err = Open(r.t.Context(), r.cfg); err != nil {
		r.t.Fatalf("Open: %v", err)
	}
	if d := r.tl.DurableLSN(); r.tl.LastLSN() != d {
		r.t.Fatalf("after Open: last %s, durable %s", r.tl.LastLSN(), d)
	}
	r.m.forget(r.tl.DurableLSN())
}

func TestAgainstModel(t *testing.T) {
	seeds := []uint64{*seedFlag}
	if *seedFlag == 0 {
		seeds = seeds[:0]
		for s := range uint64(30) {
			seeds = append(seeds, s+1)
		}
	}
	for _, seed := range seeds {
		t.Run(fmt.Sprintf("seed=%d", seed), func(t *testing.T) {
			t.Parallel()
			r := newModelRun(t, seed)
			var err error
			if r.tl, err = Create(t.Context(), r.cfg, testStart); err != nil {
				t.Fatal(err)
			}
			for range 300 {
				r.step()
			}
			checkAll(t, r.tl, r.m, r.rng)
			if err := errors.Join(r.tl.Flush(t.Context()), r.tl.Compact(t.Context())); err != nil {
				t.Fatal(err)
			}
			r.reopen()
			checkAll(t, r.tl, r.m, r.rng)
			r.tl.Close()
			checkObjects(t, r)
		})
	}
}

// checkObjects sees that nothing but the manifest and its layers stays, once orphans are swept.
func checkObjects(t *testing.T, r *modelRun) {
	t.Helper()
	r.cfg.CompactAfter = -1
	tl, err := Open(t.Context(), r.cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer tl.Close()
	want := 1 + len(tl.mu.manifest.Layers)
	waitUntil(t, "the orphans to be swept", func() bool { return len(r.store.keys(r.cfg.prefix())) == want })
}

func waitUntil(t testing.TB, what string, cond func() bool) {
	t.Helper()
	for range 20000 {
		if cond() {
			return
		}
		time.Sleep(500 * time.Microsecond)
	}
	t.Fatalf("waited in vain for %s", what)
}

// TestBucketFaults fails a third of all calls to the bucket, half of them after they took
// effect: everything gets slower, nothing is wrong or lost.
func TestBucketFaults(t *testing.T) {
	for seed := range uint64(12) {
		t.Run(fmt.Sprintf("seed=%d", seed), func(t *testing.T) {
			t.Parallel()
			r := newModelRun(t, seed)
			faults := rand.New(rand.NewPCG(seed, 99))
			var healthy atomic.Bool
			healthy.Store(true)
			r.cfg.Store = blobtest.NewFaulty(r.store, func(op blobtest.Op, key string) blobtest.Fault {
				if healthy.Load() || op == blobtest.OpGet && faults.IntN(10) > 0 {
					return blobtest.None // a read gives up after some tries, and is checked here
				}
				return blobtest.Fault(max(0, faults.IntN(6)-3))
			})
			var err error
			if r.tl, err = Create(t.Context(), r.cfg, testStart); err != nil {
				t.Fatal(err)
			}
			healthy.Store(false)
			for range 80 {
				entries, upTo := r.m.randomEntries(r.rng, r.keys)
				mustPut(t, r.tl, r.m, entries, upTo)
				if r.rng.IntN(10) == 0 {
					if err := r.tl.Flush(t.Context()); err != nil {
						t.Fatal(err)
					}
				}
				if r.rng.IntN(10) == 0 {
					_ = r.tl.Compact(t.Context()) // may give up on reads
				}
			}
			if err := r.tl.Flush(t.Context()); err != nil {
				t.Fatal(err)
			}
			healthy.Store(true)
			checkAll(t, r.tl, r.m, r.rng)
			r.reopen()
			if r.m.last == testStart {
				t.Fatal("nothing was durable")
			}
			checkAll(t, r.tl, r.m, r.rng)
			r.tl.Close()
			checkObjects(t, r)
		})
	}
}

// TestCrashAtEveryCall kills the server at its nth call to the bucket that changes
// something, the call itself done or not. Another one opens the branch, and has
// everything that was reported as durable; the dead one's late writes change nothing.
func TestCrashAtEveryCall(t *testing.T) {
	for _, last := range []blobtest.Fault{blobtest.Lost, blobtest.Unreported} {
		for crashAt := int64(1); ; crashAt++ {
			if !crashOnce(t, last, crashAt) {
				if crashAt < 20 {
					t.Fatalf("the whole run has only %d calls", crashAt)
				}
				break
			}
		}
	}
}

// crashOnce tells false if the run ended before the crash.
func crashOnce(t *testing.T, last blobtest.Fault, crashAt int64) (crashed bool) {
	r := newModelRun(t, 5)
	r.cfg.CompactAfter, r.cfg.Dir, r.cfg.FlushBytes = -1, "", 1<<20
	var err error
	if r.tl, err = Create(t.Context(), r.cfg, testStart); err != nil {
		t.Fatal(err)
	}
	r.tl.Close()
	alive, crash := context.WithCancel(t.Context())
	defer crash()
	var calls atomic.Int64
	dying := r.cfg
	dying.Store = blobtest.NewFaulty(r.store, func(op blobtest.Op, key string) blobtest.Fault {
		if op == blobtest.OpGet || op == blobtest.OpList {
			return blobtest.None
		}
		switch n := calls.Add(1); {
		case n < crashAt:
			return blobtest.None
		case n == crashAt:
			crash()
			return last
		}
		return blobtest.Lost
	})
	durable := testStart
	if tl, err := Open(alive, dying); err == nil {
		durable = r.putUntilCrash(alive, tl)
		// It lives on, and tries again and again, while another one takes over.
		defer tl.Close()
	}
	if r.tl, err = Open(t.Context(), r.cfg); err != nil {
		t.Fatal(err)
	}
	defer r.tl.Close()
	if d := r.tl.DurableLSN(); d < durable {
		t.Fatalf("crash at %d (%d): durable is %s, was reported as %s", crashAt, last, d, durable)
	}
	r.m.forget(r.tl.DurableLSN())
	checkAll(t, r.tl, r.m, r.rng)
	r.putSome(3)
	if err := errors.Join(r.tl.Flush(t.Context()), r.tl.Compact(t.Context())); err != nil {
		t.Fatal(err)
	}
	checkAll(t, r.tl, r.m, r.rng)
	return alive.Err() != nil
}

// putUntilCrash gives what was durable at the end.
func (r *modelRun) putUntilCrash(alive context.Context, tl *Timeline) pg.LSN {
	for i := range 8 {
		entries, upTo := r.m.randomEntries(r.rng, r.keys)
		if err := tl.Put(r.t.Context(), entries, upTo+8); err != nil {
			r.t.Fatal(err)
		}
		r.m.add(entries, upTo+8)
		if tl.Flush(alive) != nil || i%3 == 2 && tl.Compact(alive) != nil {
			break
		}
	}
	return tl.DurableLSN()
}

// TestReadersBesideWriter reads from several goroutines while versions come in and layers are
// flushed, merged and deleted.
func TestReadersBesideWriter(t *testing.T) {
	r := newModelRun(t, 1)
	r.cfg.FlushBytes, r.cfg.CompactAfter, r.cfg.HistoryBytes = 4000, 2, 3000
	var err error
	if r.tl, err = Create(t.Context(), r.cfg, testStart); err != nil {
		t.Fatal(err)
	}
	defer r.tl.Close()
	var shared sync.RWMutex // guards r.m
	var done atomic.Bool
	var wg sync.WaitGroup
	for i := range uint64(3) {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(i, 77))
			for !done.Load() {
				readBeside(t, r, &shared, rng)
			}
		})
	}
	for range 400 {
		entries, upTo := r.m.randomEntries(r.rng, r.keys)
		shared.Lock()
		r.m.add(entries, upTo)
		shared.Unlock()
		if err := r.tl.Put(t.Context(), entries, upTo); err != nil {
			t.Error(err)
			break
		}
	}
	done.Store(true)
	wg.Wait()
}

func readBeside(t *testing.T, r *modelRun, shared *sync.RWMutex, rng *rand.Rand) {
	last, key := r.tl.LastLSN(), pageKey(rng.IntN(r.keys))
	lsn := max(r.tl.HorizonLSN(), last-min(last-testStart, pg.LSN(rng.IntN(3000))))
	h, err := r.tl.Get(t.Context(), key, lsn)
	if errors.Is(err, ErrTooOld) {
		return
	}
	shared.RLock()
	want := evaluate(r.m.history(key, lsn))
	shared.RUnlock()
	if err != nil || evaluate(h) != want {
		t.Errorf("Get(%x, %s): %v\n got %.300s\nwant %.300s", key[:], lsn, err, evaluate(h), want)
	}
}
