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
	"testing"
)

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
