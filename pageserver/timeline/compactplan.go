package timeline

import (
	"slices"

	"github.com/holdfastdb/holdfast/pageserver/keyspace"
)

// compactionPlan says what one compaction does. It is made by a pure function of the layers, so that it
// can be tested without any.
type compactionPlan struct {
	flushed []string // L0 files, all merged
	parts   []partPlan
}

// partPlan is what happens to one partition: the versions that the L0 files have of it
// become an L1 file on top of its stack, or, with fold, are merged with its stack and its base into
// new bases.
type partPlan struct {
	from, to keyspace.Key
	endless  bool // the last partition: to does not count
	fold     bool
	inputs   []string // the stack and the base, if fold
}

// planCompaction plans the merge of all L0 files. share estimates how many bytes of them
// belong to a partition.
//
// Folding rewrites a whole partition. It is worth that when what is new is at least half
// of what is there; or when the stack is so high that reads suffer.
func planCompaction(layers []layerDesc, maxStack int, share func(from, to keyspace.Key, endless bool) int64) compactionPlan {
	var plan compactionPlan
	var bases []layerDesc
	for _, d := range layers {
		switch d.Level {
		case levelFlushed:
			plan.flushed = append(plan.flushed, d.Object)
		case levelBase:
			bases = append(bases, d)
		}
	}
	froms := partitionsOf(bases)
	for i, from := range froms {
		p := partPlan{from: from, endless: i+1 == len(froms)}
		if !p.endless {
			p.to = froms[i+1]
		}
		p.decide(layers, maxStack, share(p.from, p.to, p.endless))
		plan.parts = append(plan.parts, p)
	}
	return plan
}

func (p *partPlan) holds(d *layerDesc) bool {
	key := d.First.key()
	return d.Level != levelFlushed && key.Compare(p.from) >= 0 && (p.endless || key.Compare(p.to) < 0)
}

func (p *partPlan) decide(layers []layerDesc, maxStack int, incoming int64) {
	var inputs []string
	var base int64
	stack := 0
	for i := range layers {
		d := &layers[i]
		if !p.holds(d) {
			continue
		}
		inputs = append(inputs, d.Object)
		if d.Level == levelBase {
			base = d.Size
		} else {
			incoming += d.Size
			stack++
		}
	}
	if p.fold = incoming >= base/2 || stack >= maxStack; p.fold {
		// Oldest first: the base, then the stack.
		slices.SortStableFunc(inputs, func(a, b string) int { return levelOf(layers, b) - levelOf(layers, a) })
		p.inputs = inputs
	}
}

func levelOf(layers []layerDesc, object string) int {
	return layers[slices.IndexFunc(layers, func(d layerDesc) bool { return d.Object == object })].Level
}
