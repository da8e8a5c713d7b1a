package walrec

import (
	"bytes"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/zstd"

	"github.com/holdfastdb/holdfast/internal/pg"
)

// stretch is real WAL of PostgreSQL 15 (test/oracle writes it): all records between two
// switch records, some zeros, and the next segment's first pages.
func stretch(tb testing.TB) (start pg.LSN, wal []byte) {
	tb.Helper()
	z, err := os.ReadFile("testdata/wal.zst")
	if err != nil {
		tb.Fatal(err)
	}
	d, err := zstd.NewReader(nil)
	if err != nil {
		tb.Fatal(err)
	}
	defer d.Close()
	b, err := d.DecodeAll(z, nil)
	if err != nil || len(b) < 3*pg.WALPageSize {
		tb.Fatalf("the corpus has %d bytes: %v", len(b), err)
	}
	return pg.LSN(le.Uint64(b)), b[8:]
}

// scan gives copies of all records, fed in pieces.
func scan(start pg.LSN, wal []byte, piece int) (list []RawRecord, pos pg.LSN, err error) {
	s := NewScanner(start)
	for {
		rec, ok, err := s.Next()
		switch {
		case err != nil:
			return list, s.Pos(), err
		case ok:
			rec.Data = bytes.Clone(rec.Data)
			list = append(list, rec)
		case len(wal) == 0:
			return list, s.Pos(), nil
		default:
			n := min(piece, len(wal))
			s.Feed(wal[:n])
			wal = wal[n:]
		}
	}
}

func same(a, b []RawRecord) bool {
	return slices.EqualFunc(a, b, func(x, y RawRecord) bool {
		return x.LSN == y.LSN && x.End == y.End && x.IsSwitch == y.IsSwitch && bytes.Equal(x.Data, y.Data)
	})
}

func TestScanCorpus(t *testing.T) {
	start, wal := stretch(t)
	want, pos, err := scan(start, wal, len(wal))
	if err != nil {
		t.Fatal(err)
	}
	switches, after, images, names := 0, 0, 0, map[string]int{}
	var page [pg.BlockSize]byte
	for i, r := range want {
		if i > 0 && r.LSN != want[i-1].End.SkipPageHeader() {
			t.Fatalf("record at %v follows one that ends at %v", r.LSN, want[i-1].End)
		}
		rec, err := Parse(r.Data, r.LSN, r.End)
		if err != nil {
			t.Fatal(err)
		}
		names[Name(rec.RmID, rec.Info)]++
		for i := range rec.Blocks {
			if rec.Blocks[i].HasImage {
				images++
				if err := rec.Blocks[i].RestoreImage(page[:]); err != nil {
					t.Fatal(err)
				}
			}
		}
		if switches > 0 {
			after++
		}
		if r.IsSwitch {
			switches++
			if r.End%pg.WALSegmentSize != 0 {
				t.Errorf("a switch record ends at %v", r.End)
			}
		}
	}
	if len(want) < 50 || len(names) < 5 || images < 20 || switches != 1 || after < 10 || pos != want[len(want)-1].End {
		t.Errorf("%d records of %d kinds, %d images, %d switches and %d records after it; end %v", len(want), len(names), images, switches, after, pos)
	}
	for _, piece := range []int{1, 7, 4096, 8192, 8200} {
		have, p, err := scan(start, wal, piece)
		if err != nil || p != pos {
			t.Errorf("in pieces of %d: end %v, want %v: %v", piece, p, pos, err)
		}
		if !same(want, have) {
			t.Errorf("in pieces of %d: other records", piece)
		}
	}
	// Without the zeros after the switch record, as the safekeepers keep it.
	for _, r := range want {
		if r.IsSwitch {
			cut := int(r.LSN.Align()-start) + (len(r.Data)+7)&^7
			rest := wal[cut:]
			for rest[0] == 0 {
				rest = rest[1:]
			}
			have, _, err := scan(start, append(bytes.Clone(wal[:cut]), rest...), 5000)
			if !same(want, have) || err != nil {
				t.Errorf("without zeros: other records, or %v", err)
			}
		}
	}
}

// TestFlippedBits shows that no damage makes a record other than those that were written.
func TestFlippedBits(t *testing.T) {
	start, wal := stretch(t)
	wal = wal[:3*pg.WALPageSize]
	want, _, err := scan(start, wal, len(wal))
	if err != nil || len(want) == 0 {
		t.Fatal(len(want), err)
	}
	failed := 0
	for bit := 0; bit < len(wal)*8; bit += 37 {
		damaged := bytes.Clone(wal)
		damaged[bit/8] ^= 1 << (bit % 8)
		have, _, err := scan(start, damaged, len(wal))
		if len(have) > len(want) || !same(want[:len(have)], have) {
			t.Fatalf("bit %d flipped: other records", bit)
		}
		if err != nil {
			failed++
		}
	}
	if failed == 0 {
		t.Error("no damage was found")
	}
}

func someRecord(size int, prev pg.LSN) []byte {
	data := make([]byte, size)
	for i := range data {
		data[i] = byte(i*7 + 1)
	}
	return Build(21, 0, 99, prev, data)
}

// TestPlaceRecord lays records from every place of the page before page and segment
// boundaries, and from places after them, and reads them again, in pieces.
func TestPlaceRecord(t *testing.T) {
	const sysid = 4242
	for _, boundary := range []pg.LSN{0x3002000, 0x4000000} {
		for at := boundary - pg.WALPageSize; at <= boundary+80; at += 8 {
			if in := boundary - at; in > pg.WALPageSize-pg.LSN(pg.WALPageHeaderSize(boundary-pg.WALPageSize)) && in != pg.WALPageSize {
				continue // in the page's header
			}
			if off := int(at - boundary); off > 0 && off < pg.WALPageHeaderSize(boundary) {
				continue
			}
			for _, size := range []int{0, 1, 40, 300, pg.WALPageSize, 3*pg.WALPageSize + 5} {
				first := someRecord(size, at-8)
				bytes1, end := PlaceRecord(at, first, sysid)
				second := someRecord(10, at.SkipPageHeader())
				bytes2, end2 := PlaceRecord(end, second, sysid)
				if int(end-at) != len(bytes1) || int(end2-end) != len(bytes2) {
					t.Fatalf("at %v: %d bytes up to %v, then %d up to %v", at, len(bytes1), end, len(bytes2), end2)
				}
				want := []RawRecord{{LSN: at.SkipPageHeader(), End: end, Data: first}, {LSN: end.SkipPageHeader(), End: end2, Data: second}}
				for _, piece := range []int{5, 1 << 20} {
					have, pos, err := scan(at, append(bytes.Clone(bytes1), bytes2...), piece)
					if !same(want, have) || err != nil || pos != end2 {
						t.Fatalf("at %v, %d bytes: end %v, want %v: %d records, %v", at, size, pos, end2, len(have), err)
					}
				}
			}
		}
	}
}

func TestCheckpointRecord(t *testing.T) {
	at := pg.LSN(0x5000000)
	cp := pg.CheckPoint{TimelineID: 1, PrevTimelineID: 1, NextXid: 1000, NextOid: 2000}
	b, end := PlaceRecord(at, BuildCheckpointRecord(at.SkipPageHeader(), 0x4FFFF00, cp), 1)
	list, _, err := scan(at, b, 100)
	if err != nil || len(list) != 1 || list[0].End != end {
		t.Fatal(list, err)
	}
	rec, err := Parse(list[0].Data, list[0].LSN, end)
	if err != nil {
		t.Fatal(err)
	}
	cp.Redo = at.SkipPageHeader()
	have, err := pg.ParseCheckPoint(rec.MainData)
	if d := cmp.Diff(cp, have); d != "" || err != nil || Name(rec.RmID, rec.Info) != "XLOG/CHECKPOINT_SHUTDOWN" || rec.Prev != 0x4FFFF00 {
		t.Error(err, d, rec)
	}
}

// TestRewrittenTail is how compute/wal uses a Scanner: a page's tail is written again.
func TestRewrittenTail(t *testing.T) {
	at := pg.LSN(0x3000000)
	b, end := PlaceRecord(at, someRecord(100, at-8), 1)
	first, garbage := at.SkipPageHeader(), bytes.Repeat([]byte{0xAA}, 64)
	s := NewScanner(at)
	s.Feed(append(bytes.Clone(b), make([]byte, 200)...))
	if _, ok, err := s.Next(); !ok || err != nil {
		t.Fatal(ok, err)
	}
	for range 2 {
		if rec, ok, err := s.Next(); ok || err != nil {
			t.Fatalf("zeros made %v: %v", rec, err)
		}
	}
	s.Reset(s.Pos())
	s.Feed(garbage)
	if _, ok, err := s.Next(); ok || err == nil {
		t.Fatal("garbage is no error")
	}
	if _, _, err := s.Next(); err == nil {
		t.Fatal("the error is gone without Reset")
	}
	s.Reset(s.Pos())
	next, end2 := PlaceRecord(end, someRecord(50, first), 1)
	s.Feed(next)
	if rec, ok, err := s.Next(); !ok || err != nil || rec.LSN != end || s.Pos() != end2 {
		t.Fatal(rec, ok, err)
	}
	if s.Reset(end); s.LastRecord() != 0 {
		t.Error("at another place, the last record is still known")
	}
}

func TestScannerRefuses(t *testing.T) {
	at := pg.LSN(0x3000100)
	rec := someRecord(60, at-16)
	next := func(change func(r []byte)) []byte {
		r := bytes.Clone(rec)
		change(r)
		return append(r, make([]byte, 16)...)
	}
	continued, _ := PlaceRecord(0x3001FC0, someRecord(200, 0x3001F00), 1)
	for _, c := range []struct {
		name  string
		start pg.LSN
		wal   []byte
		want  string
	}{
		{"short length", at, next(func(r []byte) { le.PutUint32(r, 23) }), "length 23"},
		{"huge length", at, next(func(r []byte) { le.PutUint32(r, 1<<31) }), "length"},
		{"bad CRC", at, next(func(r []byte) { r[30]++ }), "CRC"},
		{"unknown manager", at, next(func(r []byte) { r[atRmID] = 99 }), "resource manager 99"},
		{"link to the future", at, next(func(r []byte) { le.PutUint64(r[atPrev:], uint64(at)) }), "before it"},
		{"start in a page header", 0x3000008, nil, "no record begins"},
		{"unaligned start", at + 4, nil, "no record begins"},
		{"rest of a record at the start", 0x3002000, continued[0x40:], "none was begun"},
		{"wrong rest", 0x3001FC0, func() []byte { b := bytes.Clone(continued); b[0x40+16]++; return b }(), "continues"},
		{"no rest", 0x3001FC0, append(bytes.Clone(continued[:0x40]), pg.NewWALPageHeader(0x3002000, 0, 0).Append(nil)...), "continues"},
	} {
		_, _, err := scan(c.start, c.wal, 1<<20)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: want an error about %q, have %v", c.name, c.want, err)
		}
	}
}

// TestPrevLink: the record before must be the one that the record says.
func TestPrevLink(t *testing.T) {
	at := pg.LSN(0x3000100)
	a, end := PlaceRecord(at, someRecord(20, at-16), 1)
	b, _ := PlaceRecord(end, someRecord(20, at-8), 1)
	if list, _, err := scan(at, append(a, b...), 100); len(list) != 1 || err == nil {
		t.Errorf("%d records: %v", len(list), err)
	}
}

// TestOverwrittenContrecord: recovery gave up a record whose rest was lost and went on.
func TestOverwrittenContrecord(t *testing.T) {
	at, page := pg.LSN(0x3001FC0), pg.LSN(0x3002000)
	lost, _ := PlaceRecord(at, someRecord(500, at-16), 1)
	h := pg.NewWALPageHeader(page, 0, 0)
	h.Info |= pg.FirstIsOverwriteContRecord
	wal := h.Append(bytes.Clone(lost[:page-at]))
	begin := at + pg.LSN(len(wal))
	rest, end := PlaceRecord(begin, someRecord(30, at-16), 1)
	list, pos, err := scan(at, append(wal, rest...), 11)
	if err != nil || len(list) != 1 || list[0].LSN != begin || pos != end {
		t.Error(list, pos, err)
	}
}

// TestClaimedLength: a record that claims a gigabyte costs what was fed.
func TestClaimedLength(t *testing.T) {
	at := pg.LSN(0x3000100)
	rec := someRecord(60, at-16)
	le.PutUint32(rec, 1<<30)
	s := NewScanner(at)
	s.Feed(rec)
	if _, ok, err := s.Next(); ok || err != nil {
		t.Fatal(ok, err)
	}
	if cap(s.part)+cap(s.buf) > 1<<16 {
		t.Errorf("%d bytes of memory", cap(s.part)+cap(s.buf))
	}
}

func TestNoAllocations(t *testing.T) {
	start, wal := stretch(t)
	s, rec := NewScanner(start), Record{Blocks: make([]Block, 0, maxBlockID+1)}
	run := func() {
		s.Reset(start)
		s.Feed(wal)
		for {
			r, ok, err := s.Next()
			if err != nil || !ok {
				break
			}
			if err := ParseInto(&rec, r.Data, r.LSN, r.End); err != nil {
				t.Fatal(err)
			}
		}
	}
	run()
	if n := testing.AllocsPerRun(3, run); n > 0 {
		t.Errorf("%v allocations", n)
	}
}

func TestName(t *testing.T) {
	for _, c := range []struct {
		rmid, info uint8
		want       string
	}{
		{10, 0x00, "Heap/INSERT"}, {10, 0x82, "Heap/INSERT+INIT"}, {1, 0x80, "Transaction/COMMIT"}, {0, 0x40, "XLOG/SWITCH"},
		{20, 0, "Generic"}, {21, 0, "LogicalMessage"}, {11, 0xF0, "Btree/0xf0"}, {200, 0x10, "rmgr 200/0x10"},
	} {
		if have := Name(c.rmid, c.info); have != c.want {
			t.Errorf("%d/%#x: %s, want %s", c.rmid, c.info, have, c.want)
		}
		if have, want := Known(c.rmid, c.info), !strings.Contains(c.want, "/0x"); have != want {
			t.Errorf("%s is known: %v", c.want, have)
		}
		if have := IsExtension(c.rmid); have != (c.rmid == 200) {
			t.Errorf("%s is an extension's: %v", c.want, have)
		}
	}
}

func FuzzScanner(f *testing.F) {
	start, wal := stretch(f)
	f.Add(uint64(start), wal[:3*pg.WALPageSize], uint16(100))
	b, _ := PlaceRecord(0x3001FF8, someRecord(pg.WALPageSize, 0x3001F00), 1)
	f.Add(uint64(0x3001FF8), b, uint16(7))
	f.Fuzz(func(t *testing.T, start uint64, wal []byte, piece uint16) {
		list, pos, err := scan(pg.LSN(start), wal, int(piece)+1)
		again, pos2, err2 := scan(pg.LSN(start), wal, len(wal)+1)
		if pos != pos2 || (err == nil) != (err2 == nil) || !same(list, again) {
			t.Errorf("pieces of %d: %d records to %v, %v; at once: %d to %v, %v", piece, len(list), pos, err, len(again), pos2, err2)
		}
		for _, r := range list {
			if r.LSN < pg.LSN(start) || r.End <= r.LSN {
				t.Errorf("record from %v to %v", r.LSN, r.End)
			}
		}
	})
}

func FuzzParse(f *testing.F) {
	start, wal := stretch(f)
	list, _, err := scan(start, wal, len(wal))
	if err != nil || len(list) == 0 {
		f.Fatal(len(list), err)
	}
	for _, r := range list {
		f.Add(r.Data)
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		rec, err := Parse(raw, 100, 200)
		if err != nil {
			return
		}
		total := len(rec.MainData)
		var page [pg.BlockSize]byte
		for i := range rec.Blocks {
			total += len(rec.Blocks[i].Data) + len(rec.Blocks[i].image)
			if rec.Block(rec.Blocks[i].ID) != &rec.Blocks[i] {
				t.Error("a block is not found by its number")
			}
			_ = rec.Blocks[i].RestoreImage(page[:])
		}
		if total > len(raw) {
			t.Errorf("%d bytes in a record of %d", total, len(raw))
		}
	})
}

func BenchmarkScanParse(b *testing.B) {
	var small []byte
	at := pg.LSN(0x3000000)
	for prev := at - 8; len(small) < 4<<20; {
		bytes, end := PlaceRecord(at, someRecord(120, prev), 1)
		small, prev, at = append(small, bytes...), at.SkipPageHeader(), end
	}
	start, wal := stretch(b)
	for _, c := range []struct {
		name  string
		start pg.LSN
		wal   []byte
	}{{"records of 146 bytes", 0x3000000, small}, {"with page images", start, wal}} {
		b.Run(fmt.Sprint(c.name), func(b *testing.B) {
			b.SetBytes(int64(len(c.wal)))
			s, rec, n := NewScanner(c.start), new(Record), 0
			for b.Loop() {
				s.Reset(c.start)
				for rest := c.wal; len(rest) > 0; {
					k := min(len(rest), 64<<10)
					s.Feed(rest[:k])
					rest = rest[k:]
					for {
						r, ok, err := s.Next()
						if err != nil {
							b.Fatal(err)
						}
						if !ok {
							break
						}
						if err := ParseInto(rec, r.Data, r.LSN, r.End); err != nil {
							b.Fatal(err)
						}
						n++
					}
				}
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(n), "ns/record")
		})
	}
}
