package pg

import "encoding/binary"

var le = binary.LittleEndian

// PageLSN is the LSN in a relation page's header: of the end of the last WAL record that
// stamped it. p has at least 8 bytes.
func PageLSN(p []byte) LSN { return LSN(le.Uint32(p))<<32 | LSN(le.Uint32(p[4:])) }

// SetPageLSN stores an LSN in a relation page's header.
func SetPageLSN(p []byte, l LSN) {
	le.PutUint32(p, uint32(l>>32))
	le.PutUint32(p[4:], uint32(l))
}

// IsNewPage tells a relation page that was never initialised (PageIsNew): its pd_upper is
// zero. p has at least 16 bytes.
func IsNewPage(p []byte) bool { return le.Uint16(p[14:]) == 0 }
