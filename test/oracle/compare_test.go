package oracle

import (
	"bytes"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/holdfastdb/holdfast/internal/pagemask"
	"github.com/holdfastdb/holdfast/internal/pg"
)

// A comparison sets what replay made against what a stock server holds.
type comparison struct {
	t       *testing.T
	name    string
	have    *state
	want    *state
	skipped map[pg.RelTag]bool
	blanked map[pg.RelTag]bool // maps that may say less than the primary's, never more
	// kinds has the primary's relations by what their pages look like. It is nil for a
	// server that did nothing but replay, too: that one's pages must be the same, hints
	// included, and only bytes that belong to nothing may differ.
	kinds map[pg.RelFileNode]pagemask.Kind
	// lsnFree: the primary's heap pages may have other LSNs.
	lsnFree bool

	pages, equal, extended, left int
	problems                     []string
}

func (c *comparison) errorf(format string, args ...any) {
	c.problems = append(c.problems, fmt.Sprintf(format, args...))
}

// report fails the test for what run found.
func (c *comparison) report() {
	c.t.Logf("%s: %d pages compared, %d of them the same in each byte; %d empty pages that WAL does not tell of; %d pages left out; %d SLRU pages",
		c.name, c.pages, c.equal, c.extended, c.left, len(c.want.slru))
	for _, p := range c.problems[:min(len(c.problems), 30)] {
		c.t.Errorf("%s: %s", c.name, p)
	}
	if c.pages == 0 {
		c.t.Errorf("%s: nothing was compared", c.name)
	}
}

func (c *comparison) run() *comparison {
	tags := map[pg.RelTag]bool{}
	for _, s := range []*state{c.have, c.want} {
		for tag := range s.rels {
			tags[tag] = true
		}
	}
	for _, tag := range slices.SortedFunc(maps.Keys(tags), func(a, b pg.RelTag) int { return strings.Compare(a.String(), b.String()) }) {
		c.relation(tag)
	}
	for p, want := range c.want.slru {
		if c.have.slru[p] == nil && !empty(want) { // a file's pages before the first one that was made
			c.errorf("page %d of %s is missing", p.Page, p.Kind.Dir())
		}
	}
	for p, have := range c.have.slru {
		switch want := c.want.slru[p]; {
		case want == nil:
			c.errorf("page %d of %s should not exist", p.Page, p.Kind.Dir())
		case !bytes.Equal(have, want):
			c.errorf("page %d of %s differs at %d", p.Page, p.Kind.Dir(), pagemask.Difference(have, want))
		}
	}
	for _, d := range []string{
		cmp.Diff(c.want.dirs, c.have.dirs), cmp.Diff(c.want.relmaps, c.have.relmaps), cmp.Diff(c.want.twoPhase, c.have.twoPhase),
	} {
		if d != "" {
			c.errorf("files (-server +replay):\n%s", d)
		}
	}
	return c
}

func (c *comparison) relation(tag pg.RelTag) {
	have, inHave := c.have.rels[tag]
	want, inWant := c.want.rels[tag]
	primary := c.kinds != nil
	switch {
	case tag.Fork != pg.InitFork && (c.want.unlogged(tag.RelFileNode) || c.have.unlogged(tag.RelFileNode)),
		c.skipped[tag],
		primary && tag.Fork == pg.FSMFork: // recovery's map is another than the primary's
		c.left += len(want)
		return
	case !inHave && !(primary && tag.Fork == pg.VMFork), !inWant && tag.Fork == pg.MainFork:
		c.errorf("%v: exists here %v, there %v", tag, inHave, inWant)
		return
	case len(have) > len(want):
		c.errorf("%v: %d blocks here, %d there", tag, len(have), len(want))
	}
	for i, w := range want {
		if i >= len(have) {
			// The primary extends files before it logs what goes there.
			if !primary || !empty(w) {
				c.errorf("%v: %d blocks here, %d there", tag, len(have), len(want))
				return
			}
			c.extended++
			continue
		}
		if tag.Fork == pg.FSMFork && i < 2 {
			c.left++ // upper levels, which redo leaves to the next vacuum
			continue
		}
		c.pages++
		if kind := c.kinds[tag.RelFileNode]; kind != pagemask.Other && tag.Fork == pg.MainFork && !pg.IsNewPage(w) {
			if told := pagemask.KindOf(w); told != kind {
				c.errorf("%v block %d is taken for a %v page, it is a %v page", tag, i, told, kind)
			}
		}
		if bytes.Equal(have[i], w) {
			c.equal++
			continue
		}
		c.page(tag, i, have[i], w)
	}
}

func (c *comparison) page(tag pg.RelTag, block int, have, want []byte) {
	kind := c.kinds[tag.RelFileNode]
	a, errA := mask(tag.Fork, block, kind, c.kinds != nil, have)
	b, errB := mask(tag.Fork, block, kind, c.kinds != nil, want)
	if errA != nil || errB != nil {
		c.errorf("%v block %d: here %v, there %v", tag, block, errA, errB)
		return
	}
	if c.lsnFree && kind == pagemask.Heap {
		clear(a[:8])
		clear(b[:8])
	}
	if c.blanked[tag] {
		for i := range a {
			b[i] &= a[i]
		}
	}
	if i := pagemask.Difference(a, b); i >= 0 {
		c.errorf("%v (%v pages) block %d differs from byte %d on: %x here, %x there (LSNs %v, %v)", tag, kind, block, i,
			a[i:min(i+8, len(a))], b[i:min(i+8, len(b))], pg.PageLSN(have), pg.PageLSN(want))
	}
}

func empty(p []byte) bool {
	return bytes.Count(p, []byte{0}) == len(p) || bytes.Count(p[24:], []byte{0}) == len(p)-24
}

// mask copies a page without what may differ: what belongs to nothing, and, on the
// primary, hints and command ids.
func mask(fork pg.ForkNumber, block int, kind pagemask.Kind, primary bool, p []byte) ([]byte, error) {
	allow := pagemask.Allow(0)
	if primary {
		allow = pagemask.Hints | pagemask.AllVisible | pagemask.Unlogged | pagemask.Ahead
	}
	p = bytes.Clone(p)
	return p, pagemask.Mask(p, pagemask.Place{Fork: fork, Block: pg.BlockNumber(block), Kind: kind}, allow)
}
