package pgfs

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/holdfastdb/holdfast/internal/pagemask"
	"github.com/holdfastdb/holdfast/internal/pg"
)

// The comparison of pages, a continuous oracle for tests (Config.Past): a page that Postgres
// wrote leaves only after it was found to equal the page server's, and what is left at the end
// is compared by VerifyAll. It proves redo, and the eviction rule: what WAL lacks may differ
// only where other witnesses than the rule's show that nobody can need it any more.
//
// A page is compared as of its own LSN, if the page server has a newer one: Postgres may have
// changed and logged it again without writing it. Three things move without the LSN: hints,
// the flag of a heap page that all its rows are visible, and bits of the visibility map that are
// cleared; the last two are compared in the direction that holds.
//
// A difference is not believed at once. The kernel hands over halves of a block apart, and a
// relation is shortened at the page server a moment before it is here. So the page stays, and
// what differs the same way after a while is reported. Nothing of a page's content is.

// Verified counts what was compared.
type Verified struct {
	Compared   int64            // pages and small files
	Mismatched int64            // those that differ
	Withdrawn  int64            // differed once, and were changed before that was reported
	Skipped    map[string]int64 // by reason
}

const (
	// patience is more than the kernel delays half a block.
	patience = time.Minute
	// maxReports bounds the messages in the log; all are counted.
	maxReports = 100
	// verifyBatch is how many blocks VerifyAll asks for at a time.
	verifyBatch = 128
)

// Reasons for which pages are not compared.
const (
	skipFSM       = "free space map"
	skipUnlogged  = "unlogged relation"
	skipEmpty     = "empty and not logged"
	skipTooOld    = "history gone"
	skipMulti     = "command ids under a multixact"
	skipCopiedMap = "visibility map that CREATE DATABASE copied"
)

type verifier struct {
	log      *slog.Logger
	patience time.Duration
	mu       struct {
		sync.Mutex
		counts   Verified
		suspects map[suspectKey]suspect
	}
}

type suspectKey struct {
	file  uint64
	block pg.BlockNumber
}

type suspect struct {
	gen      uint32 // of the write
	since    time.Time
	found    *difference // until it is reported
	reported bool
}

func newVerifier(log *slog.Logger) *verifier {
	v := &verifier{log: log, patience: patience}
	v.mu.suspects = map[suspectKey]suspect{}
	v.mu.counts.Skipped = map[string]int64{}
	return v
}

// Verified tells what was compared so far, if anything is.
func (fs *FS) Verified() (counts Verified, on bool) {
	v := fs.verify
	if v == nil {
		return counts, false
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	counts = v.mu.counts
	counts.Skipped = maps.Clone(counts.Skipped)
	return counts, true
}

func (v *verifier) compared() {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.mu.counts.Compared++
}

func (v *verifier) skip(why string, n int64) {
	if n == 0 {
		return
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.mu.counts.Skipped[why] += n
}

// report counts a difference and says where it is.
func (v *verifier) report(path string, attrs ...any) {
	v.mu.Lock()
	v.mu.counts.Mismatched++
	n := v.mu.counts.Mismatched
	v.mu.Unlock()
	if n <= maxReports {
		v.log.Error("what Postgres wrote differs from the page server's", append([]any{"path", path}, attrs...)...)
	}
	if n == maxReports {
		v.log.Error("further differences are only counted")
	}
}

// difference is where two copies of a page differ.
type difference struct {
	what        string
	at          int
	here, there pg.LSN
	sure        bool // more than half a block can explain
}

func (d *difference) attrs(s *source, b pg.BlockNumber) []any {
	return []any{"relation", s.rel.String(), "block", uint32(s.first + b), "lsn", d.here.String(), "remote_lsn", d.there.String(), "offset", d.at, "what", d.what}
}

// agreed has, by block of a chunk, the entries whose pages may leave.
type agreed [chunkBlocks]page

// leaver is a page that the rule lets go.
type leaver struct {
	block   pg.BlockNumber
	entry   page
	content []byte
}

// agree compares the pages of a chunk that are about to leave. No lock is held.
func (fs *FS) agree(f *file, first pg.BlockNumber, c *chunk, spared uint64, safe uint32, committed pg.LSN) *agreed {
	var same agreed
	var run []leaver
	flush := func() {
		for _, l := range fs.compareRun(f, run, committed) {
			same[l.block%chunkBlocks] = l.entry
		}
		run = run[:0]
	}
	for j := range c.pages {
		b := first + pg.BlockNumber(j)
		l, ok := leaver{}, false
		if spared&(1<<j) == 0 {
			l, ok = fs.leaving(f, b, &c.pages[j], safe, committed)
		}
		if !ok {
			flush()
			continue
		}
		run = append(run, l)
	}
	flush()
	return &same
}

func (fs *FS) leaving(f *file, b pg.BlockNumber, p *page, safe uint32, committed pg.LSN) (leaver, bool) {
	f.mu.RLock()
	defer f.mu.RUnlock()
	lock := fs.pageLock(f, b)
	lock.RLock()
	defer lock.RUnlock()
	if !p.hasSlot() || p.gen == remoteGen || !mayLeave(f, p, safe, committed) || !fs.verify.due(f, b, p.gen) {
		return leaver{}, false
	}
	l := leaver{block: b, entry: *p, content: make([]byte, pg.BlockSize)}
	if n, err := fs.store.Read(p.slot, l.content); err != nil || n != pg.BlockSize {
		return leaver{}, false
	}
	return l, true
}

// compareRun compares consecutive pages and gives those that may leave.
func (fs *FS) compareRun(f *file, run []leaver, committed pg.LSN) (same []leaver) {
	if len(run) == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(fs.ctx, fetchTimeout)
	defer cancel()
	pages, err := fs.cfg.Past.PagesAt(ctx, f.src.rel, f.src.first+run[0].block, len(run), committed)
	if ctx.Err() != nil {
		return nil
	}
	for i, l := range run {
		d := &difference{what: "the page server has no such block", here: pg.PageLSN(l.content)}
		switch {
		case err != nil:
			d.what = err.Error()
		case (i+1)*pg.BlockSize <= len(pages):
			if d, err = fs.compareLeaving(ctx, f.src, l, pages[i*pg.BlockSize:][:pg.BlockSize]); err != nil {
				return same
			}
		}
		if d == nil {
			same = append(same, l)
		}
		fs.verify.decide(f, l, d)
	}
	return same
}

// compareLeaving compares a page with the page server's newest. If the latter is newer in
// fact, it is asked for as of this page's LSN.
func (fs *FS) compareLeaving(ctx context.Context, s *source, l leaver, newest []byte) (*difference, error) {
	v, here, there := fs.verify, pg.PageLSN(l.content), newest
	if s.rel.Fork == pg.FSMFork {
		v.skip(skipFSM, 1)
		return nil, nil
	}
	past := pg.PageLSN(newest) > here
	if past {
		// A page of before the start stood at the start as it stood at its LSN.
		pages, err := fs.cfg.Past.PagesAt(ctx, s.rel, s.first+l.block, 1, max(here, fs.cfg.StartLSN))
		switch {
		case errors.Is(err, ErrTooOld):
			v.skip(skipTooOld, 1)
			return nil, nil
		case err != nil && ctx.Err() != nil:
			return nil, err
		case err != nil:
			return &difference{what: err.Error(), here: here, there: pg.PageLSN(newest)}, nil
		case len(pages) != pg.BlockSize:
			return &difference{what: "the page server had no such block", here: here, there: pg.PageLSN(newest)}, nil
		}
		there = pages
	}
	if s.rel.Fork == pg.VMFork {
		d := v.compareMap(s, l.content, there, past)
		return d, nil
	}
	at := pagemask.Place{Fork: s.rel.Fork, Block: s.first + l.block, Kind: kindOf(s.rel.Fork, l.content)}
	d, needs := comparePages(at, l.content, there, pagemask.Hints|pagemask.AllVisible)
	if d != nil {
		return d, nil
	}
	return v.needed(needs, at, l, fs.cache.proven()), nil
}

func kindOf(fork pg.ForkNumber, p []byte) pagemask.Kind {
	if fork != pg.MainFork && fork != pg.InitFork {
		return pagemask.Other
	}
	return pagemask.KindOf(p)
}

// gistBuildLSN is what pages of a GiST index bear that its build wrote, which logs them
// afterwards (GistBuildLSN in gist.h).
const gistBuildLSN = 1

// comparePages tells where two copies differ in what WAL has, and in what it lacks.
func comparePages(at pagemask.Place, here, there []byte, allow pagemask.Allow) (*difference, []pagemask.Need) {
	a, b := slices.Clone(here), slices.Clone(there)
	errA, errB := pagemask.Mask(a, at, allow|pagemask.Unlogged), pagemask.Mask(b, at, allow|pagemask.Unlogged)
	d := &difference{here: pg.PageLSN(here), there: pg.PageLSN(there)}
	if at.Kind == pagemask.Gist && d.here == gistBuildLSN {
		pg.SetPageLSN(a, d.there)
	}
	switch {
	case errA != nil && errB == nil:
		d.what = fmt.Sprintf("here: %v", errA)
		return d, nil
	case errB != nil && errA == nil:
		d.what = fmt.Sprintf("there: %v", errB)
		return d, nil
	}
	if d.at = pagemask.Difference(a, b); d.at >= 0 {
		d.what = fmt.Sprintf("%s of a %v page", pagemask.Field(here, at, d.at), at.Kind)
		return d, nil
	}
	return nil, pagemask.Needs(here, there, at)
}

// needed judges what a page has that WAL lacks: nobody may be able to need it any more.
func (v *verifier) needed(needs []pagemask.Need, at pagemask.Place, l leaver, known proof) *difference {
	multi := int64(0)
	for _, n := range needs {
		what := ""
		switch {
		case n.Cycle && !known.noVacuum(l.entry.gen):
			what = "the vacuum cycle, while a vacuum of its time runs"
		case n.Xmin != 0 && !known.ended(n.Xmin):
			what = fmt.Sprintf("whose transaction %d may run", n.Xmin)
		case n.Xmax != 0 && !known.ended(n.Xmax):
			what = fmt.Sprintf("whose deleting transaction %d may run", n.Xmax)
		}
		if what != "" {
			lsn := pg.PageLSN(l.content)
			return &difference{what: pagemask.Field(l.content, at, n.At) + ": " + what + ": the page was to leave too early", at: n.At, here: lsn, there: lsn, sure: true}
		}
		if n.Multi {
			multi = 1
		}
	}
	v.skip(skipMulti, multi)
	return nil
}

// compareMap compares pages of a visibility map. Bits are cleared without a trace in the
// page's LSN: so the newest page says no more than an older one of the same LSN, and a page
// no more than the page server's as of the record that it bears.
func (v *verifier) compareMap(s *source, here, there []byte, past bool) *difference {
	d := &difference{here: pg.PageLSN(here), there: pg.PageLSN(there), what: "pd_lsn"}
	if d.here != d.there {
		return d
	}
	more, less := there, here
	if past {
		if copied(s.rel) {
			v.skip(skipCopiedMap, 1)
			return nil
		}
		more, less = here, there
	}
	if d.at = saysMore(more, less); d.at >= 0 {
		d.what = "the visibility map"
		return d
	}
	return nil
}

// saysMore is the first byte of a map in which a has a bit that b has not, or -1.
func saysMore(a, b []byte) int {
	for i := pageHeader; i < pg.BlockSize; i++ {
		if a[i]&^b[i] != 0 {
			return i
		}
	}
	return -1
}

const pageHeader = 24

// copied tells that CREATE DATABASE may have copied a relation: then it has a lower number
// than its database. PostgreSQL logs the copy of a map without its bits.
func copied(rel pg.RelTag) bool { return rel.Database != 0 && rel.Relation < rel.Database }

// due tells whether a page is to be compared: a suspect only after a while, and once more.
func (v *verifier) due(f *file, b pg.BlockNumber, gen uint32) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	key := suspectKey{f.id, b}
	s, ok := v.mu.suspects[key]
	if ok && s.gen != gen {
		delete(v.mu.suspects, key)
		if ok = false; !s.reported {
			v.mu.counts.Withdrawn++
		}
	}
	return !ok || !s.reported && time.Since(s.since) >= v.patience
}

// decide takes a comparison's outcome.
func (v *verifier) decide(f *file, l leaver, d *difference) {
	key := suspectKey{f.id, l.block}
	v.mu.Lock()
	s, again := v.mu.suspects[key]
	switch {
	case d == nil:
		v.mu.counts.Compared++
		if again {
			delete(v.mu.suspects, key)
			v.mu.counts.Withdrawn++
		}
	case d.sure || again || v.patience == 0:
		s = suspect{gen: l.entry.gen, reported: true}
		v.mu.suspects[key] = s
	default:
		v.mu.suspects[key] = suspect{gen: l.entry.gen, since: time.Now(), found: d}
	}
	v.mu.Unlock()
	if s.reported {
		v.report(f.src.path, append(d.attrs(f.src, l.block), "when", "before it was to leave; it stays")...)
	}
}

// settle tells whether a page is known to differ since it was to leave, and gives the difference
// if it is still to be reported: it has not passed.
func (v *verifier) settle(f *file, b pg.BlockNumber, gen uint32) (known bool, d *difference) {
	key := suspectKey{f.id, b}
	v.mu.Lock()
	defer v.mu.Unlock()
	s, ok := v.mu.suspects[key]
	if !ok || s.gen != gen {
		return false, nil
	}
	v.mu.suspects[key] = suspect{gen: gen, reported: true}
	return true, s.found
}
