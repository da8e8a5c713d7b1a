package oracle

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"
	"testing"

	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/internal/walrec"
	"github.com/holdfastdb/holdfast/pageserver/redo"
	"github.com/holdfastdb/holdfast/pageserver/redo/xact"
)

var le = binary.LittleEndian

// A tally counts one kind of record.
type tally struct {
	records     int // seen
	applied     int // pages changed
	checked     int // pages compared with the record's image
	unsupported int // pages taken from the image for want of redo
}

// A replayer makes the state follow WAL.
type replayer struct {
	t *testing.T
	*state
	tallies  map[string]*tally
	bytes    int
	commitTS bool
	// skipped has the pages of index kinds without redo.
	skipped map[pg.RelTag]bool
	// blanked has the visibility maps that a record's image emptied: CREATE DATABASE with
	// strategy WAL_LOG logs a map's page as a standard one, whose content is all hole.
	blanked map[pg.RelTag]bool
	errors  int

	// seen, unless nil, is called before each record is applied.
	seen func(*walrec.Record)

	ingest   *ingester
	corpus   *corpus // nil unless it is to be written
	switches []walrec.RawRecord
}

// Resource managers (rmgrlist.h).
const (
	rmXLOG, rmXact, rmSMGR, rmCLOG, rmDBase      = 0, 1, 2, 3, 4
	rmMultiXact, rmRelMap, rmStandby, rmCommitTS = 6, 7, 8, 18
)

func newReplayer(t *testing.T, base *state) *replayer {
	return &replayer{t: t, state: base, tallies: map[string]*tally{}, skipped: map[pg.RelTag]bool{}, blanked: map[pg.RelTag]bool{},
		commitTS: base.control.TrackCommitTS}
}

// replay applies all records from the base's checkpoint to the one at last, read from
// segment files in dir.
func (r *replayer) replay(dir string, last pg.LSN) {
	r.t.Helper()
	start := r.control.CheckPoint
	sc := walrec.NewScanner(start)
	var rec walrec.Record
	for seg := start.SegmentStart(); ; seg += pg.WALSegmentSize {
		b, err := os.ReadFile(filepath.Join(dir, pg.WALFileName(seg)))
		if err != nil {
			r.t.Fatal(err)
		}
		if seg < start {
			b = b[start-seg:]
		}
		for len(b) > 0 {
			n := min(len(b), 100_003) // pieces that end anywhere
			sc.Feed(b[:n])
			b = b[n:]
			for {
				raw, ok, err := sc.Next()
				if err != nil {
					r.t.Fatal(err)
				}
				if !ok {
					break
				}
				if err := walrec.ParseInto(&rec, raw.Data, raw.LSN, raw.End); err != nil {
					r.t.Fatal(err)
				}
				r.bytes += len(raw.Data)
				if raw.IsSwitch {
					r.switches = append(r.switches, walrec.RawRecord{LSN: raw.LSN, End: raw.End})
				}
				if err := r.apply(&rec); err != nil {
					r.fail(err)
				}
				if raw.LSN == last {
					return
				}
			}
		}
	}
}

func (r *replayer) fail(err error) {
	if r.errors++; r.errors < 30 {
		r.t.Error(err)
	}
}

func (r *replayer) apply(rec *walrec.Record) error {
	name := walrec.Name(rec.RmID, rec.Info)
	c := r.tallies[name]
	if c == nil {
		c = new(tally)
		r.tallies[name] = c
	}
	c.records++
	if r.seen != nil {
		r.seen(rec)
	}
	if err := r.ingest.apply(rec); err != nil {
		return fmt.Errorf("ingest: %w", err)
	}
	r.control.CheckPointCopy.AdvanceXid(rec.Xid)
	for i := range rec.Blocks {
		if err := r.block(rec, &rec.Blocks[i], c); err != nil {
			return err
		}
	}
	if err := r.ingest.checkImages(rec); err != nil {
		return err
	}
	clears, err := redo.ImpliedVM(rec)
	if err != nil {
		return err
	}
	for _, v := range clears {
		tag, block := pg.RelTag{RelFileNode: v.Rel, Fork: pg.VMFork}, redo.VMBlock(v.Heap)
		if err := redo.ApplyBlock(tag, block, r.page(tag, block), rec); err != nil {
			return err
		}
		c.applied++
	}
	pages, err := redo.SLRUPages(rec)
	if err != nil {
		return err
	}
	for _, p := range pages {
		if p.Kind == pg.CommitTS && rec.RmID == rmXact && !r.commitTS {
			continue
		}
		if err := redo.ApplySLRU(p.Kind, p.Page, r.slruPage(p), rec); err != nil {
			return err
		}
		c.applied++
	}
	if err := r.other(rec); err != nil {
		return fmt.Errorf("%s at %v: %w", name, rec.LSN, err)
	}
	return nil
}

// page is a block, with the relation extended so that it exists.
func (r *replayer) page(tag pg.RelTag, block pg.BlockNumber) []byte {
	for len(r.rels[tag]) <= int(block) {
		r.rels[tag] = append(r.rels[tag], make([]byte, pg.BlockSize))
	}
	return r.rels[tag][block]
}

func (r *replayer) slruPage(p redo.SLRUPage) []byte {
	if r.slru[p] == nil {
		r.slru[p] = make([]byte, pg.BlockSize)
	}
	return r.slru[p]
}

func (r *replayer) block(rec *walrec.Record, b *walrec.Block, c *tally) error {
	p := r.page(b.Rel, b.Block)
	if r.corpus != nil {
		defer r.corpus.take(rec, b, p)()
	}
	var unsupported *redo.UnsupportedError
	switch err := redo.ApplyBlock(b.Rel, b.Block, p, rec); {
	case errors.As(err, &unsupported):
		if b.ApplyImage || !b.HasImage {
			return err
		}
		c.unsupported++
		r.skipped[b.Rel] = true
		if err := b.RestoreImage(p); err != nil {
			return err
		}
		pg.SetPageLSN(p, rec.End)
		return nil
	case err != nil:
		return err
	}
	c.applied++
	if b.ApplyImage && b.Rel.Fork == pg.VMFork {
		r.blanked[b.Rel] = true
	}
	checked, err := redo.Check(rec, b, p)
	if err != nil {
		return err
	}
	if checked {
		c.checked++
	}
	return r.freeSpace(rec, b, p)
}

// freeSpace does what recovery does to the free space map.
func (r *replayer) freeSpace(rec *walrec.Record, b *walrec.Block, heap []byte) error {
	free, ok := redo.FreeSpaceAfter(rec, b, heap)
	if !ok {
		return nil
	}
	block, slot := redo.FSMLocation(b.Block)
	return redo.SetFreeSpace(r.page(pg.RelTag{RelFileNode: b.Rel.RelFileNode, Fork: pg.FSMFork}, block), slot, free)
}

// other does what a record does besides changing pages that it names or implies.
func (r *replayer) other(rec *walrec.Record) error {
	d, kind := rec.MainData, rec.Info&0xF0
	u32 := func(at int) uint32 { return le.Uint32(d[at:]) }
	switch rec.RmID {
	case rmXLOG:
		return r.xlog(kind, d)
	case rmXact:
		return r.xact(rec)
	case rmSMGR:
		if kind == 0x10 {
			tag := pg.RelTag{RelFileNode: pg.RelFileNode{Tablespace: pg.Oid(u32(0)), Database: pg.Oid(u32(4)), Relation: pg.Oid(u32(8))},
				Fork: pg.ForkNumber(u32(12))}
			if r.rels[tag] == nil {
				r.rels[tag] = [][]byte{}
			}
			return nil
		}
		return r.truncate(rec)
	case rmDBase:
		switch kind {
		case 0x00:
			r.copyDatabase(pg.Oid(u32(4)), pg.Oid(u32(0)), pg.Oid(u32(12)), pg.Oid(u32(8)))
		case 0x10:
			r.dirs[pg.DatabasePath(pg.Oid(u32(4)), pg.Oid(u32(0)))] = true
		case 0x20:
			for i := range int(u32(4)) {
				r.dropDatabase(pg.Oid(u32(8+4*i)), pg.Oid(u32(0)))
			}
		}
	case rmRelMap:
		r.relmaps[pg.DatabasePath(pg.Oid(u32(4)), pg.Oid(u32(0)))] = append([]byte(nil), d[12:]...)
	case rmStandby:
		if kind == 0x10 {
			r.control.CheckPointCopy.AdvanceXid(pg.TransactionID(u32(12)) - 1)
		}
	case rmCLOG:
		if kind == 0x10 {
			r.truncateSLRU(pg.CLog, u32(0))
		}
	case rmCommitTS:
		if kind == 0x10 {
			r.truncateSLRU(pg.CommitTS, u32(0))
		}
	case rmMultiXact:
		if kind == 0x30 { // offsets step back one multixact, members drop whole segments
			before := u32(8) - 1
			if before == 0 {
				before = 1<<32 - 1 // 0 is no multixact
			}
			r.truncateSLRU(pg.MultiXactOffsets, before/2048)
			r.truncateSLRU(pg.MultiXactMembers, u32(16)/1636)
		}
	}
	return nil
}

// xlog follows checkpoints and the parameters that redo depends on.
func (r *replayer) xlog(kind uint8, d []byte) error {
	switch kind {
	case 0x00, 0x10:
		cp, err := pg.ParseCheckPoint(d)
		if err != nil {
			return err
		}
		if have := r.control.CheckPointCopy.NextXid; kind == 0 && have != cp.NextXid {
			return fmt.Errorf("the next xid is %d, records before it make it %d", cp.NextXid, have)
		}
	case 0x60: // PARAMETER_CHANGE
		r.commitTS = d[25] != 0
		if !r.commitTS {
			for p := range r.slru {
				if p.Kind == pg.CommitTS {
					delete(r.slru, p)
				}
			}
			return nil
		}
		r.slruPage(redo.SLRUPage{Kind: pg.CommitTS, Page: uint32(r.control.CheckPointCopy.NextXid) / (pg.BlockSize / 10)})
	}
	return nil
}

func (r *replayer) xact(rec *walrec.Record) error {
	if rec.Info&xact.OpMask == xact.OpPrepare {
		p, err := xact.ParsePrepare(rec)
		if err != nil {
			return err
		}
		for _, x := range p.Subxacts {
			r.control.CheckPointCopy.AdvanceXid(x)
		}
		file := append([]byte(nil), rec.MainData...)
		r.twoPhase[p.Xid] = le.AppendUint32(file, crc32.Checksum(file, pg.Castagnoli))
		return nil
	}
	end, err := xact.ParseEnd(rec)
	if err != nil || end == nil {
		return err
	}
	for x := range end.All() {
		r.control.CheckPointCopy.AdvanceXid(x)
	}
	for _, rel := range end.Relations {
		for f := pg.MainFork; f <= pg.InitFork; f++ {
			delete(r.rels, pg.RelTag{RelFileNode: rel, Fork: f})
		}
	}
	if end.Prepared {
		delete(r.twoPhase, end.Xid)
	}
	return nil
}

// truncate is smgr_redo's (storage.c): the forks' new sizes, and the tails of the maps.
func (r *replayer) truncate(rec *walrec.Record) error {
	d := rec.MainData
	blocks := le.Uint32(d)
	rel := pg.RelFileNode{Tablespace: pg.Oid(le.Uint32(d[4:])), Database: pg.Oid(le.Uint32(d[8:])), Relation: pg.Oid(le.Uint32(d[12:]))}
	cut := func(f pg.ForkNumber, n uint32) {
		if tag := (pg.RelTag{RelFileNode: rel, Fork: f}); len(r.rels[tag]) > int(n) {
			r.rels[tag] = r.rels[tag][:n]
		}
	}
	flags := le.Uint32(d[16:])
	if flags&1 != 0 {
		cut(pg.MainFork, blocks)
	}
	for _, m := range []struct {
		fork pg.ForkNumber
		flag uint32
		last uint32 // the map block of the first heap block that goes
		tail bool   // it also tells of heap blocks that stay
	}{
		{pg.VMFork, 2, blocks / 32672, blocks%32672 != 0},
		{pg.FSMFork, 4, fsmBlock(blocks), blocks%4069 != 0},
	} {
		tag := pg.RelTag{RelFileNode: rel, Fork: m.fork}
		if flags&m.flag == 0 || m.tail && len(r.rels[tag]) <= int(m.last) {
			continue
		}
		if m.tail {
			if err := redo.ApplyBlock(tag, pg.BlockNumber(m.last), r.rels[tag][m.last], rec); err != nil {
				return err
			}
			m.last++
		}
		cut(m.fork, m.last)
	}
	return nil
}

func fsmBlock(heap uint32) uint32 {
	b, _ := redo.FSMLocation(pg.BlockNumber(heap))
	return uint32(b)
}

func (r *replayer) copyDatabase(toSpace, toDB, fromSpace, fromDB pg.Oid) {
	from, to := pg.DatabasePath(fromSpace, fromDB), pg.DatabasePath(toSpace, toDB)
	r.dropDatabase(toSpace, toDB)
	r.dirs[to] = true
	r.relmaps[to] = r.relmaps[from]
	for tag, pages := range r.rels {
		if tag.Tablespace != fromSpace || tag.Database != fromDB {
			continue
		}
		copies := [][]byte{}
		for _, p := range pages {
			copies = append(copies, append([]byte(nil), p...))
		}
		skipped, blanked := r.skipped[tag], r.blanked[tag]
		tag.Tablespace, tag.Database = toSpace, toDB
		if skipped {
			r.skipped[tag] = true
		}
		if blanked {
			r.blanked[tag] = true
		}
		r.rels[tag] = copies
	}
}

func (r *replayer) dropDatabase(space, db pg.Oid) {
	dir := pg.DatabasePath(space, db)
	delete(r.dirs, dir)
	delete(r.relmaps, dir)
	for tag := range r.rels {
		if tag.Tablespace == space && tag.Database == db {
			delete(r.rels, tag)
		}
	}
}

// truncateSLRU removes the segments that lie wholly before a page, in numbers that count
// modulo 2^32.
func (r *replayer) truncateSLRU(kind pg.SLRUKind, page uint32) {
	perPage := map[pg.SLRUKind]uint32{pg.CLog: 32768, pg.CommitTS: 819, pg.MultiXactOffsets: 2048, pg.MultiXactMembers: 1636}[kind]
	begin := func(page uint32) uint32 { return page / pg.SLRUPagesPerSegment * pg.SLRUPagesPerSegment * perPage } // of its segment
	for p := range r.slru {
		if p.Kind == kind && int32(begin(p.Page)-begin(page)) < 0 {
			delete(r.slru, p)
		}
	}
}
