package redo

import (
	"fmt"

	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/internal/walrec"
)

// The visibility map has two bits per heap block, after an empty page's header
// (visibilitymap.c).
const (
	vmAllVisible  = 1
	vmAllFrozen   = 2
	vmValidBits   = vmAllVisible | vmAllFrozen
	vmPerByte     = 4
	vmMapSize     = pg.BlockSize - headerSize
	vmHeapPerPage = vmMapSize * vmPerByte
)

// VMBlock is the visibility map block that holds a heap block's bits.
func VMBlock(heap pg.BlockNumber) pg.BlockNumber { return heap / vmHeapPerPage }

// vmPosition is where a heap block's bits are within its map page.
func vmPosition(heap uint32) (at int, shift uint) {
	in := heap % vmHeapPerPage
	return headerSize + int(in/vmPerByte), uint(in%vmPerByte) * 2
}

// A VMClear is the clearing of visibility map bits that a heap record implies.
type VMClear struct {
	Rel  pg.RelFileNode
	Heap pg.BlockNumber
	Bits uint8
}

// ImpliedVM lists the map bits that a heap record clears without naming the map's
// block: for blocks that stop to be all-visible, or for row locks all-frozen.
func ImpliedVM(rec *walrec.Record) ([]VMClear, error) {
	var list []VMClear
	err := impliedVM(rec, func(c VMClear) { list = append(list, c) })
	if err != nil {
		return nil, wrap(rec, "the visibility map", err)
	}
	return list, nil
}

func impliedVM(rec *walrec.Record, emit func(VMClear)) error {
	ref, bits, second, err := vmFlags(rec)
	if err != nil || bits == 0 && second == 0 {
		return err
	}
	for _, c := range [...]struct {
		id   uint8
		bits uint8
	}{{ref, bits}, {0, second}} {
		if c.bits == 0 {
			continue
		}
		b := rec.Block(c.id)
		if b == nil {
			return fmt.Errorf("no block %d, whose map bits are to be cleared", c.id)
		}
		emit(VMClear{b.Rel.RelFileNode, b.Block, c.bits})
	}
	return nil
}

// vmFlags tells which bits are cleared for block reference ref, and which besides
// for block reference 0, the new page of an update.
func vmFlags(rec *walrec.Record) (ref uint8, bits, second uint8, err error) {
	pick := func(flags, flag, value uint8) uint8 {
		if flags&flag != 0 {
			return value
		}
		return 0
	}
	switch kind := rec.Info & heapOpMask; {
	case rec.RmID == rmHeap && kind == heapInsert:
		x, err := parseHeapInsert(rec.MainData)
		return 0, pick(x.flags, insertAllVisibleCleared, vmValidBits), 0, err
	case rec.RmID == rmHeap && kind == heapDelete:
		x, err := parseHeapDelete(rec.MainData)
		return 0, pick(x.flags, deleteAllVisibleCleared, vmValidBits), 0, err
	case rec.RmID == rmHeap && (kind == heapUpdate || kind == heapHotUpdate):
		x, err := parseHeapUpdate(rec.MainData)
		if rec.Block(1) != nil {
			ref = 1
		}
		return ref, pick(x.flags, updateOldAllVisibleCleared, vmValidBits),
			pick(x.flags, updateNewAllVisibleCleared, vmValidBits), err
	case rec.RmID == rmHeap && kind == heapLock, rec.RmID == rmHeap2 && kind == heap2LockUpdated:
		x, err := parseHeapLock(rec.MainData)
		return 0, pick(x.flags, lockAllFrozenCleared, vmAllFrozen), 0, err
	case rec.RmID == rmHeap2 && kind == heap2MultiInsert:
		c := cursor{b: rec.MainData}
		flags := c.u8()
		return 0, pick(flags, insertAllVisibleCleared, vmValidBits), 0, c.err()
	}
	return 0, 0, 0, nil
}

// applyImpliedVM clears bits on a map page; its LSN stays (visibilitymap_clear).
func applyImpliedVM(tag pg.RelTag, block pg.BlockNumber, p page, rec *walrec.Record) error {
	touched := false
	err := impliedVM(rec, func(c VMClear) {
		if c.Rel != tag.RelFileNode || VMBlock(c.Heap) != block {
			return
		}
		touched = true
		if p.isNew() {
			p.init(0)
		}
		at, shift := vmPosition(uint32(c.Heap))
		p[at] &^= c.Bits << shift
	})
	if err == nil && !touched {
		return ErrUntouched
	}
	return err
}

// setVisible sets a heap block's bits on the op's page, the map (visibilitymap_set).
func (o *op) setVisible(heap uint32, flags uint8) error {
	if VMBlock(pg.BlockNumber(heap)) != o.blk.Block {
		return fmt.Errorf("the bits of heap block %d are not on map block %d", heap, o.blk.Block)
	}
	flags &= vmValidBits
	at, shift := vmPosition(heap)
	if o.page[at]>>shift&vmValidBits == flags {
		return nil
	}
	o.page[at] |= flags << shift
	return o.done()
}

// Fields of XLOG_SMGR_TRUNCATE (storage_xlog.h).
const (
	smgrTruncate    = 0x20
	smgrTruncateVM  = 2
	smgrTruncateFSM = 4
)

// applyTruncate clears what a map's last remaining page says of heap blocks that a
// truncation removed.
func applyTruncate(tag pg.RelTag, block pg.BlockNumber, p page, rec *walrec.Record) error {
	if rec.Info&infoMask != smgrTruncate {
		return ErrUntouched
	}
	c := cursor{b: rec.MainData}
	blocks := pg.BlockNumber(c.u32())
	rel := pg.RelFileNode{Tablespace: pg.Oid(c.u32()), Database: pg.Oid(c.u32()), Relation: pg.Oid(c.u32())}
	flags := c.u32()
	if err := c.err(); err != nil {
		return err
	}
	switch {
	case rel != tag.RelFileNode:
	case tag.Fork == pg.VMFork && flags&smgrTruncateVM != 0:
		return TruncateVM(p, block, blocks)
	case tag.Fork == pg.FSMFork && flags&smgrTruncateFSM != 0:
		return TruncateFSM(p, block, blocks)
	}
	return ErrUntouched
}

// TruncateVM clears the bits that block of a visibility map holds for heap blocks
// from number heap on (visibilitymap_prepare_truncate). Blocks wholly beyond are
// dropped by the caller; blocks before stay as they are.
func TruncateVM(p []byte, block, heap pg.BlockNumber) error {
	if len(p) != pg.BlockSize {
		return errPageSize
	}
	if page(p).isNew() || block < VMBlock(heap) {
		return nil
	}
	if block > VMBlock(heap) {
		clear(p[headerSize:])
		return nil
	}
	at, shift := vmPosition(uint32(heap))
	clear(p[at+1:])
	p[at] &= 1<<shift - 1
	return nil
}
