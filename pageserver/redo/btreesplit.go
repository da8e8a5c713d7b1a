package redo

import (
	"fmt"

	"github.com/holdfastdb/holdfast/internal/pg"
)

// Index tuple header (itup.h) and a btree's use of its TID (nbtree.h).
const (
	indexTupleHeader = 8
	tupInfo          = 6 // t_info, after the 6 bytes of t_tid
	indexSizeMask    = 0x1FFF
	altTID           = 0x2000 // t_tid is no heap TID
	btIsPosting      = 0x2000 // in t_tid's offset number
	btOffsetMask     = 0x0FFF
	tidSize          = 6

	// BTMaxItemSizeNoHeapTid: a third of the page, 2712 bytes. Leaf tuples stop 8
	// bytes earlier, to leave room for a heap TID in a pivot made of them.
	maxIndexTuple = (pg.BlockSize - (headerSize+3*itemIDSize+7)&^7 - btOpaqueSize) / 3 &^ 7
)

func indexTupleSize(t []byte) int { return int(le.Uint16(t[tupInfo:]) & indexSizeMask) }

// checkIndexTuple checks that a tuple from a record has the size it says (up to
// its padding) and is not larger than a btree allows.
func checkIndexTuple(t []byte, have int) error {
	if len(t) < indexTupleHeader {
		return errShort
	}
	n := indexTupleSize(t)
	if n < indexTupleHeader || n > have || align8(n) < align8(have) || n > maxIndexTuple {
		return fmt.Errorf("an index tuple of %d bytes in %d bytes of data", n, have)
	}
	return nil
}

// takeIndexTuple reads a tuple with its padding from the start of data.
func takeIndexTuple(c *cursor) ([]byte, error) {
	if len(c.b) < indexTupleHeader {
		return nil, errShort
	}
	n := align8(indexTupleSize(c.b))
	if n < indexTupleHeader || n > maxIndexTuple {
		return nil, fmt.Errorf("an index tuple of %d bytes", n)
	}
	t := c.take(n)
	return t, c.err()
}

// btreeSplit plays the part of a page split that concerns this block: 0 is the
// page that is split, 1 the new right page, 2 the page to the right of that.
func (o *op) btreeSplit() error {
	c := cursor{b: o.rec.MainData}
	x := xlBtreeSplit{c.u32(), int(c.u16()), int(c.u16()), int(c.u16())}
	if err := c.err(); err != nil {
		return err
	}
	orig, right, next := o.rec.Block(0), o.rec.Block(1), o.rec.Block(2)
	if orig == nil || right == nil {
		return fmt.Errorf("a split names its left and its right page")
	}
	leaf := uint16(0)
	if x.level == 0 {
		leaf = btpLeaf
	}
	switch o.blk.ID {
	case 0:
		return o.btreeSplitLeft(x, uint32(right.Block), leaf)
	case 1:
		var nextBlock uint32
		if next != nil {
			nextBlock = uint32(next.Block)
		}
		o.btInit(uint32(orig.Block), nextBlock, x.level, leaf)
		if err := o.page.restorePage(o.blk.Data); err != nil {
			return err
		}
		return o.done()
	case 2:
		q, err := o.btExisting()
		if err != nil {
			return err
		}
		q.setPrev(uint32(right.Block))
		return o.done()
	}
	return errUnusedRef
}

// xlBtreeSplit is xl_btree_split.
type xlBtreeSplit struct {
	level                              uint32
	firstRight, newItemOff, postingOff int
}

// btreeSplitLeft rebuilds the left page in item order, with its new high key and,
// if it belongs there, the new item; a posting list that the new item falls into
// is split on the way.
func (o *op) btreeSplitLeft(x xlBtreeSplit, rightBlock uint32, leaf uint16) error {
	q, err := o.btExisting()
	if err != nil {
		return err
	}
	onLeft := o.rec.Info&infoMask == btreeSplitL
	c := cursor{b: o.blk.Data}
	var newItem, posting []byte
	var itemRoom, postingRoom [maxIndexTuple]byte
	replaceOff := 0
	if onLeft || x.postingOff != 0 {
		t, err := takeIndexTuple(&c)
		if err != nil {
			return fmt.Errorf("new item: %w", err)
		}
		newItem = append(itemRoom[:0], t...)
	}
	if x.postingOff != 0 {
		replaceOff = x.newItemOff - 1
		old, err := o.page.indexTuple(replaceOff)
		if err != nil {
			return err
		}
		if len(old) > maxIndexTuple {
			return fmt.Errorf("a posting list of %d bytes", len(old))
		}
		posting = append(postingRoom[:0], old...)
		if err := swapPosting(newItem, posting, x.postingOff); err != nil {
			return err
		}
	}
	highKey, err := takeIndexTuple(&c)
	if err != nil {
		return fmt.Errorf("high key of the left page: %w", err)
	}
	if len(c.b) != 0 {
		return fmt.Errorf("%d bytes after the left page's high key", len(c.b))
	}

	var room [pg.BlockSize]byte
	left := page(room[:])
	left.initLike(o.page)
	add := func(t []byte) error { return left.addItem(t, left.maxOffset()+1, addIndex) }
	if err := add(highKey); err != nil {
		return err
	}
	off := q.firstDataOffset()
	for ; off < x.firstRight; off++ {
		if posting != nil && off == replaceOff {
			if err := add(posting); err != nil {
				return err
			}
			continue
		}
		if onLeft && off == x.newItemOff {
			if err := add(newItem); err != nil {
				return err
			}
		}
		t, err := o.page.indexTuple(off)
		if err != nil {
			return err
		}
		if err := add(t); err != nil {
			return err
		}
	}
	if onLeft && off == x.newItemOff {
		if err := add(newItem); err != nil {
			return err
		}
	}
	copy(o.page, left)
	q.setFlags(btpIncompleteSplit | leaf)
	q.setNext(rightBlock)
	q.setCycleID(0)
	return o.done()
}

// initLike makes p an empty page with other's special area (PageGetTempPageCopySpecial).
func (p page) initLike(other page) {
	p.init(pg.BlockSize - other.special())
	copy(p[p.special():], other[other.special():])
}
