package redo

import "fmt"

// Record kinds of the hash resource manager (hash_xlog.h).
const (
	hashInitMeta       = 0x00
	hashInitBitmap     = 0x10
	hashInsert         = 0x20
	hashAddOvfl        = 0x30
	hashSplitAllocate  = 0x40
	hashSplitPage      = 0x50
	hashSplitComplete  = 0x60
	hashMoveContents   = 0x70
	hashSqueeze        = 0x80
	hashDelete         = 0x90
	hashSplitCleanup   = 0xA0
	hashUpdateMeta     = 0xB0
	hashVacuumOnePage  = 0xC0
	splitUpdatesMasks  = 1 << 0 // XLH_SPLIT_META_UPDATE_*
	splitUpdatesSpares = 1 << 1
)

// Layout of the special area of a hash index's pages (hash.h).
const (
	hashOpaqueSize = 16
	hashoPrev      = 0
	hashoNext      = 4
	hashoBucket    = 8
	hashoFlag      = 12
	hashoPageID    = 14

	lhUnused       = 0
	lhOverflow     = 1 << 0
	lhBucket       = 1 << 1
	lhBitmap       = 1 << 2
	lhMeta         = 1 << 3
	lhNeedsCleanup = 1 << 6
	lhHasDead      = 1 << 7
	lhPageType     = lhOverflow | lhBucket | lhBitmap | lhMeta

	hashPageID   = 0xFF80
	invalidBlock = 0xFFFFFFFF // also InvalidBucket
)

// redoHash is hash_redo for one block (hash_xlog.c). A reference 0 of MOVE, SQUEEZE
// and DELETE only has recovery lock the bucket: its page stays as it is.
func redoHash(o *op) error {
	id := o.blk.ID
	switch o.rec.Info & infoMask {
	case hashInitMeta:
		return o.only(0, o.hashInitMeta)
	case hashInitBitmap:
		return o.oneOf(o.hashInitBitmap, o.hashAddFirstBitmap)
	case hashInsert:
		return o.oneOf(o.hashInsert, o.hashCountInserted)
	case hashAddOvfl:
		return o.oneOf(o.hashNewOvfl, o.hashLinkNext, o.hashSetBit, o.hashInitBitmap, o.hashMetaAddOvfl)
	case hashSplitAllocate:
		return o.oneOf(o.hashSplitOld, o.hashSplitNew, o.hashMetaSplit)
	case hashSplitPage:
		return fmt.Errorf("a split page's record has no image to apply of reference %d", id)
	case hashSplitComplete:
		return o.oneOf(o.hashSplitDone, o.hashSplitDone)
	case hashMoveContents:
		return o.oneOf(o.existing, o.hashMoveTo, o.hashDeleteItems)
	case hashSqueeze:
		return o.oneOf(o.existing, o.hashMoveTo, o.hashFreeOvfl, o.hashSqueezeLinks, o.hashSqueezeLinks, o.hashClearBit, o.hashMetaFreed)
	case hashDelete:
		return o.oneOf(o.existing, o.hashDeleteItems)
	case hashSplitCleanup:
		return o.only(0, o.hashSplitCleanup)
	case hashUpdateMeta:
		return o.only(0, o.hashUpdateMeta)
	case hashVacuumOnePage:
		return o.oneOf(o.hashVacuumPage, o.hashMetaVacuumed)
	}
	return errNoBlocks
}

// oneOf does what belongs to the block's reference number.
func (o *op) oneOf(fns ...func() error) error {
	if int(o.blk.ID) >= len(fns) {
		return errUnusedRef
	}
	return fns[o.blk.ID]()
}

// hashOpaque is the page's special area as a hash index's.
type hashOpaque []byte

func (q hashOpaque) flags() uint16       { return le.Uint16(q[hashoFlag:]) }
func (q hashOpaque) setPrev(v uint32)    { le.PutUint32(q[hashoPrev:], v) }
func (q hashOpaque) setNext(v uint32)    { le.PutUint32(q[hashoNext:], v) }
func (q hashOpaque) setFlags(v uint16)   { le.PutUint16(q[hashoFlag:], v) }
func (q hashOpaque) clearFlags(v uint16) { q.setFlags(q.flags() &^ v) }

// hashOpaque is the special area, checked to be a hash index's.
func (p page) hashOpaque() (hashOpaque, error) {
	if p.special() != len(p)-hashOpaqueSize {
		return nil, fmt.Errorf("not a hash page: its special area begins at %d", p.special())
	}
	q := hashOpaque(p[p.special():])
	if id := le.Uint16(q[hashoPageID:]); id != hashPageID {
		return nil, fmt.Errorf("not a hash page: its page id is %#x", id)
	}
	return q, nil
}

// hashExisting is a page that is in the index already, of one of the types.
func (o *op) hashExisting(types uint16) (hashOpaque, error) {
	if err := o.existing(); err != nil {
		return nil, err
	}
	q, err := o.page.hashOpaque()
	if err != nil {
		return nil, err
	}
	if q.flags()&lhPageType&types == 0 {
		return nil, fmt.Errorf("a hash page with flags %#x, want one of the types %#x", q.flags(), types)
	}
	return q, nil
}

// hashInit makes the page an empty hash page without a successor (_hash_initbuf).
func (o *op) hashInit(prev, bucket uint32, flags uint16) {
	o.page.init(hashOpaqueSize)
	q := hashOpaque(o.page[o.page.special():])
	q.setPrev(prev)
	q.setNext(invalidBlock)
	le.PutUint32(q[hashoBucket:], bucket)
	q.setFlags(flags)
	le.PutUint16(q[hashoPageID:], hashPageID)
}

func (o *op) hashInsert() error {
	c := cursor{b: o.rec.MainData}
	n := int(c.u16())
	if err := c.err(); err != nil {
		return err
	}
	if _, err := o.hashExisting(lhBucket | lhOverflow); err != nil {
		return err
	}
	t := o.blk.Data
	if len(t) < indexTupleHeader || indexTupleSize(t) != len(t) {
		return fmt.Errorf("an index tuple of %d bytes does not have the size it says", len(t))
	}
	if err := o.page.addItem(t, n, addIndex); err != nil {
		return err
	}
	return o.done()
}

// hashNewOvfl makes the overflow page that ADD_OVFL_PAGE appends to reference 1's.
func (o *op) hashNewOvfl() error {
	left := o.rec.Block(1)
	c := cursor{b: o.blk.Data}
	bucket := c.u32()
	if left == nil || c.short {
		return errShort
	}
	o.hashInit(uint32(left.Block), bucket, lhOverflow)
	return o.done()
}

func (o *op) hashLinkNext() error {
	right := o.rec.Block(0)
	if right == nil {
		return errShort
	}
	q, err := o.hashExisting(lhBucket | lhOverflow)
	if err != nil {
		return err
	}
	q.setNext(uint32(right.Block))
	return o.done()
}

// A splitAllocation is an xl_hash_split_allocate_page.
type splitAllocation struct {
	newBucket          uint32
	oldFlags, newFlags uint16
	updates            uint8
}

func (o *op) splitAllocation() (splitAllocation, error) {
	c := cursor{b: o.rec.MainData}
	a := splitAllocation{c.u32(), c.u16(), c.u16(), c.u8()}
	return a, c.err()
}

// hashSplitOld marks the bucket to split. A bucket's page notes in place of a
// predecessor what the highest bucket was when it was last split.
func (o *op) hashSplitOld() error {
	a, err := o.splitAllocation()
	if err != nil {
		return err
	}
	q, err := o.hashExisting(lhBucket)
	if err != nil {
		return err
	}
	q.setFlags(a.oldFlags)
	q.setPrev(a.newBucket)
	return o.done()
}

func (o *op) hashSplitNew() error {
	a, err := o.splitAllocation()
	if err != nil {
		return err
	}
	o.hashInit(a.newBucket, a.newBucket, a.newFlags)
	return o.done()
}

// hashSplitDone sets the flags of the old bucket (reference 0) or the new one.
func (o *op) hashSplitDone() error {
	c := cursor{b: o.rec.MainData}
	flags := [2]uint16{c.u16(), c.u16()}
	if err := c.err(); err != nil {
		return err
	}
	q, err := o.hashExisting(lhBucket)
	if err != nil {
		return err
	}
	q.setFlags(flags[o.blk.ID])
	return o.done()
}

func (o *op) hashSplitCleanup() error {
	q, err := o.hashExisting(lhBucket)
	if err != nil {
		return err
	}
	q.clearFlags(lhNeedsCleanup)
	return o.done()
}

// A squeeze is an xl_hash_squeeze_page; of it xl_hash_move_page_contents has only
// the number of tuples.
type squeeze struct {
	prev, next uint32
	tuples     int
	prevIsDest bool // the tuples go to the freed page's predecessor, which reference 3 then leaves out
}

func (o *op) squeeze() (squeeze, error) {
	c := cursor{b: o.rec.MainData}
	if o.rec.Info&infoMask == hashMoveContents {
		s := squeeze{tuples: int(c.u16())}
		return s, c.err()
	}
	s := squeeze{prev: c.u32(), next: c.u32(), tuples: int(c.u16())}
	c.u8() // whether they go to the bucket's first page
	s.prevIsDest = c.u8() != 0
	return s, c.err()
}

// hashMoveTo adds tuples that come from a later page of the chain. The data is their
// offset numbers, then the tuples, each padded.
func (o *op) hashMoveTo() error {
	s, err := o.squeeze()
	if err != nil {
		return err
	}
	q, err := o.hashExisting(lhBucket | lhOverflow)
	if err != nil {
		return err
	}
	if s.tuples > maxItems {
		return fmt.Errorf("%d tuples moved to one page", s.tuples)
	}
	var room [maxItems]uint16
	c := cursor{b: o.blk.Data}
	for _, n := range c.u16s(s.tuples, room[:0]) {
		if len(c.b) < indexTupleHeader {
			return errShort
		}
		size := align8(indexTupleSize(c.b))
		if size < indexTupleHeader {
			return fmt.Errorf("an index tuple of %d bytes is shorter than its header", size)
		}
		if t := c.take(size); t != nil {
			if err := o.page.addItem(t, int(n), addIndex); err != nil {
				return err
			}
		}
	}
	if c.short || s.tuples > 0 && len(c.b) > 0 {
		return fmt.Errorf("the tuples moved are not the %d that the record says", s.tuples)
	}
	if s.prevIsDest {
		q.setNext(s.next)
	}
	return o.done()
}

// hashFreeOvfl leaves an overflow page empty, to be found through its bit.
func (o *op) hashFreeOvfl() error {
	if _, err := o.hashExisting(lhOverflow); err != nil {
		return err
	}
	o.hashInit(invalidBlock, invalidBlock, lhUnused)
	return o.done()
}

// hashSqueezeLinks takes the freed page out of its chain, in the page before it
// (reference 3) or after it (4).
func (o *op) hashSqueezeLinks() error {
	s, err := o.squeeze()
	if err != nil {
		return err
	}
	q, err := o.hashExisting(lhBucket | lhOverflow)
	switch {
	case err != nil:
		return err
	case o.blk.ID == 4:
		q.setPrev(s.prev)
	case s.prevIsDest:
		return errUnusedRef
	default:
		q.setNext(s.next)
	}
	return o.done()
}

// hashDeleteItems deletes the offset numbers in the block's data, for DELETE and for
// the page that MOVE_PAGE_CONTENTS takes tuples from.
func (o *op) hashDeleteItems() error {
	c := cursor{b: o.rec.MainData}
	clean := c.u8() != 0
	if err := c.err(); err != nil {
		return err
	}
	q, err := o.hashExisting(lhBucket | lhOverflow)
	if err != nil {
		return err
	}
	if err := o.page.deleteListed(o.blk.Data, len(o.blk.Data)/2); err != nil {
		return err
	}
	if clean && o.rec.Info&infoMask == hashDelete {
		q.clearFlags(lhHasDead)
	}
	return o.done()
}

func (o *op) hashVacuumPage() error {
	n, numbers, err := o.hashVacuumed()
	if err != nil {
		return err
	}
	q, err := o.hashExisting(lhBucket | lhOverflow)
	if err != nil {
		return err
	}
	if err := o.page.deleteListed(numbers, n); err != nil {
		return err
	}
	q.clearFlags(lhHasDead)
	return o.done()
}

// hashVacuumed is what VACUUM_ONE_PAGE deletes: how many tuples, and their offset
// numbers.
func (o *op) hashVacuumed() (n int, numbers []byte, err error) {
	c := cursor{b: o.rec.MainData}
	c.u32() // latestRemovedXid
	n = int(int32(c.u32()))
	if n < 0 || n > maxItems {
		return 0, nil, fmt.Errorf("%d tuples deleted on one page", n)
	}
	return n, c.b, c.err()
}

// deleteListed is deleteMany of n little-endian offset numbers.
func (p page) deleteListed(b []byte, n int) error {
	if n > maxItems {
		return fmt.Errorf("%d tuples deleted on one page", n)
	}
	var room [maxItems]uint16
	c := cursor{b: b}
	numbers := c.u16s(n, room[:0])
	if err := c.err(); err != nil {
		return err
	}
	return p.deleteMany(numbers)
}

// maskHash is hash_mask: a free page says nothing, and dead tuples are hints.
func maskHash(p page, _ uint32) error {
	if err := maskHints(p); err != nil {
		return err
	}
	q, err := p.hashOpaque()
	if err != nil {
		return err
	}
	switch kind := q.flags() & lhPageType; {
	case kind == lhUnused:
		clear(p[headerSize:])
		p.setLower(0)
		p.setUpper(0)
		return nil
	case kind == lhBucket || kind == lhOverflow:
		p.maskItemFlags()
	}
	q.clearFlags(lhHasDead)
	return nil
}
