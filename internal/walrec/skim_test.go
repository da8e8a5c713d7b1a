package walrec

import (
	"bytes"
	"testing"

	"github.com/holdfastdb/holdfast/internal/pg"
)

// mixed is a log of small and large records, and which of them are larger than limit.
func mixed(start pg.LSN, limit int) (wal []byte, large int) {
	at, prev := start, start-8
	for i, size := range []int{10, limit, limit - 26, 100, 3 * limit, 8000, limit + 1, limit - 27, 0} {
		data := bytes.Repeat([]byte{byte(i + 1)}, size)
		rec := Build(RmLogicalMsg, 0, pg.TransactionID(i), prev, data)
		if len(rec) > limit {
			large++
		}
		b, end := PlaceRecord(at, rec, 42)
		wal, prev, at = append(wal, b...), at.SkipPageHeader(), end
	}
	return wal, large
}

// A record that is skimmed is found where it is, and checked, as one that is put together.
func TestSkim(t *testing.T) {
	const start, limit = pg.LSN(0x3000000), 30000
	wal, large := mixed(start, limit)
	want, _, err := scan(start, wal, len(wal))
	if err != nil {
		t.Fatal(err)
	}
	for _, piece := range []int{1, 8, 24, 8192, 10000, len(wal)} {
		s := NewScanner(start)
		s.Skim(func(rmid uint8, size int) bool { return rmid == RmLogicalMsg && size > limit })
		var have []RawRecord
		skimmed := 0
		for rest := wal; ; {
			rec, ok, err := s.Next()
			if err != nil {
				t.Fatal(err)
			}
			if ok {
				w := want[len(have)]
				if rec.Skimmed {
					skimmed++
					if h := HeaderOnly(rec); h.Xid != pg.TransactionID(len(have)) || h.Prev == 0 || h.RmID != RmLogicalMsg {
						t.Errorf("header: %+v", h)
					}
					w.Data = w.Data[:headerSize]
				}
				if rec.LSN != w.LSN || rec.End != w.End || !bytes.Equal(rec.Data, w.Data) {
					t.Fatalf("record %d is at %v to %v, want %v to %v", len(have), rec.LSN, rec.End, w.LSN, w.End)
				}
				have = append(have, w)
				continue
			}
			if len(rest) == 0 {
				break
			}
			if s.Skims() {
				s.Wipe() // the stream goes on
			}
			n := min(piece, len(rest))
			s.Feed(rest[:n])
			rest = rest[n:]
			if cap(s.part) > 2*keepPart || len(s.part) > limit {
				t.Fatalf("%d bytes are kept", cap(s.part))
			}
		}
		if len(have) != len(want) || skimmed != large || large < 3 {
			t.Errorf("in pieces of %d: %d records, %d of them skimmed; want %d, %d", piece, len(have), skimmed, len(want), large)
		}
	}
}

func TestSkimFindsDamage(t *testing.T) {
	const start, limit = pg.LSN(0x3000000), 30000
	rec := Build(RmLogicalMsg, 0, 7, start-8, make([]byte, 2*limit))
	wal, end := PlaceRecord(start, rec, 42)
	for at := range wal {
		lsn := start + pg.LSN(at)
		// Page headers are not covered by a CRC, and padding is not either.
		if lsn < lsn.PageStart()+pg.LongPageHeaderSize || lsn >= end-8 || at%97 != 0 && at > 200 {
			continue
		}
		damaged := bytes.Clone(wal)
		damaged[at] ^= 4
		s := NewScanner(start)
		s.Skim(func(_ uint8, size int) bool { return size > limit })
		s.Feed(damaged)
		if _, ok, _ := s.Next(); ok {
			t.Fatalf("byte %d was changed, and the record is taken", at)
		}
	}
}

// PostgreSQL reads no record of more than 1 GiB; one that is skimmed may have any size.
func TestSkimAnySize(t *testing.T) {
	const start = pg.LSN(0x3000000)
	rec := Build(RmLogicalMsg, 0, 7, start-8, make([]byte, 20000))
	le.PutUint32(rec, 3<<30)
	wal, _ := PlaceRecord(start, rec, 42)
	le.PutUint32(wal[pg.WALPageSize+16:], 3<<30-(pg.WALPageSize-pg.LongPageHeaderSize)) // xlp_rem_len
	for _, skim := range []bool{false, true} {
		s := NewScanner(start)
		s.Skim(func(uint8, int) bool { return skim })
		s.Feed(wal[:2*pg.WALPageSize])
		if _, ok, err := s.Next(); ok || (err == nil) != skim || s.Skims() != skim {
			t.Errorf("skim %v: %v, %v, skims %v", skim, ok, err, s.Skims())
		}
	}
}
