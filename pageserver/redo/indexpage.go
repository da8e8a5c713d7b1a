package redo

import "fmt"

// checkedIndexItem is the line pointer at offset number n with its tuple checked
// to lie, with padding, in the tuple area.
func (p page) checkedIndexItem(n int) (off, size int, err error) {
	item, err := p.item(n)
	if err != nil {
		return 0, 0, err
	}
	off, size = item.off(), align8(item.len())
	if off < p.upper() || off+size > p.special() || off%8 != 0 {
		return 0, 0, fmt.Errorf("offset number %d: corrupt line pointer %d+%d", n, off, item.len())
	}
	return off, size, nil
}

// shift moves the tuples that lie below (that is, at smaller offsets than) the
// tuple at off by delta bytes towards the end of the page and corrects the line
// pointers of everything up to off.
func (p page) shift(off, delta int) {
	upper := p.upper()
	copy(p[upper+delta:off+delta], p[upper:off])
	p.setUpper(upper + delta)
	for n := 1; n <= p.maxOffset(); n++ {
		if item := p.rawItem(n); item.len() != 0 && item.off() <= off {
			p.setItem(n, makeItem(item.off()+delta, item.flags(), item.len()))
		}
	}
}

// deleteOne removes a line pointer and its tuple, keeping the physical order of
// the others (PageIndexTupleDelete).
func (p page) deleteOne(n int) error {
	off, size, err := p.checkedIndexItem(n)
	if err != nil {
		return err
	}
	copy(p[linePos(n):], p[linePos(n+1):p.lower()])
	p.setLower(p.lower() - itemIDSize)
	p.shift(off, size)
	return nil
}

// deleteNoCompact is deleteOne, but the other tuples keep their offset numbers: the
// line pointer stays, unused, unless it is the last one (PageIndexTupleDeleteNoCompact).
func (p page) deleteNoCompact(n int) error {
	off, size, err := p.checkedIndexItem(n)
	if err != nil {
		return err
	}
	if n < p.maxOffset() {
		p.setItem(n, 0)
	} else {
		p.setLower(p.lower() - itemIDSize)
	}
	p.shift(off, size)
	return nil
}

// deleteMany removes line pointers, given in ascending order, with their tuples
// (PageIndexMultiDelete, which for one or two removes them singly: the physical
// order of the remaining tuples depends on that).
func (p page) deleteMany(numbers []uint16) error {
	if len(numbers) <= 2 {
		for i := len(numbers) - 1; i >= 0; i-- {
			if err := p.deleteOne(int(numbers[i])); err != nil {
				return err
			}
		}
		return nil
	}
	var room [maxItems]place
	var items [maxItems]itemID
	keep := room[:0]
	for n := 1; n <= p.maxOffset(); n++ {
		off, size, err := p.checkedIndexItem(n)
		if err != nil {
			return err
		}
		if len(numbers) > 0 && n == int(numbers[0]) {
			numbers = numbers[1:]
			continue
		}
		items[len(keep)] = p.rawItem(n)
		keep = append(keep, place{uint16(len(keep) + 1), uint16(off), uint16(size)})
	}
	if len(numbers) > 0 {
		return fmt.Errorf("offset number %d to delete is out of order or beyond the page's end", numbers[0])
	}
	for i := range keep {
		p.setItem(i+1, items[i])
	}
	p.setLower(headerSize + len(keep)*itemIDSize)
	return p.compact(keep)
}

// overwrite replaces the tuple at offset number n by one of another size
// (PageIndexTupleOverwrite).
func (p page) overwrite(n int, tuple []byte) error {
	off, oldSize, err := p.checkedIndexItem(n)
	if err != nil {
		return err
	}
	size := align8(len(tuple))
	if size > oldSize+p.upper()-p.lower() {
		return fmt.Errorf("no room to replace the item at offset number %d by %d bytes", n, len(tuple))
	}
	if delta := oldSize - size; delta != 0 {
		p.shift(off, delta)
		off += delta
	}
	p.setItem(n, makeItem(off, p.rawItem(n).flags(), len(tuple)))
	copy(p[off:], tuple)
	return nil
}
