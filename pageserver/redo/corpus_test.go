package redo

import (
	"bytes"
	"math/rand/v2"
	"os"
	"testing"

	"github.com/klauspost/compress/zstd"

	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/internal/walrec"
)

// A sample is a real record and a page before and after it, which PostgreSQL made or
// agreed to (test/oracle writes the file).
type sample struct {
	lsn, end pg.LSN
	raw      []byte
	ref      uint8
	before   []byte
	after    []byte
}

func (s *sample) parse(tb testing.TB) (*walrec.Record, *walrec.Block) {
	tb.Helper()
	rec, err := walrec.Parse(s.raw, s.lsn, s.end)
	if err != nil {
		tb.Fatal(err)
	}
	return rec, rec.Block(s.ref)
}

func samples(tb testing.TB) []sample {
	tb.Helper()
	z, err := os.ReadFile("testdata/pages.zst")
	if err != nil {
		tb.Fatal(err)
	}
	d, err := zstd.NewReader(nil)
	if err != nil {
		tb.Fatal(err)
	}
	defer d.Close()
	b, err := d.DecodeAll(z, nil)
	if err != nil {
		tb.Fatal(err)
	}
	take := func(n int) []byte {
		v := b[:n:n]
		b = b[n:]
		return v
	}
	var list []sample
	for len(b) > 0 {
		s := sample{lsn: pg.LSN(le.Uint64(take(8))), end: pg.LSN(le.Uint64(take(8)))}
		n := int(le.Uint32(take(4)))
		s.ref = uint8(le.Uint32(take(4)))
		s.raw, s.before, s.after = take(n), take(pg.BlockSize), take(pg.BlockSize)
		list = append(list, s)
	}
	if len(list) < 100 {
		tb.Fatalf("the corpus has %d samples", len(list))
	}
	return list
}

// TestCorpus applies each real record to its page.
func TestCorpus(t *testing.T) {
	applied, checked := map[string]int{}, 0
	for _, s := range samples(t) {
		rec, blk := s.parse(t)
		name := walrec.Name(rec.RmID, rec.Info)
		p := bytes.Clone(s.before)
		err := ApplyBlock(blk.Rel, blk.Block, p, rec)
		switch {
		case err != nil:
			t.Errorf("%s: %v", name, err)
			continue
		case !bytes.Equal(p, s.after):
			t.Errorf("%s: %v", name, difference(p, s.after))
		}
		applied[name]++
		ok, err := Check(rec, blk, p)
		if err != nil {
			t.Error(err)
		}
		if !ok {
			continue
		}
		checked++
		again := bytes.Clone(p)
		if err := ApplyBlock(blk.Rel, blk.Block, again, rec); err != nil || !blk.WillInit && !bytes.Equal(again, p) {
			t.Errorf("%s applied twice: %v %v", name, err, difference(again, p))
		}
		p[len(p)-1] ^= 0x40
		if ok, err := Check(rec, blk, p); rec.RmID == rmGeneric && (!ok || err == nil) {
			t.Errorf("%s: a changed byte is not seen", name)
		}
	}
	if len(applied) < 30 || checked < 100 {
		t.Errorf("%d kinds applied, %d pages checked", len(applied), checked)
	}
}

// mutate changes a few bytes, mostly by bits and small steps as they are the likeliest to
// pass one check and fail the next.
func mutate(rng *rand.Rand, b []byte) {
	if len(b) == 0 {
		return
	}
	for range 1 + rng.IntN(4) {
		i := rng.IntN(len(b))
		switch rng.IntN(4) {
		case 0:
			b[i] ^= 1 << rng.IntN(8)
		case 1:
			b[i] += byte(rng.IntN(9)) - 4
		case 2:
			b[i] = [...]byte{0, 0xFF, 0x7F, 0x80, 1, 24}[rng.IntN(6)]
		case 3:
			b[i] = byte(rng.Uint32())
		}
	}
}

// applyHostile does all that redo offers for a record; only panics and writes past the
// page count.
func applyHostile(t *testing.T, raw []byte, lsn, end pg.LSN, ref uint8, p []byte) {
	rec, err := walrec.Parse(raw, lsn, end)
	if err != nil {
		return
	}
	room := append(bytes.Clone(p), make([]byte, 64)...)
	p = room[:pg.BlockSize]
	for i := range rec.Blocks {
		b := &rec.Blocks[i]
		if b.ID != ref && ref != 255 {
			continue
		}
		if err := ApplyBlock(b.Rel, b.Block, p, rec); err == nil {
			_, _ = Check(rec, b, p)
			if free, ok := FreeSpaceAfter(rec, b, p); ok && (free < 0 || free > pg.BlockSize) {
				t.Errorf("%d bytes free", free)
			}
		}
	}
	if clears, err := ImpliedVM(rec); err == nil {
		for _, c := range clears {
			_ = ApplyBlock(pg.RelTag{RelFileNode: c.Rel, Fork: pg.VMFork}, VMBlock(c.Heap), bytes.Clone(p), rec)
		}
	}
	if pages, err := SLRUPages(rec); err == nil {
		for _, s := range pages {
			_ = ApplySLRU(s.Kind, s.Page, bytes.Clone(p), rec)
		}
	}
	if !bytes.Equal(room[pg.BlockSize:], make([]byte, 64)) {
		t.Error("written past the page")
	}
}

// TestHostile applies real records with damage in the record or the page.
func TestHostile(t *testing.T) {
	const rounds = 120
	rng := rand.New(rand.NewPCG(15, 18))
	for _, s := range samples(t) {
		for range rounds {
			raw, p := bytes.Clone(s.raw), bytes.Clone(s.before)
			switch rng.IntN(3) {
			case 0: // the record's headers and data; images, which come first, are long
				mutate(rng, raw[24:min(len(raw), 24+120)])
			case 1:
				mutate(rng, raw[max(24, len(raw)-60):])
			case 2:
				mutate(rng, p[:400])
				mutate(rng, p[len(p)-200:])
			}
			applyHostile(t, raw, s.lsn, s.end, s.ref, p)
		}
	}
}

func FuzzApply(f *testing.F) {
	for _, s := range samples(f) {
		f.Add(s.raw, s.before, s.ref)
	}
	f.Fuzz(func(t *testing.T, raw, p []byte, ref uint8) {
		if len(p) != pg.BlockSize {
			return
		}
		applyHostile(t, raw, 1<<40, 1<<40+64, ref, p)
	})
}

// BenchmarkRedo applies the corpus's records by kind; copying the page back takes part in
// it (about 100 ns).
func BenchmarkRedo(b *testing.B) {
	all := samples(b)
	for _, name := range []string{
		"Heap/INSERT", "Heap/DELETE", "Heap/UPDATE", "Heap/HOT_UPDATE", "Heap/LOCK", "Heap2/MULTI_INSERT", "Heap2/PRUNE", "Heap2/VISIBLE",
		"Btree/INSERT_LEAF", "Btree/INSERT_POST", "Btree/DEDUP", "Btree/SPLIT_R", "Btree/VACUUM",
	} {
		b.Run(name, func(b *testing.B) {
			var recs []*walrec.Record
			var blks []*walrec.Block
			var before [][]byte
			for i := range all {
				if rec, blk := all[i].parse(b); walrec.Name(rec.RmID, rec.Info) == name && !blk.ApplyImage {
					recs, blks, before = append(recs, rec), append(blks, blk), append(before, all[i].before)
				}
			}
			if len(recs) == 0 {
				b.Fatal("the corpus has no such record")
			}
			p, n := make([]byte, pg.BlockSize), 0
			for b.Loop() {
				for i, rec := range recs {
					copy(p, before[i])
					if err := ApplyBlock(blks[i].Rel, blks[i].Block, p, rec); err != nil {
						b.Fatal(err)
					}
				}
				n += len(recs)
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(n), "ns/record")
		})
	}
}
