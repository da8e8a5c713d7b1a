package redo

import "fmt"

// spgAddLeaf adds a leaf tuple to a page (block 0), and to its parent's node (block 1)
// if it begins a chain.
func (o *op) spgAddLeaf() error {
	c := cursor{b: o.rec.MainData}
	newPage, nulls := c.u8() != 0, c.u8() != 0
	leaf, head, parent, node := int(c.u16()), int(c.u16()), int(c.u16()), int(c.u16())
	if err := c.err(); err != nil {
		return err
	}
	switch {
	case o.blk.ID == 0:
		tuple, err := c.spgLeafTuple()
		if err != nil {
			return err
		}
		q, err := o.spgTarget(newPage, spgFlagLeaf|spgNulls(nulls))
		if err != nil {
			return err
		}
		if leaf == head { // a dead one, which had to stay as the chain's head
			err = o.page.spgReplace(tuple, leaf)
		} else if err = o.page.spgPut(q, tuple, leaf); err == nil && head != 0 {
			err = o.page.spgSetNext(head, leaf)
		}
		if err != nil {
			return err
		}
		return o.done()
	case o.blk.ID == 1 && parent != 0:
		return o.spgDownlink(parent, node, 0, uint16(leaf))
	}
	return errUnusedRef
}

// spgDownlink is all that a record does to its parent page: a node gets the link to a
// tuple on the block with reference target.
func (o *op) spgDownlink(parent, node int, target uint8, offset uint16) error {
	block, err := o.spgBlock(target)
	if err != nil {
		return err
	}
	if _, err := o.spgExisting(); err != nil {
		return err
	}
	if err := o.page.spgLink(parent, node, block, offset); err != nil {
		return err
	}
	return o.done()
}

// spgMoveLeafs moves a chain with a new tuple from one leaf page (block 0) to another
// (block 1) and corrects the parent's node (block 2).
func (o *op) spgMoveLeafs() error {
	c := cursor{b: o.rec.MainData}
	nmoves := int(c.u16())
	newPage, replaceDead, nulls := c.u8() != 0, c.u8() != 0, c.u8() != 0
	c.take(1) // padding
	parent, node := int(c.u16()), int(c.u16())
	c.take(2) // padding
	state := c.spgState()
	ninsert := nmoves + 1
	if replaceDead {
		ninsert = 1
	}
	var droom, iroom [maxItems]uint16
	deleted, inserted := c.u16s(nmoves, droom[:0]), c.u16s(ninsert, iroom[:0])
	if err := c.err(); err != nil {
		return err
	}
	head := inserted[ninsert-1]
	switch o.blk.ID {
	case 0:
		block, err := o.spgBlock(1)
		if err != nil {
			return err
		}
		q, err := o.spgExisting()
		if err != nil {
			return err
		}
		if err := o.page.spgBury(q, deleted, state.moved(block, head)); err != nil {
			return err
		}
		return o.done()
	case 1:
		q, err := o.spgTarget(newPage, spgFlagLeaf|spgNulls(nulls))
		if err != nil {
			return err
		}
		for _, n := range inserted {
			tuple, err := c.spgLeafTuple()
			if err != nil {
				return err
			}
			if err := o.page.spgPut(q, tuple, int(n)); err != nil {
				return err
			}
		}
		return o.done()
	case 2:
		return o.spgDownlink(parent, node, 1, head)
	}
	return errUnusedRef
}

// spgAddNode replaces an inner tuple (block 0) by one with another node. If it has to
// go to another page (block 1), its parent's node follows: that is on one of the two
// pages or a third one (block 2).
func (o *op) spgAddNode() error {
	c := cursor{b: o.rec.MainData}
	old, added := int(c.u16()), c.u16()
	newPage, parentRef := c.u8() != 0, c.u8() // -1: no parent to correct
	parent, node := int(c.u16()), int(c.u16())
	c.take(2) // padding
	state := c.spgState()
	tuple, err := c.spgInnerTuple()
	if err != nil {
		return err
	}
	if o.blk.ID == 2 && parentRef == 2 {
		return o.spgDownlink(parent, node, 1, added)
	}
	q, err := o.spgTarget(o.blk.ID == 1 && newPage, 0)
	if err != nil {
		return err
	}
	to := o.rec.Block(1)
	switch {
	case o.blk.ID == 0 && to == nil:
		if err := o.page.spgReplace(tuple, old); err != nil {
			return err
		}
		return o.done()
	case o.blk.ID == 0:
		g := state.moved(uint32(to.Block), added)
		dead := spgDeadTuple(g.first, state, g.block, g.offset)
		if err := o.page.spgReplace(dead[:], old); err != nil {
			return err
		}
		q.spgCount(g.first)
	case o.blk.ID == 1:
		if err := o.page.spgPut(q, tuple, int(added)); err != nil {
			return err
		}
	default:
		return errUnusedRef
	}
	if parentRef == o.blk.ID {
		return o.spgDownlink(parent, node, 1, added)
	}
	return o.done()
}

// spgSplitTuple replaces an inner tuple (block 0) by one with a shorter prefix, and
// adds one with the rest of the prefix, there or on another page (block 1).
func (o *op) spgSplitTuple() error {
	c := cursor{b: o.rec.MainData}
	prefixAt, postfixAt := int(c.u16()), int(c.u16())
	newPage, same := c.u8() != 0, c.u8() != 0
	prefix, err := c.spgInnerTuple()
	if err != nil {
		return err
	}
	postfix, err := c.spgInnerTuple()
	if err != nil {
		return err
	}
	if o.blk.ID > 1 || o.blk.ID == 1 && same {
		return errUnusedRef
	}
	q, err := o.spgTarget(o.blk.ID == 1 && newPage, 0)
	if err != nil {
		return err
	}
	if o.blk.ID == 0 {
		if err := o.page.spgReplace(prefix, prefixAt); err != nil {
			return err
		}
	}
	if o.blk.ID == 1 || same {
		if err := o.page.spgPut(q, postfix, postfixAt); err != nil {
			return err
		}
	}
	return o.done()
}

// xlPickSplit is spgxlogPickSplit with what follows it.
type xlPickSplit struct {
	rootSplit, initSrc, initDest, initInner, nulls, innerIsParent bool

	inner        uint16
	parent, node int
	state        spgState
	deleted      []uint16
	inserted     []uint16
	onDest       []byte // for each inserted tuple: does it go to the destination page?
	tuple        []byte // the new inner tuple
	leaves       cursor
}

func parsePickSplit(data []byte) (x xlPickSplit, err error) {
	c := cursor{b: data}
	x.rootSplit = c.u8() != 0
	c.take(1) // padding
	ndelete, ninsert := int(c.u16()), int(c.u16())
	x.initSrc, x.initDest = c.u8() != 0, c.u8() != 0
	x.inner = c.u16()
	x.initInner, x.nulls, x.innerIsParent = c.u8() != 0, c.u8() != 0, c.u8() != 0
	c.take(1) // padding
	x.parent, x.node = int(c.u16()), int(c.u16())
	c.take(2) // padding
	x.state = c.spgState()
	x.deleted = c.u16s(ndelete, nil)
	x.inserted = c.u16s(ninsert, nil)
	x.onDest = c.take(ninsert)
	if err := c.err(); err != nil {
		return x, err
	}
	x.tuple, err = c.spgInnerTuple()
	x.leaves = c
	return x, err
}

// spgPickSplit makes a new inner tuple (on block 2) of a chain of leaf tuples, and
// spreads these over the page where they were (block 0, unless it is the root, which
// becomes the inner page) and another one (block 1). The parent's node that leads to
// them is on the inner page or on block 3.
func (o *op) spgPickSplit() error {
	x, err := parsePickSplit(o.rec.MainData)
	if err != nil {
		return err
	}
	leaf := spgFlagLeaf | spgNulls(x.nulls)
	switch {
	case o.blk.ID == 0 && !x.rootSplit:
		q, err := o.spgTarget(x.initSrc, leaf)
		if err != nil {
			return err
		}
		if !x.initSrc {
			block, err := o.spgBlock(2)
			if err != nil {
				return err
			}
			if err := o.page.spgBury(q, x.deleted, x.state.moved(block, x.inner)); err != nil {
				return err
			}
		}
		return o.spgSpread(&x, q, false)
	case o.blk.ID == 1:
		q, err := o.spgTarget(x.initDest, leaf)
		if err != nil {
			return err
		}
		return o.spgSpread(&x, q, true)
	case o.blk.ID == 2:
		q, err := o.spgTarget(x.initInner, spgNulls(x.nulls))
		if err != nil {
			return err
		}
		if err := o.page.spgPut(q, x.tuple, int(x.inner)); err != nil {
			return err
		}
		if x.innerIsParent {
			return o.spgDownlink(x.parent, x.node, 2, x.inner)
		}
		return o.done()
	case o.blk.ID == 3:
		return o.spgDownlink(x.parent, x.node, 2, x.inner)
	}
	return errUnusedRef
}

// spgSpread adds the leaf tuples that belong to this page.
func (o *op) spgSpread(x *xlPickSplit, q spgOpaque, dest bool) error {
	for i, n := range x.inserted {
		tuple, err := x.leaves.spgLeafTuple()
		if err != nil {
			return fmt.Errorf("leaf tuple %d of %d: %w", i+1, len(x.inserted), err)
		}
		if (x.onDest[i] != 0) != dest {
			continue
		}
		if err := o.page.spgPut(q, tuple, int(n)); err != nil {
			return err
		}
	}
	return o.done()
}
