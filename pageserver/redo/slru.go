package redo

import (
	"errors"
	"fmt"

	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/internal/walrec"
	"github.com/holdfastdb/holdfast/pageserver/redo/xact"
)

// Record kinds of clog.h and commit_ts.h: each area has one that zeroes a new page.
const slruZeroPage = 0x00

// Transaction status in pg_xact: two bits each (clog.h).
const (
	clogCommitted = 1
	clogAborted   = 2
	clogPerByte   = 4
	clogPerPage   = pg.BlockSize * clogPerByte
)

// Commit timestamps: 8 bytes of time, 2 of replication origin (commit_ts.c).
const (
	commitTSEntry   = 10
	commitTSPerPage = pg.BlockSize / commitTSEntry
)

// An SLRUPage names a page of an SLRU area.
type SLRUPage struct {
	Kind pg.SLRUKind
	Page uint32
}

// SLRUPages lists the pages that a record changes, each once. Pages of CommitTS
// are among them for every commit; they exist only if the branch's computes have
// track_commit_timestamp on, which the record does not tell.
func SLRUPages(rec *walrec.Record) ([]SLRUPage, error) {
	var list []SLRUPage
	add := func(k pg.SLRUKind, n uint32) {
		s := SLRUPage{k, n}
		for i := len(list) - 1; i >= 0 && i >= len(list)-8; i-- {
			if list[i] == s {
				return
			}
		}
		list = append(list, s)
	}
	if err := slruPages(rec, add); err != nil {
		return nil, wrap(rec, "the transaction status areas", err)
	}
	return list, nil
}

func slruPages(rec *walrec.Record, add func(pg.SLRUKind, uint32)) error {
	kind := rec.Info & infoMask
	switch {
	case rec.RmID == rmXact:
		end, err := xact.ParseEnd(rec)
		if err != nil || end == nil {
			return err
		}
		for x := range end.All() {
			add(pg.CLog, uint32(x)/clogPerPage)
		}
		if end.Committed {
			for x := range end.All() {
				add(pg.CommitTS, uint32(x)/commitTSPerPage)
			}
		}
	case rec.RmID == rmCLOG && kind == slruZeroPage:
		return addZeroed(rec, pg.CLog, add)
	case rec.RmID == rmCommitTS && kind == slruZeroPage:
		return addZeroed(rec, pg.CommitTS, add)
	case rec.RmID == rmMultiXact && kind == multiXactZeroOffsets:
		return addZeroed(rec, pg.MultiXactOffsets, add)
	case rec.RmID == rmMultiXact && kind == multiXactZeroMembers:
		return addZeroed(rec, pg.MultiXactMembers, add)
	case rec.RmID == rmMultiXact && kind == multiXactCreate:
		m, err := parseMultiXactCreate(rec.MainData)
		if err != nil {
			return err
		}
		m.pages(add)
	}
	return nil
}

func addZeroed(rec *walrec.Record, kind pg.SLRUKind, add func(pg.SLRUKind, uint32)) error {
	n, err := zeroedPage(rec)
	if err == nil {
		add(kind, n)
	}
	return err
}

// zeroedPage is the page number that ZEROPAGE records hold.
func zeroedPage(rec *walrec.Record) (uint32, error) {
	c := cursor{b: rec.MainData}
	n := c.u32()
	return n, c.err()
}

func applySLRU(kind pg.SLRUKind, number uint32, p []byte, rec *walrec.Record) error {
	if len(p) != pg.BlockSize {
		return errPageSize
	}
	op := rec.Info & infoMask
	switch {
	case kind == pg.CLog && rec.RmID == rmXact:
		return applyCLog(number, p, rec)
	case kind == pg.CommitTS && rec.RmID == rmXact:
		return applyCommitTS(number, p, rec)
	case kind == pg.MultiXactOffsets && rec.RmID == rmMultiXact && op == multiXactCreate:
		return applyMultiXactOffsets(number, p, rec)
	case kind == pg.MultiXactMembers && rec.RmID == rmMultiXact && op == multiXactCreate:
		return applyMultiXactMembers(number, p, rec)
	case kind == pg.CLog && rec.RmID == rmCLOG && op == slruZeroPage,
		kind == pg.CommitTS && rec.RmID == rmCommitTS && op == slruZeroPage,
		kind == pg.MultiXactOffsets && rec.RmID == rmMultiXact && op == multiXactZeroOffsets,
		kind == pg.MultiXactMembers && rec.RmID == rmMultiXact && op == multiXactZeroMembers:
		n, err := zeroedPage(rec)
		if err != nil {
			return err
		}
		if n != number {
			return fmt.Errorf("%w: it zeroes page %d", ErrUntouched, n)
		}
		clear(p)
		return nil
	}
	return ErrUntouched
}

// parseEnd is xact.ParseEnd for a record that has to end a transaction.
func parseEnd(rec *walrec.Record) (*xact.End, error) {
	end, err := xact.ParseEnd(rec)
	if err == nil && end == nil {
		err = ErrUntouched
	}
	return end, err
}

// applyCLog marks the transaction and its subtransactions, as far as they are on
// this page, committed or aborted (xact_redo_commit, xact_redo_abort).
func applyCLog(number uint32, p []byte, rec *walrec.Record) error {
	end, err := parseEnd(rec)
	if err != nil {
		return err
	}
	status := byte(clogAborted)
	if end.Committed {
		status = clogCommitted
	}
	touched := false
	for x := range end.All() {
		if uint32(x)/clogPerPage != number {
			continue
		}
		touched = true
		in := uint32(x) % clogPerPage
		shift := in % clogPerByte * 2
		p[in/clogPerByte] = p[in/clogPerByte]&^(3<<shift) | status<<shift
	}
	if !touched {
		return ErrUntouched
	}
	return nil
}

// applyCommitTS stores commit time and origin of a transaction and its
// subtransactions (TransactionTreeSetCommitTsData).
func applyCommitTS(number uint32, p []byte, rec *walrec.Record) error {
	end, err := parseEnd(rec)
	if err != nil {
		return err
	}
	if !end.Committed {
		return ErrUntouched
	}
	time := end.Time
	if end.HasOrigin {
		time = end.OriginTime
	}
	touched := false
	for x := range end.All() {
		if uint32(x)/commitTSPerPage != number {
			continue
		}
		touched = true
		at := uint32(x) % commitTSPerPage * commitTSEntry
		le.PutUint64(p[at:], uint64(time))
		le.PutUint16(p[at+8:], rec.Origin)
	}
	if !touched {
		return ErrUntouched
	}
	return nil
}

// Record kinds and layouts of multixact.c. A member group is 4 flag bytes and the
// 4 transactions they belong to.
const (
	multiXactZeroOffsets = 0x00
	multiXactZeroMembers = 0x10
	multiXactCreate      = 0x20

	firstMultiXact     = 1
	offsetsPerPage     = pg.BlockSize / 4
	memberGroupSize    = 20
	membersPerGroup    = 4
	membersPerPage     = pg.BlockSize / memberGroupSize * membersPerGroup
	maxMultiXactStatus = 5 // MultiXactStatusUpdate
)

// multiXact is an xl_multixact_create.
type multiXact struct {
	id      uint32
	offset  uint32 // of the first member; offsets count modulo 2^32
	members []byte // 8 bytes each: xid, status
}

func parseMultiXactCreate(data []byte) (m multiXact, err error) {
	c := cursor{b: data}
	m.id, m.offset = c.u32(), c.u32()
	n := int(int32(c.u32()))
	if n < 0 || n > len(c.b)/8 {
		return m, fmt.Errorf("%d members: %w", n, errShort)
	}
	m.members = c.take(n * 8)
	return m, c.err()
}

func (m multiXact) n() uint32 { return uint32(len(m.members) / 8) }

// next is the multixact after m; its offset, where m's members end, is stored
// with m since 15.15 (RecordNewMultiXact). Offset 0 is skipped.
func (m multiXact) next() (id, offset uint32) {
	return max(m.id+1, firstMultiXact), max(m.offset+m.n(), 1)
}

func (m multiXact) pages(add func(pg.SLRUKind, uint32)) {
	next, _ := m.next()
	add(pg.MultiXactOffsets, m.id/offsetsPerPage)
	add(pg.MultiXactOffsets, next/offsetsPerPage)
	for i := range m.n() {
		add(pg.MultiXactMembers, (m.offset+i)/membersPerPage)
	}
}

func applyMultiXactOffsets(number uint32, p []byte, rec *walrec.Record) error {
	m, err := parseMultiXactCreate(rec.MainData)
	if err != nil {
		return err
	}
	next, nextOffset := m.next()
	touched := false
	for _, e := range [2][2]uint32{{m.id, m.offset}, {next, nextOffset}} {
		if e[0]/offsetsPerPage == number {
			le.PutUint32(p[e[0]%offsetsPerPage*4:], e[1])
			touched = true
		}
	}
	if !touched {
		return ErrUntouched
	}
	return nil
}

func applyMultiXactMembers(number uint32, p []byte, rec *walrec.Record) error {
	m, err := parseMultiXactCreate(rec.MainData)
	if err != nil {
		return err
	}
	touched := false
	for i := range m.n() {
		at := m.offset + i
		if at/membersPerPage != number {
			continue
		}
		xid, status := le.Uint32(m.members[i*8:]), le.Uint32(m.members[i*8+4:])
		if status > maxMultiXactStatus {
			return errors.New("a member with an unknown lock status")
		}
		in := at % membersPerPage
		group, slot := in/membersPerGroup*memberGroupSize, in%membersPerGroup
		p[group+slot] = byte(status)
		le.PutUint32(p[group+4+slot*4:], xid)
		touched = true
	}
	if !touched {
		return ErrUntouched
	}
	return nil
}
