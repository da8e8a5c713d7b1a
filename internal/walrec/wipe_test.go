package walrec

import (
	"slices"
	"testing"

	"github.com/holdfastdb/holdfast/internal/pg"
)

// TestWipe: nothing of the WAL is left in the scanner's memory, and after whole records the
// stream goes on.
func TestWipe(t *testing.T) {
	start, wal := stretch(t)
	want, _, err := scan(start, wal, len(wal))
	if err != nil {
		t.Fatal(err)
	}
	// Up to the switch record: behind it, LSNs and bytes part.
	want = want[:slices.IndexFunc(want, func(r RawRecord) bool { return r.IsSwitch })]
	wiped := func(s *Scanner, when string) {
		t.Helper()
		for _, b := range [][]byte{s.buf[:cap(s.buf)], s.part[:cap(s.part)]} {
			if !isZero(b) {
				t.Fatalf("%s: WAL is left in %d bytes of memory", when, len(b))
			}
		}
	}
	s, n, fed := NewScanner(start), 0, start
	for n < len(want) {
		next := want[min(n+n%3, len(want)-1)].End // one to three records
		s.Feed(wal[fed-start : next-start])
		for fed = next; s.Pos() < next; n++ {
			if _, ok, err := s.Next(); err != nil || !ok {
				t.Fatalf("record %d, at %v: %v", n, s.Pos(), err)
			}
		}
		s.Wipe()
		wiped(s, "after whole records")
	}
	if last := want[len(want)-1].End; s.Pos() != last {
		t.Errorf("the stream ended at %v, want %v", s.Pos(), last)
	}
	for _, cut := range []int{3, 100, pg.WALPageSize + 11, len(wal) / 2} {
		s := NewScanner(start)
		s.Feed(wal[:cut])
		for ok := true; ok; {
			if _, ok, err = s.Next(); err != nil {
				t.Fatal(err)
			}
		}
		s.Feed(wal[cut : cut+40])
		s.Wipe()
		wiped(s, "amid a record")
		s.Feed(wal[cut+40 : cut+80])
		for ok := true; ok && err == nil; { // what was lost is noticed, or the rest is waited for
			_, ok, err = s.Next()
		}
		s.Reset(start)
		wiped(s, "after Reset")
	}
}
