package witness

import (
	"bytes"
	"encoding/binary"
	"fmt"

	"github.com/holdfastdb/holdfast/internal/pg"
)

var le = binary.LittleEndian

// maskUnused copies a page without the bytes that belong to nothing: between line pointers and
// tuples, and between tuples. What a server that recovered leaves there depends on which pages it had in
// memory, and on what was there before.
func maskUnused(tag pg.RelTag, page []byte) ([]byte, error) {
	p := bytes.Clone(page)
	if tag.Fork == pg.VMFork || pg.IsNewPage(p) {
		return p, nil
	}
	lower, upper, special := int(le.Uint16(p[12:])), int(le.Uint16(p[14:])), int(le.Uint16(p[16:]))
	if lower < 24 || lower > upper || upper > special || special > len(p) {
		return nil, fmt.Errorf("corrupt header: lower %d upper %d special %d", lower, upper, special)
	}
	if special != len(p)-8 || le.Uint16(p[len(p)-2:]) != brinRevmap { // which is all TIDs
		clear(p[lower:upper])
	}
	used := make([]bool, len(p))
	for at := 24; at+4 <= lower; at += 4 {
		item := le.Uint32(p[at:])
		off, n := int(item&0x7FFF), int(item>>17)
		for i := off; n > 0 && i < min(off+n, len(p)); i++ {
			used[i] = true
		}
	}
	for i := upper; i < special; i++ {
		if !used[i] {
			p[i] = 0
		}
	}
	return p, nil
}

// brinRevmap is BRIN_PAGETYPE_REVMAP (brin_page.h).
const brinRevmap = 0xF092
