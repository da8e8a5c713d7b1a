package ingest

import (
	"encoding/binary"
	"hash/crc32"

	"github.com/holdfastdb/holdfast/internal/pg"
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
	if err := c.status(); err != nil {
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
