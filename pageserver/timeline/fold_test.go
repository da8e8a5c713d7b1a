package timeline

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/pageserver/keyspace"
)

// TestFoldKeepsEveryReadAboveTheCutoff folds random histories, in one layer over another or
// at the lowest level, and reads every LSN that may be read, from the result.
func TestFoldKeepsEveryReadAboveTheCutoff(t *testing.T) {
	for seed := range uint64(400) {
		rng := rand.New(rand.NewPCG(seed, 11))
		m, below := newModel(), newModel()
		lowest := rng.IntN(2) == 0
		if !lowest {
			below.add(below.randomEntries(rng, 4))
		}
		m.last = below.last
		for range 1 + rng.IntN(8) {
			m.add(m.randomEntries(rng, 4))
		}
		cutoff := pg.LSN(0)
		if rng.IntN(4) > 0 {
			cutoff = testStart + pg.LSN(rng.Uint64N(uint64(m.last-testStart)+2))
		}
		if err := checkFold(m, below, lowest, cutoff, 1+rng.IntN(4)); err != nil {
			t.Fatalf("seed %d, lowest %v, cutoff %s: %v", seed, lowest, cutoff, err)
		}
	}
}

func checkFold(m, below *model, lowest bool, cutoff pg.LSN, imageAfter int) error {
	out := newModel()
	var last Entry
	f := &folder{cutoff: cutoff, lowest: lowest, imageAfter: imageAfter, materialize: materialize,
		below: func(key keyspace.Key) (History, error) {
			if lowest {
				return History{}, fmt.Errorf("looked below the lowest level")
			}
			return below.history(key, maxLSN), nil
		},
		emit: func(e Entry) error {
			if c := e.Key.Compare(last.Key); c < 0 || c == 0 && e.LSN < last.LSN {
				return fmt.Errorf("out of order: %x at %s", e.Key[:], e.LSN)
			}
			last = e
			e.Data = slices.Clone(e.Data)
			out.versions[e.Key] = append(out.versions[e.Key], e.Value)
			return nil
		}}
	for _, key := range m.keys() {
		for _, v := range m.versions[key] {
			if err := f.add(Entry{key, v}); err != nil {
				return err
			}
		}
	}
	if err := f.end(); err != nil {
		return err
	}
	for _, key := range m.keys() {
		whole, folded := newModel(), newModel()
		whole.versions[key] = slices.Concat(below.versions[key], m.versions[key])
		folded.versions[key] = slices.Concat(below.versions[key], out.versions[key])
		for lsn := max(cutoff, below.last+1); lsn <= m.last; lsn += 8 {
			if got, want := evaluate(folded.history(key, lsn)), evaluate(whole.history(key, lsn)); got != want {
				return fmt.Errorf("key %x at %s:\n got %s\nwant %s", key[:], lsn, got, want)
			}
		}
	}
	return nil
}

// foldOne folds a key with a base and n changes of 10 bytes, 8 apart.
func foldOne(t *testing.T, f *folder, n int) (out []Entry) {
	t.Helper()
	f.emit = func(e Entry) error { out = append(out, e); return nil }
	key := pageKey(0)
	add := func(v Value) {
		if err := f.add(Entry{key, v}); err != nil {
			t.Fatal(err)
		}
	}
	add(Value{LSN: testStart, Kind: Image, Data: []byte("base")})
	for i := range n {
		add(Value{LSN: testStart + 8*pg.LSN(i+1), Kind: Delta, Data: []byte("0123456789")})
	}
	if err := f.end(); err != nil {
		t.Fatal(err)
	}
	return out
}

func TestFoldBoundsWhatAReadTakes(t *testing.T) {
	out := foldOne(t, &folder{imageAfter: 4, lowest: true, materialize: materialize}, 1000)
	run, longest := 0, 0
	for _, e := range out {
		run++
		if e.Kind == Image {
			run = 0
		}
		longest = max(longest, run)
	}
	if longest > 4*periodic || run >= 4 {
		t.Errorf("%d changes in a row, %d at the end; want at most %d, and less than 4", longest, run, 4*periodic)
	}
}

func TestFoldDropsWhatNoReadNeeds(t *testing.T) {
	f := &folder{cutoff: testStart + 8*900, imageAfter: 200, lowest: true, materialize: materialize}
	if out := foldOne(t, f, 1000); len(out) != 101 || out[0].Kind != Image || out[0].LSN != f.cutoff {
		t.Errorf("%d versions, first %v at %s; want an image at the cutoff and the 100 above it", len(out), out[0].Kind, out[0].LSN)
	}
	f = &folder{cutoff: testStart + 8*900, imageAfter: 200, lowest: true}
	if out := foldOne(t, f, 1000); len(out) != 1001 || f.failed != 1 {
		t.Errorf("%d versions, %d keys stuck; without redo all stay", len(out), f.failed)
	}
}
