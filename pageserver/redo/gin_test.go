package redo

import (
	"bytes"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/holdfastdb/holdfast/internal/walrec"
)

// plainTIDs writes TIDs, as numbers, as items of a record.
func plainTIDs(numbers []uint64) []byte {
	b := make([]byte, tidSize*len(numbers))
	for i, v := range numbers {
		putTID(b[tidSize*i:], uint32(v>>ginOffsetBits), uint16(v&ginOffsetMask))
	}
	return b
}

func segmentTIDs(t *testing.T, seg []byte) (list []uint64) {
	r := tidReader{plain: seg[:tidSize], coded: seg[ginSegHeader:][:le.Uint16(seg[tidSize:])]}
	for v := r.next(); v != ginTIDLimit; v = r.next() {
		list = append(list, v)
	}
	if r.err != nil {
		t.Error(r.err)
	}
	return list
}

// TestGINMerge merges lists of TIDs, near and far from one another, also with TIDs in both.
func TestGINMerge(t *testing.T) {
	rng := rand.New(rand.NewPCG(15, 18))
	for range 300 {
		bits := 1 + rng.IntN(32+ginOffsetBits)
		lists := make([][]uint64, 2)
		for i := range lists {
			for range 1 + rng.IntN(40) {
				if v := rng.Uint64N(1 << bits); v&ginOffsetMask != 0 {
					lists[i] = append(lists[i], v)
				}
			}
			lists[i] = append(lists[i], 1)
			slices.Sort(lists[i])
			lists[i] = slices.Compact(lists[i])
		}
		var seg []byte
		for _, list := range lists {
			w := ginWriter{b: make([]byte, 1000)}
			if seg == nil { // begins as the list of one TID
				seg = append(plainTIDs(list[:1]), 0, 0)
			}
			if err := w.merge(plainTIDs(list), seg); err != nil {
				t.Fatal(err)
			}
			seg = w.b[:w.n]
		}
		want := slices.Concat(lists...)
		slices.Sort(want)
		if d := cmp.Diff(slices.Compact(want), segmentTIDs(t, seg)); d != "" {
			t.Fatal(d)
		}
		if c := (cursor{b: seg}); len(seg)%2 != 0 {
			t.Errorf("a segment of %d bytes", len(seg))
		} else if got, err := takeSegment(&c); err != nil || !bytes.Equal(got, seg) {
			t.Errorf("the segment is not one: %v", err)
		}
	}
}

// TestGINRecompress changes a leaf of three segments, or refuses to.
func TestGINRecompress(t *testing.T) {
	seg := func(block byte) []byte { return []byte{0, 0, block, 0, 1, 0, 2, 0, 1, 1} } // (block,1), (block,2), (block,3)
	leaf := slices.Concat(seg(1), seg(2), seg(3))
	ended := append(seg(7), 9)
	for _, c := range []struct {
		name string
		data []byte
		want []byte // nil for an error
	}{
		{"nothing", []byte{0, 0}, leaf},
		{"delete", []byte{1, 0, 1, ginSegDelete}, slices.Concat(seg(1), seg(3))},
		{"delete two", []byte{2, 0, 0, ginSegDelete, 2, ginSegDelete}, seg(2)},
		{"insert at the end", slices.Concat([]byte{1, 0, 3, ginSegInsert}, seg(4)), slices.Concat(leaf, seg(4))},
		{"insert and replace", slices.Concat([]byte{2, 0, 0, ginSegInsert}, seg(0), []byte{0, ginSegReplace}, seg(5)), slices.Concat(seg(0), seg(5), seg(2), seg(3))},
		{"add", []byte{1, 0, 1, ginSegAddItems, 1, 0, 0, 0, 2, 0, 4, 0}, slices.Concat(seg(1), []byte{0, 0, 2, 0, 1, 0, 3, 0, 1, 1, 1, 0}, seg(3))},
		{"no count", []byte{1}, nil},
		{"no action", []byte{1, 0, 1}, nil},
		{"more actions than there are", []byte{9, 0, 1, ginSegDelete}, nil},
		{"unknown", []byte{1, 0, 1, 9}, nil},
		{"past the end", []byte{1, 0, 3, ginSegDelete}, nil},
		{"far past the end", slices.Concat([]byte{1, 0, 9, ginSegInsert}, seg(4)), nil},
		{"out of order", []byte{2, 0, 2, ginSegDelete, 1, ginSegDelete}, nil},
		{"half a segment", []byte{1, 0, 0, ginSegInsert, 0, 0, 4, 0}, nil},
		{"segment longer than the record", slices.Concat([]byte{1, 0, 0, ginSegInsert, 0, 0, 4, 0, 1, 0, 99, 0}, ended), nil},
		{"items longer than the record", []byte{1, 0, 1, ginSegAddItems, 2, 0, 0, 0, 2, 0, 4, 0}, nil},
		{"items out of order", []byte{1, 0, 1, ginSegAddItems, 2, 0, 0, 0, 2, 0, 9, 0, 0, 0, 2, 0, 8, 0}, nil},
		{"no TID", []byte{1, 0, 1, ginSegAddItems, 1, 0, 0, 0, 2, 0, 0, 0}, nil},
		{"offset number too large", []byte{1, 0, 1, ginSegAddItems, 1, 0, 0, 0, 2, 0, 0, 8}, nil},
		{"too much for the page", append([]byte{200, 0}, bytes.Repeat(slices.Concat([]byte{0, ginSegInsert}, seg(4)[:6], []byte{92, 0}, make([]byte, 92)), 200)...), nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			o := &op{rec: &walrec.Record{End: 8}, blk: &walrec.Block{Data: c.data}, page: emptyPage()}
			o.ginInit(ginFlagData | ginFlagLeaf | ginFlagCompressed)
			o.page.setLower(ginDataAt + copy(o.page[ginDataAt:], leaf))
			err := o.ginRecompress()
			if c.want == nil {
				if err == nil {
					t.Error("no error")
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(c.want, []byte(o.page[ginDataAt:o.page.lower()])); d != "" {
				t.Error(d)
			}
		})
	}
}
