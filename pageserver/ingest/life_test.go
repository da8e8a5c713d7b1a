package ingest

import (
	"bytes"
	"fmt"
	"slices"
	"testing"

	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/pageserver/keyspace"
	"github.com/holdfastdb/holdfast/pageserver/timeline"
)

// full puts a relation of n pages, each filled with a byte.
func (b *bench) full(tag pg.RelTag, n int, fill byte) {
	entries := []timeline.Entry{{Key: keyspace.RelSize(tag), Value: timeline.Value{LSN: b.at, Kind: timeline.Image, Data: words(uint32(n))}}}
	for i := range n {
		entries = append(entries, timeline.Entry{Key: keyspace.RelPage(tag, pg.BlockNumber(i)),
			Value: timeline.Value{LSN: b.at, Kind: timeline.Image, Data: bytes.Repeat([]byte{fill}, pg.BlockSize)}})
	}
	b.put(entries)
}

func (b *bench) fill(tag pg.RelTag, block pg.BlockNumber, lsn pg.LSN) byte {
	page := make([]byte, pg.BlockSize)
	if err := b.Page(b.t.Context(), keyspace.RelPage(tag, block), lsn, page); err != nil {
		b.t.Fatal(err)
	}
	return page[4000]
}

func truncation(tag pg.RelTag, blocks, flags uint32) []byte {
	return words(blocks, uint32(tag.Tablespace), uint32(tag.Database), uint32(tag.Relation), flags)
}

// P1: pages of an earlier life never show through.
func TestCutPagesComeBackEmpty(t *testing.T) {
	b, r := newBench(t), rel(100)
	b.full(r, 10, 0xAA)
	before := b.at
	b.apply(rmSMGR, smgrTruncate, 1000, truncation(r, 4, truncateHeap))
	if have := b.size(r); have != 4 {
		t.Fatalf("the relation has %d blocks, want 4", have)
	}
	b.apply(rmGin, 0, 1000, nil, initBlock(r, 8)) // grows over the cut
	if have := b.size(r); have != 9 {
		t.Fatalf("the relation has %d blocks, want 9", have)
	}
	for block, want := range map[pg.BlockNumber]byte{3: 0xAA, 4: 0, 7: 0} {
		if have := b.fill(r, block, b.at); have != want {
			t.Errorf("block %d has %#02x, want %#02x", block, have, want)
		}
	}
	if have := b.fill(r, 7, before); have != 0xAA {
		t.Errorf("before the cut block 7 has %#02x, want 0xaa", have)
	}
}

func TestTruncationTwiceAndOfNothing(t *testing.T) {
	b, r := newBench(t), rel(100)
	b.apply(rmSMGR, smgrTruncate, 1000, truncation(r, 4, truncateHeap|truncateVM|truncateFSM))
	if have := b.size(r); have != 0 {
		t.Errorf("truncating a relation that is not there leaves %d blocks, want an empty one", have)
	}
	b.full(rel(101), 3, 1)
	b.apply(rmSMGR, smgrTruncate, 1000, truncation(rel(101), 3, truncateHeap))
	if have := b.size(rel(101)); have != 3 {
		t.Errorf("a truncation to the same size leaves %d blocks, want 3", have)
	}
}

func TestTruncationCutsMaps(t *testing.T) {
	b, r := newBench(t), rel(100)
	const perPage = 32672 // heap blocks on a visibility map page
	b.full(forkOf(r, pg.VMFork), 3, 0xFF)
	b.full(forkOf(r, pg.FSMFork), 5, 0xFF)
	b.apply(rmSMGR, smgrTruncate, 1000, truncation(r, perPage+5, truncateVM|truncateFSM))
	if have := b.size(forkOf(r, pg.VMFork)); have != 2 {
		t.Errorf("the visibility map has %d blocks, want 2", have)
	}
	page := make([]byte, pg.BlockSize)
	if err := b.Page(t.Context(), keyspace.RelPage(forkOf(r, pg.VMFork), 1), b.at, page); err != nil {
		t.Fatal(err)
	}
	if page[24] != 0xFF || page[25] != 0x03 || page[26] != 0 {
		t.Errorf("the map's page begins with %x, want ff0300: the bits of 5 blocks", page[24:27])
	}
	b.apply(rmSMGR, smgrTruncate, 1000, truncation(r, perPage, truncateVM)) // exactly at a page's start
	if have := b.size(forkOf(r, pg.VMFork)); have != 1 {
		t.Errorf("the visibility map has %d blocks, want 1", have)
	}
}

func TestLargeTruncationIsStaged(t *testing.T) {
	b, r := newBench(t), rel(100)
	const blocks = 2 * stageBytes / entryCost
	b.put([]timeline.Entry{{Key: keyspace.RelSize(r), Value: timeline.Value{LSN: b.at, Kind: timeline.Image, Data: words(blocks)}}})
	b.apply(rmSMGR, smgrTruncate, 1000, truncation(r, 0, truncateHeap))
	if b.staged < blocks/2 || b.size(r) != 0 {
		t.Errorf("%d entries were staged, and the relation has %d blocks", b.staged, b.size(r))
	}
}

// P1, when a relation's number is used a second time.
func TestDroppedPagesStayHiddenWhenTheNumberComesBack(t *testing.T) {
	b, r := newBench(t), rel(100)
	b.full(r, 5, 0xBB)
	before := b.at
	drop := append(make([]byte, 8), words(1<<2, 1, uint32(r.Tablespace), uint32(r.Database), uint32(r.Relation))...)
	b.apply(rmXact, 0x80, 1000, drop)
	if have := b.size(r); have != -1 {
		t.Fatalf("the dropped relation has %d blocks", have)
	}
	for _, forget := range []bool{false, true} {
		if forget {
			b.restart()
		}
		b.apply(rmSMGR, 0x10, 1001, append(words(uint32(r.Tablespace), uint32(r.Database), uint32(r.Relation)), words(0)...))
		b.apply(rmGin, 0, 1001, nil, initBlock(r, 4))
		if have := b.fill(r, 2, b.at); have != 0 {
			t.Errorf("block 2 of the new relation has %#02x of the old one", have)
		}
		b.apply(rmXact, 0x80, 1001, drop)
	}
	if have := b.fill(r, 2, before); have != 0xBB {
		t.Errorf("before the drop block 2 has %#02x, want 0xbb", have)
	}
}

func TestDropTakesAllForks(t *testing.T) {
	b, r := newBench(t), rel(100)
	for f := pg.MainFork; f <= pg.InitFork; f++ {
		b.full(forkOf(r, f), 1, 1)
	}
	b.apply(rmXact, 0xA0, 1000, append(make([]byte, 8), words(1<<2, 1, uint32(r.Tablespace), uint32(r.Database), uint32(r.Relation))...)) // an abort
	for f := pg.MainFork; f <= pg.InitFork; f++ {
		if have := b.size(forkOf(r, f)); have != -1 {
			t.Errorf("fork %v has %d blocks after the drop", f, have)
		}
	}
}

func TestExtents(t *testing.T) {
	var e extents
	for _, p := range []uint32{5, 3, 4, 9, 0xFFFFFFFF, 0, 8, 5} {
		e = e.with(p)
	}
	back, err := parseExtents(e.marshal())
	if err != nil || !slices.Equal(back, extents{{0, 0}, {3, 5}, {8, 9}, {0xFFFFFFFF, 0xFFFFFFFF}}) {
		t.Errorf("the ranges are %v, %v", back, err)
	}
	for p, want := range map[uint32]bool{0: true, 1: false, 4: true, 6: false, 9: true, 10: false, 0xFFFFFFFF: true} {
		if e.has(p) != want {
			t.Errorf("has(%d) = %v", p, !want)
		}
	}
	if _, err := parseExtents(words(5, 3)); err == nil {
		t.Error("a range that ends before it begins is taken")
	}
	if _, err := SLRUPages(words(0, 0xFFFFFFFF)); err == nil {
		t.Error("a list of 2^32 pages is made")
	}
}

func TestSLRUsAreTruncatedBySegments(t *testing.T) {
	b := newBench(t)
	for p := range uint32(70) {
		b.apply(rmCLOG, slruZeroPage, 0, words(p))
	}
	b.apply(rmCLOG, slruTruncate, 0, words(40, 40*clogPerPage, 1))
	if have := b.slruPages(pg.CLog); len(have) != 70-32 || have[0] != 32 {
		t.Errorf("%d pages from %d on are left, want the segments from 32 on", len(have), have[0])
	}
	if b.history(keyspace.SLRUPage(pg.CLog, 5)).Base != nil {
		t.Error("a page of the removed segment is still there")
	}
}

func TestMultiXacts(t *testing.T) {
	b := newBench(t)
	create := func(multi, offset uint32, xids ...uint32) []byte {
		d := words(multi, offset, uint32(len(xids)))
		for _, x := range xids {
			d = append(d, words(x, 0)...)
		}
		return d
	}
	b.apply(rmMultiXact, multiZeroOffsets, 0, words(0))
	b.apply(rmMultiXact, multiZeroMembers, 0, words(0))
	b.apply(rmMultiXact, multiCreate, 1000, create(1, 1, 990, 5000))
	cp := b.core.state.checkPoint()
	if cp.NextMulti != 2 || cp.NextMultiOffset != 3 || cp.NextXid != 5001 {
		t.Errorf("after a multixact: %+v", *cp)
	}
	// Of an older minor version: the next page's first offset comes before its ZERO_OFF_PAGE.
	b.apply(rmMultiXact, multiCreate, 1000, create(offsetsPerPage-1, 7, 990, 991))
	b.restart()
	b.apply(rmMultiXact, multiZeroOffsets, 0, words(1))
	page := make([]byte, pg.BlockSize)
	if err := b.Page(t.Context(), keyspace.SLRUPage(pg.MultiXactOffsets, 1), b.at, page); err != nil {
		t.Fatal(err)
	}
	if have := le.Uint32(page); have != 9 {
		t.Errorf("the next page's first offset is %d, want 9", have)
	}
	b.apply(rmMultiXact, multiTruncate, 0, words(5, 1, 3000, 1, 5))
	if cp := b.core.state.checkPoint(); cp.OldestMulti != 3000 || cp.OldestMultiDB != 5 {
		t.Errorf("after a truncation the oldest multixact is %d of database %d", cp.OldestMulti, cp.OldestMultiDB)
	}
}

func TestMemberTruncationWrapsAround(t *testing.T) {
	b := newBench(t)
	const last = 0xFFFFFFFF / membersPerPage
	for _, p := range []uint32{0, 40, last} {
		b.apply(rmMultiXact, multiZeroMembers, 0, words(p))
	}
	b.apply(rmMultiXact, multiTruncate, 0, words(5, 1, 2, 0xFFFFFF00, 40*membersPerPage))
	if have := b.slruPages(pg.MultiXactMembers); !slices.Equal(have, []uint32{40}) {
		t.Errorf("pages %v are left, want 40", have)
	}
}

// P1: what was at the place of a copy before it does not show after the copy was dropped,
// either.
func TestPagesFromBeforeACopyStayHiddenAfterIt(t *testing.T) {
	const size = maxZeroed + 20
	place := words(6, 1663)
	copied, dropped := words(6, 1663, 5, 1663), words(6, 1, 1663)
	for _, c := range []struct {
		name     string
		inSource bool // the source has a relation of that number, too, a smaller one
		then     func(b *bench, tag pg.RelTag)
	}{
		{"dropped before", false, func(b *bench, _ pg.RelTag) {
			b.apply(rmDBase, 0x20, 1000, dropped)
			b.apply(rmDBase, 0x00, 1000, copied)
		}},
		{"replaced", false, func(b *bench, _ pg.RelTag) { b.apply(rmDBase, 0x00, 1000, copied) }},
		{"replaced by a smaller one", true, func(b *bench, _ pg.RelTag) { b.apply(rmDBase, 0x00, 1000, copied) }},
		{"that changes", true, func(b *bench, tag pg.RelTag) {
			b.apply(rmDBase, 0x00, 1000, copied)
			b.apply(rmGin, 0, 1000, nil, initBlock(tag, 3))
		}},
		{"that is cut", true, func(b *bench, tag pg.RelTag) {
			b.apply(rmDBase, 0x00, 1000, copied)
			b.apply(rmSMGR, smgrTruncate, 1000, truncation(tag, 1, truncateHeap))
		}},
		{"that is dropped", true, func(b *bench, tag pg.RelTag) {
			b.apply(rmDBase, 0x00, 1000, copied)
			b.apply(rmXact, 0x80, 1000, append(make([]byte, 8), words(1<<2, 1, uint32(tag.Tablespace), uint32(tag.Database), uint32(tag.Relation))...))
		}},
		{"twice", true, func(b *bench, _ pg.RelTag) {
			b.apply(rmDBase, 0x00, 1000, copied)
			b.apply(rmDBase, 0x00, 1000, copied)
		}},
	} {
		for _, restart := range []bool{false, true} {
			t.Run(fmt.Sprint(c.name, ", restart ", restart), func(t *testing.T) {
				b, tag := newBench(t), rel(100)
				if c.inSource {
					b.full(tag, 2, 0xAA)
				}
				tag.Database = 6
				b.apply(rmDBase, 0x10, 1000, place)
				b.full(tag, size, 0xBB)
				c.then(b, tag)
				if restart {
					b.restart()
				}
				b.apply(rmDBase, 0x20, 1000, dropped)
				b.apply(rmDBase, 0x10, 1000, place)
				b.apply(rmGin, 0, 1000, nil, initBlock(tag, size-1))
				for block := range pg.BlockNumber(size - 1) {
					if have := b.fill(tag, block, b.at); have != 0 {
						t.Fatalf("block %d of a new relation has %#02x of an old one", block, have)
					}
				}
			})
		}
	}
}
