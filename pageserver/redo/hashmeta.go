package redo

import (
	"fmt"
	"math"
	"math/bits"
)

// Layout of a hash index's metapage and bitmap pages (hash.h): both have their
// content right after the page header, and pd_lower behind it.
const (
	hashmMagic     = headerSize + 0
	hashmVersion   = headerSize + 4
	hashmTuples    = headerSize + 8 // a double
	hashmFFactor   = headerSize + 16
	hashmBSize     = headerSize + 18
	hashmBMSize    = headerSize + 20
	hashmBMShift   = headerSize + 22
	hashmMaxBucket = headerSize + 24
	hashmHighMask  = headerSize + 28
	hashmLowMask   = headerSize + 32
	hashmOvflPoint = headerSize + 36
	hashmFirstFree = headerSize + 40
	hashmNMaps     = headerSize + 44
	hashmProcID    = headerSize + 48
	hashmSpares    = headerSize + 52
	hashmMapp      = hashmSpares + 4*hashMaxSplitpoints
	hashmEnd       = hashmMapp + 4*hashMaxBitmaps + 4 // with padding

	hashMagic          = 0x6440640
	hashVersion        = 4
	hashMaxSplitpoints = 98 // HASH_MAX_SPLITPOINTS
	hashMaxBitmaps     = 1024
	hashOnePhase       = 10      // HASH_SPLITPOINT_GROUPS_WITH_ONE_PHASE
	hashPhaseBits      = 2       // HASH_SPLITPOINT_PHASE_BITS
	hashMaxBuckets     = 1 << 30 // that an index may begin with

	hashBitmapRoom  = 8192 - headerSize - hashOpaqueSize
	hashBitmapSize  = 4096 // the largest power of two that fits there
	hashBitmapShift = 15   // log2 of its bits
)

// hashMeta is the metapage, checked to be one.
func (o *op) hashMeta() error {
	if _, err := o.hashExisting(lhMeta); err != nil {
		return err
	}
	if m := le.Uint32(o.page[hashmMagic:]); m != hashMagic {
		return fmt.Errorf("the metapage's magic number is %#x", m)
	}
	return nil
}

func (p page) u32(at int) uint32       { return le.Uint32(p[at:]) }
func (p page) putU32(at int, v uint32) { le.PutUint32(p[at:], v) }
func (p page) hashTuples() float64     { return math.Float64frombits(le.Uint64(p[hashmTuples:])) }
func (p page) setHashTuples(v float64) { le.PutUint64(p[hashmTuples:], math.Float64bits(v)) }
func ceilLog2(n uint32) (log int)      { return bits.Len32(max(n, 1) - 1) }
func (o *op) hashSpares() (at int, err error) {
	point := o.page.u32(hashmOvflPoint)
	if point >= hashMaxSplitpoints {
		return 0, fmt.Errorf("the metapage's splitpoint is %d", point)
	}
	return hashmSpares + 4*int(point), nil
}

// hashInitMeta makes the metapage of an index for an estimated number of tuples
// (_hash_init_metabuffer).
func (o *op) hashInitMeta() error {
	c := cursor{b: o.rec.MainData}
	tuples, procid, ffactor := math.Float64frombits(c.u64()), c.u32(), c.u16()
	if err := c.err(); err != nil {
		return err
	}
	if ffactor == 0 || math.IsNaN(tuples) {
		return fmt.Errorf("a hash index for %v tuples with a fill factor of %d", tuples, ffactor)
	}
	buckets := hashBuckets(tuples / float64(ffactor))
	spare := hashSpareIndex(buckets)
	highMask := uint32(1)<<bits.Len32(buckets) - 1
	o.hashInit(invalidBlock, invalidBlock, lhMeta)
	p := o.page
	p.putU32(hashmMagic, hashMagic)
	p.putU32(hashmVersion, hashVersion)
	le.PutUint16(p[hashmFFactor:], ffactor)
	le.PutUint16(p[hashmBSize:], hashBitmapRoom)
	le.PutUint16(p[hashmBMSize:], hashBitmapSize)
	le.PutUint16(p[hashmBMShift:], hashBitmapShift)
	p.putU32(hashmProcID, procid)
	p.putU32(hashmMaxBucket, buckets-1)
	p.putU32(hashmHighMask, highMask)
	p.putU32(hashmLowMask, highMask>>1)
	p.putU32(hashmSpares+4*spare, 1)
	p.putU32(hashmOvflPoint, uint32(spare))
	p.setLower(hashmEnd)
	return o.done()
}

// hashBuckets is how many buckets an index begins with that wants at least so many:
// all those of a phase of allocation.
func hashBuckets(want float64) uint32 {
	switch {
	case want <= 2:
		return 2
	case want >= hashMaxBuckets:
		return hashMaxBuckets
	}
	return hashTotalBuckets(hashSpareIndex(uint32(want)))
}

// hashSpareIndex is the phase that allocates the last of n buckets: each doubling is
// one phase, and four from 512 buckets on (_hash_spareindex).
func hashSpareIndex(n uint32) int {
	group := ceilLog2(n)
	if group < hashOnePhase {
		return group
	}
	phase := int(n-1) >> (group - (hashPhaseBits + 1)) & (1<<hashPhaseBits - 1)
	return hashOnePhase + (group-hashOnePhase)<<hashPhaseBits + phase
}

// hashTotalBuckets is how many buckets there are after a phase (_hash_get_totalbuckets).
func hashTotalBuckets(phase int) uint32 {
	if phase < hashOnePhase {
		return 1 << phase
	}
	phase -= hashOnePhase
	before := uint32(1) << (hashOnePhase + phase>>hashPhaseBits - 1)
	return before + before>>hashPhaseBits*uint32(phase&(1<<hashPhaseBits-1)+1)
}

// hashInitBitmap makes a bitmap page, all of whose bits say "in use".
func (o *op) hashInitBitmap() error {
	c := cursor{b: o.rec.MainData}
	size := int(c.u16())
	if err := c.err(); err != nil {
		return err
	}
	if size > hashBitmapRoom {
		return fmt.Errorf("a bitmap of %d bytes", size)
	}
	o.hashInit(invalidBlock, invalidBlock, lhBitmap)
	for i := headerSize; i < headerSize+size; i++ {
		o.page[i] = 0xFF
	}
	o.page.setLower(headerSize + size)
	return o.done()
}

// hashAddBitmap notes a bitmap page in the metapage.
func (o *op) hashAddBitmap(block uint32) error {
	n := o.page.u32(hashmNMaps)
	if n >= hashMaxBitmaps {
		return fmt.Errorf("the metapage has %d bitmap pages already", n)
	}
	o.page.putU32(hashmMapp+4*int(n), block)
	o.page.putU32(hashmNMaps, n+1)
	return nil
}

// hashAddFirstBitmap notes the first bitmap page, which follows the first buckets.
func (o *op) hashAddFirstBitmap() error {
	if err := o.hashMeta(); err != nil {
		return err
	}
	if err := o.hashAddBitmap(o.page.u32(hashmMaxBucket) + 2); err != nil {
		return err
	}
	return o.done()
}

func (o *op) hashCountInserted() error {
	if err := o.hashMeta(); err != nil {
		return err
	}
	o.page.setHashTuples(o.page.hashTuples() + 1)
	return o.done()
}

func (o *op) hashMetaVacuumed() error {
	n, _, err := o.hashVacuumed()
	if err != nil {
		return err
	}
	if err := o.hashMeta(); err != nil {
		return err
	}
	o.page.setHashTuples(o.page.hashTuples() - float64(n))
	return o.done()
}

func (o *op) hashUpdateMeta() error {
	c := cursor{b: o.rec.MainData}
	tuples := math.Float64frombits(c.u64())
	if err := c.err(); err != nil {
		return err
	}
	if err := o.hashMeta(); err != nil {
		return err
	}
	o.page.setHashTuples(tuples)
	return o.done()
}

// hashMetaAddOvfl counts the new overflow page unless it is a freed one, and with it
// the new bitmap page that reference 3 may be.
func (o *op) hashMetaAddOvfl() error {
	c, d := cursor{b: o.rec.MainData}, cursor{b: o.blk.Data}
	c.u16() // size of a bitmap
	reused, firstFree := c.u8() != 0, d.u32()
	if c.short || d.short {
		return errShort
	}
	if err := o.hashMeta(); err != nil {
		return err
	}
	o.page.putU32(hashmFirstFree, firstFree)
	if reused {
		return o.done()
	}
	spares, err := o.hashSpares()
	if err != nil {
		return err
	}
	added := uint32(1)
	if b := o.rec.Block(3); b != nil {
		added++
		if err := o.hashAddBitmap(uint32(b.Block)); err != nil {
			return err
		}
	}
	o.page.putU32(spares, o.page.u32(spares)+added)
	return o.done()
}

// hashMetaSplit counts the new bucket, and may begin a new doubling (the masks) or a
// new phase of allocation (the spares).
func (o *op) hashMetaSplit() error {
	a, err := o.splitAllocation()
	if err != nil {
		return err
	}
	if err := o.hashMeta(); err != nil {
		return err
	}
	p, c := o.page, cursor{b: o.blk.Data}
	p.putU32(hashmMaxBucket, a.newBucket)
	if a.updates&splitUpdatesMasks != 0 {
		p.putU32(hashmLowMask, c.u32())
		p.putU32(hashmHighMask, c.u32())
	}
	if a.updates&splitUpdatesSpares != 0 {
		p.putU32(hashmOvflPoint, c.u32())
		spares, err := o.hashSpares()
		if err != nil {
			return err
		}
		p.putU32(spares, c.u32())
	}
	if err := c.err(); err != nil {
		return err
	}
	return o.done()
}

// hashMetaFreed notes that the freed overflow page is now the first free one.
func (o *op) hashMetaFreed() error {
	c := cursor{b: o.blk.Data}
	firstFree := c.u32()
	if err := c.err(); err != nil {
		return err
	}
	if err := o.hashMeta(); err != nil {
		return err
	}
	o.page.putU32(hashmFirstFree, firstFree)
	return o.done()
}

func (o *op) hashSetBit() error {
	b, mask, err := o.hashBit()
	if err != nil {
		return err
	}
	*b |= mask
	return o.done()
}

func (o *op) hashClearBit() error {
	b, mask, err := o.hashBit()
	if err != nil {
		return err
	}
	*b &^= mask
	return o.done()
}

// hashBit is the byte of a bitmap page that has the bit that the block's data names.
func (o *op) hashBit() (b *byte, mask byte, err error) {
	c := cursor{b: o.blk.Data}
	bit := c.u32()
	if err := c.err(); err != nil {
		return nil, 0, err
	}
	if _, err := o.hashExisting(lhBitmap); err != nil {
		return nil, 0, err
	}
	if bit >= hashBitmapRoom*8 {
		return nil, 0, fmt.Errorf("bit %d of a bitmap page", bit)
	}
	return &o.page[headerSize+bit/8], 1 << (bit % 8), nil
}
