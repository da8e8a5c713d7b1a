package redo

import (
	"errors"
	"fmt"

	"github.com/holdfastdb/holdfast/internal/pg"
)

// Record kinds of the GiST resource manager (gistxlog.h).
const (
	gistPageUpdate = 0x00
	gistDelete     = 0x10
	gistPageReuse  = 0x20
	gistPageSplit  = 0x30
	gistPageDelete = 0x60
	gistAssignLSN  = 0x70
)

// Layout of a GiST page's special area (gist.h).
const (
	gistOpaqueSize = 16
	gistNSN        = 0 // as pd_lsn: the high half first
	gistRightLink  = 8
	gistFlags      = 12
	gistPageIDAt   = 14

	gistLeaf          = 1 << 0
	gistDeleted       = 1 << 1
	gistTuplesDeleted = 1 << 2
	gistFollowRight   = 1 << 3
	gistHasGarbage    = 1 << 4

	gistPageID = 0xFF81
	gistRoot   = 0 // block number
)

// redoGist is gist_redo for one block (gistxlog.c). PAGE_REUSE concerns standbys
// only, and ASSIGN_LSN nothing but the place that it takes in WAL.
func redoGist(o *op) error {
	if o.gistLeftChild() {
		return o.gistClearFollowRight()
	}
	switch o.rec.Info & infoMask {
	case gistPageUpdate:
		return o.only(0, o.gistUpdate)
	case gistDelete:
		return o.only(0, o.gistDelete)
	case gistPageSplit:
		return o.gistSplit()
	case gistPageDelete:
		return o.gistPageDelete()
	}
	return errNoBlocks
}

// restoredGist is for a page that the record's image restored: the left half of a
// split that the record completes changes after the image was taken.
func restoredGist(o *op) error {
	if o.gistLeftChild() {
		return o.gistClearFollowRight()
	}
	return nil
}

// gistLeftChild tells whether the block is the left half of an earlier split, whose
// right half gets its downlink by this record.
func (o *op) gistLeftChild() bool {
	kind := o.rec.Info & infoMask
	return kind == gistPageUpdate && o.blk.ID == 1 || kind == gistPageSplit && o.blk.ID == 0
}

// gistOpaque is the page's special area as a GiST's.
type gistOpaque []byte

func (q gistOpaque) flags() uint16      { return le.Uint16(q[gistFlags:]) }
func (q gistOpaque) setFlags(f uint16)  { le.PutUint16(q[gistFlags:], f) }
func (q gistOpaque) setFlag(f uint16)   { q.setFlags(q.flags() | f) }
func (q gistOpaque) clearFlag(f uint16) { q.setFlags(q.flags() &^ f) }
func (q gistOpaque) setRight(b uint32)  { le.PutUint32(q[gistRightLink:], b) }
func (q gistOpaque) setNSN(v pg.LSN)    { page(q[gistNSN:]).setLSN(v) }
func (p page) isEmpty() bool            { return p.lower() <= headerSize }
func (p page) gistInit(flags uint16) gistOpaque {
	p.init(gistOpaqueSize)
	q := gistOpaque(p[p.special():])
	q.setFlags(flags)
	le.PutUint16(q[gistPageIDAt:], gistPageID)
	return q
}

// gistOpaque is the special area, checked to have a GiST's size.
func (p page) gistOpaque() (gistOpaque, error) {
	if p.special() != len(p)-gistOpaqueSize {
		return nil, fmt.Errorf("not a GiST page: its special area begins at %d", p.special())
	}
	return gistOpaque(p[p.special():]), nil
}

// gistExisting is a page that is in the index already.
func (o *op) gistExisting() (gistOpaque, error) {
	if err := o.existing(); err != nil {
		return nil, err
	}
	return o.page.gistOpaque()
}

func (o *op) gistClearFollowRight() error {
	q, err := o.gistExisting()
	if err != nil {
		return err
	}
	q.setNSN(o.rec.End)
	q.clearFlag(gistFollowRight)
	return o.done()
}

// gistUpdate deletes tuples and appends others; if it is one for one, the new tuple
// takes the old one's place.
func (o *op) gistUpdate() error {
	c := cursor{b: o.rec.MainData}
	ndelete, ninsert := int(c.u16()), int(c.u16())
	if err := c.err(); err != nil {
		return err
	}
	q, err := o.gistExisting()
	if err != nil {
		return err
	}
	c = cursor{b: o.blk.Data}
	var room [maxItems]uint16
	numbers := c.u16s(ndelete, room[:0])
	if err := c.err(); err != nil {
		return err
	}
	switch {
	case ndelete == 1 && ninsert == 1:
		t, err := takeGistTuple(&c)
		if err != nil {
			return err
		}
		if err := o.page.overwrite(int(numbers[0]), t); err != nil {
			return err
		}
		ninsert--
	case ndelete > 0:
		if err := o.page.deleteMany(numbers); err != nil {
			return err
		}
		if q.flags()&gistLeaf != 0 {
			q.setFlag(gistTuplesDeleted)
		}
	}
	if err := o.page.appendGistTuples(&c, ninsert); err != nil {
		return err
	}
	return o.done()
}

// appendGistTuples adds n tuples, all that the data has left, at the page's end.
func (p page) appendGistTuples(c *cursor, n int) error {
	for range n {
		t, err := takeGistTuple(c)
		if err != nil {
			return err
		}
		if err := p.addItem(t, p.maxOffset()+1, addIndex); err != nil {
			return err
		}
	}
	if len(c.b) > 0 {
		return fmt.Errorf("%d bytes follow the last of %d tuples", len(c.b), n)
	}
	return nil
}

// takeGistTuple reads a tuple from the start of data. Tuples come with their padding.
func takeGistTuple(c *cursor) ([]byte, error) {
	if len(c.b) < indexTupleHeader {
		return nil, errShort
	}
	n := indexTupleSize(c.b)
	if n < indexTupleHeader {
		return nil, fmt.Errorf("an index tuple of %d bytes", n)
	}
	t := c.take(n)
	return t, c.err()
}

// gistDelete removes tuples that scans found dead.
func (o *op) gistDelete() error {
	c := cursor{b: o.rec.MainData}
	c.u32() // latestRemovedXid
	n := int(c.u16())
	var room [maxItems]uint16
	numbers := c.u16s(n, room[:0])
	if err := c.err(); err != nil {
		return err
	}
	q, err := o.gistExisting()
	if err != nil {
		return err
	}
	if err := o.page.deleteMany(numbers); err != nil {
		return err
	}
	q.clearFlag(gistHasGarbage)
	q.setFlag(gistTuplesDeleted)
	return o.done()
}

// gistSplit makes one of the pages that a page was split into: blocks from 1 on in
// the order of their right links. If the root is split it is the first of them, and
// has the downlinks to the others.
func (o *op) gistSplit() error {
	c := cursor{b: o.rec.MainData}
	right := c.u32() // of the last page
	c.take(4)        // padding
	nsn := pg.LSN(c.u64())
	leaf := c.u8() != 0
	c.u8() // padding
	npages := c.u16()
	followRight := c.u8() != 0
	if err := c.err(); err != nil {
		return err
	}
	id := uint16(o.blk.ID)
	first := o.rec.Block(1)
	if id < 1 || id > npages || first == nil {
		return errUnusedRef
	}
	root := o.block() == gistRoot
	last := id == npages
	switch {
	case root:
		leaf, right = false, invalidBlock
	case !last:
		next := o.rec.Block(o.blk.ID + 1)
		if next == nil {
			return fmt.Errorf("a split into %d pages does not name page %d", npages, id+1)
		}
		right = uint32(next.Block)
	}
	q := o.page.gistInit(0)
	if leaf {
		q.setFlag(gistLeaf)
	}
	q.setRight(right)
	q.setNSN(nsn)
	if followRight && !last && first.Block != gistRoot {
		q.setFlag(gistFollowRight)
	}
	c = cursor{b: o.blk.Data}
	n := int(c.u32())
	if n > maxItems {
		return fmt.Errorf("%d tuples on one page", n)
	}
	if err := o.page.appendGistTuples(&c, n); err != nil {
		return err
	}
	return o.done()
}

// gistPageDelete marks an empty leaf (block 0) as deleted and takes its downlink out
// of the parent (block 1).
func (o *op) gistPageDelete() error {
	c := cursor{b: o.rec.MainData}
	deleteXid := c.u64()
	downlink := int(c.u16())
	if err := c.err(); err != nil {
		return err
	}
	q, err := o.gistExisting()
	if err != nil {
		return err
	}
	switch o.blk.ID {
	case 0:
		const contents = 8 // GISTDeletedPageContents
		if !o.page.isEmpty() || o.page.upper() < headerSize+contents {
			return errors.New("a page to delete is not empty")
		}
		q.setFlag(gistDeleted)
		o.page.setLower(headerSize + contents)
		le.PutUint64(o.page[headerSize:], deleteXid)
	case 1:
		if err := o.page.deleteOne(downlink); err != nil {
			return err
		}
	default:
		return errUnusedRef
	}
	return o.done()
}

// maskGist is gist_mask (gistxlog.c), and blanks F_TUPLES_DELETED too: nothing reads
// it, and for a DELETE recovery sets it while the server that wrote the record did not.
func maskGist(p page, _ uint32) error {
	if err := maskHints(p); err != nil {
		return err
	}
	q, err := p.gistOpaque()
	if err != nil {
		return err
	}
	q.setNSN(0)
	if q.flags()&gistLeaf != 0 {
		p.maskItemFlags()
	}
	q.setFlag(gistFollowRight) // cleared on the left child after its image was taken
	q.clearFlag(gistHasGarbage | gistTuplesDeleted)
	return nil
}
