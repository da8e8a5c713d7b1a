package redo

import (
	"errors"
	"fmt"
	"slices"
)

// Record kinds of the SP-GiST resource manager (spgxlog.h).
const (
	spgAddLeaf        = 0x10
	spgMoveLeafs      = 0x20
	spgAddNode        = 0x30
	spgSplitTuple     = 0x40
	spgPickSplit      = 0x50
	spgVacuumLeaf     = 0x60
	spgVacuumRoot     = 0x70
	spgVacuumRedirect = 0x80
)

// Layout of an SP-GiST page's special area and of its tuples (spgist_private.h).
const (
	spgOpaqueSize   = 8
	spgFlags        = 0
	spgNRedirection = 2
	spgNPlaceholder = 4
	spgPageIDAt     = 6
	spgFlagLeaf     = 1 << 2
	spgFlagNulls    = 1 << 3
	spgPageID       = 0xFF82

	// The two lowest bits of any tuple are its state. A leaf or dead tuple has its size
	// above them, an inner one one bit, 13 of the number of nodes, 16 of the prefix's
	// size, and its own size after that.
	spgStateMask   = 3
	spgRedirect    = 1
	spgDead        = 2
	spgPlaceholder = 3

	spgInnerHeader = 8
	spgInnerSize   = 4 // where it is
	spgLeafHeader  = 16
	spgLeafInfo    = 4 // t_info, with the offset number of the next tuple
	spgNextMask    = 0x3FFF
	spgPointer     = 6
	spgDeadXid     = 12
	spgDeadSize    = 16
)

// redoSPGist is spg_redo for one block (spgxlog.c).
func redoSPGist(o *op) error {
	switch o.rec.Info & infoMask {
	case spgAddLeaf:
		return o.spgAddLeaf()
	case spgMoveLeafs:
		return o.spgMoveLeafs()
	case spgAddNode:
		return o.spgAddNode()
	case spgSplitTuple:
		return o.spgSplitTuple()
	case spgPickSplit:
		return o.spgPickSplit()
	case spgVacuumLeaf:
		return o.only(0, o.spgVacuumLeaf)
	case spgVacuumRoot:
		return o.only(0, o.spgVacuumRoot)
	case spgVacuumRedirect:
		return o.only(0, o.spgVacuumRedirect)
	}
	return errNoBlocks
}

// spgOpaque is the page's special area as an SP-GiST's. Its counts wrap around, as
// PostgreSQL's do, if they were wrong before.
type spgOpaque []byte

func (q spgOpaque) add(at, n int) { le.PutUint16(q[at:], le.Uint16(q[at:])+uint16(n)) }

// spgExisting is a page that is in the index already.
func (o *op) spgExisting() (spgOpaque, error) {
	if err := o.existing(); err != nil {
		return nil, err
	}
	return o.page.spgOpaque()
}

// spgOpaque is the special area, checked to have an SP-GiST's size.
func (p page) spgOpaque() (spgOpaque, error) {
	if p.special() != len(p)-spgOpaqueSize {
		return nil, fmt.Errorf("not an SP-GiST page: its special area begins at %d", p.special())
	}
	return spgOpaque(p[p.special():]), nil
}

// spgTarget is the page to put tuples on: made anew, with the given flags, if the
// record says so (SpGistInitPage).
func (o *op) spgTarget(init bool, flags int) (spgOpaque, error) {
	if !init {
		return o.spgExisting()
	}
	o.page.init(spgOpaqueSize)
	q := spgOpaque(o.page[o.page.special():])
	le.PutUint16(q[spgFlags:], uint16(flags))
	le.PutUint16(q[spgPageIDAt:], spgPageID)
	return q, nil
}

func spgNulls(nulls bool) int { return btoi(nulls) * spgFlagNulls }

// spgState is what redo needs of SpGistState (spgxlogState).
type spgState struct {
	xid   uint32
	build bool
}

func (c *cursor) spgState() spgState {
	s := spgState{c.u32(), c.u8() != 0}
	c.take(3) // padding
	return s
}

// spgLeafTuple and spgInnerTuple read a tuple, which is not aligned in a record.
func (c *cursor) spgLeafTuple() ([]byte, error) {
	if len(c.b) < spgLeafHeader {
		return nil, errShort
	}
	return c.spgTuple(int(le.Uint32(c.b)>>2), spgLeafHeader)
}

func (c *cursor) spgInnerTuple() ([]byte, error) {
	if len(c.b) < spgInnerHeader {
		return nil, errShort
	}
	return c.spgTuple(int(le.Uint16(c.b[spgInnerSize:])), spgInnerHeader)
}

func (c *cursor) spgTuple(size, header int) ([]byte, error) {
	if size < header {
		return nil, fmt.Errorf("an SP-GiST tuple of %d bytes", size)
	}
	t := c.take(size)
	return t, c.err()
}

// spgDeadTuple is a tuple that stands for one that was removed (spgFormDeadTuple).
// Only a redirection has a target and an xid.
func spgDeadTuple(state int, s spgState, block uint32, n uint16) [spgDeadSize]byte {
	var t [spgDeadSize]byte
	le.PutUint32(t[:], uint32(state|spgDeadSize<<2))
	if state == spgRedirect {
		putTID(t[spgPointer:], block, n)
		le.PutUint32(t[spgDeadXid:], s.xid)
	} else {
		putTID(t[spgPointer:], invalidBlock, 0)
	}
	return t
}

// spgPut adds a tuple at offset number n or puts it in a placeholder's place
// (addOrReplaceTuple).
func (p page) spgPut(q spgOpaque, tuple []byte, n int) error {
	if n <= p.maxOffset() {
		old, err := p.indexTuple(n)
		if err != nil {
			return err
		}
		if old[0]&spgStateMask != spgPlaceholder {
			return fmt.Errorf("the tuple at offset number %d is no placeholder", n)
		}
		q.add(spgNPlaceholder, -1)
		if err := p.deleteOne(n); err != nil {
			return err
		}
	}
	return p.addItem(tuple, n, addIndex)
}

// spgReplace puts a tuple in another's place.
func (p page) spgReplace(tuple []byte, n int) error {
	if err := p.deleteOne(n); err != nil {
		return err
	}
	return p.addItem(tuple, n, addIndex)
}

// spgLink sets the downlink of an inner tuple's node (spgUpdateNodeLink).
func (p page) spgLink(n, node int, block uint32, offset uint16) error {
	t, err := p.indexTuple(n)
	if err != nil {
		return err
	}
	head := le.Uint32(t)
	nodes, at := int(head>>3&0x1FFF), spgInnerHeader+int(head>>16)
	for i := range nodes {
		if at+indexTupleHeader > len(t) {
			break
		}
		if i == node {
			putTID(t[at:], block, offset)
			return nil
		}
		size := indexTupleSize(t[at:])
		if size < indexTupleHeader {
			break
		}
		at += size
	}
	return fmt.Errorf("offset number %d: the inner tuple of %d bytes and %d nodes has no node %d", n, len(t), nodes, node)
}

// spgSetNext sets the link of a leaf tuple to the next one of its chain.
func (p page) spgSetNext(n, next int) error {
	t, err := p.indexTuple(n)
	if err != nil {
		return err
	}
	le.PutUint16(t[spgLeafInfo:], le.Uint16(t[spgLeafInfo:])&^spgNextMask|uint16(next)&spgNextMask)
	return nil
}

// A spgGrave says what takes the place of tuples that are removed: the first of them
// may leave another state than the rest.
type spgGrave struct {
	state       spgState
	first, rest int
	block       uint32
	offset      uint16
}

// spgBury replaces tuples by dead ones, so that the others keep their offset numbers
// (spgPageIndexMultiDelete).
func (p page) spgBury(q spgOpaque, numbers []uint16, g spgGrave) error {
	if len(numbers) == 0 {
		return nil
	}
	if len(numbers) > maxItems {
		return fmt.Errorf("%d tuples to remove from one page", len(numbers))
	}
	var room [maxItems]uint16
	sorted := append(room[:0], numbers...)
	slices.Sort(sorted)
	if err := p.deleteMany(sorted); err != nil {
		return err
	}
	for _, n := range sorted {
		state := g.rest
		if n == numbers[0] {
			state = g.first
		}
		t := spgDeadTuple(state, g.state, g.block, g.offset)
		if err := p.addItem(t[:], int(n), addIndex); err != nil {
			return err
		}
		q.spgCount(state)
	}
	return nil
}

// spgCount counts a dead tuple that was added.
func (q spgOpaque) spgCount(state int) {
	switch state {
	case spgRedirect:
		q.add(spgNRedirection, 1)
	case spgPlaceholder:
		q.add(spgNPlaceholder, 1)
	}
}

// moved is the grave of tuples that went elsewhere: the first one redirects scans that
// are under way. In a build there are none.
func (s spgState) moved(block uint32, offset uint16) spgGrave {
	g := spgGrave{s, spgRedirect, spgPlaceholder, block, offset}
	if s.build {
		g.first = spgPlaceholder
	}
	return g
}

var errNoTarget = errors.New("the record does not name the block that it links to")

// spgBlock is the number of the record's block with the given reference.
func (o *op) spgBlock(id uint8) (uint32, error) {
	b := o.rec.Block(id)
	if b == nil {
		return 0, errNoTarget
	}
	return uint32(b.Block), nil
}
