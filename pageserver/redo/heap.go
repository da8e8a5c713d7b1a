package redo

import (
	"errors"
	"fmt"
)

// Record kinds of the heap resource manager (heapam_xlog.h).
const (
	heapInsert    = 0x00
	heapDelete    = 0x10
	heapUpdate    = 0x20
	heapTruncate  = 0x30
	heapHotUpdate = 0x40
	heapConfirm   = 0x50
	heapLock      = 0x60
	heapInplace   = 0x70
	heapOpMask    = 0x70
	heapInitPage  = 0x80 // the page is made anew before the tuple goes in
)

// Flags of the records.
const (
	insertAllVisibleCleared = 1 << 0
	insertAllFrozenSet      = 1 << 5

	updateOldAllVisibleCleared = 1 << 0
	updateNewAllVisibleCleared = 1 << 1
	updatePrefixFromOld        = 1 << 5
	updateSuffixFromOld        = 1 << 6

	deleteAllVisibleCleared = 1 << 0
	deleteIsSuper           = 1 << 3
	deleteIsPartitionMove   = 1 << 4

	lockAllFrozenCleared = 1 << 0
)

// What ctid says of a row that an UPDATE moved to another partition (itemptr.h).
const (
	movedPartitionsBlock  = 0xFFFFFFFF
	movedPartitionsOffset = 0xFFFD
)

// redoHeap is heap_redo for one block (heapam.c).
func redoHeap(o *op) error {
	switch o.rec.Info & heapOpMask {
	case heapInsert:
		return o.heapInsert()
	case heapDelete:
		return o.heapDelete()
	case heapUpdate, heapHotUpdate:
		return o.heapUpdate()
	case heapConfirm:
		return o.heapConfirm()
	case heapLock:
		return o.heapLock()
	case heapInplace:
		return o.heapInplace()
	}
	return errNoBlocks
}

// xlHeapInsert is xl_heap_insert.
type xlHeapInsert struct {
	off   uint16
	flags uint8
}

func parseHeapInsert(data []byte) (x xlHeapInsert, err error) {
	c := cursor{b: data}
	x = xlHeapInsert{c.u16(), c.u8()}
	return x, c.err()
}

func (o *op) heapInsert() error {
	x, err := parseHeapInsert(o.rec.MainData)
	if err != nil {
		return err
	}
	if err := o.initHeapPage(); err != nil {
		return err
	}
	var buf tupleBuffer
	c := cursor{b: o.blk.Data}
	t, err := buf.start(&c)
	if err != nil {
		return err
	}
	if t, err = buf.append(t, c.b); err != nil {
		return err
	}
	o.finishTuple(t, x.off)
	if err := o.page.addItem(t, int(x.off), addHeap); err != nil {
		return err
	}
	if x.flags&insertAllVisibleCleared != 0 {
		o.page.clearFlag(pdAllVisible)
	}
	return o.done()
}

// tupleBuffer is room to put a heap tuple together.
type tupleBuffer [maxHeapTupleSize]byte

// start reads an xl_heap_header and gives a tuple that is a header only.
func (b *tupleBuffer) start(c *cursor) (heapTuple, error) {
	infomask2, infomask, hoff := c.u16(), c.u16(), c.u8()
	if err := c.err(); err != nil {
		return nil, err
	}
	t := heapTuple(b[:tupHeader])
	t.setInfomask2(infomask2)
	t.setInfomask(infomask)
	t[tupHoff] = hoff
	return t, nil
}

// append adds bytes to a tuple that lies in b.
func (b *tupleBuffer) append(t heapTuple, data []byte) (heapTuple, error) {
	if len(t)+len(data) > len(b) {
		return nil, fmt.Errorf("a tuple of more than %d bytes", len(b))
	}
	return append(t, data...), nil
}

// finishTuple sets what the header of a new tuple gets from the record itself.
func (o *op) finishTuple(t heapTuple, n uint16) {
	t.setXmin(uint32(o.rec.Xid))
	t.setCid()
	t.setCtid(o.block(), n)
}

// initHeapPage makes the page anew if the record says so.
func (o *op) initHeapPage() error {
	if o.rec.Info&heapInitPage != 0 {
		o.page.init(0)
		return nil
	}
	return o.existing()
}

type xlHeapDelete struct {
	xmax     uint32
	off      uint16
	infobits uint8
	flags    uint8
}

func parseHeapDelete(data []byte) (x xlHeapDelete, err error) {
	c := cursor{b: data}
	x = xlHeapDelete{c.u32(), c.u16(), c.u8(), c.u8()}
	return x, c.err()
}

func (o *op) heapDelete() error {
	x, err := parseHeapDelete(o.rec.MainData)
	if err != nil {
		return err
	}
	t, err := o.existingTuple(x.off)
	if err != nil {
		return err
	}
	t.setXmaxState(x.infobits)
	t.setInfomask2(t.infomask2() &^ hotUpdated)
	if x.flags&deleteIsSuper != 0 {
		t.setXmin(0)
	} else {
		t.setXmax(x.xmax)
	}
	t.setCid()
	if x.flags&deleteIsPartitionMove != 0 {
		t.setCtid(movedPartitionsBlock, movedPartitionsOffset)
	} else {
		t.setCtid(o.block(), x.off)
	}
	o.page.setPrunable(uint32(o.rec.Xid))
	if x.flags&deleteAllVisibleCleared != 0 {
		o.page.clearFlag(pdAllVisible)
	}
	return o.done()
}

// existingTuple is a tuple of a page that the record expects to exist.
func (o *op) existingTuple(n uint16) (heapTuple, error) {
	if err := o.existing(); err != nil {
		return nil, err
	}
	return o.page.heapTuple(int(n))
}

// xlHeapUpdate is xl_heap_update.
type xlHeapUpdate struct {
	oldXmax     uint32
	oldOff      uint16
	oldInfobits uint8
	flags       uint8
	newXmax     uint32
	newOff      uint16
}

func parseHeapUpdate(data []byte) (x xlHeapUpdate, err error) {
	c := cursor{b: data}
	x = xlHeapUpdate{c.u32(), c.u16(), c.u8(), c.u8(), c.u32(), c.u16()}
	return x, c.err()
}

// heapUpdate plays the part of an UPDATE that concerns this block: block 0 gets
// the new tuple, block 1, if there is one, has the old tuple; else both are in 0.
func (o *op) heapUpdate() error {
	x, err := parseHeapUpdate(o.rec.MainData)
	if err != nil {
		return err
	}
	newBlk, oldBlk := o.rec.Block(0), o.rec.Block(1)
	if newBlk == nil {
		return errors.New("an update without block 0")
	}
	var old heapTuple
	if oldBlk == nil || o.blk.ID == 1 {
		if old, err = o.updateOld(x, uint32(newBlk.Block)); err != nil {
			return err
		}
	}
	switch {
	case o.blk.ID == 1:
		return o.done()
	case o.blk.ID != 0:
		return errUnusedRef
	case oldBlk != nil:
		if err := o.initHeapPage(); err != nil {
			return err
		}
	}
	return o.updateNew(x, old)
}

func (o *op) updateOld(x xlHeapUpdate, newBlock uint32) (heapTuple, error) {
	old, err := o.existingTuple(x.oldOff)
	if err != nil {
		return nil, err
	}
	old.setXmaxState(x.oldInfobits)
	mask2 := old.infomask2() &^ hotUpdated
	if o.rec.Info&heapOpMask == heapHotUpdate {
		mask2 |= hotUpdated
	}
	old.setInfomask2(mask2)
	old.setXmax(x.oldXmax)
	old.setCid()
	old.setCtid(newBlock, x.newOff)
	o.page.setPrunable(uint32(o.rec.Xid))
	if x.flags&updateOldAllVisibleCleared != 0 {
		o.page.clearFlag(pdAllVisible)
	}
	return old, nil
}

// updateNew adds the new tuple. Its data may leave out what it has in common with
// the old tuple at the start or the end; that is done on one page only.
func (o *op) updateNew(x xlHeapUpdate, old heapTuple) error {
	c := cursor{b: o.blk.Data}
	var prefix, suffix []byte
	var err error
	if x.flags&updatePrefixFromOld != 0 {
		if prefix, err = old.part(int(c.u16()), false); err != nil {
			return err
		}
	}
	if x.flags&updateSuffixFromOld != 0 {
		if suffix, err = old.part(int(c.u16()), true); err != nil {
			return err
		}
	}
	var buf tupleBuffer
	t, err := buf.start(&c)
	if err != nil {
		return err
	}
	if len(prefix) > 0 { // null bitmap and padding come before the prefix
		if t, err = buf.append(t, c.take(t.hoff()-tupHeader)); err == nil {
			t, err = buf.append(t, prefix)
		}
		if err != nil || c.short {
			return errors.Join(err, c.err())
		}
	}
	for _, b := range [][]byte{c.b, suffix} {
		if t, err = buf.append(t, b); err != nil {
			return err
		}
	}
	o.finishTuple(t, x.newOff)
	t.setXmax(x.newXmax)
	if err := o.page.addItem(t, int(x.newOff), addHeap); err != nil {
		return err
	}
	if x.flags&updateNewAllVisibleCleared != 0 {
		o.page.clearFlag(pdAllVisible)
	}
	return o.done()
}

// part is the first or last n bytes of a tuple's data.
func (t heapTuple) part(n int, last bool) ([]byte, error) {
	if t == nil {
		return nil, errors.New("an update across two blocks shares bytes with the old tuple")
	}
	if t.hoff() < tupHeader || t.hoff()+n > len(t) {
		return nil, fmt.Errorf("the old tuple of %d bytes with header %d has no %d bytes to share", len(t), t.hoff(), n)
	}
	if last {
		return t[len(t)-n:], nil
	}
	return t[t.hoff() : t.hoff()+n], nil
}

func (o *op) heapConfirm() error {
	c := cursor{b: o.rec.MainData}
	n := c.u16()
	if err := c.err(); err != nil {
		return err
	}
	t, err := o.existingTuple(n)
	if err != nil {
		return err
	}
	t.setCtid(o.block(), n)
	return o.done()
}

// xlHeapLock is xl_heap_lock and xl_heap_lock_updated: the same fields.
type xlHeapLock struct {
	xmax     uint32
	off      uint16
	infobits uint8
	flags    uint8
}

func parseHeapLock(data []byte) (x xlHeapLock, err error) {
	c := cursor{b: data}
	x = xlHeapLock{c.u32(), c.u16(), c.u8(), c.u8()}
	return x, c.err()
}

func (o *op) heapLock() error {
	x, err := parseHeapLock(o.rec.MainData)
	if err != nil {
		return err
	}
	t, err := o.existingTuple(x.off)
	if err != nil {
		return err
	}
	t.setXmaxState(x.infobits)
	if t.lockedOnly() { // no newer version: the update chain ends here
		t.setInfomask2(t.infomask2() &^ hotUpdated)
		t.setCtid(o.block(), x.off)
	}
	t.setXmax(x.xmax)
	t.setCid()
	return o.done()
}

func (o *op) heapInplace() error {
	c := cursor{b: o.rec.MainData}
	n := c.u16()
	if err := c.err(); err != nil {
		return err
	}
	t, err := o.existingTuple(n)
	if err != nil {
		return err
	}
	if t.hoff()+len(o.blk.Data) != len(t) {
		return fmt.Errorf("a tuple of %d bytes with header %d cannot be overwritten by %d bytes", len(t), t.hoff(), len(o.blk.Data))
	}
	copy(t[t.hoff():], o.blk.Data)
	return o.done()
}
