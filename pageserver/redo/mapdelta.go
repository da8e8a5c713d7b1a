package redo

import (
	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/internal/walrec"
)

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

// FreeSpaceBlock is the heap block whose free space recovery may look at after rec, to store
// it in the free space map; nil if there is none.
func FreeSpaceBlock(rec *walrec.Record) *walrec.Block {
	kind := rec.Info & heapOpMask
	switch {
	case rec.RmID == rmHeap && (kind == heapInsert || kind == heapUpdate),
		rec.RmID == rmHeap2 && (kind == heap2MultiInsert || kind == heap2Prune || kind == heap2Vacuum):
		return rec.Block(0)
	case rec.RmID == rmHeap2 && kind == heap2Visible:
		return rec.Block(1)
	}
	return nil
}
