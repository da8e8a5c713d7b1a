package redo

import "github.com/holdfastdb/holdfast/internal/pg"

// ClearVM clears bits of a heap block on block of a visibility map; the page's LSN stays
// (visibilitymap_clear).
func ClearVM(p []byte, block, heap pg.BlockNumber, bits uint8) error {
	if len(p) != pg.BlockSize {
		return errPageSize
	}
	if VMBlock(heap) != block {
		return ErrUntouched
	}
	if page(p).isNew() {
		page(p).init(0)
	}
	at, shift := vmPosition(uint32(heap))
	p[at] &^= bits & vmValidBits << shift
	return nil
}

// HeapFreeSpace is the room for a new tuple on a heap page, in bytes; a page that cannot be
// judged has none.
func HeapFreeSpace(p []byte) int {
	switch {
	case len(p) != pg.BlockSize:
		return 0
	case page(p).isNew():
		return maxHeapTupleSize
	case page(p).sane() != nil:
		return 0
	}
	return page(p).heapFreeSpace()
}
