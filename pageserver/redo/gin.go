package redo

import (
	"errors"
	"fmt"

	"github.com/holdfastdb/holdfast/internal/pg"
)

// Record kinds of the GIN resource manager and flags in its records (ginxlog.h).
const (
	ginCreatePTree        = 0x10
	ginInsert             = 0x20
	ginSplit              = 0x30
	ginVacuumPage         = 0x40
	ginDeletePage         = 0x50
	ginUpdateMetaPage     = 0x60
	ginInsertListPage     = 0x70
	ginDeleteListPage     = 0x80
	ginVacuumDataLeafPage = 0x90

	ginInsertIsData = 1 << 0
	ginInsertIsLeaf = 1 << 1
)

// Layout of a GIN page (ginblock.h). The contents of a posting tree's page begin after
// its right bound, a TID.
const (
	ginOpaqueSize = 8
	ginSpecial    = pg.BlockSize - ginOpaqueSize

	ginFlagData            = 1 << 0
	ginFlagLeaf            = 1 << 1
	ginFlagDeleted         = 1 << 2
	ginFlagMeta            = 1 << 3
	ginFlagList            = 1 << 4
	ginFlagListFullRow     = 1 << 5
	ginFlagIncompleteSplit = 1 << 6
	ginFlagCompressed      = 1 << 7

	ginMetaSize    = 56 // GinMetaPageData with its padding
	ginDataAt      = headerSize + 8
	ginDataMax     = ginSpecial - ginDataAt // GinDataPageMaxDataSize
	ginPostingItem = 10                     // a child's block number and a TID
)

var errNoImage = errors.New("this kind of record must have an image of the page")

// redoGIN is gin_redo for one block (ginxlog.c).
func redoGIN(o *op) error {
	switch o.rec.Info & infoMask {
	case ginCreatePTree:
		return o.only(0, o.ginCreatePTree)
	case ginInsert:
		return o.ginInsert()
	case ginSplit:
		return o.ginSplit()
	case ginVacuumPage:
		return errNoImage
	case ginVacuumDataLeafPage:
		return o.only(0, o.ginRecompress)
	case ginDeletePage:
		return o.ginDeletePage()
	case ginUpdateMetaPage:
		return o.ginUpdateMeta()
	case ginInsertListPage:
		return o.only(0, o.ginInsertListPage)
	case ginDeleteListPage:
		return o.ginDeleteListPages()
	}
	return errNoBlocks
}

// ginOpaque is a GIN page's special area.
type ginOpaque []byte

func (q ginOpaque) setRightLink(v uint32) { le.PutUint32(q, v) }
func (q ginOpaque) maxOff() int           { return int(le.Uint16(q[4:])) }
func (q ginOpaque) setMaxOff(v int)       { le.PutUint16(q[4:], uint16(v)) }
func (q ginOpaque) flags() uint16         { return le.Uint16(q[6:]) }
func (q ginOpaque) setFlags(v uint16)     { le.PutUint16(q[6:], v) }

// ginOpaque is the special area, checked to have GIN's size.
func (p page) ginOpaque() (ginOpaque, error) {
	if p.special() != ginSpecial {
		return nil, fmt.Errorf("not a GIN page: its special area begins at %d", p.special())
	}
	return ginOpaque(p[ginSpecial:]), nil
}

// ginExisting is a page that is in the index already and has of the flags in mask those
// in want.
func (o *op) ginExisting(mask, want uint16) (ginOpaque, error) {
	if err := o.existing(); err != nil {
		return nil, err
	}
	q, err := o.page.ginOpaque()
	if err == nil && q.flags()&mask != want {
		err = fmt.Errorf("a GIN page with flags %#x, want %#x of %#x", q.flags(), want, mask)
	}
	return q, err
}

// ginInit makes the page an empty GIN page (GinInitPage).
func (o *op) ginInit(flags uint16) ginOpaque {
	o.page.init(ginOpaqueSize)
	q := ginOpaque(o.page[ginSpecial:])
	q.setRightLink(invalidBlock)
	q.setFlags(flags)
	return q
}

// ginMeta makes the metapage of what the record says about it.
func (o *op) ginMeta(meta []byte) error {
	o.ginInit(ginFlagMeta)
	copy(o.page[headerSize:], meta)
	o.page.setLower(headerSize + ginMetaSize)
	return o.done()
}

// ginCreatePTree makes a posting tree's root, a leaf.
func (o *op) ginCreatePTree() error {
	c := cursor{b: o.rec.MainData}
	size := c.u32()
	if size > ginDataMax {
		return fmt.Errorf("a posting tree's page of %d bytes", size)
	}
	list := c.take(int(size))
	if err := c.err(); err != nil {
		return err
	}
	o.ginInit(ginFlagData | ginFlagLeaf | ginFlagCompressed)
	copy(o.page[ginDataAt:], list)
	o.page.setLower(ginDataAt + len(list))
	return o.done()
}

// ginInsert adds to a page of the entry tree or of a posting tree (block 0). Above the
// leaves that completes the split of a child (block 1).
func (o *op) ginInsert() error {
	c := cursor{b: o.rec.MainData}
	flags := c.u16()
	leaf, right := flags&ginInsertIsLeaf != 0, uint32(invalidBlock)
	if !leaf {
		c.take(4) // the left child
		if b := c.take(4); b != nil {
			right = tidBlock(b)
		}
	}
	if err := c.err(); err != nil {
		return err
	}
	switch {
	case o.blk.ID == 1 && !leaf:
		return o.ginClearIncompleteSplit()
	case o.blk.ID != 0:
		return errUnusedRef
	case flags&ginInsertIsData == 0:
		return o.ginInsertEntry(leaf, right)
	case leaf:
		return o.ginRecompress()
	}
	return o.ginInsertPostingItem(right)
}

// ginSplit completes the split of a child (block 3): the pages of the new split itself
// come as images.
func (o *op) ginSplit() error {
	c := cursor{b: o.rec.MainData}
	c.take(12 + 4 + 4 + 4) // file, right link, children
	flags := c.u16()
	if err := c.err(); err != nil {
		return err
	}
	switch {
	case o.blk.ID == 3 && flags&ginInsertIsLeaf == 0:
		return o.ginClearIncompleteSplit()
	case o.blk.ID <= 2:
		return errNoImage
	}
	return errUnusedRef
}

func (o *op) ginClearIncompleteSplit() error {
	q, err := o.ginExisting(0, 0)
	if err != nil {
		return err
	}
	q.setFlags(q.flags() &^ ginFlagIncompleteSplit)
	return o.done()
}

// ginInsertEntry adds a tuple to a page of the entry tree. On a leaf it may replace the
// one at its offset number; above, the tuple there is for the right half of the child.
func (o *op) ginInsertEntry(leaf bool, right uint32) error {
	c := cursor{b: o.blk.Data}
	n, isDelete := int(c.u16()), c.u8() != 0
	c.take(1) // padding
	tuple, err := c.ginTuple()
	if err != nil {
		return err
	}
	want := uint16(ginFlagLeaf) * uint16(btoi(leaf))
	if _, err := o.ginExisting(ginFlagData|ginFlagLeaf, want); err != nil {
		return err
	}
	if right != invalidBlock {
		old, err := o.page.indexTuple(n)
		if err != nil {
			return err
		}
		putTID(old, right, 0)
	}
	if isDelete {
		if err := o.page.deleteOne(n); err != nil {
			return err
		}
	}
	if err := o.page.addItem(tuple, n, addIndex); err != nil {
		return err
	}
	return o.done()
}

// ginTuple reads an index tuple, which has its length in itself.
func (c *cursor) ginTuple() ([]byte, error) {
	if len(c.b) < indexTupleHeader {
		return nil, errShort
	}
	n := indexTupleSize(c.b)
	if n < indexTupleHeader || n > len(c.b) {
		return nil, fmt.Errorf("an index tuple of %d bytes, %d left in the record", n, len(c.b))
	}
	return c.take(n), nil
}

// ginUpdateMeta sets the metapage (block 0). Tuples may have come to the last page of
// the pending list, or a new last page after it (block 1).
func (o *op) ginUpdateMeta() error {
	c := cursor{b: o.rec.MainData}
	c.take(12 + 4) // file, padding
	meta := c.take(ginMetaSize)
	prevTail, newRight, ntuples := c.u32(), c.u32(), int32(c.u32())
	if err := c.err(); err != nil {
		return err
	}
	switch {
	case o.blk.ID == 0:
		return o.ginMeta(meta)
	case o.blk.ID != 1 || ntuples <= 0 && prevTail == invalidBlock:
		return errUnusedRef
	}
	q, err := o.ginExisting(ginFlagList, ginFlagList)
	if err != nil {
		return err
	}
	if ntuples <= 0 {
		q.setRightLink(newRight)
		return o.done()
	}
	if err := o.ginAppend(ntuples); err != nil {
		return err
	}
	q.setMaxOff(q.maxOff() + 1) // counts heap tuples
	return o.done()
}

// ginAppend adds the tuples in the block's data after those that the page has.
func (o *op) ginAppend(ntuples int32) error {
	c := cursor{b: o.blk.Data}
	for range ntuples {
		tuple, err := c.ginTuple()
		if err != nil {
			return err
		}
		if err := o.page.addItem(tuple, o.page.maxOffset()+1, addIndex); err != nil {
			return err
		}
	}
	return nil
}

// ginInsertListPage makes a page of the pending list.
func (o *op) ginInsertListPage() error {
	c := cursor{b: o.rec.MainData}
	right, ntuples := c.u32(), int32(c.u32())
	if err := c.err(); err != nil {
		return err
	}
	q := o.ginInit(ginFlagList)
	q.setRightLink(right)
	if right == invalidBlock { // the last page of what is added
		q.setFlags(ginFlagList | ginFlagListFullRow)
		q.setMaxOff(1)
	}
	if err := o.ginAppend(max(ntuples, 0)); err != nil {
		return err
	}
	return o.done()
}

// ginDeleteListPages takes pages off the pending list's head: block 0 is the metapage.
func (o *op) ginDeleteListPages() error {
	c := cursor{b: o.rec.MainData}
	meta := c.take(ginMetaSize)
	ndeleted := int64(int32(c.u32()))
	if err := c.err(); err != nil {
		return err
	}
	switch {
	case o.blk.ID == 0:
		return o.ginMeta(meta)
	case int64(o.blk.ID) > ndeleted:
		return errUnusedRef
	}
	o.ginInit(ginFlagDeleted)
	return o.done()
}

// maskGIN is gin_mask. Of a deleted page only the header is certain, as a page of the
// pending list keeps its contents on the primary. Pages of posting trees before 9.4 did
// not say how long their contents are.
func maskGIN(p page, _ uint32) error {
	if err := p.sane(); err != nil {
		return err
	}
	q, err := p.ginOpaque()
	if err != nil {
		return err
	}
	maskHeader(p)
	switch {
	case q.flags()&ginFlagDeleted != 0:
		p.setLower(0)
		p.setUpper(0)
		clear(p[headerSize:])
	case p.lower() > headerSize:
		return maskStandard(p, 0)
	}
	return nil
}
