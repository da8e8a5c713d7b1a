package timeline

import (
	"cmp"
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
		if err := checkFold(m, below, dirPlan{points: []pg.LSN{cutoff}}, lowest, 1+rng.IntN(4)); err != nil {
			t.Fatalf("seed %d, lowest %v, cutoff %s: %v", seed, lowest, cutoff, err)
		}
	}
}

// TestFoldKeepsWhatCopiesShare does so for pages of a folder that is a copy at times, and that
// others are copies of.
func TestFoldKeepsWhatCopiesShare(t *testing.T) {
	for seed := range uint64(1000) {
		rng := rand.New(rand.NewPCG(seed, 12))
		m, below := newModel(), newModel()
		lowest := rng.IntN(3) > 0
		if !lowest {
			below.add(below.randomEntries(rng, 4))
		}
		m.last = below.last
		for range 1 + rng.IntN(8) {
			m.add(m.randomEntries(rng, 4))
		}
		p := randomPlan(rng, below.last, m.last)
		// A folder's end buries what its pages had: versions of a next one begin there.
		for _, l := range p.lives {
			for _, key := range m.keys() {
				i, _ := slices.BinarySearchFunc(m.versions[key], l.end, func(v Value, lsn pg.LSN) int { return cmp.Compare(v.LSN, lsn) })
				if l.end < m.last && l.end > below.last {
					m.versions[key] = slices.Insert(m.versions[key], i, Value{LSN: l.end + 1, Kind: Tombstone})
				}
			}
		}
		if err := checkFold(m, below, p, lowest, 1+rng.IntN(4)); err != nil {
			t.Fatalf("seed %d, lowest %v, points %v, lives %v: %v", seed, lowest, p.points, p.lives, err)
		}
	}
}

// randomPlan has points and lives between two LSNs, none of them at that of a version.
func randomPlan(rng *rand.Rand, from, to pg.LSN) (p dirPlan) {
	at := func() pg.LSN { return from + 8*pg.LSN(rng.Uint64N(uint64(to-from)/8+2)) }
	for range rng.IntN(5) {
		p.points = append(p.points, at())
	}
	slices.Sort(p.points)
	p.points = append(slices.Compact(p.points), max(to, at())+8)
	if rng.IntN(3) > 0 {
		p.points[len(p.points)-1] = max(at(), p.points[max(0, len(p.points)-2)]+8)
	}
	var turns []pg.LSN
	for range 2 * rng.IntN(3) {
		turns = append(turns, at()+4)
	}
	slices.Sort(turns)
	if turns = slices.Compact(turns); len(turns)%2 == 1 {
		turns = append(turns, maxLSN)
	}
	for i := 0; i < len(turns); i += 2 {
		p.lives = append(p.lives, life{turns[i], turns[i+1], []Source{{UpTo: turns[i]}}})
	}
	return p
}

// lifeAt finds the life that a read at an LSN is in.
func (p *dirPlan) lifeAt(lsn pg.LSN) *life {
	for i := range p.lives {
		if l := &p.lives[i]; l.above < lsn && lsn <= l.end {
			return l
		}
	}
	return nil
}

// read is what a read of the key finds in a life: for all keys but one there is a source.
func (m *model) read(key keyspace.Key, lsn pg.LSN, l *life) History {
	var c collector
	if l != nil {
		c.above = l.above
	}
	for _, v := range slices.Backward(m.versions[key]) {
		if v.LSN <= lsn && c.add(v.LSN, v.Kind, v.Data) {
			break
		}
	}
	h := c.result()
	if l != nil && !c.whole && key != pageKey(1) {
		h.Origin = &Origin{History: History{Base: &Value{LSN: 1, Kind: Image, Data: fmt.Append(nil, l.above)}}}
	}
	return h
}

func checkFold(m, below *model, plan dirPlan, lowest bool, imageAfter int) error {
	cutoff := plan.points[len(plan.points)-1]
	dir, _ := pageKey(0).PageDir()
	out := newModel()
	var last Entry
	f := &folder{cutoff: cutoff, dirs: map[keyspace.Dir]dirPlan{dir: plan}, lowest: lowest, imageAfter: imageAfter, materialize: materialize,
		below: func(key keyspace.Key, l *life) (History, error) {
			if lowest && l == nil {
				return History{}, fmt.Errorf("looked below the lowest level")
			}
			return below.read(key, maxLSN, l), nil
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
		reads := []pg.LSN{cutoff}
		l, isPage := (*life)(nil), key[0] == byte(keyspace.KindRelPage)
		if isPage {
			reads = slices.Clone(plan.points)
		}
		for lsn := cutoff - cutoff%8; lsn <= m.last; lsn += 8 {
			reads = append(reads, lsn)
		}
		for _, lsn := range reads {
			if lsn < max(below.last+1, reads[0]) || lsn > m.last || lsn < cutoff && !slices.Contains(plan.points, lsn) {
				continue
			}
			if isPage {
				l = plan.lifeAt(lsn)
			}
			if got, want := evaluate(folded.read(key, lsn, l)), evaluate(whole.read(key, lsn, l)); got != want {
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
