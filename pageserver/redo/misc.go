package redo

import (
	"errors"
	"fmt"
)

// Record kinds of the XLOG, sequence and generic resource managers (pg_control.h,
// sequence.h; generic records have no kinds).
const (
	xlogFPIForHint = 0xA0
	xlogFPI        = 0xB0

	seqLog = 0x00
)

// redoXLOG is reached only for blocks without an image to apply. A hint's image
// may be missing when full_page_writes is off (xlog.c); then there is nothing to do.
func redoXLOG(o *op) error {
	switch o.rec.Info & infoMask {
	case xlogFPIForHint:
		return nil
	case xlogFPI:
		return errors.New("the record has no page image")
	}
	return errNoBlocks
}

const (
	seqMagic    = 0x1717 // sequence.c
	seqMagicLen = 4
	xlSeqRec    = 12 // xl_seq_rec: the relation's RelFileNode
)

// redoSeq makes the sequence's page anew from the tuple in the record (sequence.c).
func redoSeq(o *op) error {
	if o.rec.Info&infoMask != seqLog {
		return errNoBlocks
	}
	c := cursor{b: o.rec.MainData}
	c.take(xlSeqRec)
	if c.short || len(c.b) < tupHeader {
		return errShort
	}
	o.page.init(seqMagicLen)
	le.PutUint32(o.page[o.page.special():], seqMagic)
	if err := o.page.addItem(c.b, 1, addIndex); err != nil {
		return err
	}
	return o.done()
}

// redoGeneric copies byte ranges over the page and zeroes the hole, which the
// ranges leave out (generic_xlog.c).
func redoGeneric(o *op) error {
	c := cursor{b: o.blk.Data}
	for len(c.b) > 0 {
		off, n := int(c.u16()), int(c.u16())
		data := c.take(n)
		if c.short || off+n > len(o.page) {
			return fmt.Errorf("a change of %d bytes at %d: %w", n, off, errShort)
		}
		copy(o.page[off:], data)
	}
	lower, upper := o.page.lower(), o.page.upper()
	if lower > upper || upper > len(o.page) {
		return fmt.Errorf("corrupt page header after the change: lower %d, upper %d", lower, upper)
	}
	clear(o.page[lower:upper])
	return o.done()
}
