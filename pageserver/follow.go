package pageserver

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/auxfile"
	"github.com/holdfastdb/holdfast/internal/blob"
	"github.com/holdfastdb/holdfast/internal/keyring"
	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/internal/seal"
	"github.com/holdfastdb/holdfast/internal/walclient"
	"github.com/holdfastdb/holdfast/internal/walrec"
	"github.com/holdfastdb/holdfast/pageserver/ingest"
	"github.com/holdfastdb/holdfast/pageserver/keyspace"
	"github.com/holdfastdb/holdfast/pageserver/pageread"
	"github.com/holdfastdb/holdfast/pageserver/timeline"
)

// loadState reads the branch's counters as of the last LSN that the timeline holds.
func loadState(ctx context.Context, tl *timeline.Timeline) (ingest.State, error) {
	h, err := tl.Get(ctx, keyspace.Checkpoint(), tl.LastLSN())
	if err != nil {
		return ingest.State{}, err
	}
	if h.Base == nil {
		return ingest.State{}, fmt.Errorf("the branch's state: %w: its import did not finish", blob.ErrNotFound)
	}
	state, err := ingest.ParseState(h.Base.Data)
	if err != nil {
		return state, &damage{"reading the branch's state", err}
	}
	return state, nil
}

// lookup is an ingest.Lookup over a timeline. Its errors are marked as not the record's fault.
type lookup struct{ tl *timeline.Timeline }

// A lookupError is an error of the timeline, met while a record was ingested.
type lookupError struct{ error }

func (e *lookupError) Unwrap() error { return e.error }

func asLookup(err error) error {
	if err == nil {
		return nil
	}
	return &lookupError{err}
}

func (l lookup) Get(ctx context.Context, key keyspace.Key, lsn pg.LSN) (timeline.History, error) {
	h, err := l.tl.Get(ctx, key, lsn)
	return h, asLookup(err)
}

func (l lookup) Scan(ctx context.Context, from, to keyspace.Key, lsn pg.LSN, fn func(keyspace.Key, timeline.Value) error) error {
	return asLookup(l.tl.Scan(ctx, from, to, lsn, fn))
}

func (l lookup) Page(ctx context.Context, key keyspace.Key, lsn pg.LSN, page []byte) error {
	return asLookup(pageread.Page(ctx, l.tl, key, lsn, page))
}

// Stage makes entries visible at an LSN inside the record. No record ends there, so the
// branch's state is still that before the record, which is applied again after a crash.
func (l lookup) Stage(ctx context.Context, begin pg.LSN, entries []timeline.Entry) error {
	at := max(begin+1, l.tl.LastLSN())
	for i := range entries {
		entries[i].LSN = at
	}
	return asLookup(l.tl.Put(ctx, entries, at))
}

// batchBytes is the size of entries at which a batch is stored although more WAL is there.
const batchBytes = 4 << 20

// follower ingests a branch's WAL into its open timeline.
type follower struct {
	b       *branch
	ctx     context.Context
	tl      *timeline.Timeline
	core    *ingest.Core
	scanner *walrec.Scanner
	fed     pg.LSN // the end of what the scanner was given
	rec     walrec.Record
	plain   []byte
	refused []pg.Oid // tablespaces, and
	foreign int      // how many resource managers' records, that the log tells of
	// auxRefused tells that a message of somebody else's was seen.
	auxRefused bool
}

// ingest follows the WAL from where the timeline ends.
func (b *branch) ingest(ctx context.Context, tl *timeline.Timeline) error {
	state, err := loadState(ctx, tl)
	if err != nil {
		return err
	}
	from := tl.LastLSN()
	f := &follower{b: b, ctx: ctx, tl: tl, core: ingest.New(lookup{tl}, state, from)}
	f.core.Aux, f.core.AuxKey = f.openAux, f.openAuxKey
	f.core.Project, f.core.Branch = b.name.project, b.name.branch
	err = b.source.Follow(ctx, from, f.take)
	f.core.Wipe()
	clear(f.plain[:cap(f.plain)])
	if f.scanner != nil {
		f.scanner.Wipe()
	}
	switch {
	case err == nil:
		return errors.New("the safekeepers ended the stream")
	case errors.Is(err, walclient.ErrTruncated):
		return &damage{fmt.Sprintf("reading WAL from %v", from), err}
	}
	return err
}

// take ingests some chunks. What it returned nil for is in the timeline.
func (f *follower) take(chunks []*pb.SealedWAL, _ pg.LSN) error {
	f.b.setError(nil)
	for _, c := range chunks {
		if err := f.chunk(c); err != nil {
			return err
		}
	}
	return f.store()
}

func (f *follower) chunk(c *pb.SealedWAL) error {
	begin, end := pg.LSN(c.BeginLsn), pg.LSN(c.EndLsn)
	what := fmt.Sprintf("WAL chunk %v to %v", begin, end)
	if end <= f.pos() {
		return nil
	}
	if begin > f.pos() {
		return fmt.Errorf("%s does not continue the WAL, which is ingested up to %v", what, f.pos())
	}
	if err := f.open(c); err != nil {
		if errors.Is(err, keyring.ErrRevoked) || errors.Is(err, keyring.ErrUnreachable) || errors.Is(err, seal.ErrWiped) ||
			errors.Is(err, keyring.ErrRetired) || f.ctx.Err() != nil { // retired: the safekeeper is behind a rotation, and catches up
			return err
		}
		return &damage{"opening " + what, err}
	}
	state := f.core.State()
	state.Epoch = max(state.Epoch, c.Epoch)
	f.core.Epoch = c.Epoch
	f.b.enter(state.Epoch)
	switch {
	case f.scanner == nil: // the timeline may end inside a chunk: the records before are skipped
		f.scanner = walrec.NewScanner(begin)
		f.scanner.Skim(passedOver)
		f.scanner.Feed(f.plain)
	case f.pos()-begin <= pg.LSN(len(f.plain)):
		f.scanner.Feed(f.plain[f.pos()-begin:])
	}
	if err := f.records(); err != nil {
		return err
	}
	f.fed = end
	if f.scanner.Pos() != end && f.scanner.Missing() == 0 {
		return &damage{what, fmt.Errorf("its records end at %v", f.scanner.Pos())}
	}
	return nil
}

// maxMessage is above which size a logical message says nothing here: none of the compute's is so large.
const maxMessage = 2 * auxfile.MaxContent

// passedOver tells of records that change nothing and may be too large for memory. Any
// other is put together, though it comes in pieces: PostgreSQL has it in memory too, and it has
// at most 1 GiB.
func passedOver(rmid uint8, size int) bool { return rmid == walrec.RmLogicalMsg && size > maxMessage }

// pos is where the WAL has to go on.
func (f *follower) pos() pg.LSN {
	if f.scanner == nil {
		return f.tl.LastLSN()
	}
	return f.fed
}

func (f *follower) open(c *pb.SealedWAL) error {
	sc := seal.Context{Purpose: seal.PurposeWAL, Project: f.b.name.project, Branch: f.b.name.branch, Object: c.Object}
	key, err := f.b.srv.cfg.Ring.Open(f.ctx, sc, c.WrappedDek)
	if err != nil {
		return err
	}
	f.plain, err = seal.OpenWAL(f.plain[:0], key, sc, pg.LSN(c.BeginLsn), pg.LSN(c.EndLsn), c.Counter, c.Ciphertext)
	return err
}

func (f *follower) records() error {
	for {
		raw, ok, err := f.scanner.Next()
		if err != nil {
			return &damage{"reading WAL", err}
		}
		if !ok {
			return nil
		}
		if raw.End <= f.tl.LastLSN() {
			continue
		}
		if raw.Skimmed {
			f.rec = walrec.HeaderOnly(raw)
		} else if err := walrec.ParseInto(&f.rec, raw.Data, raw.LSN, raw.End); err != nil {
			return &damage{"reading WAL", err}
		}
		if err := f.record(&f.rec); err != nil {
			return err
		}
	}
}

func (f *follower) record(rec *walrec.Record) error {
	if f.core.Barrier(rec) && rec.LSN > f.tl.LastLSN() {
		if err := f.put(rec.LSN); err != nil {
			return err
		}
	}
	if err := f.core.Apply(f.ctx, rec); err != nil {
		var storage *lookupError
		if errors.As(err, &storage) {
			return err
		}
		return &damage{"ingesting", err}
	}
	f.b.verify.note(rec)
	if f.core.Pending() >= batchBytes {
		return f.put(rec.End)
	}
	return nil
}

// store puts what is ingested into the timeline, up to where the scanner is.
func (f *follower) store() error {
	if f.scanner == nil || f.scanner.Pos() <= f.tl.LastLSN() {
		return nil
	}
	return f.put(f.scanner.Pos())
}

func (f *follower) put(upTo pg.LSN) error {
	defer f.b.verify.begin()()
	if f.core.SlotsChanged {
		f.b.slotsChanged.Store(uint64(upTo)) // before it can be durable
	}
	if err := f.tl.Put(f.ctx, f.core.Take(upTo), upTo); err != nil {
		return err
	}
	f.core.SlotsChanged = false
	f.tell()
	return f.b.verify.check(f.ctx, f.tl)
}

// tell logs what was ingested and will be missed.
func (f *follower) tell() {
	if f.core.Forged > 0 {
		f.tellForged()
	}
	refused := f.core.Refused()
	if slices.ContainsFunc(refused, func(oid pg.Oid) bool { return !slices.Contains(f.refused, oid) }) {
		f.b.log.Error("a tablespace was created outside the data directory: what is in it cannot be read", "tablespaces", refused)
	}
	f.refused = refused
	if foreign := f.core.Foreign(); len(foreign) > f.foreign {
		f.foreign = len(foreign)
		f.b.log.Error("an extension's own WAL records name no page: what else they changed is not kept, and is missing after the endpoint's next start",
			"resource managers", foreign)
	}
}
