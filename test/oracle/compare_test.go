package oracle

import (
	"bytes"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

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
	kinds map[pg.RelFileNode]pageKind
	// lsnFree: the primary's heap pages may have other LSNs.
	lsnFree bool

	pages, equal, extended, left int
	problems                     []string
}

// pageKind says how a page is masked.
type pageKind int

const (
	unknownPages pageKind = iota
	heapPages
	btreePages
	hashPages
	ginPages
	brinPages
	gistPages
	spgistPages
	sequencePages
	otherPages // index kinds that leave no hints
)

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
			c.errorf("page %d of %s differs at %d", p.Page, p.Kind.Dir(), firstDifference(have, want))
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
		if bytes.Equal(have[i], w) {
			c.equal++
			continue
		}
		c.page(tag, i, have[i], w)
	}
}

func (c *comparison) page(tag pg.RelTag, block int, have, want []byte) {
	kind := c.kinds[tag.RelFileNode]
	a, errA := mask(tag.Fork, kind, c.kinds != nil, have)
	b, errB := mask(tag.Fork, kind, c.kinds != nil, want)
	if errA != nil || errB != nil {
		c.errorf("%v block %d: here %v, there %v", tag, block, errA, errB)
		return
	}
	if c.lsnFree && kind == heapPages {
		clear(a[:8])
		clear(b[:8])
	}
	if c.blanked[tag] {
		for i := range a {
			b[i] &= a[i]
		}
	}
	if i := firstDifference(a, b); i >= 0 {
		c.errorf("%v (kind %d) block %d differs from byte %d on: %x here, %x there (LSNs %v, %v)", tag, kind, block, i,
			a[i:min(i+8, len(a))], b[i:min(i+8, len(b))], pg.PageLSN(have), pg.PageLSN(want))
	}
}

func firstDifference(a, b []byte) int {
	for i := range a {
		if a[i] != b[i] {
			return i
		}
	}
	return -1
}

func empty(p []byte) bool {
	return bytes.Count(p, []byte{0}) == len(p) || bytes.Count(p[24:], []byte{0}) == len(p)-24
}

// mask copies a page without what may differ: what belongs to nothing, and, on the
// primary, hints and command ids. It is written from bufmask.c's and the access methods'
// rules, not from redo's own.
func mask(fork pg.ForkNumber, kind pageKind, primary bool, p []byte) ([]byte, error) {
	p = append([]byte(nil), p...)
	switch {
	case fork == pg.FSMFork:
		clear(p[24:28]) // fp_next_slot
		return p, nil
	case fork == pg.VMFork:
		clear(p[:24]) // where the primary extended the map, its page has a header already
		return p, nil
	case pg.IsNewPage(p):
		return p, nil
	case fork == pg.InitFork && primary:
		clear(p[:8]) // written before it is logged
	}
	lower, upper, special := int(le.Uint16(p[12:])), int(le.Uint16(p[14:])), int(le.Uint16(p[16:]))
	if lower < 24 || lower > upper || upper > special || special > len(p) {
		return nil, fmt.Errorf("corrupt header: lower %d upper %d special %d", lower, upper, special)
	}
	if special != len(p)-8 || le.Uint16(p[len(p)-2:]) != 0xF092 { // BRIN's range map, which is all TIDs
		clear(p[lower:upper])
	}
	if kind == ginPages && primary && special == len(p)-8 && le.Uint16(p[len(p)-2:]) == 1<<2 {
		clear(p[8 : len(p)-2]) // from the pending list, deleted: the primary leaves it as it is
		return p, nil
	}
	if kind == brinPages && primary && special == len(p)-8 {
		p[len(p)-4] &^= 1 // BRIN_EVACUATE_PAGE
	}
	if kind == heapPages || kind == btreePages {
		le.PutUint16(p[10:], le.Uint16(p[10:])&^7) // hints in pd_flags
		clear(p[20:24])                            // pd_prune_xid
	}
	hash := kind == hashPages && special == len(p)-16
	dead := kind == btreePages || kind == gistPages || hash && p[special+12]&3 != 0 // line pointers may say so, as a hint; in hash, not those of meta and bitmap pages
	used := make([]bool, len(p))
	for at := 24; at+4 <= lower; at += 4 {
		item := le.Uint32(p[at:])
		off, flags, n := int(item&0x7FFF), item>>15&3, int(item>>17)
		if n > 0 && off+n <= len(p) {
			for i := off; i < off+n; i++ {
				used[i] = true
			}
		}
		switch {
		case dead && primary && flags == 3:
			le.PutUint32(p[at:], item&^(3<<15)|1<<15)
		case kind == heapPages && primary && flags == 1 && n >= 23:
			maskTuple(p[off : off+n])
		case kind == sequencePages && n == 41:
			clear(p[off+24 : off+n]) // WAL is ahead by up to 32 values: last_value, log_cnt, is_called
		}
	}
	for i := upper; i < special; i++ {
		if !used[i] {
			p[i] = 0
		}
	}
	if hash && primary {
		p[special+12] &^= 1 << 7 // LH_PAGE_HAS_DEAD_TUPLES
	}
	if kind == spgistPages && primary && special == len(p)-8 && p[special]&1 != 0 {
		clear(p[24:lower]) // the metapage: which pages were used last is not in WAL
	}
	if kind == gistPages && primary && special == len(p)-16 {
		p[special+12] &^= 1<<2 | 1<<4 // TUPLES_DELETED, which recovery sets in more cases, and HAS_GARBAGE
	}
	if kind == btreePages && special == len(p)-16 {
		le.PutUint16(p[special+12:], le.Uint16(p[special+12:])&^(1<<5|1<<6)) // SPLIT_END, HAS_GARBAGE
		clear(p[special+14:])                                                // cycle id
	}
	return p, nil
}

// maskTuple blanks a heap tuple's hint bits and command ids.
func maskTuple(t []byte) {
	le.PutUint16(t[20:], le.Uint16(t[20:])&^0x0F20) // xmin and xmax hints, HEAP_COMBOCID
	clear(t[8:12])
}
