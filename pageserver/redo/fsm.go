package redo

import (
	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/internal/walrec"
)

// A free space map page holds a binary tree of one-byte categories after a 4-byte
// search hint; a parent is the larger of its children (fsm_internals.h).
const (
	fsmNodesAt   = headerSize + 4
	fsmNodes     = pg.BlockSize - fsmNodesAt // NodesPerPage
	fsmInner     = pg.BlockSize/2 - 1        // NonLeafNodesPerPage
	fsmSlots     = fsmNodes - fsmInner       // SlotsPerFSMPage, 4069
	fsmTreeDepth = 3
	fsmCatStep   = pg.BlockSize / 256
)

// FSMLocation is the bottom-level free space map block and the slot in it that
// tell a heap block's free space (fsm_get_location, fsm_logical_to_physical).
func FSMLocation(heap pg.BlockNumber) (block pg.BlockNumber, slot int) {
	leaf := uint64(heap) / fsmSlots
	pages := uint64(0)
	for range fsmTreeDepth {
		pages += leaf + 1
		leaf /= fsmSlots
	}
	return pg.BlockNumber(pages - 1), int(heap % fsmSlots)
}

// FreeSpaceAfter tells what recovery records in the free space map for rec, given
// the heap page as it is after rec: how many bytes are free on which block. ok is
// false if rec does not make recovery look at this block's free space. blk is the
// reference in rec whose page heapPage is.
//
// It is what a standby does, for tests that compare with one. The page server does
// better (package pageread); it needs FreeSpaceBlock only.
func FreeSpaceAfter(rec *walrec.Record, blk *walrec.Block, heapPage []byte) (free int, ok bool) {
	if len(heapPage) != pg.BlockSize || blk == nil || blk.Rel.Fork != pg.MainFork || page(heapPage).sane() != nil {
		return 0, false
	}
	p := page(heapPage)
	free = p.heapFreeSpace()
	small := !blk.ApplyImage && free < pg.BlockSize/5
	kind := rec.Info & heapOpMask
	switch {
	case blk.ID == 0 && rec.RmID == rmHeap && (kind == heapInsert || kind == heapUpdate),
		blk.ID == 0 && rec.RmID == rmHeap2 && kind == heap2MultiInsert:
		return free, small
	case blk.ID == 0 && rec.RmID == rmHeap2 && (kind == heap2Prune || kind == heap2Vacuum):
		return free, true
	case blk.ID == 1 && rec.RmID == rmHeap2 && kind == heap2Visible:
		x, err := parseVisible(rec.MainData)
		return p.freeSpace(), err == nil && x.flags&vmValidBits != 0
	}
	return 0, false
}

// SetFreeSpace stores a heap block's free bytes in its slot of a bottom-level map
// page (XLogRecordPageWithFreeSpace, fsm_set_avail).
func SetFreeSpace(p []byte, slot, free int) error {
	if len(p) != pg.BlockSize {
		return errPageSize
	}
	if slot < 0 || slot >= fsmSlots {
		return errUnusedRef
	}
	if page(p).isNew() {
		page(p).init(0)
	}
	nodes := p[fsmNodesAt:]
	value := fsmCategory(free)
	n := fsmInner + slot
	if nodes[n] == value && value <= nodes[0] {
		return nil
	}
	nodes[n] = value
	for n > 0 {
		n = (n - 1) / 2
		v := fsmLarger(nodes, n)
		if nodes[n] == v {
			break
		}
		nodes[n] = v
	}
	if value > nodes[0] {
		fsmRebuild(nodes)
	}
	return nil
}

// fsmCategory is fsm_space_avail_to_cat: steps of 32 bytes, 255 for a page that
// can take the largest tuple.
func fsmCategory(free int) byte {
	if free >= maxHeapTupleSize {
		return 255
	}
	return byte(min(max(free, 0)/fsmCatStep, 254))
}

// fsmLarger is the larger of a node's children; the last inner nodes may have none.
func fsmLarger(nodes []byte, n int) (v byte) {
	for child := 2*n + 1; child <= 2*n+2 && child < fsmNodes; child++ {
		v = max(v, nodes[child])
	}
	return v
}

func fsmRebuild(nodes []byte) {
	for n := fsmInner - 1; n >= 0; n-- {
		nodes[n] = fsmLarger(nodes, n)
	}
}

// TruncateFSM empties the slots that a bottom-level map block holds for heap blocks
// from number heap on (FreeSpaceMapPrepareTruncateRel). Blocks wholly beyond are
// dropped by the caller. Upper levels are left to PostgreSQL, which corrects them
// when a search finds them wrong.
func TruncateFSM(p []byte, block, heap pg.BlockNumber) error {
	if len(p) != pg.BlockSize {
		return errPageSize
	}
	last, slot := FSMLocation(heap)
	if page(p).isNew() || block != last {
		return nil
	}
	nodes := p[fsmNodesAt:]
	clear(nodes[fsmInner+slot:])
	fsmRebuild(nodes)
	return nil
}
