package timeline

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/pageserver/keyspace"
)

// planSim runs plans on layers that are only descriptions.
type planSim struct {
	rng    *rand.Rand
	layers []layerDesc
	number int
}

func (s *planSim) layer(level int, first, last keyspace.Key, size int64) layerDesc {
	s.number++
	return layerDesc{Object: fmt.Sprintf("pre/%d", s.number), Level: level, First: keyText(first), Last: keyText(last),
		Size: size, Entries: 1, Wrapped: []byte{1}}
}

func (s *planSim) manifest() *manifest {
	return &manifest{Generation: 1, Start: 1, Durable: 1, Layers: s.layers}
}

// TestPlansKeepTheLayersInOrder: whatever the sizes, every L0 file is merged once, partitions
// cover all keys, each L1 or L2 file belongs to one, what is folded is the whole of it, and
// nothing grows without bound.
func TestPlansKeepTheLayersInOrder(t *testing.T) {
	for seed := range uint64(200) {
		s := &planSim{rng: rand.New(rand.NewPCG(seed, 5))}
		for round := range 30 {
			for range 1 + s.rng.IntN(6) {
				s.layers = append(s.layers, s.layer(levelFlushed, pageKey(0), pageKey(s.rng.IntN(5000)), 1000))
			}
			plan := planCompaction(s.layers, 3, func(from, to keyspace.Key, endless bool) int64 { return int64(s.rng.IntN(2000)) })
			if err := s.check(plan); err != nil {
				t.Fatalf("seed %d, round %d: %v", seed, round, err)
			}
			s.execute(plan)
			if err := s.manifest().check("pre/"); err != nil {
				t.Fatalf("seed %d, round %d: %v", seed, round, err)
			}
		}
	}
}

func (s *planSim) check(plan compactionPlan) error {
	for i, p := range plan.parts {
		switch {
		case i == 0 && p.from != keyspace.Key{}, i > 0 && plan.parts[i-1].to != p.from, p.endless != (i == len(plan.parts)-1):
			return fmt.Errorf("partition %d does not begin where the one before ends", i)
		}
	}
	for _, d := range s.layers {
		if d.Level == levelFlushed {
			if !slices.Contains(plan.flushed, d.Object) {
				return fmt.Errorf("L0 file %s is left out", d.Object)
			}
			continue
		}
		in := 0
		for i := range plan.parts {
			p := &plan.parts[i]
			if !p.holds(&d) {
				continue
			}
			in++
			if !p.endless && d.Last.key().Compare(p.to) >= 0 {
				return fmt.Errorf("layer %s goes beyond its partition", d.Object)
			}
			if p.fold != slices.Contains(p.inputs, d.Object) {
				return fmt.Errorf("layer %s of a partition with fold = %v", d.Object, p.fold)
			}
		}
		if in != 1 {
			return fmt.Errorf("layer %s is in %d partitions", d.Object, in)
		}
	}
	return s.checkParts(plan)
}

// checkParts sees that inputs are oldest first and stacks bounded.
func (s *planSim) checkParts(plan compactionPlan) error {
	for _, p := range plan.parts {
		stack, number := 0, -1
		for i, name := range p.inputs {
			at := slices.IndexFunc(s.layers, func(d layerDesc) bool { return d.Object == name })
			if base := s.layers[at].Level == levelBase; base != (i == 0) && (base || len(p.inputs) > 1 && s.hasBase(p)) {
				return fmt.Errorf("base at place %d of the inputs", i)
			}
			if s.layers[at].Level == levelChanges {
				if at < number {
					return fmt.Errorf("the stack is not oldest first")
				}
				number = at
			}
		}
		for _, d := range s.layers {
			if p.holds(&d) && d.Level == levelChanges {
				stack++
			}
		}
		if stack > 3 || stack == 3 && !p.fold {
			return fmt.Errorf("a stack of %d, fold %v", stack, p.fold)
		}
	}
	return nil
}

func (s *planSim) hasBase(p partPlan) bool {
	return slices.ContainsFunc(s.layers, func(d layerDesc) bool { return p.holds(&d) && d.Level == levelBase })
}

// execute makes outputs with random keys inside their partitions.
func (s *planSim) execute(plan compactionPlan) {
	out := make(map[string]bool)
	for _, name := range plan.flushed {
		out[name] = true
	}
	var in []layerDesc
	for _, p := range plan.parts {
		for _, name := range p.inputs {
			out[name] = true
		}
		keys := s.keysIn(p)
		if len(keys) < 2 {
			continue
		}
		if !p.fold {
			in = append(in, s.layer(levelChanges, keys[0], keys[len(keys)-1], 300))
			continue
		}
		for i := 0; i+1 < len(keys); i += 2 {
			in = append(in, s.layer(levelBase, keys[i], keys[i+1], 1000))
		}
	}
	m := s.manifest()
	m.replace(out, in)
	s.layers = m.Layers
}

func (s *planSim) keysIn(p partPlan) (keys []keyspace.Key) {
	for range s.rng.IntN(7) {
		key := pageKey(s.rng.IntN(5000))
		if key.Compare(p.from) >= 0 && (p.endless || key.Compare(p.to) < 0) {
			keys = append(keys, key)
		}
	}
	slices.SortFunc(keys, keyspace.Key.Compare)
	return slices.Compact(keys)
}

func TestPlanFoldsOnlyWhenItIsWorth(t *testing.T) {
	s := &planSim{}
	s.layers = []layerDesc{s.layer(levelFlushed, pageKey(0), pageKey(99), 100), s.layer(levelBase, pageKey(10), pageKey(20), 1000)}
	for share, fold := range map[int64]bool{499: false, 500: true} {
		plan := planCompaction(s.layers, 3, func(keyspace.Key, keyspace.Key, bool) int64 { return share })
		if plan.parts[0].fold != fold {
			t.Errorf("%d bytes over a base of 1000: fold = %v", share, plan.parts[0].fold)
		}
	}
}

func TestCutoffRespectsWindowPinsAndHorizon(t *testing.T) {
	tl := &Timeline{cfg: Config{HistoryBytes: 1000}}
	tl.mu.pins = make(map[*pg.LSN]struct{})
	check := func(durable, horizon lsnText, want pg.LSN) {
		t.Helper()
		tl.mu.manifest = &manifest{Durable: durable, Horizon: horizon}
		if got := tl.cutoffLocked(); got != want {
			t.Errorf("durable %s, horizon %s: cutoff %d, want %d", durable, horizon, got, want)
		}
	}
	check(500, 10, 10)
	check(5000, 10, 4000)
	check(5000, 4500, 4500)
	pin := pg.LSN(3000)
	tl.mu.pins[&pin] = struct{}{}
	check(5000, 10, 3000)
}
