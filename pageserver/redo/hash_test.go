package redo

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/internal/walrec"
)

// TestHashPhases compares how buckets are allocated with what the README of hash indexes says:
// doublings up to 512 buckets, then each doubling in four equal steps.
func TestHashPhases(t *testing.T) {
	want := []uint32{1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 640, 768, 896, 1024, 1280, 1536, 1792, 2048, 2560}
	for phase, n := range want {
		if got := hashTotalBuckets(phase); got != n {
			t.Errorf("%d buckets after phase %d, want %d", got, phase, n)
		}
		if got := hashSpareIndex(n); got != phase {
			t.Errorf("phase %d allocates bucket %d, want %d", got, n, phase)
		}
		if got := hashSpareIndex(n + 1); got != phase+1 {
			t.Errorf("phase %d allocates bucket %d, want %d", got, n+1, phase+1)
		}
	}
	if got := hashSpareIndex(hashMaxBuckets); got >= hashMaxSplitpoints || hashTotalBuckets(got) != hashMaxBuckets {
		t.Errorf("phase %d makes %d buckets", got, hashTotalBuckets(got))
	}
}

// hashPage is what a record makes of a page of the index that the tests below share.
func hashPage(t *testing.T, p page, rec *walrec.Record, ref uint8) page {
	t.Helper()
	rec.RmID = rmHash
	rec.End = p.lsn() + 8
	blk := rec.Block(ref)
	if err := ApplyBlock(blk.Rel, blk.Block, p, rec); err != nil {
		t.Fatal(err)
	}
	return p
}

func emptyPage() page { return make(page, pg.BlockSize) }

func hashMetapage(t *testing.T) page {
	tuples := make([]byte, 14)
	le.PutUint16(tuples[12:], 100)
	return hashPage(t, emptyPage(), &walrec.Record{Info: hashInitMeta, MainData: tuples, Blocks: []walrec.Block{{WillInit: true}}}, 0)
}

// TestHashSecondBitmap adds an overflow page that needs another bitmap page, which takes
// an index of 256 MB.
func TestHashSecondBitmap(t *testing.T) {
	meta := hashMetapage(t)
	rec := &walrec.Record{Info: hashAddOvfl, MainData: []byte{0, 0x10, 0}, Blocks: []walrec.Block{
		{ID: 0, Block: 51, WillInit: true, Data: []byte{7, 0, 0, 0}},
		{ID: 1, Block: 9},
		{ID: 3, Block: 50, WillInit: true},
		{ID: 4, Block: 0, Data: []byte{1, 2, 0, 0}},
	}}
	hashPage(t, meta, rec, 4)
	got := []uint32{meta.u32(hashmFirstFree), meta.u32(hashmNMaps), meta.u32(hashmMapp), meta.u32(hashmSpares + 4)}
	if d := cmp.Diff([]uint32{0x201, 1, 50, 3}, got); d != "" {
		t.Errorf("first free bit, bitmap pages, block of the first, spares (-want +got):\n%s", d)
	}
	bitmap := hashPage(t, emptyPage(), rec, 3)
	if bitmap.lower() != headerSize+4096 || bitmap[headerSize] != 0xFF || bitmap[headerSize+4095] != 0xFF || bitmap[headerSize+4096] != 0 {
		t.Errorf("the bitmap ends at %d", bitmap.lower())
	}
	meta.putU32(hashmNMaps, hashMaxBitmaps)
	rec.End = 1 << 20
	if err := ApplyBlock(pg.RelTag{}, 0, meta, rec); err == nil {
		t.Error("more bitmap pages than the metapage holds")
	}
}

// TestHashFreedInTheMidst frees a page that has a successor.
func TestHashFreedInTheMidst(t *testing.T) {
	data := []byte{3, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 1}
	ovfl := &walrec.Record{Info: hashAddOvfl, MainData: []byte{0, 0x10, 0}, Blocks: []walrec.Block{
		{ID: 0, Block: 5, WillInit: true, Data: []byte{1, 0, 0, 0}}, {ID: 1, Block: 4}}}
	next := hashPage(t, emptyPage(), ovfl, 0)
	rec := &walrec.Record{Info: hashSqueeze, MainData: data, Blocks: []walrec.Block{{ID: 3, Block: 3}, {ID: 4, Block: 5}}}
	hashPage(t, next, rec, 4)
	q, err := next.hashOpaque()
	if err != nil || le.Uint32(q[hashoPrev:]) != 3 || le.Uint32(q[hashoNext:]) != invalidBlock {
		t.Errorf("%v, special area %x", err, q)
	}
	rec.End = 1 << 20
	if err := ApplyBlock(pg.RelTag{}, 3, next, rec); err == nil {
		t.Error("the page before is named twice: as the one that tuples go to, and by its own reference")
	}
}
