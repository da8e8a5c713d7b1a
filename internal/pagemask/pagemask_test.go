package pagemask

import (
	"bytes"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/holdfastdb/holdfast/internal/pg"
)

// pageWith makes a page with a special area and one item of the given size at its end.
func pageWith(specialSize, itemSize int, end ...byte) []byte {
	p := make([]byte, pg.BlockSize)
	pg.SetPageLSN(p, 0x5000000)
	sp := len(p) - specialSize
	off := sp - (itemSize+7)&^7
	le.PutUint16(p[offLower:], headerSize+4)
	le.PutUint16(p[offUpper:], uint16(off))
	le.PutUint16(p[offSpecial:], uint16(sp))
	le.PutUint32(p[headerSize:], uint32(off)|lpNormal<<15|uint32(itemSize)<<17)
	copy(p[len(p)-len(end):], end)
	return p
}

// heapRow is a heap page with a row of transactions 700 and 701.
func heapRow() (p, row []byte) {
	p = pageWith(0, 45)
	row = p[len(p)-48:][:45]
	le.PutUint32(row[rowXmin:], 700)
	le.PutUint32(row[rowXmax:], 701)
	le.PutUint16(row[rowCtid+4:], 1)
	row[22] = 24
	return p, row
}

func TestKindOf(t *testing.T) {
	sequence := pageWith(8, sequenceRow, 0x17, 0x17, 0, 0, 0, 0, 0, 0)
	neighbour := pageWith(8, 16, 0x17, 0x17, 0, 0, 0, 0, 0, 0) // a page of GIN before block 0x1717
	heap, _ := heapRow()
	for _, c := range []struct {
		page []byte
		want Kind
	}{
		{heap, Heap}, {pageWith(16, 16, 0, 0), Btree}, {pageWith(16, 16, 0x7F, 0xFF), Btree}, {pageWith(16, 16, 0x80, 0xFF), Hash},
		{pageWith(16, 16, 0x81, 0xFF), Gist}, {pageWith(8, 16, 0x82, 0xFF), SPGist}, {pageWith(8, 16, 0x83, 0xFF), Other},
		{pageWith(8, 16, 0x93, 0xF0), BRIN}, {pageWith(8, 16, 2, 0), GIN}, {sequence, Sequence}, {neighbour, GIN},
		{make([]byte, pg.BlockSize), Other}, {pageWith(24, 16), Other},
	} {
		if got := KindOf(c.page); got != c.want {
			t.Errorf("a page that ends with % x is a %v page, want %v", c.page[pg.BlockSize-8:], got, c.want)
		}
	}
}

func TestMask(t *testing.T) {
	heap := Place{Kind: Heap, Block: 0x20003}
	set16 := func(off int, bits uint16) func(p, row []byte) {
		return func(p, row []byte) { le.PutUint16(row[off:], le.Uint16(row[off:])|bits) }
	}
	header16 := func(off int, bits uint16) func(p, row []byte) {
		return func(p, _ []byte) { le.PutUint16(p[off:], le.Uint16(p[off:])|bits) }
	}
	speculate := func(_, row []byte) {
		le.PutUint16(row[rowCtid:], 9) // the token
		le.PutUint16(row[rowCtid+4:], speculative)
	}
	for _, c := range []struct {
		name   string
		change func(p, row []byte)
		needs  Allow // without any of it the pages differ
	}{
		{"xmin is committed", set16(rowInfomask, 0x100), Hints},
		{"xmax is invalid", set16(rowInfomask, xmaxInvalid), Hints},
		{"xmin is frozen", set16(rowInfomask, xminBits), 0xFF},
		{"locked only", set16(rowInfomask, xmaxLockOnly), 0xFF},
		{"page is full", header16(offFlags, 2), Hints},
		{"prune", header16(offPrune, 7), Hints},
		{"all visible", header16(offFlags, pdAllVisible), AllVisible},
		{"command", set16(rowCid, 3), Unlogged},
		{"two commands", set16(rowInfomask, comboCid), Unlogged},
		{"speculative", speculate, Unlogged},
		{"LSN", header16(4, 8), 0xFF},
		{"content", set16(24, 1), 0xFF},
		{"free space", header16(1000, 1), 0},
		{"padding", func(p, _ []byte) { p[len(p)-1] = 1 }, 0},
	} {
		for _, allow := range []Allow{0, Hints, AllVisible, Unlogged, Ahead, Hints | AllVisible | Unlogged | Ahead} {
			a, rowA := heapRow()
			b, rowB := heapRow()
			le.PutUint16(rowA[rowCtid:], 2)
			le.PutUint16(rowA[rowCtid+2:], 3)
			copy(rowB, rowA)
			c.change(a, rowA)
			for _, p := range [][]byte{a, b} {
				if err := Mask(p, heap, allow); err != nil {
					t.Fatal(err)
				}
			}
			want := c.needs != 0 && allow&c.needs == 0 || c.needs == 0xFF
			if got := Difference(a, b) >= 0; got != want {
				t.Errorf("%s, allowing %b: the pages differ: %v, want %v", c.name, allow, got, want)
			}
		}
	}
	corrupt, _ := heapRow()
	le.PutUint16(corrupt[offUpper:], 9000)
	if Mask(corrupt, heap, Hints) == nil {
		t.Error("a page whose free space ends beyond it was masked")
	}
}

func TestMaskOfIndexes(t *testing.T) {
	all := Hints | AllVisible | Unlogged | Ahead
	dead := func(p []byte) { le.PutUint32(p[headerSize:], le.Uint32(p[headerSize:])|lpDead<<15) }
	at := func(i int, v byte) func([]byte) { return func(p []byte) { p[i] |= v } }
	for _, c := range []struct {
		name   string
		kind   Kind
		end    []byte
		size   int
		change func(p []byte)
		allow  Allow
		differ bool
	}{
		{"btree dead", Btree, []byte{1, 0, 0, 0}, 16, dead, Hints, false},
		{"btree dead, no hints", Btree, []byte{1, 0, 0, 0}, 16, dead, Unlogged, true},
		{"btree metapage", Btree, []byte{btreeMeta, 0, 0, 0}, 16, dead, all, true},
		{"btree cycle", Btree, []byte{1, 0, 0, 0}, 16, at(8190, 5), Hints, true},
		{"btree cycle allowed", Btree, []byte{1, 0, 0, 0}, 16, at(8190, 5), Unlogged, false},
		{"btree neighbour", Btree, []byte{1, 0, 0, 0}, 16, at(8176, 5), all, true},
		{"hash bucket dead", Hash, []byte{2, 0, 0x80, 0xFF}, 16, dead, Hints, false},
		{"hash bitmap", Hash, []byte{4, 0, 0x80, 0xFF}, 16, dead, all, true},
		{"hash flag", Hash, []byte{2, 0, 0x80, 0xFF}, 16, at(8188, hashHasDead), Hints, false},
		{"gist garbage", Gist, []byte{1, 0, 0x81, 0xFF}, 16, at(8188, gistGarbage), Hints, false},
		{"gist leaf", Gist, []byte{0, 0, 0x81, 0xFF}, 16, at(8188, 1), all, true},
		{"gin in use", GIN, []byte{0, 0, 2, 0}, 8, at(8170, 1), all, true},
		{"gin deleted", GIN, []byte{0, 0, ginDeleted, 0}, 8, at(8170, 1), Hints, false},
		{"brin map", BRIN, []byte{0, 0, 0x92, 0xF0}, 8, at(100, 1), all, true},
		{"brin evacuates", BRIN, []byte{0, 0, 0x93, 0xF0}, 8, at(8188, brinEvacuate), Hints, false},
	} {
		a := pageWith(c.size, 16, c.end...)
		b := slices.Clone(a)
		c.change(a)
		for _, p := range [][]byte{a, b} {
			if err := Mask(p, Place{Kind: c.kind}, c.allow); err != nil {
				t.Fatal(err)
			}
		}
		if got := Difference(a, b) >= 0; got != c.differ {
			t.Errorf("%s: the pages differ: %v, want %v", c.name, got, c.differ)
		}
	}
}

func TestMaskOfMapsAndSequences(t *testing.T) {
	fresh, zero := make([]byte, pg.BlockSize), make([]byte, pg.BlockSize)
	fresh[offLower] = headerSize
	le.PutUint16(fresh[offUpper:], pg.BlockSize)
	for _, fork := range []pg.ForkNumber{pg.MainFork, pg.VMFork} {
		p := bytes.Clone(fresh)
		if err := Mask(p, Place{Fork: fork}, Hints); err != nil || !bytes.Equal(p, zero) || !Empty(fresh) {
			t.Errorf("%v: a header with nothing after it does not equal zeros: %v", fork, err)
		}
	}
	a := pageWith(8, sequenceRow, 0x17, 0x17, 0, 0, 0, 0, 0, 0)
	b := slices.Clone(a)
	a[pg.BlockSize-8-48+24] = 33 // last_value
	for _, p := range [][]byte{a, b} {
		if err := Mask(p, Place{Kind: Sequence}, Ahead); err != nil {
			t.Fatal(err)
		}
	}
	if i := Difference(a, b); i >= 0 {
		t.Errorf("a sequence that WAL is ahead of differs at %d", i)
	}
}

func TestNeeds(t *testing.T) {
	heap := Place{Kind: Heap}
	for _, c := range []struct {
		name string
		info uint16
		cid  byte
		want []Need
	}{
		{"the same", 0, 0, nil},
		{"command", 0, 3, []Need{{Xmin: 700, Xmax: 701}}},
		{"combined", comboCid, 0, []Need{{Xmin: 700, Xmax: 701}}},
		{"not deleted", xmaxInvalid, 3, []Need{{Xmin: 700}}},
		{"frozen", xminBits | xmaxInvalid, 3, []Need{{}}},
		{"multixact", xmaxIsMulti, 3, []Need{{Xmin: 700, Multi: true}}},
		{"lockers", xmaxIsMulti | xmaxLockOnly, 3, []Need{{Xmin: 700}}},
	} {
		a, row := heapRow()
		b, _ := heapRow()
		le.PutUint16(row[rowInfomask:], c.info)
		row[rowCid] = c.cid
		got := Needs(a, b, heap)
		for i := range got {
			got[i].At = 0
		}
		if diff := cmp.Diff(c.want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", c.name, diff)
		}
	}
	a := pageWith(16, 16, 1, 0, 5, 0)
	b := pageWith(16, 16, 1|btreeGarbage, 0, 5, 0)
	if got := Needs(a, b, Place{Kind: Btree}); got != nil {
		t.Errorf("a hint is needed: %v", got)
	}
	b[pg.BlockSize-2] = 0
	if got := Needs(a, b, Place{Kind: Btree}); len(got) != 1 || !got[0].Cycle || got[0].At != pg.BlockSize-2 {
		t.Errorf("a vacuum cycle: %v", got)
	}
}

func TestField(t *testing.T) {
	p, _ := heapRow()
	heap := Place{Kind: Heap}
	row := pg.BlockSize - 48
	for i, want := range map[int]string{0: "pd_lsn", 11: "pd_flags", 22: "pd_prune_xid", 25: "line pointer 1", 500: "the space between rows",
		row: "t_xmin of row 1", row + 9: "t_cid of row 1", row + 20: "t_infomask of row 1", row + 30: "the content of row 1"} {
		if got := Field(p, heap, i); got != want {
			t.Errorf("byte %d is %s, want %s", i, got, want)
		}
	}
	if got := Field(pageWith(16, 16), Place{Kind: Btree}, pg.BlockSize-1); got != "the special area" {
		t.Error(got)
	}
	if got := Field(p, Place{Fork: pg.VMFork}, 30); got != "the visibility map" {
		t.Error(got)
	}
}
