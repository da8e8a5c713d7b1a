package pg

import (
	"fmt"
	"strconv"
	"strings"
)

// LSN is a byte position in a branch's write-ahead log (XLogRecPtr).
type LSN uint64

// InvalidLSN is never the position of a record.
const InvalidLSN LSN = 0

// String formats the LSN as PostgreSQL does: two hexadecimal halves, "0/14FE6E8".
func (l LSN) String() string { return fmt.Sprintf("%X/%X", uint32(l>>32), uint32(l)) }

// ParseLSN reads PostgreSQL's form of an LSN.
func ParseLSN(s string) (LSN, error) {
	hi, lo, ok := strings.Cut(s, "/")
	if !ok {
		return 0, fmt.Errorf("invalid LSN %q: want two hexadecimal numbers separated by a slash", s)
	}
	h, err := strconv.ParseUint(hi, 16, 32)
	if err != nil {
		return 0, fmt.Errorf("invalid LSN %q: %w", s, err)
	}
	l, err := strconv.ParseUint(lo, 16, 32)
	if err != nil {
		return 0, fmt.Errorf("invalid LSN %q: %w", s, err)
	}
	return LSN(h<<32 | l), nil
}

// Align rounds up to the alignment of WAL records (MAXALIGN, 8 bytes).
func (l LSN) Align() LSN { return (l + 7) &^ 7 }

// PageStart is the start of the 8 KiB WAL page that holds l.
func (l LSN) PageStart() LSN { return l &^ (WALPageSize - 1) }

// SegmentStart is the start of the WAL segment file that holds l.
func (l LSN) SegmentStart() LSN { return l &^ (WALSegmentSize - 1) }

// SkipPageHeader moves a position that stands at the start of a WAL page past
// that page's header, to where a record can begin. Other positions stay.
func (l LSN) SkipPageHeader() LSN {
	switch {
	case l%WALSegmentSize == 0:
		return l + LongPageHeaderSize
	case l%WALPageSize == 0:
		return l + ShortPageHeaderSize
	}
	return l
}
