package ingest

import (
	"bytes"
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/pageserver/keyspace"
	"github.com/holdfastdb/holdfast/pageserver/redo"
)

// emptyPage is a page without items, as some access method with a special area left it.
func emptyPage(special []byte) []byte {
	p := make([]byte, pg.BlockSize)
	at := pg.BlockSize - len(special)
	for i, v := range []int{24, at, at, pg.BlockSize | 4} { // pd_lower, pd_upper, pd_special, version
		le.PutUint16(p[12+2*i:], uint16(v))
	}
	copy(p[at:], special)
	return p
}

// TestUnknownRecordsCostTheirPages: what PostgreSQL 15 itself does not write fails the read of
// the pages that it names, loudly, and of no others; who makes the page anew heals it.
func TestUnknownRecordsCostTheirPages(t *testing.T) {
	for _, c := range []struct {
		rmid, info uint8
		name       string
	}{
		{128, 0x00, "rmgr 128/0x00"}, {200, 0x30, "rmgr 200/0x30"}, {255, 0xF0, "rmgr 255/0xf0"},
		{rmXLOG, 0xC0, "XLOG/0xc0"}, {rmHeap, 0x90, "Heap/0x90"}, {rmBtree, 0xF0, "Btree/0xf0"}, {rmGin, 0x00, "Gin/0x00"},
	} {
		b, r := newBench(t), rel(100)
		for n := range pg.BlockNumber(4) {
			b.mustWAL(rmXLOG, xlogFPI, nil, ref{tag: r, block: n, image: emptyPage([]byte{byte(n), 0, 0, 0, 0, 0, 0, 0})})
		}
		before := b.at
		rec, err := b.wal(c.rmid, c.info, 1000, []byte("main data"), ref{tag: r, block: 1, data: []byte("data")}, ref{tag: r, block: 5, init: true})
		if err != nil {
			t.Fatalf("%s: %v", c.name, err)
		}
		b.mustWAL(rmXLOG, xlogFPI, nil, ref{tag: r, block: 6, image: emptyPage([]byte("later...")[:8])})
		if have := b.size(r); have != 7 {
			t.Errorf("%s: the relation has %d blocks, want 7", c.name, have)
		}
		if cp := b.core.state.checkPoint(); cp.NextXid != 1001 {
			t.Errorf("%s: the next xid is %d, want 1001", c.name, cp.NextXid)
		}
		page := make([]byte, pg.BlockSize)
		for block, fails := range []bool{false, true, false, false, false, true, false} {
			err := b.Page(t.Context(), keyspace.RelPage(r, pg.BlockNumber(block)), b.at, page)
			if !fails {
				if err != nil {
					t.Errorf("%s: block %d, which it does not name: %v", c.name, block, err)
				}
				continue
			}
			var unsupported *redo.UnsupportedError
			if !errors.As(err, &unsupported) {
				t.Errorf("%s: reading block %d gives %v", c.name, block, err)
				continue
			}
			for _, part := range []string{c.name, rec.LSN.String(), r.String(), "block " + string(rune('0'+block))} {
				if !strings.Contains(err.Error(), part) {
					t.Errorf("%s: the error does not name %q: %v", c.name, part, err)
				}
			}
		}
		if err := b.Page(t.Context(), keyspace.RelPage(r, 1), before, page); err != nil {
			t.Errorf("%s: before the record: %v", c.name, err)
		}
		b.mustWAL(rmXLOG, xlogFPI, nil, ref{tag: r, block: 1, image: emptyPage([]byte("new page"))})
		if err := b.Page(t.Context(), keyspace.RelPage(r, 1), b.at, page); err != nil || !bytes.HasSuffix(page, []byte("new page")) {
			t.Errorf("%s: a page made anew: %v", c.name, err)
		}
	}
}

func (b *bench) mustWAL(rmid, info uint8, main []byte, refs ...ref) {
	b.t.Helper()
	if _, err := b.wal(rmid, info, 0, main, refs...); err != nil {
		b.t.Fatal(err)
	}
}

// TestUnknownRecordsWithoutPages: an extension's is noted, one of PostgreSQL's own managers stops
// the branch.
func TestUnknownRecordsWithoutPages(t *testing.T) {
	b, r := newBench(t), rel(100)
	b.mustWAL(200, 0x10, []byte("some"))
	b.mustWAL(130, 0x20, nil)
	b.mustWAL(200, 0x30, nil)
	if have := b.core.Foreign(); !slices.Equal(have, []uint8{130, 200}) {
		t.Errorf("resource managers %v are noted, want 130 and 200", have)
	}
	b.mustWAL(rmXLOG, xlogFPI, nil, ref{tag: r, image: emptyPage(nil)})
	if err := b.Page(t.Context(), keyspace.RelPage(r, 0), b.at, make([]byte, pg.BlockSize)); err != nil {
		t.Errorf("a page made later: %v", err)
	}
	for _, c := range []struct {
		rmid, info uint8
		name       string
	}{
		{rmXLOG, 0xE0, "XLOG/0xe0"}, {rmXact, 0x70, "Transaction/0x70"}, {rmSMGR, 0x30, "Storage/0x30"}, {rmDBase, 0x30, "Database/0x30"},
		{rmTablespace, 0x20, "Tablespace/0x20"}, {rmStandby, 0x30, "Standby/0x30"}, {rmRelMap, 0x10, "RelMap/0x10"}, {rmBtree, 0xF0, "Btree/0xf0"},
	} {
		rec, err := b.wal(c.rmid, c.info, 0, make([]byte, 100))
		if err == nil || !strings.Contains(err.Error(), c.name+" at "+rec.LSN.String()) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}

// TestGistImageThatItsRecordStillChanges: the record that inserts a downlink has an image of the
// left half of the split, taken before the split is marked complete there.
func TestGistImageThatItsRecordStillChanges(t *testing.T) {
	const rmGist, leaf, followRight, pageID = 14, 1, 8, 0xFF81
	special := append(make([]byte, 8), words(7)...)                        // no NSN yet; the right half is block 7
	special = append(special, leaf|followRight, 0, pageID&0xFF, pageID>>8) // flags and the mark of a GiST page
	for _, c := range []struct {
		name string
		info uint8
		left int // the reference to the left half
	}{{"PAGE_UPDATE", 0x00, 1}, {"PAGE_SPLIT", 0x30, 0}} {
		b, r := newBench(t), rel(100)
		refs := []ref{{tag: r, block: 0, image: emptyPage(make([]byte, 16))}, {tag: r, block: 1, image: emptyPage(make([]byte, 16))}}
		refs[c.left].image = emptyPage(special)
		rec, err := b.wal(rmGist, c.info, 1000, make([]byte, 32), refs...)
		if err != nil {
			t.Fatalf("%s: %v", c.name, err)
		}
		page := make([]byte, pg.BlockSize)
		if err := b.Page(t.Context(), keyspace.RelPage(r, pg.BlockNumber(c.left)), b.at, page); err != nil {
			t.Fatalf("%s: %v", c.name, err)
		}
		nsn := pg.PageLSN(page[pg.BlockSize-16:])
		if flags := page[pg.BlockSize-4]; nsn != rec.End || flags != leaf || pg.PageLSN(page) != rec.End {
			t.Errorf("%s: the left half has NSN %v, want %v, flags %#x, want %#x, and LSN %v", c.name, nsn, rec.End, flags, leaf, pg.PageLSN(page))
		}
	}
}

func TestTablespacesAreRefusedUntilTheyAreDropped(t *testing.T) {
	b := newBench(t)
	b.apply(rmTablespace, 0x00, 1000, append(words(16400), "/elsewhere\x00"...))
	b.apply(rmTablespace, 0x00, 1000, append(words(16401), "/elsewhere\x00"...))
	b.apply(rmTablespace, 0x10, 1000, words(16400))
	if have := b.core.Refused(); !slices.Equal(have, []pg.Oid{16401}) {
		t.Errorf("tablespaces %v are refused, want 16401", have)
	}
	for _, info := range []uint8{0x00, 0x10} {
		if b.try(rmTablespace, info, 0, []byte{1, 2, 3}) == nil {
			t.Errorf("a tablespace record %#02x of 3 bytes is taken", info)
		}
	}
}

// TestCLogTruncationMovesTheOldestXid: a start from the state must not look for what is gone.
func TestCLogTruncationMovesTheOldestXid(t *testing.T) {
	b := newBench(t)
	cp := b.core.state.checkPoint()
	cp.NextXid = 60 * clogPerPage
	b.apply(rmCLOG, slruTruncate, 0, words(40, 40*clogPerPage+7, 9))
	if cp.OldestXid != 40*clogPerPage+7 || cp.OldestXidDB != 9 {
		t.Errorf("the oldest xid is %d of database %d", cp.OldestXid, cp.OldestXidDB)
	}
	b.apply(rmCLOG, slruTruncate, 0, words(39, 39*clogPerPage, 5))
	if cp.OldestXid != 40*clogPerPage+7 || cp.OldestXidDB != 9 {
		t.Errorf("the oldest xid went back to %d of database %d", cp.OldestXid, cp.OldestXidDB)
	}
	for n := range 12 {
		if b.try(rmCLOG, slruTruncate, 0, make([]byte, n)) == nil {
			t.Errorf("a truncation of %d bytes is taken", n)
		}
	}
}

// TestNoAreaHasPagesBeyondItsLastNumber: such a page would make removing its segment endless.
func TestNoAreaHasPagesBeyondItsLastNumber(t *testing.T) {
	for _, c := range []struct {
		rmid, info uint8
		last       uint32
	}{
		{rmCLOG, slruZeroPage, 131071}, {rmMultiXact, multiZeroOffsets, 2097151}, {rmMultiXact, multiZeroMembers, 2625285}, {rmCommitTS, slruZeroPage, 5244160},
	} {
		b := newBench(t)
		b.apply(c.rmid, c.info, 0, words(c.last))
		for _, page := range []uint32{c.last + 1, 0xFFFFFFFF} {
			if b.try(c.rmid, c.info, 0, words(page)) == nil {
				t.Errorf("resource manager %d: page %d is taken", c.rmid, page)
			}
		}
	}
}
