package walrec

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"

	"github.com/holdfastdb/holdfast/internal/pg"
)

var le = binary.LittleEndian

// Layout of XLogRecord, the header of each record (xlogrecord.h).
const (
	headerSize = 24
	atXid      = 4
	atPrev     = 8
	atInfo     = 16
	atRmID     = 17
	atCRC      = 20

	maxRecord   = 1 << 30 // no allocation in PostgreSQL may be larger
	maxBuiltin  = 21      // RM_MAX_BUILTIN_ID
	minCustom   = 128     // RM_MIN_CUSTOM_ID
	infoMask    = 0xF0    // the resource manager's part of xl_info
	switchInfo  = 0x40    // XLOG_SWITCH, of resource manager 0
	lengthField = 4
	keepPart    = 1 << 20 // memory for records across pages that is kept for the next one
)

// A RawRecord is a whole record whose CRC is right.
type RawRecord struct {
	LSN      pg.LSN // where its header begins
	End      pg.LSN // where the next record could begin, before a page header is skipped
	Data     []byte // header included, page headers taken out; see Scanner for its lifetime
	IsSwitch bool   // XLOG_SWITCH: End is the start of the next segment
	Skimmed  bool   // Data is the header alone (Scanner.Skim)
}

// A Scanner splits a stream of WAL bytes into records. Feed copies what it is given; a
// RawRecord's Data lies in the Scanner's own memory and is valid until the next call of
// Feed, Next, Reset or Wipe.
//
// It remembers at most one unfinished record, in memory that grows with the bytes that
// came and not with the length that the record claims. An error is final until Reset.
type Scanner struct {
	buf []byte // what was fed
	off int    // what of it is consumed
	pos pg.LSN // the position of buf[off]

	end  pg.LSN // of the last complete record
	prev pg.LSN // begin of the last complete record, 0 if there is none yet
	err  error

	skip int // zero bytes that may follow a switch record before the next segment

	// A record that crosses a page boundary is put together here.
	part      []byte
	partLSN   pg.LSN
	remaining int // of its bytes; 0 if there is no such record
	// Of a record that is skimmed, part is the header alone, and crc that of what followed it.
	skim     func(rmid uint8, size int) bool
	skimming bool
	crc      uint32
}

// NewScanner makes a Scanner of the stream that begins at start: the end of a record, or
// the start of a page that does not begin with the rest of a record.
func NewScanner(start pg.LSN) *Scanner {
	s := new(Scanner)
	s.Reset(start)
	return s
}

// Skim has the Scanner not put together records of which which says so, by their resource manager and
// size: they are checked as they pass by, and may have any size. Of others none has more than
// 1 GiB: PostgreSQL itself could not read it.
func (s *Scanner) Skim(which func(rmid uint8, size int) bool) { s.skim = which }

// Skims tells whether what was fed ends inside a record that is skimmed, of whose header nothing is
// wrong.
func (s *Scanner) Skims() bool { return s.skimming && s.err == nil && s.off == len(s.buf) }

// Missing is how many bytes are still to come of a record of which a part was fed and taken; 0 if there
// is none.
func (s *Scanner) Missing() int { return s.remaining }

// Reset forgets all that was fed and what went wrong, and expects the stream from start
// on. Whoever feeds bytes that may still be rewritten (a WAL page's tail) resets to Pos and
// feeds again from there. If start is Pos, the next record's link to the one before it is
// still checked.
func (s *Scanner) Reset(start pg.LSN) {
	s.skimming = false
	s.Wipe()
	prev := s.prev
	if start != s.end {
		prev = 0
	}
	*s = Scanner{buf: s.buf[:0], part: s.part[:0], pos: start, end: start, prev: prev, skim: s.skim}
	inPage := int(start % pg.WALPageSize)
	if start%8 != 0 || inPage != 0 && inPage < pg.WALPageHeaderSize(start.PageStart()) {
		s.err = fmt.Errorf("WAL cannot be read from %v: no record begins there", start)
	}
}

// Wipe zeroes the WAL that the scanner holds (K2), the last record's Data included. Where all that
// was fed was given by Next, the stream may go on, also where it Skims, for which the record's header
// stays; else what was not is lost, and Reset is next.
func (s *Scanner) Wipe() {
	clear(s.buf)
	if s.Skims() {
		clear(s.part[len(s.part):cap(s.part)])
	} else {
		clear(s.part[:cap(s.part)])
	}
	s.buf, s.off = s.buf[:0], 0
}

// Pos is the end of the last complete record that Next gave, or the start.
func (s *Scanner) Pos() pg.LSN { return s.end }

// LastRecord is where the last complete record began, what the next one's xl_prev must be;
// 0 if it is not known.
func (s *Scanner) LastRecord() pg.LSN { return s.prev }

// Feed appends bytes that continue the stream.
func (s *Scanner) Feed(p []byte) {
	if s.off > 0 {
		n := copy(s.buf, s.buf[s.off:])
		clear(s.buf[n:]) // nothing stays beyond what Wipe reaches
		s.buf, s.off = s.buf[:n], 0
	}
	s.buf = append(s.buf, p...)
}

// Next gives the next complete record. ok is false if there is none yet: more bytes are
// needed, or zeros stand where it would begin, as in a WAL page's unused tail. err means
// that the bytes are not WAL.
//
// After a switch record the stream goes on with the next segment's first byte; the zeros
// that fill a segment file may stand in between or be left out.
func (s *Scanner) Next() (rec RawRecord, ok bool, err error) {
	for s.err == nil {
		switch {
		case s.skip > 0 && !s.skipZeros():
			return RawRecord{}, false, nil
		case s.pos%pg.WALPageSize == 0:
			ok = s.pageHeader()
			if ok {
				continue
			}
		case s.remaining > 0:
			if !s.gather() {
				return RawRecord{}, false, nil
			}
			if s.remaining > 0 {
				continue
			}
			rec, ok = s.finish(s.part, s.partLSN)
		default:
			var whole bool
			rec, ok, whole = s.begin()
			if !whole {
				continue
			}
		}
		if s.err == nil {
			return rec, ok, nil
		}
	}
	return RawRecord{}, false, s.err
}

func (s *Scanner) fail(format string, args ...any) {
	s.err = fmt.Errorf(format, args...)
}

func (s *Scanner) rest() []byte { return s.buf[s.off:] }

func (s *Scanner) advance(n int) {
	s.off += n
	s.pos += pg.LSN(n)
}

// skipZeros passes over the rest of a segment after a switch record; false if it needs
// more bytes to know. No segment begins with a zero byte.
func (s *Scanner) skipZeros() bool {
	for s.skip > 0 {
		if s.off == len(s.buf) {
			return false
		}
		if s.buf[s.off] != 0 {
			s.skip = 0
			break
		}
		s.off++
		s.skip--
	}
	return true
}

// pageHeader consumes the page header at pos; false if there is none yet.
func (s *Scanner) pageHeader() bool {
	b, size := s.rest(), pg.WALPageHeaderSize(s.pos)
	if len(b) < size || isZero(b[:size]) {
		return false
	}
	h, err := pg.ParseWALPageHeader(b, s.pos)
	switch {
	case err != nil:
		s.err = err
		return false
	case h.Info&pg.FirstIsOverwriteContRecord != 0:
		s.remaining, s.part, s.skimming = 0, s.part[:0], false // recovery gave that record up
		fallthrough
	case s.remaining == 0:
		if h.Info&pg.FirstIsContRecord != 0 {
			s.fail("WAL page at %v begins with the rest of a record, and none was begun", s.pos)
			return false
		}
	case int64(h.Remaining) != int64(s.remaining):
		s.fail("WAL page at %v continues a record by %d bytes; the record at %v lacks %d", s.pos, h.Remaining, s.partLSN, s.remaining)
		return false
	}
	s.advance(size)
	return true
}

// begin looks at a record's start. whole is false if the record goes on on the next page:
// then its first part is taken and the caller goes on.
func (s *Scanner) begin() (rec RawRecord, ok, whole bool) {
	b := s.rest()
	if len(b) < lengthField {
		return RawRecord{}, false, true
	}
	n := le.Uint32(b)
	switch {
	case n == 0:
		return RawRecord{}, false, true
	case n < headerSize || n > maxRecord && s.skim == nil:
		s.fail("WAL record at %v: length %d, want %d to %d", s.pos, n, headerSize, maxRecord)
		return RawRecord{}, false, true
	}
	left := int(pg.WALPageSize - s.pos%pg.WALPageSize)
	if int(n) > left {
		clear(s.part)
		if cap(s.part) > keepPart {
			s.part = nil
		}
		s.part, s.partLSN, s.remaining, s.skimming = s.part[:0], s.pos, int(n), false
		return RawRecord{}, false, false
	}
	if padded := int(n+7) &^ 7; len(b) < padded {
		return RawRecord{}, false, true
	}
	lsn := s.pos
	s.advance(int(n))
	rec, ok = s.finish(b[:n:n], lsn)
	return rec, ok, true
}

// gather takes what there is of the record's bytes on this page; false if there is none.
func (s *Scanner) gather() bool {
	left := int(pg.WALPageSize - s.pos%pg.WALPageSize)
	n := min(left, s.remaining, len(s.rest()))
	if n == 0 {
		return false
	}
	if n == s.remaining { // finish needs the padding, too
		if padded := int(s.pos+pg.LSN(n)+7)&^7 - int(s.pos); len(s.rest()) < padded {
			return false
		}
	}
	b := s.rest()[:n]
	s.advance(n)
	s.remaining -= n
	if s.skimming {
		s.crc = crc32.Update(s.crc, pg.Castagnoli, b)
		return true
	}
	had := len(s.part)
	s.part = append(s.part, b...)
	if had < headerSize && len(s.part) >= headerSize && s.checkHeader(s.part, s.partLSN) {
		s.choose()
	}
	return true
}

// choose decides, now that a record's header is there, whether it is skimmed.
func (s *Scanner) choose() {
	size := int(le.Uint32(s.part))
	switch {
	case s.skim != nil && s.skim(s.part[atRmID], size):
		s.crc, s.skimming = crc32.Checksum(s.part[headerSize:], pg.Castagnoli), true
		s.part = s.part[:headerSize]
	case size > maxRecord:
		s.fail("WAL record at %v: length %d, want %d to %d", s.partLSN, size, headerSize, maxRecord)
	}
}

// checkHeader checks what a header can tell before its CRC is known, so that a false
// length does not make the scanner wait for a gigabyte.
func (s *Scanner) checkHeader(data []byte, lsn pg.LSN) bool {
	if id := data[atRmID]; id > maxBuiltin && id < minCustom {
		s.fail("WAL record at %v: resource manager %d is not known", lsn, id)
		return false
	}
	switch prev := pg.LSN(le.Uint64(data[atPrev:])); {
	case s.prev != 0 && prev != s.prev:
		s.fail("WAL record at %v says that the record before it is at %v, not at %v", lsn, prev, s.prev)
		return false
	case prev >= lsn:
		s.fail("WAL record at %v says that the record before it is at %v", lsn, prev)
		return false
	}
	return true
}

// finish checks a whole record, which ends at pos, and moves to where the next one begins.
func (s *Scanner) finish(data []byte, lsn pg.LSN) (RawRecord, bool) {
	if !s.checkHeader(data, lsn) {
		return RawRecord{}, false
	}
	if have, want := s.crcOf(data), le.Uint32(data[atCRC:]); have != want {
		s.fail("WAL record at %v of %d bytes: CRC is %#08x, the record says %#08x", lsn, le.Uint32(data), have, want)
		return RawRecord{}, false
	}
	s.advance(int(s.pos.Align() - s.pos))
	rec := RawRecord{LSN: lsn, Data: data, Skimmed: s.skimming}
	s.skimming = false
	if data[atRmID] == 0 && data[atInfo]&infoMask == switchInfo {
		rec.IsSwitch = true
		next := (s.pos + pg.WALSegmentSize - 1).SegmentStart()
		s.skip = int(next - s.pos)
		s.pos = next
	}
	rec.End = s.pos
	s.end, s.prev = s.pos, lsn
	return rec, true
}

// crcOf is the CRC of a record that is whole, or was skimmed.
func (s *Scanner) crcOf(data []byte) uint32 {
	if s.skimming {
		return crc32.Update(s.crc, pg.Castagnoli, data[:atCRC])
	}
	return CRC(data)
}

// CRC is the CRC-32C of a record of at least headerSize bytes: of what follows the header,
// then of the header up to the CRC itself.
func CRC(data []byte) uint32 {
	return crc32.Update(crc32.Checksum(data[headerSize:], pg.Castagnoli), pg.Castagnoli, data[:atCRC])
}

func isZero(b []byte) bool {
	for _, v := range b {
		if v != 0 {
			return false
		}
	}
	return true
}
