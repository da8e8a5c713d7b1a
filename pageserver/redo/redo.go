// Package redo replays one WAL record on one page, in pure Go: no I/O, no clock,
// no state between calls. Given a page as it was before a record, Apply makes it
// what PostgreSQL's own recovery would make it (invariant P1), or fails and names
// the record, its LSN and the page. It never guesses, and since WAL is hostile
// input, every offset in a record or page is checked before use.
//
// A record changes the blocks it names, and some pages it does not name: the
// visibility map (ImpliedVM), the transaction status and multixact areas
// (SLRUPages), the free space map (FreeSpaceBlock: a hint, kept apart since its
// value depends on another page; package pageread takes it from there when the map
// is read). There is one file per resource manager and one
// table of them; a manager without an entry, an extension's, or a kind of record that
// PostgreSQL 15 does not have, gives an *UnsupportedError unless the record carries the
// whole page.
//
// Check compares a page with the image that PostgreSQL adds to each record under
// wal_consistency_checking, which makes PostgreSQL itself the oracle of the tests.
package redo

import (
	"errors"
	"fmt"
	"sync"

	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/internal/walrec"
	"github.com/holdfastdb/holdfast/pageserver/keyspace"
)

// An Error says which record could not be applied to which page.
type Error struct {
	Record string // as in "Heap/INSERT"
	LSN    pg.LSN // where the record begins
	Page   string
	Err    error
}

func (e *Error) Error() string {
	return fmt.Sprintf("applying %s at %v to %s: %v", e.Record, e.LSN, e.Page, e.Err)
}

func (e *Error) Unwrap() error { return e.Err }

// An UnsupportedError means that there is no redo for such records: an extension's
// resource manager made them, or a version of PostgreSQL other than 15. The page needs
// a full image, or the recovery of whoever made the record.
type UnsupportedError struct{ Record string }

func (e *UnsupportedError) Error() string {
	return fmt.Sprintf("no redo for %s records", e.Record)
}

var (
	// ErrUntouched means that the record does not change the page: whoever filed
	// the record under that page was wrong.
	ErrUntouched = errors.New("the record does not change this page")

	errNoBlocks  = errors.New("this kind of record changes no block")
	errUnusedRef = errors.New("this kind of record has no such block reference")
	errNewPage   = errors.New("the page was never initialised, and the record does not do it")
	errPageSize  = fmt.Errorf("a page has %d bytes", pg.BlockSize)
)

// infoMask is the part of xl_info that belongs to the resource manager.
const infoMask = 0xF0

// Resource manager numbers (rmgrlist.h).
const (
	rmXLOG      = 0
	rmXact      = 1
	rmSMGR      = 2
	rmCLOG      = 3
	rmMultiXact = 6
	rmHeap2     = 9
	rmHeap      = 10
	rmBtree     = 11
	rmHash      = 12
	rmGIN       = 13
	rmGist      = 14
	rmSeq       = 15
	rmSPGist    = 16
	rmBRIN      = 17
	rmCommitTS  = 18
	rmGeneric   = 20
)

// managers has each resource manager's redo for a block that a record names and
// gives no image of.
var managers = [256]func(*op) error{
	rmXLOG:    redoXLOG,
	rmHeap2:   redoHeap2,
	rmHeap:    redoHeap,
	rmBtree:   redoBtree,
	rmHash:    redoHash,
	rmGIN:     redoGIN,
	rmGist:    redoGist,
	rmSeq:     redoSeq,
	rmSPGist:  redoSPGist,
	rmBRIN:    redoBRIN,
	rmGeneric: redoGeneric,
}

// restored has what a manager's redo still does to a page that the record's image
// restored (BLK_RESTORED).
var restored = [256]func(*op) error{
	rmGist: restoredGist,
}

// Apply changes page, 8 KiB, which key names, as rec does, and stamps rec.End on
// it as its LSN where PostgreSQL does. After an error the page's content is
// undefined. A page whose LSN says that it has seen rec already is left alone,
// as in PostgreSQL. FSM pages change by images and truncation only.
func Apply(key keyspace.Key, page []byte, rec *walrec.Record) error {
	k, err := keyspace.Parse(key)
	if err != nil {
		return fmt.Errorf("redo of the record at %v: %w", rec.LSN, err)
	}
	switch k.Kind {
	case keyspace.KindRelPage:
		return ApplyBlock(k.Rel, k.Block, page, rec)
	case keyspace.KindSLRUPage:
		return ApplySLRU(k.SLRU, k.Page, page, rec)
	}
	return wrap(rec, fmt.Sprintf("key %q", key), errors.New("not the key of a page"))
}

// ApplyBlock is Apply for a block of a relation.
func ApplyBlock(tag pg.RelTag, block pg.BlockNumber, p []byte, rec *walrec.Record) error {
	if err := applyBlock(tag, block, p, rec); err != nil {
		return wrap(rec, fmt.Sprintf("block %d of %v", block, tag), err)
	}
	return nil
}

// ApplySLRU is Apply for a page of an SLRU area.
func ApplySLRU(kind pg.SLRUKind, number uint32, p []byte, rec *walrec.Record) error {
	if err := applySLRU(kind, number, p, rec); err != nil {
		return wrap(rec, fmt.Sprintf("page %d of %s", number, kind.Dir()), err)
	}
	return nil
}

func wrap(rec *walrec.Record, page string, err error) error {
	return &Error{walrec.Name(rec.RmID, rec.Info), rec.LSN, page, err}
}

func applyBlock(tag pg.RelTag, block pg.BlockNumber, p []byte, rec *walrec.Record) error {
	if len(p) != pg.BlockSize {
		return errPageSize
	}
	named := false
	for i := range rec.Blocks {
		b := &rec.Blocks[i]
		if b.Block != block || b.Rel != tag {
			continue
		}
		if named {
			return errors.New("the record names the block twice")
		}
		named = true
		if err := applyPooled(op{rec: rec, blk: b, page: p}); err != nil {
			return err
		}
	}
	if named {
		return nil
	}
	return applyUnnamed(tag, block, p, rec)
}

// ops spares an allocation for each record: an op is on the heap, since it goes through a table.
var ops = sync.Pool{New: func() any { return new(op) }}

func applyPooled(work op) error {
	o := ops.Get().(*op)
	defer ops.Put(o)
	*o = work
	err := applyRef(o)
	*o = op{}
	return err
}

// applyRef is what XLogReadBufferForRedo and a redo routine do for one block
// (xlogutils.c).
func applyRef(o *op) error {
	switch {
	case o.blk.ApplyImage:
		if err := o.blk.RestoreImage(o.page); err != nil {
			return err
		}
		if !o.page.isNew() {
			o.page.setLSN(o.rec.End)
		}
		if fn := restored[o.rec.RmID]; fn != nil {
			return fn(o)
		}
		return nil
	case !o.blk.WillInit && o.page.lsn() >= o.rec.End:
		return nil
	}
	fn := managers[o.rec.RmID]
	if fn == nil || !walrec.Known(o.rec.RmID, o.rec.Info) {
		return &UnsupportedError{walrec.Name(o.rec.RmID, o.rec.Info)}
	}
	return fn(o)
}

// applyUnnamed handles pages that the record changes without naming them.
func applyUnnamed(tag pg.RelTag, block pg.BlockNumber, p page, rec *walrec.Record) error {
	if rec.RmID == rmSMGR {
		return applyTruncate(tag, block, p, rec)
	}
	if tag.Fork != pg.VMFork {
		return ErrUntouched
	}
	return applyImpliedVM(tag, block, p, rec)
}

// op is one record's work on one block that it names.
type op struct {
	rec  *walrec.Record
	blk  *walrec.Block
	page page
}

func (o *op) block() uint32 { return uint32(o.blk.Block) }

// existing checks that the page is one that earlier records made.
func (o *op) existing() error {
	if o.page.isNew() {
		return errNewPage
	}
	return o.page.sane()
}

// done stamps the page with the record's end.
func (o *op) done() error {
	o.page.setLSN(o.rec.End)
	return nil
}
