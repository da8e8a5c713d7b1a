package wal

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sort"
	"testing"
	"time"

	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/internal/walrec"
	"github.com/holdfastdb/holdfast/test/stock"
)

var seed = flag.Uint64("seed", 0, "seed of the simulated writes; 0: a random one")

// history is a stretch of real WAL.
type history struct {
	start pg.LSN
	bytes []byte   // from start's segment on
	base  pg.LSN   // of bytes
	ends  []pg.LSN // of records, ascending
	gaps  map[pg.LSN]pg.LSN
}

func (h *history) at(lsn pg.LSN) int { return int(lsn - h.base) }

// record makes WAL with a stock server: small commits, records of many pages, and switches
// of segments.
func record(t *testing.T) *history {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	s, err := stock.New(ctx, t.TempDir(), "primary", map[string]string{"fsync": "off", "autovacuum": "off",
		"wal_keep_size": "1GB", "wal_recycle": "off", "checkpoint_timeout": "1h", "max_wal_size": "1GB"})
	if err != nil {
		t.Skipf("no PostgreSQL to record WAL with: %v", err)
	}
	if err := s.Start(ctx); err != nil {
		t.Fatal(err)
	}
	err = s.Target().Exec(ctx, "CREATE TABLE t(id int, v text)",
		"INSERT INTO t SELECT i, repeat('x', i % 700) FROM generate_series(1, 5000) i",
		"SELECT pg_logical_emit_message(false, 'p', repeat('long', 100000))",
		"SELECT pg_switch_wal()",
		"INSERT INTO t SELECT i, repeat('y', i % 300) FROM generate_series(1, 2000) i",
		"SELECT pg_logical_emit_message(true, 'p', repeat('longer', 3000000))", // more than a segment
		"SELECT pg_switch_wal()",
		"CREATE INDEX ON t(id)", "DELETE FROM t WHERE id % 3 = 0", "VACUUM t")
	for i := 0; i < 200 && err == nil; i += 50 {
		var stmts []string
		for j := range 50 {
			stmts = append(stmts, fmt.Sprintf("INSERT INTO t VALUES (%d, 'z')", i+j))
		}
		err = s.Target().Exec(ctx, stmts...)
	}
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Stop(); err != nil {
		t.Fatal(err)
	}
	return load(t, filepath.Join(s.Dir, "pg_wal"))
}

func load(t *testing.T, dir string) *history {
	files, err := filepath.Glob(filepath.Join(dir, "0000000100000000*"))
	if err != nil || len(files) == 0 {
		t.Fatalf("no WAL in %s: %v", dir, err)
	}
	sort.Strings(files)
	h := &history{gaps: make(map[pg.LSN]pg.LSN)}
	for i, f := range files {
		start, ok := pg.ParseWALFileName(filepath.Base(f))
		if i == 0 {
			h.base = start
		}
		if !ok || start != h.base+pg.LSN(len(h.bytes)) {
			break
		}
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		h.bytes = append(h.bytes, b...)
	}
	h.start = h.base
	sc := walrec.NewScanner(h.base)
	sc.Feed(h.bytes)
	for {
		rec, ok, err := sc.Next()
		if err != nil || !ok {
			t.Logf("WAL ends at %v: %v", sc.Pos(), err)
			break
		}
		h.ends = append(h.ends, rec.End)
		if rec.IsSwitch {
			h.gaps[recordEnd(rec.LSN, uint32(len(rec.Data)))] = rec.End
		}
	}
	t.Logf("%d files from %v", len(files), h.base)
	if len(h.gaps) < 2 || len(h.ends) < 5000 {
		t.Fatalf("%d records and %d switches: want more", len(h.ends), len(h.gaps))
	}
	last := h.at(h.ends[len(h.ends)-1])
	clear(h.bytes[last:])
	return h
}

// replay writes the history's pages as Postgres does, cutting where r says, from a record's
// end on, and checks what the tracker gives.
func (h *history) replay(t *testing.T, r *rand.Rand, from int, maxStep int) {
	start := h.base
	if from >= 0 {
		start = h.ends[from]
	}
	tr, err := NewTracker(start, h.bytes[h.at(start.PageStart()):h.at(start)])
	if err != nil {
		t.Fatal(err)
	}
	const maxWrites = 10_000 // about
	last := sort.Search(len(h.ends)-1, func(i int) bool { return h.ends[i] > start+pg.LSN(maxStep)*maxWrites/2 })
	end := h.ends[last]
	pos := start
	accept := func(chunks []Chunk, written pg.LSN) {
		for _, c := range chunks {
			if c.Begin != pos {
				t.Fatalf("chunk begins at %v, want %v", c.Begin, pos)
			}
			got := c.Begin + pg.LSN(len(c.WAL))
			if got != c.End && h.gaps[got] != c.End {
				t.Fatalf("chunk [%v, %v) has %d bytes", c.Begin, c.End, len(c.WAL))
			}
			if !bytes.Equal(c.WAL, h.bytes[h.at(c.Begin):h.at(got)]) {
				t.Fatalf("chunk [%v, %v) differs from what was written", c.Begin, c.End)
			}
			pos = c.End
		}
		i := sort.Search(len(h.ends), func(i int) bool { return h.ends[i] > written })
		want := start
		if i > 0 && h.ends[i-1] > start {
			want = h.ends[i-1]
		}
		if pos < want {
			t.Fatalf("complete up to %v after everything up to %v was written, want at least %v", pos, written, want)
		}
		if pos != tr.Accepted() {
			t.Fatalf("Accepted is %v, the chunks end at %v", tr.Accepted(), pos)
		}
	}
	var shown []bool
	var shownEnd pg.LSN // end of the page that shown is of
	for at := start; at < end; {
		next := min(end, at+1+pg.LSN(r.IntN(maxStep)))
		first, last := at.PageStart(), (next + pg.WALPageSize - 1).PageStart()
		p := bytes.Clone(h.bytes[h.at(first):h.at(last)])
		if last != shownEnd {
			shown, shownEnd = make([]bool, pg.WALPageSize), last
		}
		insert(r, p[len(p)-pg.WALPageSize:], shown, pg.WALPageSize-int(last-next))
		// Whole calls of write(2) may reach the mount in parts, at page boundaries.
		for lsn := first; len(p) > 0; {
			n := len(p)
			if r.IntN(4) == 0 {
				n = min(n, pg.WALPageSize*(1+r.IntN(16)))
			}
			chunks, err := tr.Write(lsn, p[:n])
			if err != nil {
				t.Fatalf("writing [%v, %v): %v", lsn, lsn+pg.LSN(n), err)
			}
			if r.IntN(2) == 0 {
				clear(p[:n]) // the bytes are the caller's again
			}
			p, lsn = p[n:], lsn+pg.LSN(n)
			accept(chunks, min(next, lsn))
		}
		at = next
	}
	if pos < end {
		t.Fatalf("accepted up to %v, want at least %v", pos, end)
	}
}

// insert makes the last page what it is while others insert behind done: nothing there yet,
// or holes among whole records. What was shown once does not vanish.
func insert(r *rand.Rand, page []byte, shown []bool, done int) {
	hide := make([]bool, len(page))
	if r.IntN(3) == 0 {
		for i := done; i < len(page); i++ {
			hide[i] = true
		}
	} else if done < len(page) {
		for range r.IntN(4) {
			i := done + r.IntN(len(page)-done)
			for j := i; j < min(len(page), i+r.IntN(300)); j++ {
				hide[j] = true
			}
		}
	}
	for i := range page {
		if hide[i] && !shown[i] {
			page[i] = 0
		} else {
			shown[i] = true
		}
	}
}

// TestReplay commits every byte of real WAL exactly once, however the writes are cut.
func TestReplay(t *testing.T) {
	h := record(t)
	if *seed == 0 {
		*seed = rand.Uint64()
	}
	t.Logf("-seed %d, %d records, %d bytes", *seed, len(h.ends), len(h.bytes))
	r := rand.New(rand.NewPCG(*seed, 0))
	for _, step := range []int{300, 5000, 100_000, 3 << 20} {
		h.replay(t, r, -1, step)
		h.replay(t, r, r.IntN(len(h.ends)-1000), step)
	}
	t.Run("rewritten", func(t *testing.T) { testRewritten(t, h) })
	t.Run("damaged", func(t *testing.T) { testDamaged(t, h, r) })
}

// testRewritten: what was accepted may be written again, but not with other bytes.
func testRewritten(t *testing.T, h *history) {
	newTracker := func() *Tracker {
		tr, err := NewTracker(h.base, nil)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := tr.Write(h.base, h.bytes[:3*pg.WALPageSize+4000]); err != nil {
			t.Fatal(err)
		}
		return tr
	}
	tr := newTracker()
	page := bytes.Clone(h.bytes[3*pg.WALPageSize : 4*pg.WALPageSize])
	if _, err := tr.Write(h.base+3*pg.WALPageSize, page); err != nil {
		t.Errorf("writing the same bytes again: %v", err)
	}
	page[100] ^= 1
	if _, err := tr.Write(h.base+3*pg.WALPageSize, page); err == nil {
		t.Error("an accepted byte was changed, and no error")
	}
	page[100] ^= 1
	if _, err := tr.Write(h.base+3*pg.WALPageSize, page); err == nil {
		t.Error("the error is not final")
	}
	if _, err := newTracker().Write(h.base, page); err == nil {
		t.Error("a page far behind was rewritten, and no error")
	}
	if _, err := newTracker().Write(h.base+64*pg.WALPageSize, page); err == nil {
		t.Error("a page beyond a hole was written, and no error")
	}
	for end, next := range h.gaps {
		tr, err := NewTracker(end.PageStart(), nil)
		if err != nil {
			t.Fatal(err)
		}
		tr.base, tr.before, tr.beforeEnd, tr.tailStart = next, h.bytes[h.at(end.PageStart()):h.at(end)], end, next
		if _, err := tr.Write(end.PageStart(), h.bytes[h.at(end.PageStart()):h.at(next)]); err != nil {
			t.Errorf("zeros behind the switch record that ends at %v: %v", end, err)
		}
		if _, err := tr.Write(next-8, []byte{1, 2, 3, 4, 5, 6, 7, 8}); err == nil {
			t.Error("bytes behind a switch record, and no error")
		}
	}
}

// testDamaged: bytes that are not WAL stop the log once later pages are written.
func testDamaged(t *testing.T, h *history, r *rand.Rand) {
	for range 200 {
		n := 64 * pg.WALPageSize
		b := bytes.Clone(h.bytes[:n])
		at := r.IntN(n - 2*pg.WALPageSize)
		b[at] ^= 1 << r.IntN(8)
		tr, err := NewTracker(h.base, nil)
		if err != nil {
			t.Fatal(err)
		}
		_, err = tr.Write(h.base, b)
		// Padding is not covered by any CRC, and a length may reach beyond what was written.
		if err == nil && tr.Accepted() > h.base+pg.LSN(at)+8 && !isPadding(h, at) {
			t.Fatalf("a flipped bit at %v was accepted", h.base+pg.LSN(at))
		}
	}
}

// TestLargeRecord: a record of more than maxWhole bytes comes in pieces once all of it is there, and what
// comes before and behind it does not share a chunk with it.
func TestLargeRecord(t *testing.T) {
	const start = pg.LSN(0x3000000)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 1))
	var stream []byte
	ends := map[pg.LSN]bool{}
	at, prev := start, start-8
	for _, size := range []int{100, maxWhole + 12345, 50, 40 << 20, maxWhole, maxWhole - 100, 7} {
		data := make([]byte, size)
		for i := 0; i < size; i += 1000 {
			data[i] = byte(r.Uint32())
		}
		b, end := walrec.PlaceRecord(at, walrec.Build(walrec.RmLogicalMsg, 0, 0, prev, data), 42)
		stream, prev, at = append(stream, b...), at.SkipPageHeader(), end
		ends[end] = true
	}
	tr, err := NewTracker(start, nil)
	if err != nil {
		t.Fatal(err)
	}
	var got []byte
	pieces := 0
	partial := false
	for off := 0; off < len(stream); { // whole pages, the last one again and again, parts of it zeros at first
		n := min(len(stream), (off+1+r.IntN(3<<20))/pg.WALPageSize*pg.WALPageSize+r.IntN(pg.WALPageSize))
		n = max(n, off)
		from := off / pg.WALPageSize * pg.WALPageSize
		p := append(bytes.Clone(stream[from:n]), make([]byte, (pg.WALPageSize-n%pg.WALPageSize)%pg.WALPageSize)...)
		chunks, err := tr.Write(start+pg.LSN(from), p)
		if err != nil {
			t.Fatalf("at %d: %v", from, err)
		}
		for _, c := range chunks {
			if c.Begin != start+pg.LSN(len(got)) || c.End != c.Begin+pg.LSN(len(c.WAL)) {
				t.Fatalf("chunk %v to %v of %d bytes at %v", c.Begin, c.End, len(c.WAL), start+pg.LSN(len(got)))
			}
			if c.Partial == ends[c.End] {
				t.Fatalf("chunk to %v: partial %v", c.End, c.Partial)
			}
			if c.Partial || partial {
				pieces++
				if len(c.WAL) > maxChunk {
					t.Errorf("a piece of %d bytes", len(c.WAL))
				}
			}
			partial = c.Partial
			got = append(got, c.WAL...)
		}
		if partial {
			t.Fatal("the pieces of a record did not come at once")
		}
		off = n
	}
	if !bytes.Equal(got, stream) || tr.Accepted() != at {
		t.Errorf("%d bytes were accepted, up to %v; want %d up to %v", len(got), tr.Accepted(), len(stream), at)
	}
	if want := (2*maxWhole + 40<<20) / maxChunk; pieces < want {
		t.Errorf("%d pieces, want about %d", pieces, want)
	}
	if cap(tr.tail) > maxWhole {
		t.Errorf("%d bytes of memory are kept", cap(tr.tail))
	}
}

// isPadding tells whether the byte lies between a record's last byte and its aligned end,
// or in a field of a page header that nothing depends on.
func isPadding(h *history, at int) bool {
	lsn := h.base + pg.LSN(at)
	if in := lsn - lsn.PageStart(); in < pg.LongPageHeaderSize {
		return true
	}
	i := sort.Search(len(h.ends), func(i int) bool { return h.ends[i] > lsn })
	return h.ends[i]-lsn < 8
}

// queue is an Appender that holds what it was sent.
type queue struct {
	end  pg.LSN
	err  error
	wait chan struct{}
}

func (q *queue) Send(begin pg.LSN, wal []byte, partial bool) error {
	if q.err != nil {
		return q.err
	}
	if begin < q.end {
		return fmt.Errorf("begins at %v, want %v", begin, q.end)
	}
	q.end = begin + pg.LSN(len(wal))
	return nil
}

func (q *queue) Wait(ctx context.Context, lsn pg.LSN) error {
	select {
	case <-q.wait:
		return q.err
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (q *queue) Committed() pg.LSN { return q.end }

// TestWriter: Sync waits for the quorum, and a fenced compute gets an error (W2).
func TestWriter(t *testing.T) {
	const start = pg.LSN(0x3000000)
	rec := walrec.BuildCheckpointRecord(start.SkipPageHeader(), 0x2000028, pg.CheckPoint{})
	stream, end := walrec.PlaceRecord(start, rec, 42)
	q := &queue{wait: make(chan struct{}), end: start}
	w, err := NewWriter(q, start, nil)
	if err != nil {
		t.Fatal(err)
	}
	page := append(bytes.Clone(stream), make([]byte, pg.WALPageSize-len(stream))...)
	if err := w.Write(start, page); err != nil {
		t.Fatal(err)
	}
	if q.end != end || w.Accepted() != end {
		t.Fatalf("sent up to %v, accepted %v, want %v", q.end, w.Accepted(), end)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := w.Sync(ctx); err != context.Canceled {
		t.Fatalf("Sync returned %v before the quorum held the WAL", err)
	}
	close(q.wait)
	if err := w.Sync(context.Background()); err != nil {
		t.Fatal(err)
	}
	q.err = fmt.Errorf("fenced")
	if err := w.Sync(context.Background()); err == nil {
		t.Fatal("Sync of a fenced compute succeeded")
	}
	next, _ := walrec.PlaceRecord(end, walrec.Build(0, 0x20, 0, start.SkipPageHeader(), nil), 42)
	copy(page[end-start:], next)
	if err := w.Write(start, page); err == nil {
		t.Fatal("Write of a fenced compute succeeded")
	}
	if w.Err() == nil || w.Sync(context.Background()) == nil {
		t.Fatal("the error is not final")
	}
}

// What the agent adds behind a shutdown continues the log: the scanner checks the link to the
// record before, also where the log ends at a page's end.
func TestAppend(t *testing.T) {
	for _, size := range []int{100, 7000, 30000} {
		const start = pg.LSN(0x3000000)
		checkpoint, end := walrec.PlaceRecord(start, walrec.BuildCheckpointRecord(start.SkipPageHeader(), 0x2000028, pg.CheckPoint{}), 42)
		q := &queue{wait: make(chan struct{}), end: start}
		w, err := NewWriter(q, start, nil)
		if err != nil {
			t.Fatal(err)
		}
		if err := w.Write(start, append(bytes.Clone(checkpoint), make([]byte, pg.WALPageSize-len(checkpoint))...)); err != nil {
			t.Fatal(err)
		}
		var prevs []pg.LSN
		for range 2 {
			err := w.Append(42, func(prev pg.LSN) []byte {
				prevs = append(prevs, prev)
				return walrec.Build(walrec.RmLogicalMsg, 0, 0, prev, make([]byte, size))
			})
			if err != nil {
				t.Fatalf("%d bytes: %v", size, err)
			}
		}
		if prevs[0] != start.SkipPageHeader() || prevs[1] != end.SkipPageHeader() {
			t.Errorf("%d bytes: the records before begin at %v", size, prevs)
		}
		if w.Accepted() <= end+pg.LSN(2*size) || q.end != w.Accepted() {
			t.Errorf("%d bytes: accepted up to %v, sent up to %v", size, w.Accepted(), q.end)
		}
	}
}

// BenchmarkCommits writes a page again for each small record, as single commits do.
func BenchmarkCommits(b *testing.B) {
	const start = pg.LSN(0x3000000)
	var stream []byte
	at, prev := start, start-8
	for len(stream) < 8<<20 {
		lsn := at.SkipPageHeader()
		rec := walrec.Build(0, 0x20, 0, prev, make([]byte, 150))
		placed, end := walrec.PlaceRecord(at, rec, 42)
		stream, at, prev = append(stream, placed...), end, lsn
	}
	b.ReportAllocs()
	var tr *Tracker
	pos := 0
	for b.Loop() {
		if tr == nil || pos+400 > len(stream)-pg.WALPageSize {
			var err error
			if tr, err = NewTracker(start, nil); err != nil {
				b.Fatal(err)
			}
			pos = 0
		}
		first := pos &^ (pg.WALPageSize - 1)
		pos += 400
		if _, err := tr.Write(start+pg.LSN(first), stream[first:pos]); err != nil {
			b.Fatal(err)
		}
	}
}
