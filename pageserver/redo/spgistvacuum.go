package redo

import "fmt"

// spgVacuumLeaf removes leaf tuples of chains. A chain that loses its head gets the
// next live tuple in the head's place; a chain without live tuples keeps a dead head.
func (o *op) spgVacuumLeaf() error {
	c := cursor{b: o.rec.MainData}
	ndead, nplaceholder, nmove, nchain := int(c.u16()), int(c.u16()), int(c.u16()), int(c.u16())
	state := c.spgState()
	var room [6][maxItems]uint16
	dead, placeholders := c.u16s(ndead, room[0][:0]), c.u16s(nplaceholder, room[1][:0])
	from, to := c.u16s(nmove, room[2][:0]), c.u16s(nmove, room[3][:0])
	link, next := c.u16s(nchain, room[4][:0]), c.u16s(nchain, room[5][:0])
	if err := c.err(); err != nil {
		return err
	}
	q, err := o.spgExisting()
	if err != nil {
		return err
	}
	gone := spgGrave{state: state, first: spgPlaceholder, rest: spgPlaceholder}
	if err := o.page.spgBury(q, dead, spgGrave{state: state, first: spgDead, rest: spgDead}); err != nil {
		return err
	}
	if err := o.page.spgBury(q, placeholders, gone); err != nil {
		return err
	}
	for i := range from {
		if err := o.page.swapItems(int(from[i]), int(to[i])); err != nil {
			return err
		}
	}
	if err := o.page.spgBury(q, from, gone); err != nil {
		return err
	}
	for i := range link {
		if err := o.page.spgSetNext(int(link[i]), int(next[i])); err != nil {
			return err
		}
	}
	return o.done()
}

// swapItems exchanges two line pointers.
func (p page) swapItems(a, b int) error {
	x, err := p.item(a)
	if err != nil {
		return err
	}
	y, err := p.item(b)
	if err != nil {
		return err
	}
	p.setItem(a, y)
	p.setItem(b, x)
	return nil
}

// spgVacuumRoot removes tuples from a root page that is a leaf: it has no chains.
func (o *op) spgVacuumRoot() error {
	c := cursor{b: o.rec.MainData}
	n := int(c.u16())
	c.take(2) // padding
	c.spgState()
	var room [maxItems]uint16
	numbers := c.u16s(n, room[:0])
	if err := c.err(); err != nil {
		return err
	}
	if _, err := o.spgExisting(); err != nil {
		return err
	}
	if err := o.page.deleteMany(numbers); err != nil {
		return err
	}
	return o.done()
}

// spgVacuumRedirect makes placeholders of redirections that no scan can need, and
// drops the placeholders at the page's end.
func (o *op) spgVacuumRedirect() error {
	c := cursor{b: o.rec.MainData}
	n, first := int(c.u16()), int(c.u16())
	c.u32() // newestRedirectXid
	var room [maxItems]uint16
	redirects := c.u16s(n, room[:0])
	if err := c.err(); err != nil {
		return err
	}
	q, err := o.spgExisting()
	if err != nil {
		return err
	}
	for _, n := range redirects {
		t, err := o.page.indexTuple(int(n))
		if err != nil {
			return err
		}
		if len(t) < spgDeadSize {
			return fmt.Errorf("offset number %d: %d bytes are no dead tuple", n, len(t))
		}
		t[0] |= spgPlaceholder
		putTID(t[spgPointer:], invalidBlock, 0)
	}
	q.add(spgNRedirection, -n)
	q.add(spgNPlaceholder, n)
	if first != 0 {
		numbers := room[:0]
		for i := first; i <= o.page.maxOffset(); i++ {
			numbers = append(numbers, uint16(i))
		}
		q.add(spgNPlaceholder, -len(numbers))
		if err := o.page.deleteMany(numbers); err != nil {
			return err
		}
	}
	return o.done()
}

// maskSPGist is spg_mask (spgxlog.c).
func maskSPGist(p page, _ uint32) error { return maskHints(p) }
