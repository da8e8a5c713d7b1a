package ingest

import (
	"encoding/binary"
	"fmt"

	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/pageserver/keyspace"
	"github.com/holdfastdb/holdfast/pageserver/timeline"
)

// How many entries a page has (clog.c, multixact.c, commit_ts.c).
const (
	clogPerPage     = pg.BlockSize * 4
	offsetsPerPage  = pg.BlockSize / 4
	membersPerPage  = pg.BlockSize / 20 * 4
	commitTSPerPage = pg.BlockSize / 10
)

// Record kinds: those of CLOG and commit_ts are alike.
const (
	slruZeroPage = 0x00
	slruTruncate = 0x10

	multiZeroOffsets = 0x00
	multiZeroMembers = 0x10
	multiCreate      = 0x20
	multiTruncate    = 0x30
)

// slruRecord is clog_redo, multixact_redo and commit_ts_redo.
func (c *Core) slruRecord() error {
	kind := c.rec.Info & infoMask
	switch {
	case c.rec.RmID == rmCLOG && kind == slruZeroPage:
		return c.zeroPage(pg.CLog)
	case c.rec.RmID == rmCLOG && kind == slruTruncate:
		return c.truncateCLog()
	case c.rec.RmID == rmCommitTS && kind == slruZeroPage:
		return c.zeroPage(pg.CommitTS)
	case c.rec.RmID == rmCommitTS && kind == slruTruncate:
		return c.truncateCommitTS()
	case c.rec.RmID == rmMultiXact && kind == multiZeroOffsets:
		return c.zeroOffsets()
	case c.rec.RmID == rmMultiXact && kind == multiZeroMembers:
		return c.zeroPage(pg.MultiXactMembers)
	case c.rec.RmID == rmMultiXact && kind == multiCreate:
		return c.multiCreate()
	case c.rec.RmID == rmMultiXact && kind == multiTruncate:
		return c.multiTruncate()
	}
	return fmt.Errorf("unknown kind %#02x", kind)
}

// lastPages has the page of each area's largest number.
var lastPages = map[pg.SLRUKind]uint32{
	pg.CLog:             0xFFFFFFFF / clogPerPage,
	pg.MultiXactOffsets: 0xFFFFFFFF / offsetsPerPage,
	pg.MultiXactMembers: 0xFFFFFFFF / membersPerPage,
	pg.CommitTS:         0xFFFFFFFF / commitTSPerPage,
}

func (c *Core) zeroPage(kind pg.SLRUKind) error {
	f := c.main()
	page := f.u32()
	if f.bad {
		return errShort
	}
	if last := lastPages[kind]; page > last {
		return fmt.Errorf("page %d of %s, whose last one is %d", page, kind.Dir(), last)
	}
	if err := c.slruAdd(kind, page); err != nil {
		return err
	}
	c.put(keyspace.SLRUPage(kind, page), timeline.Init, c.record())
	return nil
}

// zeroOffsets does nothing for a page that an earlier CREATE_ID made and wrote to
// (pre_initialized_offsets_page in multixact.c).
func (c *Core) zeroOffsets() error {
	f := c.main()
	page := f.u32()
	early := c.state.EarlyOffsets
	c.state.EarlyOffsets = -1
	if !f.bad && early == int64(page) {
		return nil
	}
	return c.zeroPage(pg.MultiXactOffsets)
}

func (c *Core) multiCreate() error {
	f := c.main()
	multi, offset, n := f.u32(), f.u32(), f.u32()
	if f.bad || uint64(n)*8 > uint64(len(f.b)) {
		return errShort
	}
	c.state.EarlyOffsets = -1
	next := max(multi+1, 1)
	if page := next / offsetsPerPage; page != multi/offsetsPerPage {
		e, err := c.extents(pg.MultiXactOffsets)
		if err != nil {
			return err
		}
		if !e.has(page) {
			c.state.EarlyOffsets = int64(page)
		}
	}
	if err := c.status(); err != nil {
		return err
	}
	c.state.advanceMulti(pg.MultiXactID(multi+1), offset+n)
	newest := c.rec.Xid
	for range n {
		if xid := pg.TransactionID(f.u32()); xidPrecedes(newest, xid) {
			newest = xid
		}
		f.u32() // status
	}
	c.state.checkPoint().AdvanceXid(newest)
	return nil
}

func (c *Core) multiTruncate() error {
	f := c.main()
	db := f.oid()
	f.u32() // startTruncOff
	endOff, startMember, endMember := f.u32(), f.u32(), f.u32()
	if f.bad {
		return errShort
	}
	cp := c.state.checkPoint()
	cp.OldestMulti, cp.OldestMultiDB = pg.MultiXactID(endOff), db
	if err := c.truncateMembers(startMember/membersPerPage/pg.SLRUPagesPerSegment, endMember/membersPerPage/pg.SLRUPagesPerSegment); err != nil {
		return err
	}
	previous := endOff - 1 // PreviousMultiXactId
	if endOff == 1 {
		previous = 0xFFFFFFFF
	}
	return c.slruCutoff(pg.MultiXactOffsets, previous/offsetsPerPage, offsetsPerPage, 1+1, precedes)
}

// truncateMembers deletes segments from one up to another, around the end of the number
// space (PerformMembersTruncation).
func (c *Core) truncateMembers(segment, end uint32) error {
	const last = 0xFFFFFFFF / membersPerPage / pg.SLRUPagesPerSegment
	if segment > last || end > last {
		return fmt.Errorf("truncation of member segments %d to %d", segment, end)
	}
	return c.slruRemove(pg.MultiXactMembers, func(s uint32) bool {
		if segment <= end {
			return segment <= s && s < end
		}
		return s >= segment || s < end
	})
}

// truncateCLog also takes the oldest xid that is left, as the server that wrote the record did:
// no start from the state may look for the status of an older one.
func (c *Core) truncateCLog() error {
	f := c.main()
	page, oldest, db := f.u32(), pg.TransactionID(f.u32()), f.oid()
	if f.bad {
		return errShort
	}
	if cp := c.state.checkPoint(); xidPrecedes(cp.OldestXid, oldest) {
		cp.OldestXid, cp.OldestXidDB = oldest, db
	}
	return c.slruCutoff(pg.CLog, page, clogPerPage, 3+1, xidOrder)
}

func (c *Core) truncateCommitTS() error {
	f := c.main()
	page, oldest := f.u32(), pg.TransactionID(f.u32())
	if f.bad {
		return errShort
	}
	if cp := c.state.checkPoint(); cp.OldestCommitTsXid != 0 && xidPrecedes(cp.OldestCommitTsXid, oldest) {
		cp.OldestCommitTsXid = oldest
	}
	return c.slruCutoff(pg.CommitTS, page, commitTSPerPage, 3+1, xidOrder)
}

func xidOrder(a, b uint32) bool { return xidPrecedes(pg.TransactionID(a), pg.TransactionID(b)) }

// slruCutoff removes the segments that lie wholly before a page (SimpleLruTruncate and the
// areas' PagePrecedes): first is added to a page's first number, as there.
func (c *Core) slruCutoff(kind pg.SLRUKind, cutoff, perPage, first uint32, before func(a, b uint32) bool) error {
	pagePrecedes := func(a, b uint32) bool {
		x, y := a*perPage+first, b*perPage+first
		return before(x, y) && before(x, y+perPage-1)
	}
	return c.slruRemove(kind, func(segment uint32) bool {
		p := segment * pg.SLRUPagesPerSegment
		return pagePrecedes(p, cutoff) && pagePrecedes(p+pg.SLRUPagesPerSegment-1, cutoff)
	})
}

// activateCommitTS is ActivateCommitTs: the current page is made without a record of its own.
func (c *Core) activateCommitTS() error {
	cp := c.state.checkPoint()
	next := pg.TransactionID(cp.NextXid)
	if cp.OldestCommitTsXid == 0 {
		cp.OldestCommitTsXid, cp.NewestCommitTsXid = next, next
	}
	page := uint32(next) / commitTSPerPage
	e, err := c.extents(pg.CommitTS)
	if err != nil || e.has(page) {
		return err
	}
	c.put(keyspace.SLRUPage(pg.CommitTS, page), timeline.Image, make([]byte, pg.BlockSize))
	return c.slruAdd(pg.CommitTS, page)
}

func (c *Core) deactivateCommitTS() error {
	cp := c.state.checkPoint()
	cp.OldestCommitTsXid, cp.NewestCommitTsXid = 0, 0
	return c.slruRemove(pg.CommitTS, func(uint32) bool { return true })
}

// extents are the pages of an area that exist: ranges, ascending, apart, ends included.
type extents [][2]uint32

func (e extents) has(page uint32) bool {
	for _, r := range e {
		if page <= r[1] {
			return page >= r[0]
		}
	}
	return false
}

// with is e and one page more.
func (e extents) with(page uint32) extents {
	out := make(extents, 0, len(e)+1)
	add := [2]uint32{page, page}
	for _, r := range e {
		switch {
		case uint64(r[1])+1 < uint64(add[0]):
			out = append(out, r)
		case uint64(add[1])+1 < uint64(r[0]):
			out = append(out, add)
			add = r
		default:
			add = [2]uint32{min(add[0], r[0]), max(add[1], r[1])}
		}
	}
	return append(out, add)
}

func (e extents) marshal() []byte {
	b := make([]byte, 0, 8*len(e))
	for _, r := range e {
		b = binary.LittleEndian.AppendUint32(b, r[0])
		b = binary.LittleEndian.AppendUint32(b, r[1])
	}
	return b
}

func parseExtents(b []byte) (extents, error) {
	if len(b)%8 != 0 {
		return nil, fmt.Errorf("a list of SLRU pages of %d bytes", len(b))
	}
	e := make(extents, 0, len(b)/8)
	for ; len(b) > 0; b = b[8:] {
		r := [2]uint32{binary.LittleEndian.Uint32(b), binary.LittleEndian.Uint32(b[4:])}
		if r[0] > r[1] || len(e) > 0 && e[len(e)-1][1] >= r[0] {
			return nil, fmt.Errorf("a list of SLRU pages with the range %d to %d out of order", r[0], r[1])
		}
		e = append(e, r)
	}
	return e, nil
}

// SLRUPages lists the pages in the value of a keyspace.SLRUExtents key, ascending.
func SLRUPages(value []byte) ([]uint32, error) {
	const most = 1 << 24 // pages: more than any area can have in use
	e, err := parseExtents(value)
	if err != nil {
		return nil, err
	}
	var pages []uint32
	for _, r := range e {
		if uint64(len(pages))+uint64(r[1]-r[0]) >= most {
			return nil, fmt.Errorf("a list of SLRU pages with the range %d to %d", r[0], r[1])
		}
		for p := r[0]; ; p++ {
			pages = append(pages, p)
			if p == r[1] {
				break
			}
		}
	}
	return pages, nil
}

// MarshalSLRUPages is the reverse of SLRUPages.
func MarshalSLRUPages(pages []uint32) []byte {
	var e extents
	for _, p := range pages {
		e = e.with(p)
	}
	return e.marshal()
}

func (c *Core) extents(kind pg.SLRUKind) (extents, error) {
	if e, ok := c.slru[kind]; ok {
		return e, nil
	}
	var e extents
	h, err := c.look.Get(c.ctx, keyspace.SLRUExtents(kind), c.last)
	if err == nil && h.Base != nil {
		e, err = parseExtents(h.Base.Data)
	}
	if err != nil {
		return nil, err
	}
	c.slru[kind] = e
	return e, nil
}

func (c *Core) setExtents(kind pg.SLRUKind, e extents) {
	c.slru[kind] = e
	c.put(keyspace.SLRUExtents(kind), timeline.Image, e.marshal())
}

func (c *Core) slruAdd(kind pg.SLRUKind, page uint32) error {
	e, err := c.extents(kind)
	if err != nil || e.has(page) {
		return err
	}
	c.setExtents(kind, e.with(page))
	return nil
}

// slruRemove removes whole segments, as PostgreSQL deletes their files.
func (c *Core) slruRemove(kind pg.SLRUKind, gone func(segment uint32) bool) error {
	e, err := c.extents(kind)
	if err != nil {
		return err
	}
	var kept extents
	removed := false
	for _, r := range e {
		for s := r[0] / pg.SLRUPagesPerSegment; s <= r[1]/pg.SLRUPagesPerSegment; s++ {
			part := [2]uint32{max(r[0], s*pg.SLRUPagesPerSegment), min(r[1], s*pg.SLRUPagesPerSegment+pg.SLRUPagesPerSegment-1)}
			if !gone(s) {
				if n := len(kept); n > 0 && kept[n-1][1]+1 == part[0] {
					kept[n-1][1] = part[1]
				} else {
					kept = append(kept, part)
				}
				continue
			}
			removed = true
			for p := part[0]; p <= part[1]; p++ {
				c.put(keyspace.SLRUPage(kind, p), timeline.Tombstone, nil)
			}
		}
	}
	if removed {
		c.setExtents(kind, kept)
	}
	return nil
}
