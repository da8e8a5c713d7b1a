package timeline

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/holdfastdb/holdfast/internal/blob"
	"github.com/holdfastdb/holdfast/internal/blob/blobtest"
	"github.com/holdfastdb/holdfast/internal/keyring"
	"github.com/holdfastdb/holdfast/internal/keyring/keyringtest"
	"github.com/holdfastdb/holdfast/internal/seal"
)

// touched notes which objects are read and written.
type touched struct {
	blob.Store
	mu   sync.Mutex
	keys map[string]int
}

func (s *touched) note(key string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.keys == nil {
		s.keys = make(map[string]int)
	}
	s.keys[key]++
}

func (s *touched) take() map[string]int {
	s.mu.Lock()
	defer s.mu.Unlock()
	keys := s.keys
	s.keys = nil
	return keys
}

func (s *touched) Get(ctx context.Context, key string) ([]byte, blob.ETag, error) {
	s.note(key)
	return s.Store.Get(ctx, key)
}

func (s *touched) GetRange(ctx context.Context, key string, p []byte, off int64) (int, error) {
	s.note(key)
	return s.Store.GetRange(ctx, key, p, off)
}

func (s *touched) Create(ctx context.Context, key string, r io.Reader, size int64) (blob.ETag, error) {
	s.note(key)
	return s.Store.Create(ctx, key, r, size)
}

func (s *touched) Swap(ctx context.Context, key string, data []byte, old blob.ETag) (blob.ETag, error) {
	s.note(key)
	return s.Store.Swap(ctx, key, data, old)
}

// withLayers makes a branch of n layers.
func withLayers(t *testing.T, cfg Config, n int) (*Timeline, *model) {
	t.Helper()
	tl, err := Create(t.Context(), cfg, testStart)
	if err != nil {
		t.Fatal(err)
	}
	m, rng := newModel(), rand.New(rand.NewPCG(7, 7))
	for range n {
		entries, upTo := m.randomEntries(rng, 20)
		for len(entries) == 0 {
			entries, upTo = m.randomEntries(rng, 20)
		}
		mustPut(t, tl, m, entries, upTo)
		if err := tl.Flush(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	return tl, m
}

func headersUnder(t *testing.T, store *memStore, version uint32) (n int) {
	t.Helper()
	for _, key := range store.keys("") {
		if !strings.Contains(key, "/layers/") {
			continue
		}
		data, _, err := store.Get(t.Context(), key)
		if err != nil {
			t.Fatal(err)
		}
		w, err := seal.WrappedDEK(data)
		if err != nil {
			t.Fatal(err)
		}
		if v, err := seal.KEKVersion(w); err == nil && v == version {
			n++
		}
	}
	return n
}

// TestRewrapTouchesTheManifestAlone: and afterwards the old version of the KEK is needed by nothing, though it
// is in the header of every layer, in the bucket and in the local copies.
func TestRewrapTouchesTheManifestAlone(t *testing.T) {
	mem, ring := newMemStore(), keyringtest.New()
	store := &touched{Store: mem}
	cfg := testConfig(t, mem, ring)
	cfg.Store = store
	tl, m := withLayers(t, cfg, 5)
	store.take()
	ring.RotateKEK()
	done, err := tl.Rewrap(t.Context())
	if err != nil || done.DEKs != 5 || done.KEKVersion != 2 || done.Bytes == 0 {
		t.Fatalf("Rewrap: %+v, %v", done, err)
	}
	if keys := store.take(); len(keys) != 1 || keys[cfg.manifestKey()] != 1 {
		t.Errorf("touched: %v, want one write of the manifest", keys)
	}
	if done, err := tl.Rewrap(t.Context()); err != nil || done.DEKs != 0 || done.Bytes != 0 {
		t.Errorf("Rewrap again: %+v, %v", done, err)
	}
	if uses := fmt.Sprint(tl.KeyUse()); uses != "map[2:5]" {
		t.Errorf("uses: %s", uses)
	}
	ring.RetireKEK(1)
	checkAll(t, tl, m, rand.New(rand.NewPCG(1, 1))) // what was open
	if n := headersUnder(t, mem, 1); n != 5 {
		t.Fatalf("%d layers have the old form in their header: the test proves nothing", n)
	}
	if err := tl.Close(); err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{cfg.Dir, t.TempDir()} { // over the local copies, and from the bucket
		cfg.Dir = dir
		again, err := Open(t.Context(), cfg)
		if err != nil {
			t.Fatal(err)
		}
		checkAll(t, again, m, rand.New(rand.NewPCG(1, 1)))
		if err := again.Compact(t.Context()); err != nil {
			t.Errorf("compacting: %v", err)
		}
		checkAll(t, again, m, rand.New(rand.NewPCG(1, 1)))
		if err := again.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if uses, err := ReadKeyUse(t.Context(), cfg); err != nil || uses[2] == 0 || len(uses) != 1 {
		t.Errorf("uses by the bucket: %v, %v", uses, err)
	}
}

// TestRewrapIsFailedBothWays: whatever the bucket says of the manifest's write, what is readable stays so.
func TestRewrapIsFailedBothWays(t *testing.T) {
	for _, fault := range []blobtest.Fault{blobtest.Lost, blobtest.Unreported} {
		mem, ring := newMemStore(), keyringtest.New()
		store := blobtest.NewFaulty(mem, nil)
		cfg := testConfig(t, mem, ring)
		cfg.Store = store
		tl, m := withLayers(t, cfg, 4)
		ring.RotateKEK()
		store.FailNext(blobtest.OpSwap, cfg.manifestKey(), fault)
		store.FailNext(blobtest.OpSwap, cfg.manifestKey(), fault)
		if done, err := tl.Rewrap(t.Context()); err != nil || done.DEKs != 4 {
			t.Errorf("fault %d: %+v, %v", fault, done, err)
		}
		ring.RetireKEK(1)
		tl.Close()
		again, err := Open(t.Context(), cfg)
		if err != nil {
			t.Fatalf("fault %d: %v", fault, err)
		}
		checkAll(t, again, m, rand.New(rand.NewPCG(2, 2)))
		again.Close()
	}
}

// TestRewrapOfASupersededServer changes nothing (P2).
func TestRewrapOfASupersededServer(t *testing.T) {
	store, ring := newMemStore(), keyringtest.New()
	cfg := testConfig(t, store, ring)
	old, _ := withLayers(t, cfg, 3)
	defer old.Close()
	cfg.Dir = t.TempDir()
	newer, err := Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer newer.Close()
	ring.RotateKEK()
	if _, err := old.Rewrap(t.Context()); !errors.Is(err, ErrSuperseded) {
		t.Errorf("the older server: %v, want ErrSuperseded", err)
	}
	if uses := fmt.Sprint(newer.KeyUse()); uses != "map[1:3]" {
		t.Errorf("the newer server's uses: %s", uses)
	}
	if done, err := newer.Rewrap(t.Context()); err != nil || done.DEKs != 3 {
		t.Errorf("the newer server: %+v, %v", done, err)
	}
}

func TestRewrapUnderARevokedKey(t *testing.T) {
	store, ring := newMemStore(), keyringtest.New()
	tl, _ := withLayers(t, testConfig(t, store, ring), 2)
	defer tl.Close()
	ring.RotateKEK()
	ring.Revoke()
	if _, err := tl.Rewrap(t.Context()); !errors.Is(err, keyring.ErrRevoked) {
		t.Errorf("Rewrap: %v, want ErrRevoked", err)
	}
}

// TestRotationsUnderLoad rotates the KEK again and again while layers are flushed, merged and read, and retires
// each version as soon as nothing is said to use it: a layer in work that was not counted, or one that a
// merge brought back under its old form, could not be read any more.
func TestRotationsUnderLoad(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 1))
	store, ring := newMemStore(), keyringtest.New()
	cfg := testConfig(t, store, ring)
	cfg.CompactAfter, cfg.FlushBytes, cfg.LayerBytes, cfg.BlockCacheBytes = 3, 4<<10, 8<<10, 1<<10
	tl, err := Create(t.Context(), cfg, testStart)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var rotated sync.WaitGroup
	retired := 0
	rotated.Go(func() {
		for v := uint32(1); ctx.Err() == nil; v++ {
			ring.RotateKEK()
			for ctx.Err() == nil {
				if _, err := tl.Rewrap(ctx); err != nil && ctx.Err() == nil {
					t.Errorf("Rewrap: %v", err)
					return
				}
				if uses := tl.KeyUse(); uses[v] == 0 && uses[0] == 0 {
					ring.RetireKEK(v)
					retired++
					break
				}
				time.Sleep(time.Millisecond)
			}
		}
	})
	m := newModel()
	for i := range 600 {
		entries, upTo := m.randomEntries(rng, 30)
		mustPut(t, tl, m, entries, upTo)
		if i%20 == 0 {
			checkAll(t, tl, m, rng)
		}
	}
	if err := tl.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	cancel()
	rotated.Wait()
	if retired < 3 {
		t.Errorf("%d versions were retired: too few to prove anything", retired)
	}
	if _, err := tl.Rewrap(t.Context()); err != nil {
		t.Fatal(err)
	}
	checkAll(t, tl, m, rng)
	tl.Close()
	cfg.Dir = t.TempDir()
	again, err := Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	checkAll(t, again, m, rng)
	t.Logf("%d versions retired, %d layers", retired, again.Stats().Layers)
}
