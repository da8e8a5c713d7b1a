// Package xact parses the WAL records that end or prepare a transaction: which
// transactions and subtransactions ended and how, which relations are dropped with
// that, and what a prepared transaction will do. It only reads; it decides nothing.
//
// The layouts are those of xact.h and rmgrdesc/xactdesc.c. Every count in a record
// is checked against the bytes that are there before it is used.
package xact

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"iter"

	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/internal/walrec"
)

// RmID is the transaction resource manager's number (rmgrlist.h).
const RmID = 1

// Record kinds, and the flag in xl_info that tells of an xinfo field (xact.h).
const (
	OpCommit         = 0x00
	OpPrepare        = 0x10
	OpAbort          = 0x20
	OpCommitPrepared = 0x30
	OpAbortPrepared  = 0x40
	OpAssignment     = 0x50
	OpInvalidations  = 0x60
	OpMask           = 0x70

	hasInfo = 0x80
)

// Bits of xinfo: which parts a commit or abort record has.
const (
	hasDBInfo = 1 << iota
	hasSubxacts
	hasRelations
	hasInvals
	hasTwoPhase
	hasOrigin
	hasAELocks
	hasGID
	hasDroppedStats
)

// Sizes of the parts' elements.
const (
	xidSize    = 4
	relSize    = 12 // RelFileNode
	statsSize  = 12 // xl_xact_stats_item
	invalSize  = 16 // SharedInvalidationMessage
	maxGIDSize = 200
)

var errShort = errors.New("the record's data is too short for what it says it has")

// An End is the commit or abort of a transaction, prepared before or not.
type End struct {
	Xid       pg.TransactionID // of the transaction that ended; 0 if it had none
	Committed bool
	Prepared  bool  // COMMIT PREPARED or ROLLBACK PREPARED
	Time      int64 // microseconds since 2000-01-01 UTC, as all times here
	Info      uint32

	Database, Tablespace pg.Oid
	Subxacts             []pg.TransactionID
	Relations            []pg.RelFileNode // dropped with this end, all their forks
	GID                  string           // of a prepared transaction; only with logical WAL

	HasOrigin  bool
	OriginLSN  pg.LSN
	OriginTime int64
}

// All gives the transaction, if it has a number, and then its subtransactions.
func (e *End) All() iter.Seq[pg.TransactionID] {
	return func(yield func(pg.TransactionID) bool) {
		if e.Xid != 0 && !yield(e.Xid) {
			return
		}
		for _, x := range e.Subxacts {
			if !yield(x) {
				return
			}
		}
	}
}

// ParseEnd parses a record that ends a transaction; nil for transaction records
// of other kinds.
func ParseEnd(rec *walrec.Record) (*End, error) {
	if rec.RmID == RmID {
		switch rec.Info & OpMask {
		case OpCommit, OpCommitPrepared:
			return ParseCommit(rec)
		case OpAbort, OpAbortPrepared:
			return ParseAbort(rec)
		}
	}
	return nil, nil
}

// ParseCommit parses a COMMIT or COMMIT_PREPARED record.
func ParseCommit(rec *walrec.Record) (*End, error) {
	op := rec.Info & OpMask
	if rec.RmID != RmID || op != OpCommit && op != OpCommitPrepared {
		return nil, fmt.Errorf("the record at %v is no commit", rec.LSN)
	}
	return parse(rec, &End{Committed: true, Prepared: op == OpCommitPrepared})
}

// ParseAbort parses an ABORT or ABORT_PREPARED record.
func ParseAbort(rec *walrec.Record) (*End, error) {
	op := rec.Info & OpMask
	if rec.RmID != RmID || op != OpAbort && op != OpAbortPrepared {
		return nil, fmt.Errorf("the record at %v is no abort", rec.LSN)
	}
	return parse(rec, &End{Prepared: op == OpAbortPrepared})
}

func parse(rec *walrec.Record, e *End) (*End, error) {
	r := reader{b: rec.MainData}
	e.Xid = rec.Xid
	e.Time = int64(r.u64())
	if rec.Info&hasInfo != 0 {
		e.Info = r.u32()
	}
	if e.Info&hasDBInfo != 0 {
		e.Database, e.Tablespace = pg.Oid(r.u32()), pg.Oid(r.u32())
	}
	if e.Info&hasSubxacts != 0 {
		e.Subxacts = r.xids(r.count(xidSize))
	}
	if e.Info&hasRelations != 0 {
		e.Relations = r.rels(r.count(relSize))
	}
	if e.Info&hasDroppedStats != 0 {
		r.take(r.count(statsSize) * statsSize)
	}
	if e.Info&hasInvals != 0 && e.Committed {
		r.take(r.count(invalSize) * invalSize)
	}
	if e.Info&hasTwoPhase != 0 {
		xid := pg.TransactionID(r.u32())
		if e.Prepared {
			e.Xid = xid
		}
		if e.Info&hasGID != 0 {
			e.GID = r.cstring()
		}
	} else if e.Prepared {
		r.bad = true
	}
	if e.Info&hasOrigin != 0 {
		e.HasOrigin = true
		e.OriginLSN, e.OriginTime = pg.LSN(r.u64()), int64(r.u64())
	}
	if r.bad {
		return nil, fmt.Errorf("transaction record at %v: %w", rec.LSN, errShort)
	}
	return e, nil
}

// A Prepare is what a PREPARE TRANSACTION record holds. Its data, with a CRC, is
// also the content of the file in pg_twophase (twophase.c).
type Prepare struct {
	Xid                   pg.TransactionID
	Database, Owner       pg.Oid
	Time                  int64
	GID                   string
	Subxacts              []pg.TransactionID
	CommitDrops           []pg.RelFileNode // relations to drop on commit
	AbortDrops            []pg.RelFileNode // and on abort
	RelcacheInitFileStale bool
	OriginLSN             pg.LSN
	OriginTime            int64
}

// twoPhaseMagic is TWOPHASE_MAGIC of PostgreSQL 15 (twophase.c).
const twoPhaseMagic = 0x57F94534

// ParsePrepare parses a PREPARE record.
func ParsePrepare(rec *walrec.Record) (*Prepare, error) {
	if rec.RmID != RmID || rec.Info&OpMask != OpPrepare {
		return nil, fmt.Errorf("the record at %v is no prepare", rec.LSN)
	}
	r := reader{b: rec.MainData}
	if magic := r.u32(); magic != twoPhaseMagic {
		return nil, fmt.Errorf("prepare record at %v: magic %#x, want %#x", rec.LSN, magic, twoPhaseMagic)
	}
	var p Prepare
	r.u32() // total_len: the file's length
	p.Xid, p.Database = pg.TransactionID(r.u32()), pg.Oid(r.u32())
	p.Time, p.Owner = int64(r.u64()), pg.Oid(r.u32())
	var n [6]int // subtransactions, drops on commit and abort, stats of both, invalidations
	for i := range n {
		n[i] = int(int32(r.u32()))
	}
	p.RelcacheInitFileStale = r.u8() != 0
	r.u8() // padding
	gidLen := int(r.u16())
	p.OriginLSN, p.OriginTime = pg.LSN(r.u64()), int64(r.u64())
	gid, _, _ := bytes.Cut(r.aligned(gidLen, 1), []byte{0})
	p.GID = string(gid)
	p.Subxacts = xids(r.aligned(n[0], xidSize))
	p.CommitDrops = rels(r.aligned(n[1], relSize))
	p.AbortDrops = rels(r.aligned(n[2], relSize))
	r.aligned(n[3], statsSize)
	r.aligned(n[4], statsSize)
	r.aligned(n[5], invalSize)
	if r.bad || gidLen > maxGIDSize {
		return nil, fmt.Errorf("prepare record at %v: %w", rec.LSN, errShort)
	}
	return &p, nil
}

// reader reads fields; past the end it gives zeros and sets bad.
type reader struct {
	b   []byte
	bad bool
}

func (r *reader) take(n int) []byte {
	if n < 0 || n > len(r.b) {
		r.bad, r.b = true, nil
		return nil
	}
	v := r.b[:n]
	r.b = r.b[n:]
	return v
}

// aligned takes n elements and the padding to the next multiple of 8.
func (r *reader) aligned(n, size int) []byte {
	if n < 0 || n > len(r.b)/size {
		return r.take(-1)
	}
	v := r.take(n * size)
	r.take(-n * size & 7)
	return v
}

func (r *reader) u8() uint8 {
	if v := r.take(1); v != nil {
		return v[0]
	}
	return 0
}

func (r *reader) u16() uint16 {
	if v := r.take(2); v != nil {
		return binary.LittleEndian.Uint16(v)
	}
	return 0
}

func (r *reader) u32() uint32 {
	if v := r.take(4); v != nil {
		return binary.LittleEndian.Uint32(v)
	}
	return 0
}

func (r *reader) u64() uint64 {
	if v := r.take(8); v != nil {
		return binary.LittleEndian.Uint64(v)
	}
	return 0
}

// count reads a number of elements of the given size that are to follow.
func (r *reader) count(size int) int {
	n := int(int32(r.u32()))
	if n < 0 || n > len(r.b)/size {
		r.take(-1)
		return 0
	}
	return n
}

func (r *reader) xids(n int) []pg.TransactionID { return xids(r.take(n * xidSize)) }
func (r *reader) rels(n int) []pg.RelFileNode   { return rels(r.take(n * relSize)) }

func (r *reader) cstring() string {
	i := bytes.IndexByte(r.b, 0)
	if i < 0 || i >= maxGIDSize {
		r.take(-1)
		return ""
	}
	s := string(r.b[:i])
	r.take(i + 1)
	return s
}

func xids(b []byte) []pg.TransactionID {
	list := make([]pg.TransactionID, 0, len(b)/xidSize)
	for ; len(b) >= xidSize; b = b[xidSize:] {
		list = append(list, pg.TransactionID(binary.LittleEndian.Uint32(b)))
	}
	return list
}

func rels(b []byte) []pg.RelFileNode {
	list := make([]pg.RelFileNode, 0, len(b)/relSize)
	for ; len(b) >= relSize; b = b[relSize:] {
		list = append(list, pg.RelFileNode{
			Tablespace: pg.Oid(binary.LittleEndian.Uint32(b)),
			Database:   pg.Oid(binary.LittleEndian.Uint32(b[4:])),
			Relation:   pg.Oid(binary.LittleEndian.Uint32(b[8:])),
		})
	}
	return list
}
