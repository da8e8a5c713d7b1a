// Package ingest turns WAL records into versions of the things that they change: pages,
// relation sizes, relation maps, two-phase files, the branch's counters. It is what
// PostgreSQL's recovery does, except that pages are not changed but get the record filed
// under them, for pageserver/pageread to replay when somebody asks.
//
// A Core is pure: it has no goroutine, clock or I/O of its own, and what it needs to know of the
// branch's past it asks of a Lookup. The caller's duties, in order, for each batch:
//
//  1. For each record: if Barrier says so, Take and store what there is first. Then Apply.
//  2. Take the entries, and store them in one step. They and their data are the Core's memory,
//     which the next Apply uses again.
//  3. After any error: Wipe the Core, and go on with a new one from the stored state.
//
// A page's versions of an earlier life must never show through (invariant P1). When a
// relation is cut, every page beyond the cut gets a tombstone. When it is dropped, only its
// size does, and what is to be hidden is remembered (keyspace.Dropped); the pages get their
// tombstones in the rare case that the same number is created again.
package ingest

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/holdfastdb/holdfast/internal/auxfile"
	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/internal/walrec"
	"github.com/holdfastdb/holdfast/pageserver/change"
	"github.com/holdfastdb/holdfast/pageserver/keyspace"
	"github.com/holdfastdb/holdfast/pageserver/timeline"
)

// Lookup is the branch's past, as of what was stored.
type Lookup interface {
	// Get gives the history of a thing.
	Get(ctx context.Context, key keyspace.Key, lsn pg.LSN) (timeline.History, error)
	// Scan gives the newest values of a range of keys whose values are images.
	Scan(ctx context.Context, from, to keyspace.Key, lsn pg.LSN, fn func(keyspace.Key, timeline.Value) error) error
	// Page fills page with a relation's page.
	Page(ctx context.Context, key keyspace.Key, lsn pg.LSN, page []byte) error
	// Stage stores a part of what a record makes, before its end: as of an LSN inside the
	// record, which begins at begin. After a crash the record is applied again. It copies the
	// entries' data.
	Stage(ctx context.Context, begin pg.LSN, entries []timeline.Entry) error
}

// Resource manager numbers (rmgrlist.h).
const (
	rmXLOG       = 0
	rmXact       = 1
	rmSMGR       = 2
	rmCLOG       = 3
	rmDBase      = 4
	rmTablespace = 5
	rmMultiXact  = 6
	rmRelMap     = 7
	rmStandby    = 8
	rmHeap2      = 9
	rmHeap       = 10
	rmCommitTS   = 18
	rmReplOrigin = 19
	rmLogicalMsg = 21

	infoMask = 0xF0
)

// Core files records. It is not safe for concurrent use.
type Core struct {
	// Aux opens a message about aux files (internal/auxfile) in the old form, and gives what it
	// says; nothing if it is none of ours. Nil: such messages mean nothing.
	Aux func(ctx context.Context, sealed []byte) ([]auxfile.Change, error)
	// AuxKey opens the key of a life's messages; nothing if it is none of ours. Nil: as Aux.
	AuxKey func(ctx context.Context, epoch uint64, sealed []byte) (key []byte, err error)
	// Project, Branch and Epoch tell whose records come next.
	Project, Branch string
	Epoch           uint64
	// SlotsChanged is set when a replication slot's file is among what is to be stored.
	SlotsChanged bool
	// Forged counts messages that claimed to be of the compute's, and were not.
	Forged uint64

	look  Lookup
	state State
	last  pg.LSN // all before it is stored: what lookups are asked for

	sizes map[pg.RelTag]relation
	slru  map[pg.SLRUKind]extents
	marks map[mark]struct{}

	out   []timeline.Entry
	given []timeline.Entry // what Take gave, to be used again
	bytes int
	mem   memory
	taken bool // the entries whose data is in mem are stored

	// Of the record under way.
	ctx    context.Context
	rec    *walrec.Record
	change []byte // the record as a change, made when it is first needed

	life *auxfile.Reader // of state.Life; nil: not made yet

	refused map[pg.Oid]struct{} // tablespaces
	foreign map[uint8]struct{}  // resource managers

	maxSources int // a test has it lower
}

// New makes a Core that goes on from a stored state, which holds at lsn.
func New(look Lookup, state State, lsn pg.LSN) *Core {
	state.Origins = cloneOrigins(state.Origins)
	return &Core{look: look, state: state, last: lsn, sizes: make(map[pg.RelTag]relation),
		slru: make(map[pg.SLRUKind]extents), marks: make(map[mark]struct{}), refused: make(map[pg.Oid]struct{}), foreign: make(map[uint8]struct{}),
		maxSources: maxSources}
}

// State is the branch's state after the last record. Its maps are the Core's.
func (c *Core) State() *State { return &c.state }

// Pending is the number of bytes that Take would return.
func (c *Core) Pending() int { return c.bytes }

// Bounds of what a Core remembers and of what it holds back, in entries and bytes.
const (
	maxSizes   = 1 << 18
	maxMarks   = 1 << 18
	stageBytes = 4 << 20
	entryCost  = 64
	bigXact    = 64 << 10 // main data of a transaction's end with many dropped relations
)

// Barrier tells that what came before rec must be stored first, the state included: rec reads
// it, or makes so much that it is staged.
func (c *Core) Barrier(rec *walrec.Record) bool {
	switch rec.RmID {
	case rmDBase:
		return true
	case rmSMGR:
		return rec.Info&infoMask == smgrTruncate
	case rmXact:
		return len(rec.MainData) > bigXact
	}
	return false
}

// Apply files one record.
func (c *Core) Apply(ctx context.Context, rec *walrec.Record) error {
	if c.taken {
		c.mem.reset()
		clear(c.given)
		c.out, c.given, c.taken = c.given[:0], nil, false
	}
	c.ctx, c.rec, c.change = ctx, rec, nil
	c.state.checkPoint().AdvanceXid(rec.Xid)
	if err := c.apply(); err != nil {
		return fmt.Errorf("%s at %v: %w", walrec.Name(rec.RmID, rec.Info), rec.LSN, err)
	}
	c.state.PrevRecord = rec.LSN
	return nil
}

func (c *Core) apply() error {
	if !walrec.Known(c.rec.RmID, c.rec.Info) {
		return c.unknown()
	}
	switch c.rec.RmID {
	case rmXLOG:
		return c.xlog()
	case rmXact:
		return c.xact()
	case rmSMGR:
		return c.smgr()
	case rmCLOG, rmMultiXact, rmCommitTS:
		return c.slruRecord()
	case rmDBase:
		return c.database()
	case rmTablespace:
		return c.tablespace()
	case rmRelMap:
		return c.relMap()
	case rmReplOrigin:
		return c.replOrigin()
	case rmStandby:
		return nil // for standbys: no durable state
	case rmLogicalMsg:
		return c.message()
	case rmHeap, rmHeap2:
		return c.heap()
	}
	return c.blocks()
}

// unknown files a record that PostgreSQL 15 itself does not make. The pages that it names fail
// when they are read, until a record makes them anew (package redo); all others go on. One that
// names no page may have changed whatever its manager looks after. With an extension's manager
// those are the extension's own affairs: it is noted (Foreign), and the branch goes on. With one
// of PostgreSQL's it may be sizes or the status of transactions, and no read would fail for it:
// the branch stops.
func (c *Core) unknown() error {
	switch {
	case len(c.rec.Blocks) > 0:
		return c.blocks()
	case walrec.IsExtension(c.rec.RmID):
		c.foreign[c.rec.RmID] = struct{}{}
		return nil
	}
	return errors.New("PostgreSQL 15 has no such record, and it names no page that could be given up instead of the branch")
}

// Foreign lists the extensions' resource managers of which a record that names no page was seen
// since the Core was made.
func (c *Core) Foreign() []uint8 { return slices.Sorted(maps.Keys(c.foreign)) }

// Take returns the entries since the last Take, with the state as of upTo, the end of the
// last record or of the WAL that was read. They and upTo are to be stored together.
func (c *Core) Take(upTo pg.LSN) []timeline.Entry {
	out := append(c.out, timeline.Entry{Key: keyspace.Checkpoint(),
		Value: timeline.Value{LSN: upTo, Kind: timeline.Image, Data: c.state.Marshal()}})
	c.out, c.given, c.bytes, c.last, c.taken = nil, out, 0, upTo, true
	if len(c.sizes) > maxSizes {
		clear(c.sizes)
	}
	return out
}

// put adds a version as of the end of the record under way.
func (c *Core) put(key keyspace.Key, kind timeline.ValueKind, data []byte) {
	c.out = append(c.out, timeline.Entry{Key: key, Value: timeline.Value{LSN: c.rec.End, Kind: kind, Data: data}})
	c.bytes += len(data) + entryCost
}

// stage hands on what there is if a record makes more than should be in memory.
func (c *Core) stage() error {
	if c.bytes < stageBytes || !c.Barrier(c.rec) {
		return nil
	}
	out := c.out
	c.out, c.bytes, c.change = nil, 0, nil
	err := c.look.Stage(c.ctx, c.rec.LSN, out)
	c.mem.reset()
	return err
}

// alloc gives n zero bytes that live as long as the entries of this batch.
func (c *Core) alloc(n int) []byte { return c.mem.alloc(n) }

// Wipe clears the plaintext that the Core holds. The Core is of no use after it (K2).
func (c *Core) Wipe() {
	c.mem.reset()
	c.out, c.given = nil, nil
	clear(c.state.Life.Key)
	c.forgetLife()
}

func (c *Core) u32(v uint32) []byte {
	p := c.alloc(4)
	binary.LittleEndian.PutUint32(p, v)
	return p
}

// record is the record under way as a change; entries share it.
func (c *Core) record() []byte {
	if c.change == nil {
		c.change = c.alloc(change.RecordHeader + len(c.rec.Raw))
		change.PutRecord(c.change, c.rec)
	}
	return c.change
}

var errShort = errors.New("the record's data is too short")

// fields reads main data; past the end it gives zeros and sets bad.
type fields struct {
	b   []byte
	bad bool
}

func (f *fields) take(n int) []byte {
	if n > len(f.b) {
		f.bad, f.b = true, nil
		return make([]byte, n)
	}
	p := f.b[:n]
	f.b = f.b[n:]
	return p
}

func (f *fields) u8() uint8   { return f.take(1)[0] }
func (f *fields) u16() uint16 { return binary.LittleEndian.Uint16(f.take(2)) }
func (f *fields) u32() uint32 { return binary.LittleEndian.Uint32(f.take(4)) }
func (f *fields) u64() uint64 { return binary.LittleEndian.Uint64(f.take(8)) }
func (f *fields) oid() pg.Oid { return pg.Oid(f.u32()) }

func (f *fields) relFileNode() pg.RelFileNode {
	return pg.RelFileNode{Tablespace: f.oid(), Database: f.oid(), Relation: f.oid()}
}

func (f *fields) err() error {
	if f.bad {
		return errShort
	}
	return nil
}

func (c *Core) main() *fields { return &fields{b: c.rec.MainData} }
