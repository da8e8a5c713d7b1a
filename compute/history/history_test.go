package history

import (
	"bytes"
	"context"
	"errors"
	"testing"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/pg"
)

// log is a Source whose WAL is not sealed: each byte tells where it stands.
type log struct {
	bounds []pg.LSN // of the chunks
	asked  pg.LSN   // how much was asked for in all
	err    error
}

func byteAt(lsn pg.LSN) byte { return byte(lsn>>13) ^ byte(lsn) | 1 }

func (l *log) Read(_ context.Context, from, until pg.LSN, fn func(*pb.SealedWAL) error) error {
	if l.asked += until - from; l.err != nil {
		return l.err
	}
	for i, begin := range l.bounds[:len(l.bounds)-1] {
		end := l.bounds[i+1]
		if end <= from || begin >= until {
			continue
		}
		c := &pb.SealedWAL{BeginLsn: uint64(begin), EndLsn: uint64(end)}
		for lsn := begin; lsn < end; lsn++ {
			c.Ciphertext = append(c.Ciphertext, byteAt(lsn))
		}
		if err := fn(c); err != nil {
			return err
		}
	}
	return nil
}

func unsealed(_ context.Context, dst []byte, c *pb.SealedWAL) ([]byte, error) {
	return append(dst, c.Ciphertext...), nil
}

func open(t *testing.T, l *log, oldest, start, end pg.LSN) *History {
	t.Helper()
	h, err := Open(t.Context(), Config{Source: l, Unseal: unsealed, Oldest: oldest, Start: start, End: end, SystemID: 77})
	if err != nil {
		t.Fatal(err)
	}
	return h
}

func TestPagesAreTheLogs(t *testing.T) {
	const start, end = 0x1002100, 0x20045A8
	l := &log{bounds: []pg.LSN{start, 0x1008000, 0x1FFFF00, 0x2000500, end}}
	h := open(t, l, 0x1009000, start, end)
	if h.Begin() != start {
		t.Errorf("it begins at %v, want the branch's start", h.Begin())
	}
	l.asked = 0
	for _, page := range []pg.LSN{0x1004000, 0x1FFE000, 0x2000000, 0x2004000} {
		got, err := h.Pages(t.Context(), page, 1)
		if err != nil {
			t.Fatal(err)
		}
		for i := range got {
			want := byteAt(page + pg.LSN(i))
			if page+pg.LSN(i) >= end {
				want = 0
			}
			if got[i] != want {
				t.Fatalf("page %v, byte %d: %#x, want %#x", page, i, got[i], want)
			}
		}
	}
	prefix, err := h.Prefix(t.Context())
	if err != nil || len(prefix) != int(pg.LSN(end)%pg.WALPageSize) || prefix[0] != byteAt(0x2004000) {
		t.Errorf("the last page's beginning: %d bytes, %v", len(prefix), err)
	}
	if want := 3*pg.LSN(pg.WALPageSize) + 2*(end-0x2004000); l.asked != want {
		t.Errorf("%d bytes were asked for, want %d", l.asked, want)
	}
	all, err := h.Pages(t.Context(), 0x1FFE000, 3)
	if err != nil {
		t.Fatal(err)
	}
	for i := range all {
		if all[i] != byteAt(0x1FFE000+pg.LSN(i)) {
			t.Fatalf("three pages in two segments, byte %d: %#x", i, all[i])
		}
	}
}

// slow is a Source at which a reader of the first page waits to be let go.
type slow struct{ inside, letGo chan struct{} }

func (s *slow) Read(_ context.Context, from, until pg.LSN, _ func(*pb.SealedWAL) error) error {
	if from == 0x1000000 && until == 0x1002000 {
		close(s.inside)
		<-s.letGo
	}
	return nil
}

// Who reads one place does not wait for who reads another.
func TestReadersAtOnce(t *testing.T) {
	const begin, end = 0x1000000, 0x1008000
	s := &slow{inside: make(chan struct{}), letGo: make(chan struct{})}
	h, err := Open(t.Context(), Config{Source: s, Unseal: unsealed, Oldest: begin, Start: begin, End: end})
	if err != nil {
		t.Fatal(err)
	}
	first := make(chan error)
	go func() {
		_, err := h.Pages(t.Context(), begin, 1)
		first <- err
	}()
	<-s.inside
	if _, err := h.Pages(t.Context(), begin+0x2000, 1); err != nil {
		t.Error(err)
	}
	close(s.letGo)
	if err := <-first; err != nil {
		t.Error(err)
	}
}

// What is not held is no WAL, but the headers by which a reader opens segment and page.
func TestBeforeTheBegin(t *testing.T) {
	const begin, end = 0x1006100, 0x1008000
	h := open(t, &log{bounds: []pg.LSN{begin, end}}, begin, begin, end)
	for page, hasHeader := range map[pg.LSN]bool{0x1000000: true, 0x1002000: false, 0x1006000: true} {
		got, err := h.Pages(t.Context(), page, 1)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := pg.ParseWALPageHeader(got, page); (err == nil) != hasHeader {
			t.Errorf("page %v: header %v, want %v", page, err == nil, hasHeader)
		}
		if page != 0x1006000 && bytes.Count(got[pg.LongPageHeaderSize:], []byte{0}) != pg.WALPageSize-pg.LongPageHeaderSize {
			t.Errorf("page %v holds something", page)
		}
	}
}

func TestAfterTheWipe(t *testing.T) {
	l := &log{bounds: []pg.LSN{0x1000100, 0x1004000}}
	h := open(t, l, 0x1000100, 0x1000100, 0x1004000)
	if _, err := h.Pages(t.Context(), 0x1000000, 1); err != nil {
		t.Fatal(err)
	}
	h.Wipe()
	if _, err := h.Pages(t.Context(), 0x1000000, 1); err == nil {
		t.Error("it gives WAL after it was wiped")
	}
	l.err = errors.New("away")
	if _, err := Open(t.Context(), Config{Source: l, Oldest: 0x1000100, Start: 0x1000100, End: 0x1004000}); !errors.Is(err, l.err) {
		t.Errorf("without the safekeepers: %v", err)
	}
}
