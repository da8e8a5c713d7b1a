package redo

import (
	"errors"
	"fmt"

	"github.com/holdfastdb/holdfast/internal/pg"
)

// Record kinds of the BRIN resource manager, and the flag that a record makes the
// regular page it adds to (brin_xlog.h).
const (
	brinCreateIndex    = 0x00
	brinInsert         = 0x10
	brinUpdate         = 0x20
	brinSamepageUpdate = 0x30
	brinRevmapExtend   = 0x40
	brinDesummarize    = 0x50

	brinOpMask   = 0x70
	brinInitPage = 0x80
)

// Layout of a BRIN page's special area, of its metapage and of the pages of its range
// map, which are filled with TIDs (brin_page.h).
const (
	brinSpecialSize = 8
	brinOffFlags    = pg.BlockSize - 4
	brinOffType     = pg.BlockSize - 2

	brinMeta    = 0xF091
	brinRevmap  = 0xF092
	brinRegular = 0xF093

	brinEvacuate = 1 << 0

	brinMagic    = 0xA8109CFA
	brinMetaSize = 16

	brinRevmapItems = (pg.BlockSize - headerSize - brinSpecialSize) / tidSize // REVMAP_PAGE_MAXITEMS
)

// redoBRIN is brin_redo for one block (brin_xlog.c).
func redoBRIN(o *op) error {
	switch o.rec.Info & brinOpMask {
	case brinCreateIndex:
		return o.only(0, o.brinCreateIndex)
	case brinInsert:
		return o.brinInsert(&cursor{b: o.rec.MainData})
	case brinUpdate:
		c := &cursor{b: o.rec.MainData}
		old := int(c.u16())
		c.take(2) // padding
		if o.blk.ID == 2 && !c.short {
			return o.brinDelete(old)
		}
		return o.brinInsert(c)
	case brinSamepageUpdate:
		return o.only(0, o.brinSamepageUpdate)
	case brinRevmapExtend:
		return o.brinRevmapExtend()
	case brinDesummarize:
		return o.brinDesummarize()
	}
	return errNoBlocks
}

// brinInit makes the page an empty one of a type (brin_page_init).
func (o *op) brinInit(kind uint16) {
	o.page.init(brinSpecialSize)
	le.PutUint16(o.page[brinOffType:], kind)
}

// brinType is which of a BRIN index's pages p is.
func (p page) brinType() (uint16, error) {
	kind := le.Uint16(p[brinOffType:])
	if p.special() != len(p)-brinSpecialSize || kind < brinMeta || kind > brinRegular {
		return 0, fmt.Errorf("not a BRIN page: its special area begins at %d, its type is %#04x", p.special(), kind)
	}
	return kind, nil
}

// brinExisting checks that the page is one of the index's already, of a type.
func (o *op) brinExisting(kind uint16) error {
	if err := o.existing(); err != nil {
		return err
	}
	have, err := o.page.brinType()
	if err == nil && have != kind {
		err = fmt.Errorf("a BRIN page of type %#04x, want %#04x", have, kind)
	}
	return err
}

// brinCreateIndex makes the metapage (brin_metapage_init).
func (o *op) brinCreateIndex() error {
	c := cursor{b: o.rec.MainData}
	pagesPerRange, version := c.u32(), c.u16()
	if err := c.err(); err != nil {
		return err
	}
	o.brinInit(brinMeta)
	md := o.page[headerSize:]
	le.PutUint32(md, brinMagic)
	le.PutUint32(md[4:], uint32(version))
	le.PutUint32(md[8:], pagesPerRange)
	o.page.setLower(headerSize + brinMetaSize)
	return o.done()
}

// brinInsert reads xl_brin_insert: a tuple goes to a regular page (block 0), its place
// into the range map (block 1).
func (o *op) brinInsert(c *cursor) error {
	heapBlk, pagesPerRange, n := c.u32(), c.u32(), c.u16()
	if err := c.err(); err != nil {
		return err
	}
	switch o.blk.ID {
	case 0:
		return o.brinAdd(int(n))
	case 1:
		regular := o.rec.Block(0)
		if regular == nil || n == 0 {
			return fmt.Errorf("no tuple to refer to: offset number %d, block reference 0 %v", n, regular != nil)
		}
		return o.brinSetRevmap(pagesPerRange, heapBlk, uint32(regular.Block), n)
	}
	return errUnusedRef
}

func (o *op) brinAdd(n int) error {
	if o.rec.Info&brinInitPage != 0 {
		o.brinInit(brinRegular)
	} else if err := o.brinExisting(brinRegular); err != nil {
		return err
	}
	if len(o.blk.Data) == 0 {
		return errShort
	}
	if err := o.page.addItem(o.blk.Data, n, addFree); err != nil {
		return err
	}
	return o.done()
}

// brinSetRevmap makes the range map say where the tuple of a heap block's range is
// (brinSetHeapBlockItemptr).
func (o *op) brinSetRevmap(pagesPerRange, heapBlk, block uint32, n uint16) error {
	if pagesPerRange == 0 {
		return errors.New("ranges of no pages")
	}
	if err := o.brinExisting(brinRevmap); err != nil {
		return err
	}
	at := headerSize + tidSize*int(heapBlk/pagesPerRange%brinRevmapItems)
	putTID(o.page[at:], block, n)
	return o.done()
}

func (o *op) brinDelete(n int) error {
	if err := o.brinExisting(brinRegular); err != nil {
		return err
	}
	if err := o.page.deleteNoCompact(n); err != nil {
		return err
	}
	return o.done()
}

func (o *op) brinSamepageUpdate() error {
	c := cursor{b: o.rec.MainData}
	n := int(c.u16())
	if err := c.err(); err != nil {
		return err
	}
	if err := o.brinExisting(brinRegular); err != nil {
		return err
	}
	if len(o.blk.Data) == 0 {
		return errShort
	}
	if err := o.page.overwrite(n, o.blk.Data); err != nil {
		return err
	}
	return o.done()
}

// brinRevmapExtend makes block 1 a page of the range map and notes that in the
// metapage, block 0.
func (o *op) brinRevmapExtend() error {
	c := cursor{b: o.rec.MainData}
	target := c.u32()
	if err := c.err(); err != nil {
		return err
	}
	switch o.blk.ID {
	case 0:
		if err := o.brinExisting(brinMeta); err != nil {
			return err
		}
		le.PutUint32(o.page[headerSize+12:], target) // lastRevmapPage
		o.page.setLower(headerSize + brinMetaSize)
		return o.done()
	case 1:
		o.brinInit(brinRevmap)
		return o.done()
	}
	return errUnusedRef
}

// brinDesummarize takes a range's entry out of the range map (block 0) and its tuple
// from its page (block 1).
func (o *op) brinDesummarize() error {
	c := cursor{b: o.rec.MainData}
	pagesPerRange, heapBlk, n := c.u32(), c.u32(), int(c.u16())
	if err := c.err(); err != nil {
		return err
	}
	switch o.blk.ID {
	case 0:
		return o.brinSetRevmap(pagesPerRange, heapBlk, invalidBlock, 0)
	case 1:
		return o.brinDelete(n)
	}
	return errUnusedRef
}

// maskBRIN is brin_mask. A page of the range map has its TIDs where other pages have
// their free space.
func maskBRIN(p page, _ uint32) error {
	if err := p.sane(); err != nil {
		return err
	}
	kind, err := p.brinType()
	if err != nil {
		return err
	}
	maskHeader(p)
	le.PutUint16(p[brinOffFlags:], le.Uint16(p[brinOffFlags:])&^brinEvacuate)
	if kind == brinRevmap {
		return nil
	}
	return maskStandard(p, 0)
}
