package redo

import "fmt"

// Layout of a heap tuple's header (htup_details.h).
const (
	tupXmin      = 0
	tupXmax      = 4
	tupCid       = 8 // t_field3: cmin, cmax, a combo of both, or xvac
	tupCtid      = 12
	tupInfomask2 = 18
	tupInfomask  = 20
	tupHoff      = 22
	tupHeader    = 23 // SizeofHeapTupleHeader

	maxHeapTuples    = (8192 - headerSize) / (24 + itemIDSize) // MaxHeapTuplesPerPage, 291
	maxHeapTupleSize = 8192 - 32                               // MaxHeapTupleSize
)

// t_infomask and t_infomask2 bits.
const (
	xmaxKeyShrLock = 0x0010
	comboCid       = 0x0020
	xmaxExclLock   = 0x0040
	xmaxLockOnly   = 0x0080
	xmaxCommitted  = 0x0400
	xmaxInvalid    = 0x0800
	xmaxIsMulti    = 0x1000
	heapMoved      = 0xC000
	lockMask       = xmaxKeyShrLock | xmaxExclLock
	xmaxBits       = xmaxCommitted | xmaxInvalid | xmaxIsMulti | lockMask | xmaxLockOnly
	xminFrozen     = 0x0300
	xactMask       = 0xFFF0

	keysUpdated = 0x2000 // infomask2
	hotUpdated  = 0x4000 // infomask2
)

// infobits_set of the delete, update and lock records (heapam_xlog.h).
const (
	infoXmaxIsMulti    = 0x01
	infoXmaxLockOnly   = 0x02
	infoXmaxExclLock   = 0x04
	infoXmaxKeyShrLock = 0x08
	infoKeysUpdated    = 0x10
)

// heapTuple is a tuple in place on its page, at least tupHeader bytes.
type heapTuple []byte

func (t heapTuple) infomask() uint16      { return le.Uint16(t[tupInfomask:]) }
func (t heapTuple) setInfomask(v uint16)  { le.PutUint16(t[tupInfomask:], v) }
func (t heapTuple) infomask2() uint16     { return le.Uint16(t[tupInfomask2:]) }
func (t heapTuple) setInfomask2(v uint16) { le.PutUint16(t[tupInfomask2:], v) }
func (t heapTuple) setXmin(x uint32)      { le.PutUint32(t[tupXmin:], x) }
func (t heapTuple) setXmax(x uint32)      { le.PutUint32(t[tupXmax:], x) }
func (t heapTuple) setXvac(x uint32)      { le.PutUint32(t[tupCid:], x) }
func (t heapTuple) hoff() int             { return int(t[tupHoff]) }
func (t heapTuple) setCtid(block uint32, n uint16) {
	putTID(t[tupCtid:], block, n)
}

// setCid stores FirstCommandId, which is all that redo knows of cmin and cmax.
func (t heapTuple) setCid() {
	le.PutUint32(t[tupCid:], 0)
	t.setInfomask(t.infomask() &^ comboCid)
}

// setXmaxState replaces what the tuple says on its xmax by a record's
// infobits_set (fix_infomask_from_infobits).
func (t heapTuple) setXmaxState(bits uint8) {
	mask, mask2 := t.infomask()&^(xmaxBits|heapMoved), t.infomask2()&^keysUpdated
	for _, b := range [...]struct {
		info uint8
		mask uint16
	}{
		{infoXmaxIsMulti, xmaxIsMulti}, {infoXmaxLockOnly, xmaxLockOnly},
		{infoXmaxExclLock, xmaxExclLock}, {infoXmaxKeyShrLock, xmaxKeyShrLock},
	} {
		if bits&b.info != 0 {
			mask |= b.mask
		}
	}
	if bits&infoKeysUpdated != 0 {
		mask2 |= keysUpdated
	}
	t.setInfomask(mask)
	t.setInfomask2(mask2)
}

// lockedOnly is HEAP_XMAX_IS_LOCKED_ONLY.
func (t heapTuple) lockedOnly() bool {
	m := t.infomask()
	return m&xmaxLockOnly != 0 || m&(xmaxIsMulti|lockMask) == xmaxExclLock
}

// heapTuple is the tuple at offset number n, whose line pointer must be LP_NORMAL.
func (p page) heapTuple(n int) (heapTuple, error) {
	item, err := p.item(n)
	if err != nil {
		return nil, err
	}
	if item.flags() != lpNormal {
		return nil, fmt.Errorf("the line pointer at offset number %d is not normal", n)
	}
	t, err := p.storage(item)
	if err != nil {
		return nil, fmt.Errorf("offset number %d: %w", n, err)
	}
	if len(t) < tupHeader {
		return nil, fmt.Errorf("offset number %d: a heap tuple of %d bytes is shorter than its header", n, len(t))
	}
	return t, nil
}

// setPrunable lowers pd_prune_xid to xid (PageSetPrunable).
func (p page) setPrunable(xid uint32) {
	if old := p.pruneXid(); old == 0 || xidPrecedes(xid, old) {
		le.PutUint32(p[offPruneXid:], xid)
	}
}

// xidPrecedes compares modulo 2^32; permanent xids precede all others
// (TransactionIdPrecedes).
func xidPrecedes(a, b uint32) bool {
	const firstNormal = 3
	if a < firstNormal || b < firstNormal {
		return a < b
	}
	return int32(a-b) < 0
}

// putTID stores an ItemPointerData: block number in two halves, the high one
// first, then the offset number.
func putTID(dst []byte, block uint32, n uint16) {
	putTIDBlock(dst, block)
	le.PutUint16(dst[4:], n)
}

func putTIDBlock(dst []byte, block uint32) {
	le.PutUint16(dst, uint16(block>>16))
	le.PutUint16(dst[2:], uint16(block))
}

func tidBlock(src []byte) uint32 {
	return uint32(le.Uint16(src))<<16 | uint32(le.Uint16(src[2:]))
}
