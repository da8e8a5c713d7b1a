package redo

import (
	"errors"
	"fmt"
)

// Record kinds of the btree resource manager (nbtxlog.h).
const (
	btreeInsertLeaf   = 0x00
	btreeInsertUpper  = 0x10
	btreeInsertMeta   = 0x20
	btreeSplitL       = 0x30
	btreeSplitR       = 0x40
	btreeInsertPost   = 0x50
	btreeDedup        = 0x60
	btreeDelete       = 0x70
	btreeUnlinkPage   = 0x80
	btreeUnlinkMeta   = 0x90
	btreeNewRoot      = 0xA0
	btreeMarkHalfDead = 0xB0
	btreeVacuum       = 0xC0
	btreeReusePage    = 0xD0
	btreeMetaCleanup  = 0xE0
)

// Layout of a btree page's special area and of its metapage (nbtree.h).
const (
	btOpaqueSize = 16
	btpoPrev     = 0
	btpoNext     = 4
	btpoLevel    = 8
	btpoFlags    = 12
	btpoCycleID  = 14

	btpLeaf            = 1 << 0
	btpRoot            = 1 << 1
	btpDeleted         = 1 << 2
	btpMeta            = 1 << 3
	btpHalfDead        = 1 << 4
	btpSplitEnd        = 1 << 5
	btpHasGarbage      = 1 << 6
	btpIncompleteSplit = 1 << 7
	btpHasFullXid      = 1 << 8

	btreeMagic      = 0x053162
	btreeNoVacVer   = 3
	btreeVersion    = 4
	btMetaSize      = 48
	xlBtreeMetaSize = 28 // xl_btree_metadata with its padding
)

// redoBtree is btree_redo for one block (nbtxlog.c). REUSE_PAGE concerns standbys
// only.
func redoBtree(o *op) error {
	info, id := o.rec.Info&infoMask, o.blk.ID
	switch {
	case info == btreeMetaCleanup && id == 0,
		info == btreeNewRoot && id == 2,
		info == btreeInsertMeta && id == 2,
		info == btreeUnlinkMeta && id == 4:
		return o.btreeMeta()
	case info == btreeNewRoot && id == 1,
		(info == btreeInsertUpper || info == btreeInsertMeta) && id == 1,
		(info == btreeSplitL || info == btreeSplitR) && id == 3:
		return o.btreeClearIncompleteSplit()
	}
	switch info {
	case btreeInsertLeaf, btreeInsertUpper, btreeInsertMeta, btreeInsertPost:
		return o.only(0, o.btreeInsert)
	case btreeSplitL, btreeSplitR:
		return o.btreeSplit()
	case btreeDedup:
		return o.only(0, o.btreeDedup)
	case btreeDelete, btreeVacuum:
		return o.only(0, o.btreeDelete)
	case btreeNewRoot:
		return o.only(0, o.btreeNewRoot)
	case btreeMarkHalfDead:
		return o.btreeMarkHalfDead()
	case btreeUnlinkPage, btreeUnlinkMeta:
		return o.btreeUnlink()
	}
	return errNoBlocks
}

func (o *op) only(id uint8, fn func() error) error {
	if o.blk.ID != id {
		return errUnusedRef
	}
	return fn()
}

// opaque is the page's special area as a btree's.
type opaque []byte

func (q opaque) next() uint32         { return le.Uint32(q[btpoNext:]) }
func (q opaque) flags() uint16        { return le.Uint16(q[btpoFlags:]) }
func (q opaque) setPrev(v uint32)     { le.PutUint32(q[btpoPrev:], v) }
func (q opaque) setNext(v uint32)     { le.PutUint32(q[btpoNext:], v) }
func (q opaque) setLevel(v uint32)    { le.PutUint32(q[btpoLevel:], v) }
func (q opaque) setFlags(v uint16)    { le.PutUint16(q[btpoFlags:], v) }
func (q opaque) setCycleID(v uint16)  { le.PutUint16(q[btpoCycleID:], v) }
func (q opaque) clearFlags(v uint16)  { q.setFlags(q.flags() &^ v) }
func (q opaque) firstDataOffset() int { return 1 + btoi(q.next() != 0) }

func btoi(b bool) int {
	if b {
		return 1
	}
	return 0
}

// btOpaque is the special area, checked to have a btree's size.
func (p page) btOpaque() (opaque, error) {
	if p.special() != len(p)-btOpaqueSize {
		return nil, fmt.Errorf("not a btree page: its special area begins at %d", p.special())
	}
	return opaque(p[p.special():]), nil
}

// btExisting is a page that is in the tree already.
func (o *op) btExisting() (opaque, error) {
	if err := o.existing(); err != nil {
		return nil, err
	}
	return o.page.btOpaque()
}

// btInit makes the page an empty btree page (_bt_pageinit).
func (o *op) btInit(prev, next, level uint32, flags uint16) opaque {
	o.page.init(btOpaqueSize)
	q := opaque(o.page[o.page.special():])
	q.setPrev(prev)
	q.setNext(next)
	q.setLevel(level)
	q.setFlags(flags)
	return q
}

// btreeMeta rebuilds the metapage from xl_btree_metadata (_bt_restore_meta).
func (o *op) btreeMeta() error {
	if len(o.blk.Data) != xlBtreeMetaSize {
		return fmt.Errorf("metapage data of %d bytes, want %d", len(o.blk.Data), xlBtreeMetaSize)
	}
	if v := le.Uint32(o.blk.Data); v < btreeNoVacVer || v > btreeVersion {
		return fmt.Errorf("btree version %d", v)
	}
	o.btInit(0, 0, 0, btpMeta)
	md := o.page[headerSize : headerSize+btMetaSize]
	le.PutUint32(md, btreeMagic)
	copy(md[4:], o.blk.Data[:24])             // version, root, level, fast root and level, deleted pages
	le.PutUint64(md[32:], 0xBFF0000000000000) // last_cleanup_num_heap_tuples: -1.0
	md[40] = byte(btoi(o.blk.Data[24] != 0))  // allequalimage
	o.page.setLower(headerSize + btMetaSize)
	return o.done()
}

func (o *op) btreeClearIncompleteSplit() error {
	q, err := o.btExisting()
	if err != nil {
		return err
	}
	q.clearFlags(btpIncompleteSplit)
	return o.done()
}

// btreeInsert adds one tuple; for INSERT_POST a posting list is split first.
func (o *op) btreeInsert() error {
	c := cursor{b: o.rec.MainData}
	n := int(c.u16())
	if err := c.err(); err != nil {
		return err
	}
	if _, err := o.btExisting(); err != nil {
		return err
	}
	tuple := o.blk.Data
	if o.rec.Info&infoMask == btreeInsertPost {
		c = cursor{b: o.blk.Data}
		postingOff := int(c.u16())
		if err := checkIndexTuple(c.b, len(c.b)); err != nil || c.short {
			return errors.Join(err, c.err())
		}
		posting, err := o.page.indexTuple(n - 1)
		if err != nil {
			return err
		}
		var room [maxIndexTuple]byte
		tuple = append(room[:0], c.b...)
		if err := swapPosting(tuple, posting, postingOff); err != nil {
			return err
		}
	}
	if err := checkIndexTuple(tuple, len(tuple)); err != nil {
		return err
	}
	if err := o.page.addItem(tuple, n, addIndex); err != nil {
		return err
	}
	return o.done()
}

// restorePage adds tuples that lie one after the other, as in the upper part of a
// page: the last one has the lowest offset number (_bt_restore_page).
func (p page) restorePage(data []byte) error {
	var room [maxItems][]byte
	items := room[:0]
	for len(data) > 0 {
		if len(data) < indexTupleHeader {
			return errShort
		}
		n := align8(indexTupleSize(data))
		if n < indexTupleHeader || n > len(data) || len(items) == maxItems {
			return fmt.Errorf("an index tuple of %d bytes, %d left in the record", n, len(data))
		}
		items = append(items, data[:n])
		data = data[n:]
	}
	for i := len(items) - 1; i >= 0; i-- {
		if err := p.addItem(items[i], len(items)-i, addIndex); err != nil {
			return err
		}
	}
	return nil
}

// btreeDelete removes tuples, and heap TIDs from posting lists: DELETE and VACUUM
// have the same data but for the xid that DELETE begins with.
func (o *op) btreeDelete() error {
	c := cursor{b: o.rec.MainData}
	if o.rec.Info&infoMask == btreeDelete {
		c.u32()
	}
	ndeleted, nupdated := int(c.u16()), int(c.u16())
	if err := c.err(); err != nil {
		return err
	}
	q, err := o.btExisting()
	if err != nil {
		return err
	}
	if ndeleted > maxItems || nupdated > maxItems {
		return fmt.Errorf("%d deleted and %d updated tuples on one page", ndeleted, nupdated)
	}
	var droom, uroom, troom [maxItems]uint16
	c = cursor{b: o.blk.Data}
	deleted := c.u16s(ndeleted, droom[:0])
	updated := c.u16s(nupdated, uroom[:0])
	for _, n := range updated {
		ntids := int(c.u16())
		tids := c.u16s(min(ntids, maxItems), troom[:0])
		if err := c.err(); err != nil {
			return err
		}
		if err := o.page.shrinkPosting(int(n), tids); err != nil {
			return fmt.Errorf("offset number %d: %w", n, err)
		}
	}
	if err := c.err(); err != nil {
		return err
	}
	if err := o.page.deleteMany(deleted); err != nil {
		return err
	}
	q.clearFlags(btpHasGarbage)
	return o.done()
}

func (o *op) btreeNewRoot() error {
	c := cursor{b: o.rec.MainData}
	c.u32() // the root's block number, as in block 0
	level := c.u32()
	if err := c.err(); err != nil {
		return err
	}
	flags := uint16(btpRoot)
	if level == 0 {
		flags |= btpLeaf
	}
	o.btInit(0, 0, level, flags)
	if level > 0 {
		if err := o.page.restorePage(o.blk.Data); err != nil {
			return err
		}
	}
	return o.done()
}

// btreeMarkHalfDead makes a leaf (block 0) half-dead and takes its downlink out of
// the parent (block 1): the downlink to its right sibling takes its place.
func (o *op) btreeMarkHalfDead() error {
	c := cursor{b: o.rec.MainData}
	parentOff := int(c.u16())
	c.take(2 + 4) // padding; the leaf's block number, as in block 0
	left, right, topParent := c.u32(), c.u32(), c.u32()
	if err := c.err(); err != nil {
		return err
	}
	switch o.blk.ID {
	case 0:
		o.btInit(left, right, 0, btpHalfDead|btpLeaf)
		return o.addDummyHighKey(topParent)
	case 1:
		if _, err := o.btExisting(); err != nil {
			return err
		}
		next, err := o.page.indexTuple(parentOff + 1)
		if err != nil {
			return err
		}
		this, err := o.page.indexTuple(parentOff)
		if err != nil {
			return err
		}
		putTIDBlock(this, tidBlock(next))
		if err := o.page.deleteOne(parentOff + 1); err != nil {
			return err
		}
		return o.done()
	}
	return errUnusedRef
}

// addDummyHighKey puts in the one tuple of a half-dead leaf: no key, its block
// number is the top parent of the branch to delete (BTreeTupleSetTopParent).
func (o *op) addDummyHighKey(topParent uint32) error {
	var t [indexTupleHeader]byte
	putTID(t[:], topParent, 0)
	le.PutUint16(t[tupInfo:], indexTupleHeader|altTID)
	if err := o.page.addItem(t[:], 1, addIndex); err != nil {
		return err
	}
	return o.done()
}

// btreeUnlink takes a page out of its level: block 0 is the page, 1 and 2 its
// siblings, 3 the half-dead leaf if the page is above it.
func (o *op) btreeUnlink() error {
	c := cursor{b: o.rec.MainData}
	left, right, level := c.u32(), c.u32(), c.u32()
	c.take(4) // padding
	safeXid := c.u64()
	leafLeft, leafRight, leafTopParent := c.u32(), c.u32(), c.u32()
	if err := c.err(); err != nil {
		return err
	}
	switch o.blk.ID {
	case 0:
		flags := uint16(btpDeleted | btpHasFullXid)
		if level == 0 {
			flags |= btpLeaf
		}
		o.btInit(left, right, level, flags)
		le.PutUint64(o.page[headerSize:], safeXid) // BTDeletedPageData
		o.page.setLower(headerSize + 8)
		return o.done()
	case 1, 2:
		q, err := o.btExisting()
		if err != nil {
			return err
		}
		if o.blk.ID == 1 {
			q.setNext(right)
		} else {
			q.setPrev(left)
		}
		return o.done()
	case 3:
		o.btInit(leafLeft, leafRight, 0, btpHalfDead|btpLeaf)
		return o.addDummyHighKey(leafTopParent)
	}
	return errUnusedRef
}
