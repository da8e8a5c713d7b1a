package redo

import (
	"errors"
	"fmt"
)

// A posting tree's leaf holds segments one after the other (GinPostingList in
// ginblock.h, ginpostinglist.c): the first TID, the length of what follows, and the
// differences between the further TIDs in a variable-length code, padded to an even
// length. A TID is a number for that, its offset number the low 11 bits.
const (
	ginSegHeader  = tidSize + 2
	ginOffsetBits = 11
	ginOffsetMask = 1<<ginOffsetBits - 1
	ginMaxCode    = 7                         // MaxBytesPerInteger
	ginTIDLimit   = 1 << (32 + ginOffsetBits) // above all TIDs
)

// What is done to a segment (ginxlog.h).
const (
	ginSegDelete   = 1
	ginSegInsert   = 2
	ginSegReplace  = 3
	ginSegAddItems = 4
)

// ginInsertPostingItem adds a child to an inner page of a posting tree: the new item
// has its left half, the one that was at that place keeps the right half.
func (o *op) ginInsertPostingItem(right uint32) error {
	c := cursor{b: o.blk.Data}
	n, item := int(c.u16()), c.take(ginPostingItem)
	if err := c.err(); err != nil {
		return err
	}
	q, err := o.ginInner()
	if err != nil {
		return err
	}
	count := q.maxOff()
	if n < 1 || n > count || (count+1)*ginPostingItem > ginDataMax {
		return fmt.Errorf("cannot add posting item %d to %d", n, count)
	}
	at, end := ginDataAt+(n-1)*ginPostingItem, ginDataAt+count*ginPostingItem
	putTIDBlock(o.page[at:], right)
	copy(o.page[at+ginPostingItem:end+ginPostingItem], o.page[at:end])
	copy(o.page[at:], item)
	q.setMaxOff(count + 1)
	o.page.setLower(end + ginPostingItem)
	return o.done()
}

// ginInner is an inner page of a posting tree, its items checked to lie on it.
func (o *op) ginInner() (ginOpaque, error) {
	q, err := o.ginExisting(ginFlagData|ginFlagLeaf, ginFlagData)
	if err == nil && q.maxOff()*ginPostingItem > ginDataMax {
		err = fmt.Errorf("corrupt page: %d posting items", q.maxOff())
	}
	return q, err
}

// ginDeletePage takes a posting tree's page out (block 0), its item out of its parent
// (block 1), and leads its left sibling past it (block 2).
func (o *op) ginDeletePage() error {
	c := cursor{b: o.rec.MainData}
	parentOff := int(c.u16())
	c.take(2) // padding
	right, xid := c.u32(), c.u32()
	if err := c.err(); err != nil {
		return err
	}
	if o.blk.ID == 1 {
		return o.ginDeletePostingItem(parentOff)
	}
	q, err := o.ginExisting(ginFlagData, ginFlagData)
	if err != nil {
		return err
	}
	switch o.blk.ID {
	case 0:
		q.setFlags(q.flags() | ginFlagDeleted)
		le.PutUint32(o.page[offPruneXid:], xid) // GinPageSetDeleteXid
	case 2:
		q.setRightLink(right)
	default:
		return errUnusedRef
	}
	return o.done()
}

func (o *op) ginDeletePostingItem(n int) error {
	q, err := o.ginInner()
	if err != nil {
		return err
	}
	count := q.maxOff()
	if n < 1 || n > count {
		return fmt.Errorf("no posting item %d to delete: there are %d", n, count)
	}
	at, end := ginDataAt+(n-1)*ginPostingItem, ginDataAt+count*ginPostingItem
	copy(o.page[at:], o.page[at+ginPostingItem:end])
	q.setMaxOff(count - 1)
	o.page.setLower(end - ginPostingItem)
	return o.done()
}

// ginRecompress changes segments of a posting tree's leaf, in ascending order
// (ginRedoRecompress).
func (o *op) ginRecompress() error {
	const flags = ginFlagData | ginFlagLeaf | ginFlagCompressed
	if _, err := o.ginExisting(flags, flags); err != nil {
		return err
	}
	lower := o.page.lower()
	if lower < ginDataAt {
		return fmt.Errorf("corrupt posting tree page: lower %d", lower)
	}
	var room [ginDataMax]byte
	n := copy(room[:], o.page[ginDataAt:lower])
	r := ginRecompressor{old: cursor{b: room[:n]}, out: ginWriter{b: o.page[ginDataAt:ginSpecial]}}
	c := cursor{b: o.blk.Data}
	for range c.u16() {
		segment, action := int(c.u8()), c.u8()
		if err := c.err(); err != nil {
			return err
		}
		if err := r.change(segment, action, &c); err != nil {
			return fmt.Errorf("segment %d: %w", segment, err)
		}
	}
	if err := errors.Join(c.err(), r.out.write(r.old.b)); err != nil {
		return err
	}
	o.page.setLower(ginDataAt + r.out.n)
	return o.done()
}

// A ginRecompressor makes a leaf's new segments from a copy of the old ones.
type ginRecompressor struct {
	old     cursor
	segment int // the number of the one that is next in old
	out     ginWriter
}

// change does one action, whose data is next in c.
func (r *ginRecompressor) change(segment int, action uint8, c *cursor) error {
	if segment < r.segment {
		return errors.New("out of order")
	}
	for r.segment < segment {
		if err := r.copyNext(); err != nil {
			return err
		}
	}
	switch action {
	case ginSegDelete:
		_, err := r.next()
		return err
	case ginSegInsert, ginSegReplace:
		seg, err := takeSegment(c)
		if err == nil && action == ginSegReplace {
			_, err = r.next()
		}
		if err != nil {
			return err
		}
		return r.out.write(seg)
	case ginSegAddItems:
		items := c.take(tidSize * int(c.u16()))
		if err := c.err(); err != nil {
			return err
		}
		seg, err := r.next()
		if err != nil {
			return err
		}
		return r.out.merge(items, seg)
	}
	return fmt.Errorf("action %d is unknown", action)
}

// next takes the next old segment.
func (r *ginRecompressor) next() ([]byte, error) {
	r.segment++
	return takeSegment(&r.old)
}

func (r *ginRecompressor) copyNext() error {
	seg, err := r.next()
	if err != nil {
		return err
	}
	return r.out.write(seg)
}

// takeSegment reads a segment with its padding.
func takeSegment(c *cursor) ([]byte, error) {
	if len(c.b) < ginSegHeader {
		return nil, fmt.Errorf("a segment in %d bytes", len(c.b))
	}
	n := int(le.Uint16(c.b[tidSize:]))
	n += ginSegHeader + n&1
	if n > len(c.b) {
		return nil, fmt.Errorf("a segment of %d bytes, %d left", n, len(c.b))
	}
	return c.take(n), nil
}

// A ginWriter puts segments into b.
type ginWriter struct {
	b []byte
	n int // bytes written
}

var errGINFull = errors.New("the segments do not fit on the page")

func (w *ginWriter) write(b []byte) error {
	if len(b) > len(w.b)-w.n {
		return errGINFull
	}
	w.n += copy(w.b[w.n:], b)
	return nil
}

// merge writes a segment of two ascending lists of TIDs: plain ones, and those of a
// segment (ginMergeItemPointers, ginCompressPostingList). A TID in both is written once.
func (w *ginWriter) merge(items, seg []byte) error {
	at := w.n
	if err := w.write(make([]byte, ginSegHeader)); err != nil {
		return err
	}
	a, b := tidReader{plain: items}, tidReader{plain: seg[:tidSize], coded: seg[ginSegHeader:][:le.Uint16(seg[tidSize:])]}
	x, y, prev := a.next(), b.next(), uint64(0)
	for x != ginTIDLimit || y != ginTIDLimit {
		v := min(x, y)
		if v == x {
			x = a.next()
		}
		if v == y {
			y = b.next()
		}
		switch {
		case v <= prev:
			return errors.New("its TIDs are not in ascending order")
		case prev == 0:
			putTID(w.b[at:], uint32(v>>ginOffsetBits), uint16(v&ginOffsetMask))
		default:
			if err := w.code(v - prev); err != nil {
				return err
			}
		}
		prev = v
	}
	if err := errors.Join(a.err, b.err); err != nil {
		return err
	}
	size := w.n - at - ginSegHeader
	le.PutUint16(w.b[at+tidSize:], uint16(size))
	return w.write(make([]byte, size&1))
}

// code writes a difference, seven bits a byte from the lowest on, the high bit set in
// all but the last byte.
func (w *ginWriter) code(v uint64) error {
	var code [ginMaxCode]byte
	n := 0
	for ; v > 0x7F; v >>= 7 {
		code[n] = 0x80 | byte(v)
		n++
	}
	code[n] = byte(v)
	return w.write(code[:n+1])
}

// A tidReader reads TIDs as numbers: plain ones, then differences. It gives ginTIDLimit
// at the end and after an error.
type tidReader struct {
	plain, coded []byte
	last         uint64
	err          error
}

func (r *tidReader) next() uint64 {
	switch {
	case r.err != nil:
		return ginTIDLimit
	case len(r.plain) > 0:
		n := le.Uint16(r.plain[4:])
		r.last = uint64(tidBlock(r.plain))<<ginOffsetBits | uint64(n)
		r.plain = r.plain[tidSize:]
		if n == 0 || n > ginOffsetMask {
			return r.fail()
		}
		return r.last
	case len(r.coded) == 0:
		return ginTIDLimit
	}
	delta, n := uint64(0), 0
	for more := true; more; n++ {
		if n == len(r.coded) || n == ginMaxCode {
			return r.fail()
		}
		delta |= uint64(r.coded[n]&0x7F) << (7 * n)
		more = r.coded[n]&0x80 != 0
	}
	r.coded = r.coded[n:]
	r.last += delta
	if r.last >= ginTIDLimit || r.last&ginOffsetMask == 0 {
		return r.fail()
	}
	return r.last
}

func (r *tidReader) fail() uint64 {
	r.err = fmt.Errorf("corrupt posting list after TID (%d,%d)", r.last>>ginOffsetBits, r.last&ginOffsetMask)
	return ginTIDLimit
}
