package redo

import (
	"encoding/binary"
	"fmt"

	"github.com/holdfastdb/holdfast/internal/pg"
)

var le = binary.LittleEndian

// Layout of a page header and a line pointer (bufpage.h, itemid.h).
const (
	offFlags    = 10
	offLower    = 12
	offUpper    = 14
	offSpecial  = 16
	offVersion  = 18
	offPruneXid = 20
	headerSize  = 24 // SizeOfPageHeaderData, already MAXALIGNed

	pageVersion = pg.BlockSize | 4 // PG_PAGE_LAYOUT_VERSION 4
	itemIDSize  = 4

	pdHasFreeLines = 0x0001
	pdPageFull     = 0x0002
	pdAllVisible   = 0x0004
)

// The states of a line pointer (lp_flags).
const (
	lpUnused   = 0
	lpNormal   = 1
	lpRedirect = 2
	lpDead     = 3
)

// maxItems is how many line pointers fit in a page that holds nothing else.
const maxItems = (pg.BlockSize - headerSize) / itemIDSize

// page is the 8 KiB of one block. Its methods never read or write outside it as
// long as sane() held and every line pointer came through item() or tuple().
type page []byte

func align8(n int) int { return (n + 7) &^ 7 }

func (p page) flags() uint16      { return le.Uint16(p[offFlags:]) }
func (p page) setFlags(f uint16)  { le.PutUint16(p[offFlags:], f) }
func (p page) lower() int         { return int(le.Uint16(p[offLower:])) }
func (p page) setLower(v int)     { le.PutUint16(p[offLower:], uint16(v)) }
func (p page) upper() int         { return int(le.Uint16(p[offUpper:])) }
func (p page) setUpper(v int)     { le.PutUint16(p[offUpper:], uint16(v)) }
func (p page) special() int       { return int(le.Uint16(p[offSpecial:])) }
func (p page) pruneXid() uint32   { return le.Uint32(p[offPruneXid:]) }
func (p page) clearFlag(f uint16) { p.setFlags(p.flags() &^ f) }
func (p page) setFlag(f uint16)   { p.setFlags(p.flags() | f) }

// isNew tells a page that was never initialised (PageIsNew).
func (p page) isNew() bool { return p.upper() == 0 }

// lsn is pd_lsn, stored as two 32-bit halves with the high one first.
func (p page) lsn() pg.LSN {
	return pg.LSN(le.Uint32(p))<<32 | pg.LSN(le.Uint32(p[4:]))
}

func (p page) setLSN(l pg.LSN) {
	le.PutUint32(p, uint32(l>>32))
	le.PutUint32(p[4:], uint32(l))
}

// init makes p an empty page with a special area of the given size (PageInit).
func (p page) init(specialSize int) {
	clear(p)
	special := pg.BlockSize - align8(specialSize)
	p.setLower(headerSize)
	p.setUpper(special)
	le.PutUint16(p[offSpecial:], uint16(special))
	le.PutUint16(p[offVersion:], pageVersion)
}

// sane checks the header's bounds, as PageAddItemExtended does before it trusts them.
func (p page) sane() error {
	lo, up, sp := p.lower(), p.upper(), p.special()
	if lo < headerSize || lo > up || up > sp || sp > pg.BlockSize || sp%8 != 0 {
		return fmt.Errorf("corrupt page header: lower %d, upper %d, special %d", lo, up, sp)
	}
	return nil
}

// maxOffset is the number of line pointers (PageGetMaxOffsetNumber).
func (p page) maxOffset() int { return max(0, p.lower()-headerSize) / itemIDSize }

// An itemID is a line pointer: offset 15 bits, flags 2, length 15.
type itemID uint32

func makeItem(off, flags, length int) itemID {
	return itemID(uint32(off)&0x7FFF | uint32(flags)<<15 | uint32(length)<<17)
}

func (i itemID) off() int   { return int(i & 0x7FFF) }
func (i itemID) flags() int { return int(i>>15) & 3 }
func (i itemID) len() int   { return int(i >> 17) }

func linePos(n int) int { return headerSize + (n-1)*itemIDSize }

// rawItem and setItem take offset numbers that are known to be on the page.
func (p page) rawItem(n int) itemID       { return itemID(le.Uint32(p[linePos(n):])) }
func (p page) setItem(n int, item itemID) { le.PutUint32(p[linePos(n):], uint32(item)) }

// item is the line pointer with offset number n (they count from 1).
func (p page) item(n int) (itemID, error) {
	if n < 1 || n > p.maxOffset() {
		return 0, fmt.Errorf("offset number %d: the page has %d line pointers", n, p.maxOffset())
	}
	return p.rawItem(n), nil
}

// storage is the bytes that a line pointer points to, checked to lie in the
// tuple area.
func (p page) storage(item itemID) ([]byte, error) {
	off, n := item.off(), item.len()
	if off < p.upper() || n == 0 || off+n > p.special() {
		return nil, fmt.Errorf("corrupt line pointer: offset %d, length %d, upper %d, special %d",
			off, n, p.upper(), p.special())
	}
	return p[off : off+n : off+n], nil
}

// indexTuple is the tuple at offset number n of an index page. In a btree an
// LP_DEAD line pointer keeps its storage: deadness is a hint there.
func (p page) indexTuple(n int) ([]byte, error) {
	item, err := p.item(n)
	if err != nil {
		return nil, err
	}
	t, err := p.storage(item)
	if err != nil {
		return nil, fmt.Errorf("offset number %d: %w", n, err)
	}
	if len(t) < indexTupleHeader {
		return nil, fmt.Errorf("offset number %d: index tuple of %d bytes is shorter than its header", n, len(t))
	}
	return t, nil
}

// How addItem treats an offset number that is in use, and which limits hold.
const (
	addIndex = iota // line pointers from there on shift up by one
	addHeap         // it must be an unused line pointer; MaxHeapTuplesPerPage holds
	addFree         // it must be an unused line pointer
)

// addItem puts a tuple at offset number n (PageAddItemExtended with a given offset).
func (p page) addItem(tuple []byte, n, mode int) error {
	limit := p.maxOffset() + 1
	if n < 1 || n > limit {
		return fmt.Errorf("cannot add an item at offset number %d: the first free one is %d", n, limit)
	}
	if mode == addHeap && n > maxHeapTuples {
		return fmt.Errorf("offset number %d is above MaxHeapTuplesPerPage", n)
	}
	if mode != addIndex && n < limit {
		if item := p.rawItem(n); item.flags() != lpUnused || item.len() != 0 {
			return fmt.Errorf("offset number %d is in use already", n)
		}
	}
	shuffle := mode == addIndex && n < limit
	lower := p.lower()
	if n == limit || shuffle {
		lower += itemIDSize
	}
	upper := p.upper() - align8(len(tuple))
	if lower > upper {
		return fmt.Errorf("no room for an item of %d bytes: lower %d, upper %d", len(tuple), p.lower(), p.upper())
	}
	if shuffle {
		copy(p[linePos(n+1):lower], p[linePos(n):p.lower()])
	}
	p.setItem(n, makeItem(upper, lpNormal, len(tuple)))
	copy(p[upper:], tuple)
	p.setLower(lower)
	p.setUpper(upper)
	return nil
}

// place is a tuple that compact keeps: the line pointer it belongs to, where it
// is, and the space it takes.
type place struct{ n, off, size uint16 }

// compact moves the kept tuples to the end of the page, the first one highest
// (compactify_tuples), and fixes their line pointers.
func (p page) compact(keep []place) error {
	total := 0
	for _, k := range keep {
		total += int(k.size)
	}
	upper := p.special()
	if total > upper-p.lower() {
		return fmt.Errorf("corrupt item lengths: %d bytes in total, %d available", total, upper-p.lower())
	}
	for len(keep) > 0 && int(keep[0].off+keep[0].size) == upper { // it is where it belongs
		upper = int(keep[0].off)
		keep = keep[1:]
	}
	if len(keep) > 0 {
		upper = p.move(keep, upper)
	}
	p.setUpper(upper)
	return nil
}

// move puts the tuples one below the other, the first one below end, and gives where the last
// begins.
func (p page) move(keep []place, end int) int {
	var old [pg.BlockSize]byte
	copy(old[p.upper():p.special()], p[p.upper():p.special()])
	for _, k := range keep {
		size := int(k.size)
		end -= size
		copy(p[end:end+size], old[k.off:int(k.off)+size])
		item := p.rawItem(int(k.n))
		p.setItem(int(k.n), makeItem(end, item.flags(), item.len()))
	}
	return end
}

// repairFragmentation closes the holes that pruned tuples left and drops unused
// line pointers at the end (PageRepairFragmentation).
func (p page) repairFragmentation() error {
	var room [maxHeapTuples]place // more would be allocated
	keep, last, unused := room[:0], 0, 0
	nline, upper, special := p.maxOffset(), p.upper(), p.special()
	for n := 1; n <= nline; n++ {
		item := p.rawItem(n)
		if item.flags() == lpUnused {
			p.setItem(n, 0)
			unused++
			continue
		}
		last = n
		if item.len() == 0 {
			continue
		}
		size := align8(item.len())
		if item.off() < upper || item.off()+size > special {
			return fmt.Errorf("offset number %d: corrupt line pointer %d+%d", n, item.off(), item.len())
		}
		keep = append(keep, place{uint16(n), uint16(item.off()), uint16(size)})
	}
	if err := p.compact(keep); err != nil {
		return err
	}
	unused -= nline - last
	p.setLower(p.lower() - (nline-last)*itemIDSize)
	p.setFreeLines(unused > 0)
	return nil
}

func (p page) setFreeLines(on bool) {
	if on {
		p.setFlag(pdHasFreeLines)
	} else {
		p.clearFlag(pdHasFreeLines)
	}
}

// truncateLines drops unused line pointers at the end, all but the first one
// (PageTruncateLinePointerArray).
func (p page) truncateLines() {
	n := p.maxOffset()
	for n > 1 && p.rawItem(n).flags() == lpUnused {
		n--
	}
	p.setLower(headerSize + n*itemIDSize)
	free := false
	for i := n; i >= 1 && !free; i-- {
		free = p.rawItem(i).flags() == lpUnused
	}
	p.setFreeLines(free)
}

// freeSpace is what a new item could use, its line pointer taken off (PageGetFreeSpace).
func (p page) freeSpace() int { return max(0, p.upper()-p.lower()-itemIDSize) }

// heapFreeSpace is freeSpace, or zero if the page can take no more line pointers
// (PageGetHeapFreeSpace).
func (p page) heapFreeSpace() int {
	space, n := p.freeSpace(), p.maxOffset()
	if space == 0 || n < maxHeapTuples {
		return space
	}
	if p.flags()&pdHasFreeLines != 0 {
		for i := 1; i <= n; i++ {
			if p.rawItem(i).flags() == lpUnused {
				return space
			}
		}
	}
	return 0
}
