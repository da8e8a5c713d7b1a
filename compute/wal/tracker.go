// Package wal makes "flushed" in Postgres mean "on a quorum": it takes what Postgres writes
// into pg_wal, finds the complete records in it, and sends them to the safekeepers.
//
// Postgres writes whole 8 KiB WAL pages, and nearly every write rewrites the last one with
// more bytes. fsync does not tell where the WAL ends, and behind the last complete record
// there may stand parts of records that other backends are still copying. So the Tracker
// (pure: no goroutine, no I/O) reads the records: what is complete and CRC-valid is
// accepted, once and for ever; bytes behind it may be rewritten. The Writer sends accepted
// stretches at write(2) time, and its Sync, which is Postgres's fdatasync, waits until the
// quorum holds them.
//
// Why that is enough: Postgres flushes up to a record's end and waits before it for every
// insertion below that end (WaitXLogInsertionsToFinish). So a record that is incomplete in
// a write is not one that this flush, or the COMMIT behind it, asks for.
package wal

import (
	"bytes"
	"encoding/binary"
	"fmt"

	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/internal/walrec"
)

const (
	// maxChunk is where a chunk ends at the next record's end.
	maxChunk = 1 << 20
	// maxWhole is the most bytes of a record that goes in one chunk, whole. A larger one, of any
	// size, goes in pieces, each a chunk of about maxChunk.
	maxWhole = 16 << 20

	recordHeaderSize = 24      // SizeOfXLogRecord
	keepTail         = 4 << 20 // memory for unfinished records that is kept for the next one
	maxFeed          = 1 << 20 // bytes that the scanner gets at once: it copies them
)

// A Chunk is a stretch [Begin, End) of WAL that holds whole records, or a piece of one. Its bytes are
// the receiver's. After a switch record End is the next segment's start, and the zeros between
// are left out.
type Chunk struct {
	Begin, End pg.LSN
	WAL        []byte
	// Partial tells that the record goes on in the next chunk, which is there already.
	Partial bool
}

// A Tracker follows the writes to pg_wal. It is not safe for concurrent use. An error is
// final: what Postgres writes is then not the log that was accepted before.
type Tracker struct {
	scanner *walrec.Scanner
	// base is the end of the last complete record. Invariant: what is before it is accepted.
	base pg.LSN
	// last is where the record begins that ends at base; 0 if none was accepted yet.
	last pg.LSN
	// before is what was accepted of the page that holds the last accepted byte; it ends at
	// beforeEnd, which is base or, after a switch record, that record's end.
	before    []byte
	beforeEnd pg.LSN
	// tail is what was written behind tailStart. tailStart == base between calls of Write.
	tail      []byte
	tailStart pg.LSN
	// fed is the end of what the scanner was given. Bytes below fed never change without
	// the scanner being reset.
	fed pg.LSN
	// pending caches recordEnd of the record that begins at base.
	pending struct {
		base, end pg.LSN
		length    uint32
	}
	err error
}

// NewTracker makes a Tracker of the WAL from start on, which is the end of a record. page
// is what stands in pg_wal between the start of start's page and start.
func NewTracker(start pg.LSN, page []byte) (*Tracker, error) {
	if want := int(start - start.PageStart()); len(page) != want {
		return nil, fmt.Errorf("WAL page before %v: %d bytes, want %d", start, len(page), want)
	}
	scanner := walrec.NewScanner(start)
	scanner.Skim(func(_ uint8, size int) bool { return size > maxWhole })
	return &Tracker{scanner: scanner, base: start, before: bytes.Clone(page), beforeEnd: start,
		tailStart: start, fed: start}, nil
}

// Accepted is the end of the last complete record.
func (t *Tracker) Accepted() pg.LSN { return t.base }

// Write takes the bytes that Postgres wrote at lsn and gives what is complete now and was
// not before. The work is in proportion to the bytes that are new, not to the page.
func (t *Tracker) Write(lsn pg.LSN, p []byte) ([]Chunk, error) {
	if t.err == nil {
		t.err = t.take(lsn, p)
	}
	if t.err != nil {
		return nil, t.err
	}
	chunks, err := t.scan()
	if err != nil {
		t.err = err
		return nil, err
	}
	return chunks, nil
}

// take puts the written bytes where they belong: what is accepted must be the same, the
// rest replaces what was written there before.
func (t *Tracker) take(lsn pg.LSN, p []byte) error {
	if lsn < t.base {
		n := min(len(p), int(t.base-lsn))
		if err := t.compare(lsn, p[:n]); err != nil {
			return err
		}
		lsn, p = lsn+pg.LSN(n), p[n:]
	}
	if len(p) == 0 {
		return nil
	}
	end := t.tailStart + pg.LSN(len(t.tail))
	if lsn > end {
		return fmt.Errorf("WAL was written at %v, and nothing between there and %v", lsn, end)
	}
	if lsn < t.fed && !bytes.Equal(p[:min(len(p), int(t.fed-lsn))], t.tail[lsn-t.tailStart:][:min(len(p), int(t.fed-lsn))]) {
		t.rewind()
	}
	t.tail = append(t.tail[:lsn-t.tailStart], keepRest(t.tail, int(lsn-t.tailStart), p)...)
	return nil
}

// keepRest is p, followed by what tail has behind p's place at off.
func keepRest(tail []byte, off int, p []byte) []byte {
	if off+len(p) >= len(tail) {
		return p
	}
	return append(bytes.Clone(p), tail[off+len(p):]...)
}

// compare checks bytes below base, which were accepted before, or are the zeros behind a
// switch record.
func (t *Tracker) compare(lsn pg.LSN, p []byte) error {
	beforeStart := t.beforeEnd - pg.LSN(len(t.before))
	if lsn < beforeStart {
		return fmt.Errorf("WAL was written at %v, far below the end of the accepted log at %v", lsn, t.base)
	}
	if lsn < t.beforeEnd {
		n := min(len(p), int(t.beforeEnd-lsn))
		if !bytes.Equal(p[:n], t.before[lsn-beforeStart:][:n]) {
			return fmt.Errorf("WAL between %v and %v was accepted and then rewritten with other bytes", lsn, lsn+pg.LSN(n))
		}
		p = p[n:]
	}
	if !isZero(p) {
		return fmt.Errorf("WAL was written between the switch record that ends at %v and the next segment at %v", t.beforeEnd, t.base)
	}
	return nil
}

// scan accepts the records that are complete now.
func (t *Tracker) scan() ([]Chunk, error) {
	var chunks []Chunk
	whole := t.tail
	defer func() { t.settle(whole) }()
	cut := func(n int, end pg.LSN) {
		if n > 0 {
			chunks = append(chunks, Chunk{Begin: t.tailStart, End: end, WAL: bytes.Clone(t.tail[:n])})
			t.accept(n)
		}
	}
	for {
		rec, ok, err := t.next()
		if err != nil {
			return nil, err
		}
		n, before := int(t.base-t.tailStart), t.base
		if !ok {
			cut(n, t.base)
			return chunks, nil
		}
		t.base, t.last = rec.End, rec.LSN
		switch {
		case rec.Skimmed:
			cut(n, before)
			chunks = append(chunks, t.pieces()...)
			whole = t.tail
		case rec.IsSwitch:
			cut(int(recordEnd(rec.LSN, uint32(len(rec.Data)))-t.tailStart), t.base)
			if err := t.skipGap(); err != nil {
				return nil, err
			}
		case n >= maxChunk:
			cut(int(t.base-t.tailStart), t.base)
		}
	}
}

// pieces cuts the record that is all of the tail up to base, at ends of pages. The pieces are the
// tail's memory, which nothing else uses any more.
func (t *Tracker) pieces() (chunks []Chunk) {
	rest, from := t.tail, t.tailStart
	left := int(t.base - t.tailStart)
	t.accept(left)
	t.tail = bytes.Clone(t.tail)
	for left > 0 {
		n := min(left, int((from+maxChunk).PageStart()-from))
		chunks = append(chunks, Chunk{Begin: from, End: from + pg.LSN(n), WAL: rest[:n:n], Partial: n < left})
		rest, from, left = rest[n:], from+pg.LSN(n), left-n
	}
	return chunks
}

// next gives the next complete record behind base.
func (t *Tracker) next() (rec walrec.RawRecord, ok bool, err error) {
	end := t.tailStart + pg.LSN(len(t.tail))
	if end <= t.base {
		return rec, false, nil
	}
	// Postgres waits for all insertions into a page before it goes on to write the next
	// one: only the page that was written last may still change.
	settled := max((end - 1).PageStart(), t.base)
	recEnd, complete, err := t.expect(settled, end)
	if err != nil {
		return rec, false, err
	}
	limit := max(t.fed, settled)
	if complete {
		limit = max(limit, recEnd)
	}
	for {
		to := min(limit, t.fed+maxFeed)
		t.scanner.Feed(t.tail[t.fed-t.tailStart : to-t.tailStart])
		t.fed = to
		if rec, ok, err = t.scanner.Next(); ok || err != nil || to == limit {
			break
		}
	}
	t.reserve(recEnd)
	switch {
	case ok:
		return rec, true, nil
	case t.fed > settled: // a record that is still being copied
		t.rewind()
		return rec, false, nil
	case err == nil && complete && recEnd <= settled:
		err = fmt.Errorf("WAL at %v: a record's page header is missing, and later pages were written", t.base)
	}
	return rec, false, err
}

// reserve makes the tail large enough, once, for a record that goes in pieces and whose header is
// right: growing by steps would need twice the memory.
func (t *Tracker) reserve(end pg.LSN) {
	if !t.scanner.Skims() || end < t.tailStart {
		return
	}
	if n := int(end-t.tailStart) + 2*pg.WALPageSize; cap(t.tail) < n {
		t.tail = append(make([]byte, 0, n), t.tail...)
	}
}

// expect looks at the length of the record that begins at base: where it ends, and whether
// that much was written.
func (t *Tracker) expect(settled, end pg.LSN) (recEnd pg.LSN, complete bool, err error) {
	start := t.base.SkipPageHeader()
	if start+4 > end {
		return 0, false, nil
	}
	n := binary.LittleEndian.Uint32(t.tail[start-t.tailStart:])
	isSettled := start+4 <= settled
	switch {
	case n < recordHeaderSize && isSettled:
		return 0, false, fmt.Errorf("WAL at %v holds no record (length %d), and later pages were written", start, n)
	case n < recordHeaderSize:
		return 0, false, nil
	}
	if t.pending.base != t.base || t.pending.length != n {
		t.pending.base, t.pending.length, t.pending.end = t.base, n, recordEnd(start, n)
	}
	return t.pending.end, t.pending.end <= end, nil
}

// rewind forgets what the scanner knows of the record that begins at base.
func (t *Tracker) rewind() {
	t.scanner.Reset(t.base)
	t.fed = t.base
}

// accept moves n bytes from the tail to what is accepted.
func (t *Tracker) accept(n int) {
	last := t.tailStart + pg.LSN(n) - 1
	if start := last.PageStart(); start < t.tailStart {
		t.before = append(t.before[len(t.before)-int(t.tailStart-start):], t.tail[:n]...)
	} else {
		t.before = append(t.before[:0], t.tail[start-t.tailStart:n]...)
	}
	t.beforeEnd = last + 1
	t.tail = t.tail[n:]
	t.tailStart += pg.LSN(n)
}

// settle moves what is left of the tail to the front of its memory, once for all that was
// accepted of it.
func (t *Tracker) settle(whole []byte) {
	switch {
	case len(t.tail) == len(whole):
	case cap(whole) > keepTail && len(t.tail) < keepTail/2:
		t.tail = bytes.Clone(t.tail)
	default:
		t.tail = whole[:copy(whole, t.tail)]
	}
}

// skipGap drops the zeros between an accepted switch record and the next segment, at base.
func (t *Tracker) skipGap() error {
	n := min(len(t.tail), int(t.base-t.tailStart))
	if !isZero(t.tail[:n]) {
		return fmt.Errorf("WAL was written between the switch record that ends at %v and the next segment at %v", t.beforeEnd, t.base)
	}
	t.tail = t.tail[n:]
	t.tailStart = t.base
	t.rewind()
	return nil
}

// recordEnd is where a record of n bytes that begins at start ends: past the page headers
// on its way and the padding behind it.
func recordEnd(start pg.LSN, n uint32) pg.LSN {
	pos, left := start, pg.LSN(n)
	for {
		pos = pos.SkipPageHeader()
		room := pg.WALPageSize - pos%pg.WALPageSize
		if left <= room {
			return (pos + left).Align()
		}
		pos, left = pos+room, left-room
	}
}

func isZero(p []byte) bool {
	for len(p) >= 8 {
		if binary.LittleEndian.Uint64(p) != 0 {
			return false
		}
		p = p[8:]
	}
	for _, b := range p {
		if b != 0 {
			return false
		}
	}
	return true
}
