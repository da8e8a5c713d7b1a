package ingest

import (
	"encoding/binary"
	"hash/crc32"
	"maps"
	"slices"

	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/internal/walrec"
	"github.com/holdfastdb/holdfast/pageserver/change"
	"github.com/holdfastdb/holdfast/pageserver/keyspace"
	"github.com/holdfastdb/holdfast/pageserver/redo"
	"github.com/holdfastdb/holdfast/pageserver/redo/xact"
	"github.com/holdfastdb/holdfast/pageserver/timeline"
)

// xact is xact_redo.
func (c *Core) xact() error {
	if c.rec.Info&xact.OpMask == xact.OpPrepare {
		return c.prepare()
	}
	end, err := xact.ParseEnd(c.rec)
	if err != nil || end == nil { // assignments and invalidations are for standbys
		return err
	}
	cp := c.state.checkPoint()
	newest := end.Xid
	for xid := range end.All() {
		cp.AdvanceXid(xid)
		newest = xid
	}
	if len(c.rec.MainData) > bigXact {
		err = c.bigStatus(end)
	} else {
		err = c.status()
	}
	if err != nil {
		return err
	}
	if end.Committed && c.state.Control.TrackCommitTS && xidPrecedes(cp.NewestCommitTsXid, newest) {
		cp.NewestCommitTsXid = newest
	}
	if end.HasOrigin {
		c.state.advanceOrigin(c.rec.Origin, end.OriginLSN, false)
	}
	if end.Prepared {
		c.put(keyspace.TwoPhase(end.Xid), timeline.Tombstone, nil)
	}
	return c.dropAll(end.Relations)
}

// status files the record under the SLRU pages that it changes.
func (c *Core) status() error {
	pages, err := redo.SLRUPages(c.rec)
	if err != nil {
		return err
	}
	for _, p := range pages {
		if p.Kind == pg.CommitTS && !c.state.Control.TrackCommitTS {
			continue
		}
		if err := c.slruAdd(p.Kind, p.Page); err != nil {
			return err
		}
		c.put(keyspace.SLRUPage(p.Kind, p.Page), timeline.Delta, c.record())
	}
	return nil
}

// bigStatus is status for an end with very many subtransactions. Each page gets a record with its own
// ones: the whole under each would be more than a version may have, and their square in all.
func (c *Core) bigStatus(end *xact.End) error {
	if err := c.statusParts(end, pg.CLog, clogPerPage); err != nil {
		return err
	}
	if !end.Committed || !c.state.Control.TrackCommitTS {
		return nil
	}
	return c.statusParts(end, pg.CommitTS, commitTSPerPage)
}

func (c *Core) statusParts(end *xact.End, kind pg.SLRUKind, perPage uint32) error {
	xids := make(map[uint32][]pg.TransactionID)
	if end.Xid != 0 {
		xids[uint32(end.Xid)/perPage] = nil
	}
	for _, x := range end.Subxacts {
		xids[uint32(x)/perPage] = append(xids[uint32(x)/perPage], x)
	}
	for _, page := range slices.Sorted(maps.Keys(xids)) {
		if err := c.slruAdd(kind, page); err != nil {
			return err
		}
		some := slices.Compact(xids[page]) // of what PostgreSQL writes each is another
		for first := true; first || len(some) > 0; first = false {
			n := min(len(some), int(perPage))
			part := walrec.Record{LSN: c.rec.LSN, End: c.rec.End, Raw: end.Part(c.rec, some[:n])}
			data := c.alloc(change.RecordHeader + len(part.Raw))
			change.PutRecord(data, &part)
			c.put(keyspace.SLRUPage(kind, page), timeline.Delta, data)
			some = some[n:]
			if err := c.stage(); err != nil {
				return err
			}
		}
	}
	return nil
}

// prepare keeps the file that PostgreSQL would have in pg_twophase: the record's data and
// its CRC (RecreateTwoPhaseFile).
func (c *Core) prepare() error {
	p, err := xact.ParsePrepare(c.rec)
	if err != nil {
		return err
	}
	cp := c.state.checkPoint()
	cp.AdvanceXid(p.Xid)
	for _, x := range p.Subxacts {
		cp.AdvanceXid(x)
	}
	n := len(c.rec.MainData)
	data := c.alloc(n + 4)
	copy(data, c.rec.MainData)
	binary.LittleEndian.PutUint32(data[n:], crc32.Checksum(data[:n], pg.Castagnoli))
	c.put(keyspace.TwoPhase(p.Xid), timeline.Image, data)
	c.state.advanceOrigin(c.rec.Origin, p.OriginLSN, false)
	return nil
}
