package redo

import (
	"errors"
	"fmt"

	"github.com/holdfastdb/holdfast/internal/pg"
)

// posting describes an index tuple's heap TIDs: one in its header, or a list at
// its end (nbtree.h).
type posting struct {
	tids    []byte // tidSize bytes each
	keySize int    // the tuple without its list
}

func (p posting) n() int { return len(p.tids) / tidSize }

func isPosting(t []byte) bool {
	return le.Uint16(t[tupInfo:])&altTID != 0 && le.Uint16(t[4:])&btIsPosting != 0
}

// postingOf parses a leaf tuple, at least indexTupleHeader bytes.
func postingOf(t []byte) (posting, error) {
	size := indexTupleSize(t)
	if size > len(t) || size < indexTupleHeader {
		return posting{}, fmt.Errorf("an index tuple says %d bytes and has %d", size, len(t))
	}
	switch {
	case isPosting(t):
		n, at := int(le.Uint16(t[4:])&btOffsetMask), int(tidBlock(t))
		if n < 1 || at < indexTupleHeader || at > size || n*tidSize > size-at {
			return posting{}, fmt.Errorf("a posting list of %d entries at %d in %d bytes", n, at, size)
		}
		return posting{t[at : at+n*tidSize], at}, nil
	case le.Uint16(t[tupInfo:])&altTID != 0:
		return posting{}, errors.New("a pivot tuple where a leaf tuple is expected")
	}
	return posting{t[:tidSize], size}, nil
}

// swapPosting puts newItem's TID into a posting list and gives newItem the list's
// last one, both in place (_bt_swap_posting).
func swapPosting(newItem, list []byte, at int) error {
	p, err := postingOf(list)
	if err != nil {
		return err
	}
	n := p.n()
	if !isPosting(list) || at <= 0 || at >= n {
		return fmt.Errorf("a posting list of %d entries cannot be split at %d", n, at)
	}
	if le.Uint16(newItem[tupInfo:])&altTID != 0 {
		return errors.New("the new item of a posting list split has no heap TID")
	}
	var last [tidSize]byte
	copy(last[:], p.tids[(n-1)*tidSize:])
	copy(p.tids[(at+1)*tidSize:], p.tids[at*tidSize:(n-1)*tidSize])
	copy(p.tids[at*tidSize:(at+1)*tidSize], newItem)
	copy(newItem, last[:])
	return nil
}

// formPosting makes a tuple with base's key and the given TIDs in dst
// (_bt_form_posting).
func formPosting(dst *[maxIndexTuple]byte, base []byte, keySize int, tids []byte) ([]byte, error) {
	size, n := keySize, len(tids)/tidSize
	if n > 1 {
		size = align8(keySize + len(tids))
	}
	if n < 1 || n > btOffsetMask || size > maxIndexTuple || keySize > len(base) || keySize%8 != 0 {
		return nil, fmt.Errorf("cannot form a posting list of %d entries after a key of %d bytes", n, keySize)
	}
	t := dst[:size]
	clear(t)
	copy(t, base[:keySize])
	info := le.Uint16(t[tupInfo:])&^indexSizeMask | uint16(size)
	if n > 1 {
		le.PutUint16(t[tupInfo:], info|altTID)
		putTID(t, uint32(keySize), uint16(n)|btIsPosting)
		copy(t[keySize:], tids)
		return t, nil
	}
	le.PutUint16(t[tupInfo:], info&^altTID)
	copy(t, tids)
	return t, nil
}

// shrinkPosting removes the entries with the given indexes, in ascending order,
// from the posting list at offset number n (_bt_update_posting).
func (p page) shrinkPosting(n int, remove []uint16) error {
	t, err := p.indexTuple(n)
	if err != nil {
		return err
	}
	old, err := postingOf(t)
	if err != nil {
		return err
	}
	if !isPosting(t) {
		return errors.New("not a posting list")
	}
	var room, formed [maxIndexTuple]byte
	keep := room[:0]
	for i := range old.n() {
		if len(remove) > 0 && int(remove[0]) == i {
			remove = remove[1:]
			continue
		}
		if len(keep)+tidSize > len(room) {
			return fmt.Errorf("a posting list of %d entries", old.n())
		}
		keep = append(keep, old.tids[i*tidSize:(i+1)*tidSize]...)
	}
	if len(remove) > 0 {
		return fmt.Errorf("entry %d to remove is out of order or beyond the %d there are", remove[0], old.n())
	}
	t, err = formPosting(&formed, t, old.keySize, keep)
	if err != nil {
		return err
	}
	return p.overwrite(n, t)
}

// btreeDedup merges runs of equal tuples into posting lists. The record lists the
// runs: the offset number of the first tuple and how many there are.
func (o *op) btreeDedup() error {
	c := cursor{b: o.rec.MainData}
	n := int(c.u16())
	runs := cursor{b: o.blk.Data}
	if c.short || len(runs.b) < n*4 {
		return errShort
	}
	q, err := o.btExisting()
	if err != nil {
		return err
	}
	var room [pg.BlockSize]byte
	out := page(room[:])
	out.initLike(o.page)
	first := q.firstDataOffset()
	if first == 2 {
		highKey, err := o.page.indexTuple(1)
		if err != nil {
			return fmt.Errorf("high key: %w", err)
		}
		if err := out.addItem(highKey, 1, addIndex); err != nil {
			return fmt.Errorf("high key: %w", err)
		}
	}
	off, end := first, o.page.maxOffset()+1
	for range n {
		base, count := int(runs.u16()), int(runs.u16())
		if base < off || count < 2 || base+count > end {
			return fmt.Errorf("a run of %d tuples from offset number %d: outside of [%d,%d)", count, base, off, end)
		}
		if err := o.page.copyItems(out, off, base); err != nil {
			return err
		}
		if err := o.page.mergeItems(out, base, base+count); err != nil {
			return err
		}
		off = base + count
	}
	if err := o.page.copyItems(out, off, end); err != nil {
		return err
	}
	opaque(out[out.special():]).clearFlags(btpHasGarbage)
	copy(o.page, out)
	return o.done()
}

// copyItems appends the tuples from offset number from up to, not with, to.
func (p page) copyItems(out page, from, to int) error {
	for n := from; n < to; n++ {
		t, err := p.indexTuple(n)
		if err != nil {
			return err
		}
		if size := indexTupleSize(t); size < len(t) { // line pointers may count padding
			t = t[:max(size, indexTupleHeader)]
		}
		if err := out.addItem(t, out.maxOffset()+1, addIndex); err != nil {
			return err
		}
	}
	return nil
}

// mergeItems appends one posting list made of the tuples in [from, to).
func (p page) mergeItems(out page, from, to int) error {
	var room, formed [maxIndexTuple]byte
	tids, keySize := room[:0], 0
	var base []byte
	for n := from; n < to; n++ {
		t, err := p.indexTuple(n)
		if err != nil {
			return err
		}
		list, err := postingOf(t)
		if err != nil {
			return fmt.Errorf("offset number %d: %w", n, err)
		}
		if base == nil {
			base, keySize = t, list.keySize
		}
		if len(tids)+len(list.tids) > len(room) {
			return fmt.Errorf("the run from offset number %d makes too long a posting list", from)
		}
		tids = append(tids, list.tids...)
	}
	t, err := formPosting(&formed, base, keySize, tids)
	if err != nil {
		return err
	}
	return out.addItem(t, out.maxOffset()+1, addIndex)
}
