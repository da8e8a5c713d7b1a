package timeline

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path"
	"path/filepath"
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

// TestDamagedLayerIsNamed flips, cuts and swaps objects in the bucket, with no local copy.
func TestDamagedLayerIsNamed(t *testing.T) {
	for name, damage := range map[string]func(r *modelRun, object string){
		"flipped": func(r *modelRun, object string) {
			r.store.change(object, func(b []byte) []byte { b[len(b)/2] ^= 1; return b })
		},
		"cut": func(r *modelRun, object string) {
			r.store.change(object, func(b []byte) []byte { return b[:len(b)-1] })
		},
		"swapped": func(r *modelRun, object string) { r.swapObjects(object) },
		"gone":    func(r *modelRun, object string) { _ = r.store.Delete(context.Background(), object) },
	} {
		t.Run(name, func(t *testing.T) {
			r := filled(t, func(c *Config) { c.Dir = "" })
			newest := r.layers()[len(r.layers())-1]
			damage(r, newest)
			var failed error
			for _, key := range r.m.keys() {
				if _, err := r.tl.Get(t.Context(), key, r.m.last); err != nil {
					failed = err
					if !strings.Contains(err.Error(), hex.EncodeToString(key[:])) || !strings.Contains(err.Error(), newest) {
						t.Fatalf("error %v names neither key nor object %s", err, newest)
					}
				}
			}
			if failed == nil {
				t.Error("no read failed")
			}
			if err := r.tl.Compact(t.Context()); err == nil || !strings.Contains(err.Error(), newest) {
				t.Errorf("Compact: %v, want an error that names %s", err, newest)
			}
		})
	}
}

// swapObjects puts another layer in the place of object.
func (r *modelRun) swapObjects(object string) {
	other, _, _ := r.store.Get(context.Background(), r.layers()[0])
	r.store.change(object, func([]byte) []byte { return other })
}

func TestDamagedManifest(t *testing.T) {
	r := filled(t, nil)
	good, _, _ := r.store.Get(t.Context(), r.cfg.manifestKey())
	rng := rand.New(rand.NewPCG(1, 1))
	check := func(what string, bad []byte) {
		t.Helper()
		r.store.change(r.cfg.manifestKey(), func([]byte) []byte { return bad })
		_, err := Open(t.Context(), r.cfg)
		if !errors.Is(err, ErrManifest) || !strings.Contains(err.Error(), r.cfg.manifestKey()) {
			t.Errorf("%s: %v, want ErrManifest with the object's name", what, err)
		}
	}
	for range 100 {
		at := rng.IntN(len(good))
		check(fmt.Sprintf("cut at %d", at), good[:at])
		bad := bytes.Clone(good)
		bad[at] ^= 1 << rng.IntN(8)
		check(fmt.Sprintf("bit flipped at %d", at), bad)
	}
	m, err := decodeManifest(&r.cfg, good)
	if err != nil {
		t.Fatal(err)
	}
	m.Branch = "other"
	data, _ := m.encode()
	check("another branch's", data)
	r.store.change(r.cfg.manifestKey(), func([]byte) []byte { return good })
	r.reopen()
	checkAll(t, r.tl, r.m, r.rng)
}

func TestManifestsWrappedKeyCounts(t *testing.T) {
	r := filled(t, func(c *Config) { c.Dir = "" })
	// A file whose header has another wrapped DEK, as after a rotation of the KEK.
	for _, object := range r.layers() {
		r.store.change(object, func(b []byte) []byte { clear(b[16:40]); return b })
	}
	r.reopen()
	checkAll(t, r.tl, r.m, r.rng)
}

// TestLocalCopies damages and deletes them while they are open and while they are not.
func TestLocalCopies(t *testing.T) {
	copies := func(r *modelRun) []string {
		names, _ := filepath.Glob(filepath.Join(r.cfg.Dir, "*-l0"))
		return names
	}
	for name, damage := range map[string]func(t *testing.T, file string) error{
		"flipped": func(t *testing.T, file string) error {
			b, err := os.ReadFile(file)
			if err != nil {
				return err
			}
			b[len(b)/2] ^= 1
			return os.WriteFile(file, b, 0o600)
		},
		"cut":     func(t *testing.T, file string) error { return os.Truncate(file, 100) },
		"deleted": func(t *testing.T, file string) error { return os.Remove(file) },
	} {
		for _, open := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, open %v", name, open), func(t *testing.T) {
				r := filled(t, nil)
				files := copies(r)
				if len(files) != 4 {
					t.Fatalf("%d local copies, want 4", len(files))
				}
				if r.tl.closeFiles(); open {
					checkAll(t, r.tl, r.m, r.rng)
				}
				for _, f := range files {
					if object, _, _ := r.store.Get(t.Context(), r.cfg.layerPrefix()+path.Base(f)); !sameFile(f, object) {
						t.Errorf("copy %s is not what the bucket has", f)
					}
					if err := damage(t, f); err != nil {
						t.Fatal(err)
					}
				}
				checkAll(t, r.tl, r.m, r.rng)
				if name == "deleted" && open {
					return // an open file outlives its name
				}
				waitUntil(t, "the copies to be fetched again", func() bool { return len(copies(r)) == 4 })
			})
		}
	}
}

func sameFile(file string, data []byte) bool {
	b, err := os.ReadFile(file)
	return err == nil && bytes.Equal(b, data)
}

func TestLocalCopiesAreBoundedAndCleaned(t *testing.T) {
	r := filled(t, nil)
	stranger := filepath.Join(r.cfg.Dir, "00000001-00000099-l0")
	if err := os.WriteFile(stranger, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	size := r.tl.mu.manifest.Layers[0].Size
	r.cfg.DiskCacheBytes = 2 * size
	r.reopen()
	checkAll(t, r.tl, r.m, r.rng)
	if _, err := os.Stat(stranger); err == nil {
		t.Error("a file that is no copy of a layer stays")
	}
	var sum int64
	entries, _ := os.ReadDir(r.cfg.Dir)
	for _, e := range entries {
		if info, err := e.Info(); err == nil && !strings.HasSuffix(e.Name(), ".new") {
			sum += info.Size()
		}
	}
	if sum > r.cfg.DiskCacheBytes {
		t.Errorf("copies of %d bytes, the bound is %d", sum, r.cfg.DiskCacheBytes)
	}
}

func TestUnusableDirWarnsOnce(t *testing.T) {
	var log bytes.Buffer
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	r := filled(t, func(c *Config) {
		c.Dir = filepath.Join(file, "below") // cannot be made
		c.Log = slog.New(slog.NewTextHandler(&log, nil))
	})
	checkAll(t, r.tl, r.m, r.rng)
	r.tl.Close()
	if n := strings.Count(log.String(), "no local copies"); n != 1 {
		t.Errorf("%d warnings, want 1:\n%s", n, &log)
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

// FuzzManifest: what is no manifest is refused; what is, is the same again.
func FuzzManifest(f *testing.F) {
	cfg := Config{Project: "p", Branch: "b"}
	m := &manifest{Project: "p", Branch: "b", Generation: 1, Start: 1, Durable: 1, Layers: []layerDesc{
		{Object: cfg.layerName(1, 1, 0), MinLSN: 1, MaxLSN: 2, Size: 5, Entries: 1, Wrapped: []byte("w")}}}
	data, err := m.encode()
	if err != nil {
		f.Fatal(err)
	}
	_, body, _ := bytes.Cut(data, []byte("\n"))
	f.Add(body)
	f.Add([]byte(`{"layers":[{}]}`))
	f.Add([]byte(`{"generation":1,"start_lsn":"0/1","layers":[{"first_key":"00"}]}`))
	f.Fuzz(func(t *testing.T, body []byte) {
		m, err := decodeManifest(&cfg, sumManifest(body))
		if err != nil {
			return
		}
		again, err := m.encode()
		if err != nil {
			t.Fatal(err)
		}
		if m2, err := decodeManifest(&cfg, again); err != nil || m2.Revision != m.Revision || len(m2.Layers) != len(m.Layers) {
			t.Errorf("round trip: %v", err)
		}
	})
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
