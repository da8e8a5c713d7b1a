package pg

import "fmt"

// Fields of a WAL page header (xlog_internal.h). The long form stands at the start of each
// segment file.
//
//	0  magic 2 | info 2 | timeline 4
//	8  address of this page 8
//	16 bytes left of a record begun before 4 | padding 4
//	24 system identifier 8 | segment size 4 | page size 4      long form only
const (
	WALPageMagic = 0xD110 // XLOG_PAGE_MAGIC of PostgreSQL 15

	// Timeline is the one timeline of all our WAL: a branch of ours never changes it.
	Timeline = 1
)

// Bits of WALPageHeader.Info.
const (
	FirstIsContRecord          uint16 = 1 << iota // the page begins with the rest of a record
	LongHeader                                    // the header has the long form
	BackupRemovable                               // page images on it may be left out
	FirstIsOverwriteContRecord                    // a record that was begun before is given up
	allWALPageFlags            = 1<<iota - 1
)

// A WALPageHeader opens each 8 KiB page of WAL.
type WALPageHeader struct {
	Info      uint16
	Timeline  uint32
	Address   LSN
	Remaining uint32 // xlp_rem_len: bytes of a record begun before, on this page and later ones
	SystemID  uint64 // long form only
}

// WALPageHeaderSize is the size of the header of the page that begins at an LSN.
func WALPageHeaderSize(page LSN) int {
	if page%WALSegmentSize == 0 {
		return LongPageHeaderSize
	}
	return ShortPageHeaderSize
}

// NewWALPageHeader is the header of the page at an LSN, on which remaining bytes of a
// record begun before are still to come.
func NewWALPageHeader(page LSN, remaining uint32, systemID uint64) WALPageHeader {
	h := WALPageHeader{Timeline: Timeline, Address: page, Remaining: remaining}
	if remaining > 0 {
		h.Info |= FirstIsContRecord
	}
	if page%WALSegmentSize == 0 {
		h.Info |= LongHeader
		h.SystemID = systemID
	}
	return h
}

// ParseWALPageHeader reads and checks the header of the page at an LSN. p has at least
// WALPageHeaderSize(page) bytes.
func ParseWALPageHeader(p []byte, page LSN) (WALPageHeader, error) {
	if len(p) < WALPageHeaderSize(page) {
		return WALPageHeader{}, fmt.Errorf("WAL page header at %v: %d bytes, want %d", page, len(p), WALPageHeaderSize(page))
	}
	h := WALPageHeader{Info: le.Uint16(p[2:]), Timeline: le.Uint32(p[4:]),
		Address: LSN(le.Uint64(p[8:])), Remaining: le.Uint32(p[16:])}
	switch long := page%WALSegmentSize == 0; {
	case le.Uint16(p) != WALPageMagic:
		return h, fmt.Errorf("WAL page header at %v: magic %#04x, want %#04x (PostgreSQL 15)", page, le.Uint16(p), WALPageMagic)
	case h.Info&^allWALPageFlags != 0:
		return h, fmt.Errorf("WAL page header at %v: unknown flags %#04x", page, h.Info)
	case h.Address != page:
		return h, fmt.Errorf("WAL page header at %v: it says that it is the page at %v", page, h.Address)
	case h.Timeline == 0:
		return h, fmt.Errorf("WAL page header at %v: timeline 0", page)
	case (h.Info&FirstIsContRecord != 0) != (h.Remaining != 0):
		return h, fmt.Errorf("WAL page header at %v: flags %#04x do not fit %d bytes of a continued record", page, h.Info, h.Remaining)
	case (h.Info&LongHeader != 0) != long:
		return h, fmt.Errorf("WAL page header at %v: long form %v, want %v", page, !long, long)
	case long && (le.Uint32(p[32:]) != WALSegmentSize || le.Uint32(p[36:]) != WALPageSize):
		return h, fmt.Errorf("WAL page header at %v: segments of %d and pages of %d bytes, want %d and %d",
			page, le.Uint32(p[32:]), le.Uint32(p[36:]), WALSegmentSize, WALPageSize)
	case long:
		h.SystemID = le.Uint64(p[24:])
	}
	return h, nil
}

// Append appends the header's bytes to dst.
func (h WALPageHeader) Append(dst []byte) []byte {
	dst = le.AppendUint16(dst, WALPageMagic)
	dst = le.AppendUint16(dst, h.Info)
	dst = le.AppendUint32(dst, h.Timeline)
	dst = le.AppendUint64(dst, uint64(h.Address))
	dst = le.AppendUint32(dst, h.Remaining)
	dst = le.AppendUint32(dst, 0)
	if h.Info&LongHeader != 0 {
		dst = le.AppendUint64(dst, h.SystemID)
		dst = le.AppendUint32(dst, WALSegmentSize)
		dst = le.AppendUint32(dst, WALPageSize)
	}
	return dst
}
