package redo

import "fmt"

// Record kinds of heap's second resource manager (heapam_xlog.h).
const (
	heap2Rewrite     = 0x00
	heap2Prune       = 0x10
	heap2Vacuum      = 0x20
	heap2FreezePage  = 0x30
	heap2Visible     = 0x40
	heap2MultiInsert = 0x50
	heap2LockUpdated = 0x60
	heap2NewCid      = 0x70
)

// redoHeap2 is heap2_redo for one block (heapam.c). REWRITE and NEW_CID concern
// no page.
func redoHeap2(o *op) error {
	switch o.rec.Info & heapOpMask {
	case heap2Prune:
		return o.heapPrune()
	case heap2Vacuum:
		return o.heapVacuum()
	case heap2FreezePage:
		return o.heapFreeze()
	case heap2Visible:
		return o.heapVisible()
	case heap2MultiInsert:
		return o.heapMultiInsert()
	case heap2LockUpdated:
		return o.heapLockUpdated()
	}
	return errNoBlocks
}

// heapPrune redirects, kills and frees line pointers and closes the gaps
// (heap_page_prune_execute). Block data: pairs for redirections, then the now
// dead, then the now unused.
func (o *op) heapPrune() error {
	c := cursor{b: o.rec.MainData}
	c.u32() // latestRemovedXid: for standbys
	redirected, dead := int(c.u16()), int(c.u16())
	if err := c.err(); err != nil {
		return err
	}
	if err := o.existing(); err != nil {
		return err
	}
	c = cursor{b: o.blk.Data}
	for range redirected {
		from, to := int(c.u16()), int(c.u16())
		if to < 1 || to > o.page.maxOffset() {
			return fmt.Errorf("redirection to offset number %d of %d", to, o.page.maxOffset())
		}
		if err := o.markItem(from, makeItem(to, lpRedirect, 0)); err != nil {
			return err
		}
	}
	for range dead {
		if err := o.markItem(int(c.u16()), makeItem(0, lpDead, 0)); err != nil {
			return err
		}
	}
	for len(c.b) >= 2 {
		if err := o.markItem(int(c.u16()), 0); err != nil {
			return err
		}
	}
	if err := c.err(); err != nil {
		return err
	}
	if err := o.page.repairFragmentation(); err != nil {
		return err
	}
	return o.done()
}

func (o *op) markItem(n int, item itemID) error {
	if _, err := o.page.item(n); err != nil {
		return err
	}
	o.page.setItem(n, item)
	return nil
}

// heapVacuum frees dead line pointers that no index refers to any more.
func (o *op) heapVacuum() error {
	c := cursor{b: o.rec.MainData}
	unused := int(c.u16())
	if err := c.err(); err != nil {
		return err
	}
	if err := o.existing(); err != nil {
		return err
	}
	c = cursor{b: o.blk.Data}
	for range unused {
		n := int(c.u16())
		item, err := o.page.item(n)
		if err != nil {
			return err
		}
		if item.flags() != lpDead || item.len() != 0 {
			return fmt.Errorf("vacuum frees offset number %d, which is not dead without storage", n)
		}
		o.page.setItem(n, 0)
	}
	if err := c.err(); err != nil {
		return err
	}
	o.page.truncateLines()
	return o.done()
}

// Flags of a frozen tuple (heapam_xlog.h); xl_heap_freeze_tuple is 12 bytes with
// its padding.
const (
	freezeXvac     = 0x02
	invalidateXvac = 0x04
	frozenXid      = 2
)

func (o *op) heapFreeze() error {
	c := cursor{b: o.rec.MainData}
	c.u32() // cutoff_xid: for standbys
	ntuples := int(c.u16())
	if err := c.err(); err != nil {
		return err
	}
	if err := o.existing(); err != nil {
		return err
	}
	c = cursor{b: o.blk.Data}
	for range ntuples {
		xmax, off, mask2, mask, flags := c.u32(), c.u16(), c.u16(), c.u16(), c.u8()
		c.take(1) // padding
		if err := c.err(); err != nil {
			return err
		}
		t, err := o.page.heapTuple(int(off))
		if err != nil {
			return err
		}
		t.setXmax(xmax)
		if flags&freezeXvac != 0 {
			t.setXvac(frozenXid)
		}
		if flags&invalidateXvac != 0 {
			t.setXvac(0)
		}
		t.setInfomask(mask)
		t.setInfomask2(mask2)
	}
	return o.done()
}

// heapVisible sets visibility map bits (block 0, the map) and PD_ALL_VISIBLE
// (block 1, the heap). The heap page's LSN stays: PostgreSQL moves it only with
// checksums or wal_log_hints, which Holdfast's computes run without.
func (o *op) heapVisible() error {
	x, err := parseVisible(o.rec.MainData)
	if err != nil {
		return err
	}
	switch o.blk.ID {
	case 0:
		heap := o.rec.Block(1)
		if heap == nil {
			return fmt.Errorf("no heap block is named")
		}
		if o.page.isNew() {
			o.page.init(0)
		}
		return o.setVisible(uint32(heap.Block), x.flags)
	case 1:
		if err := o.existing(); err != nil {
			return err
		}
		o.page.setFlag(pdAllVisible)
		return nil
	}
	return errUnusedRef
}

type xlVisible struct {
	cutoff uint32
	flags  uint8
}

func parseVisible(data []byte) (x xlVisible, err error) {
	c := cursor{b: data}
	x = xlVisible{c.u32(), c.u8()}
	return x, c.err()
}

func (o *op) heapMultiInsert() error {
	c := cursor{b: o.rec.MainData}
	flags, _, ntuples := c.u8(), c.u8(), int(c.u16())
	if c.short || ntuples > maxHeapTuples {
		return fmt.Errorf("%d tuples in one record: %w", ntuples, errShort)
	}
	if err := o.initHeapPage(); err != nil {
		return err
	}
	var buf tupleBuffer
	data := cursor{b: o.blk.Data}
	for i := range ntuples {
		off := uint16(i + 1)
		if o.rec.Info&heapInitPage == 0 {
			off = c.u16()
		}
		if err := o.insertOne(&buf, &data, off); err != nil {
			return err
		}
	}
	if err := c.err(); err != nil {
		return err
	}
	if len(data.b) != 0 {
		return fmt.Errorf("%d bytes after the last of %d tuples", len(data.b), ntuples)
	}
	if flags&insertAllVisibleCleared != 0 {
		o.page.clearFlag(pdAllVisible)
	}
	if flags&insertAllFrozenSet != 0 {
		o.page.setFlag(pdAllVisible)
	}
	return o.done()
}

// insertOne adds the next xl_multi_insert_tuple; each begins at an even offset.
func (o *op) insertOne(buf *tupleBuffer, data *cursor, off uint16) error {
	if (len(o.blk.Data)-len(data.b))%2 != 0 {
		data.take(1)
	}
	n := int(data.u16())
	t, err := buf.start(data)
	if err != nil {
		return err
	}
	t, err = buf.append(t, data.take(n))
	if err != nil || data.short {
		return fmt.Errorf("tuple of %d bytes: %w", n, errShort)
	}
	clear(t[:tupInfomask2]) // what the tuple before left in the buffer
	o.finishTuple(t, off)
	return o.page.addItem(t, int(off), addHeap)
}

func (o *op) heapLockUpdated() error {
	x, err := parseHeapLock(o.rec.MainData)
	if err != nil {
		return err
	}
	t, err := o.existingTuple(x.off)
	if err != nil {
		return err
	}
	t.setXmaxState(x.infobits)
	t.setXmax(x.xmax)
	return o.done()
}
