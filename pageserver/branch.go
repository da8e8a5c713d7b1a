package pageserver

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/blob"
	"github.com/holdfastdb/holdfast/internal/keyring"
	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/pageserver/keyspace"
	"github.com/holdfastdb/holdfast/pageserver/pageread"
	"github.com/holdfastdb/holdfast/pageserver/timeline"
)

// branch is a branch that this server follows. One goroutine, run, opens its timeline and
// ingests; calls read from the timeline that is open at the time.
type branch struct {
	srv    *Server
	name   branchName
	log    *slog.Logger
	source WALSource
	stop   context.CancelFunc
	stopCh chan struct{}
	done   chan struct{}
	verify *verifier // nil unless Config.VerifyRedo

	complained string // last warning; owned by run

	// epoch is the highest epoch of which anything may be in the timeline (W2).
	epoch atomic.Uint64
	// answering counts the calls that may hold pages.
	answering atomic.Int64
	// slotsChanged is the LSN up to which a replication slot's file may have changed.
	slotsChanged atomic.Uint64
	messages     messageDEKs

	mu struct {
		sync.Mutex
		tl      *timeline.Timeline
		err     error         // why there is no timeline, or why ingesting does not go on
		ended   bool          // err is for good
		changed chan struct{} // closed at each change
	}
}

func newBranch(s *Server, name branchName, source WALSource) *branch {
	b := &branch{srv: s, name: name, source: source, stopCh: make(chan struct{}), done: make(chan struct{}),
		log: s.log.With("project", name.project, "branch", name.branch)}
	b.stop = sync.OnceFunc(func() { close(b.stopCh) })
	b.mu.changed = make(chan struct{})
	if s.cfg.VerifyRedo {
		b.verify = newVerifier(b.log)
	}
	return b
}

func (s *Server) timelineConfig(project, id string) timeline.Config {
	cfg := s.cfg.Timeline
	cfg.Project, cfg.Branch = project, id
	cfg.Store, cfg.Ring, cfg.Log = s.cfg.Blob, s.cfg.Ring, s.log
	if s.cfg.Dir != "" {
		cfg.Dir = filepath.Join(s.cfg.Dir, project, id)
	}
	return cfg
}

func (b *branch) set(tl *timeline.Timeline, err error, ended bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.mu.tl, b.mu.err, b.mu.ended = tl, err, ended
	close(b.mu.changed)
	b.mu.changed = make(chan struct{})
}

// setError notes, or with nil takes back, why ingesting does not go on.
func (b *branch) setError(err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.mu.err = err
}

// timeline is the open timeline. It waits for one that is being opened, and not for one
// that cannot be.
func (b *branch) timeline(ctx context.Context) (*timeline.Timeline, error) {
	for {
		b.mu.Lock()
		tl, err, ended, changed := b.mu.tl, b.mu.err, b.mu.ended, b.mu.changed
		b.mu.Unlock()
		switch {
		case ended || tl == nil && err != nil:
			return nil, err
		case tl != nil:
			if err := tl.Err(); err != nil { // it ended a moment ago
				return nil, err
			}
			return tl, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// Times between attempts.
const (
	retryFirst = 100 * time.Millisecond
	retryMost  = time.Second
)

// run opens the timeline and ingests, again and again, until the branch is let go or
// something is damaged.
func (b *branch) run(ctx context.Context) {
	defer close(b.done)
	defer b.source.Close()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		select {
		case <-b.stopCh:
			cancel()
		case <-ctx.Done():
		}
	}()
	for wait := retryFirst; ctx.Err() == nil; wait = min(2*wait, retryMost) {
		begun := time.Now()
		err := b.session(ctx)
		if ctx.Err() != nil {
			break
		}
		ended := isFinal(err)
		b.set(nil, err, ended)
		if ended {
			b.log.Error("branch stopped; the other branches go on", "err", err)
			return
		}
		if time.Since(begun) > retryMost {
			wait = retryFirst
		}
		b.complain("branch is shut; trying again", err)
		select {
		case <-ctx.Done():
		case <-time.After(wait):
		case <-b.srv.cfg.Ring.News(b.name.project, b.name.branch): // the key may be enabled again
		}
	}
	b.set(nil, context.Canceled, true)
}

func isFinal(err error) bool {
	var bad *damage
	return errors.As(err, &bad) || errors.Is(err, timeline.ErrSuperseded) || errors.Is(err, blob.ErrNotFound)
}

// session opens the timeline and ingests until that fails in a way that needs it opened anew.
func (b *branch) session(ctx context.Context) (err error) {
	cfg := b.srv.timelineConfig(b.name.project, b.name.branch)
	cfg.Materialize = fold
	opened, err := timeline.Open(ctx, cfg)
	if err != nil {
		return err
	}
	defer b.onShred()() // last of all
	defer func() {
		b.set(nil, err, isFinal(err)) // before the waiting calls are woken
		err = errors.Join(err, opened.Close())
	}()
	state, err := loadState(ctx, opened)
	if err != nil {
		return err
	}
	b.enter(state.Epoch)
	b.set(opened, nil, false)
	b.complained = ""
	ctx, cancel := context.WithCancel(ctx)
	var helpers sync.WaitGroup
	defer func() { cancel(); helpers.Wait() }()
	helpers.Go(func() { b.report(ctx, opened) })
	helpers.Go(func() { // an idle stream would not notice that the timeline ended
		select {
		case <-opened.Done():
			cancel()
		case <-ctx.Done():
		}
	})
	for wait := retryFirst; ; wait = min(2*wait, retryMost) {
		before := opened.LastLSN()
		err := b.ingest(ctx, opened)
		if ended := opened.Err(); ended != nil {
			return ended
		}
		if ctx.Err() != nil || isFinal(err) || needsReopen(err) {
			return err
		}
		if opened.LastLSN() != before {
			wait = retryFirst
		}
		b.setError(err)
		b.complain("following the WAL was interrupted; trying again", err)
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(wait):
		}
	}
}

// onShred has the ring wait, when the lease is over, until the session has ended, which the timeline's
// end makes it do, and no call holds pages any more. The session calls ended when it has.
func (b *branch) onShred() (ended func()) {
	over := make(chan struct{})
	cancel := b.srv.cfg.Ring.OnShred(b.name.project, b.name.branch, func(error) []string {
		limit, cancel := context.WithTimeout(context.Background(), shredWait)
		defer cancel()
		select {
		case <-over:
		case <-limit.Done():
		}
		for b.answering.Load() > 0 {
			select {
			case <-time.After(time.Millisecond):
			case <-limit.Done():
				return []string{fmt.Sprintf("branch %s: calls that were under way have not ended within %v; they give no answer", b.name.branch, shredWait)}
			}
		}
		return []string{fmt.Sprintf("branch %s: WAL that was being ingested, pages on their way into answers", b.name.branch)}
	})
	return func() { close(over); cancel() }
}

// shredWait bounds how long a shredding waits for what is under way, within what the process's guard
// allows (internal/leaseguard).
const shredWait = time.Second

// enter notes that WAL of an epoch is about to show.
func (b *branch) enter(epoch uint64) {
	for {
		have := b.epoch.Load()
		if epoch <= have || b.epoch.CompareAndSwap(have, epoch) {
			return
		}
	}
}

// complain logs an error that the branch meets again and again, once until another comes.
func (b *branch) complain(what string, err error) {
	text := what + fmt.Sprint(err)
	if b.complained != text {
		b.complained = text
		b.log.Warn(what, "err", err)
	}
}

// needsReopen tells errors after which the timeline holds nothing any more.
func needsReopen(err error) bool {
	return errors.Is(err, keyring.ErrRevoked) || errors.Is(err, keyring.ErrUnreachable) || errors.Is(err, timeline.ErrClosed)
}

// fold gives the timeline images of pages. Other values have no history.
func fold(key keyspace.Key, h timeline.History) ([]byte, error) { return pageread.Fold(key, &h) }

// reportEvery is how often the safekeepers hear how far the bucket has the WAL, and nobody
// needs it otherwise.
const reportEvery = time.Second

func (b *branch) report(ctx context.Context, tl *timeline.Timeline) {
	var last pg.LSN
	hold := &slotHold{log: b.log, told: make(map[string]bool)}
	tick := time.NewTicker(reportEvery)
	defer tick.Stop()
	for {
		if tl.DurableLSN() > last {
			lsn, err := b.reportDurable(ctx, tl, hold, last)
			if err == nil {
				last = lsn
			} else if ctx.Err() == nil {
				b.log.Debug("the safekeepers could not be told how far layers go", "err", err)
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// reportDurable tells the safekeepers what they may forget, if that is more than at last.
func (b *branch) reportDurable(ctx context.Context, tl *timeline.Timeline, hold *slotHold, last pg.LSN) (pg.LSN, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*reportEvery)
	defer cancel()
	lsn, err := hold.needed(ctx, tl, &b.slotsChanged)
	if err != nil || lsn <= last {
		return last, err
	}
	return lsn, b.source.ReportDurable(ctx, lsn)
}

func (b *branch) describe() *pb.PageServerBranch {
	b.mu.Lock()
	tl, err := b.mu.tl, b.mu.err
	b.mu.Unlock()
	d := &pb.PageServerBranch{Project: b.name.project, Branch: b.name.branch}
	if err != nil {
		d.Error = err.Error()
	}
	if tl != nil {
		d.IngestedLsn, d.DurableLsn = uint64(tl.LastLSN()), uint64(tl.DurableLSN())
		s := tl.Stats()
		d.Layers, d.LayerBytes, d.MemoryBytes = uint64(s.Layers), uint64(s.LayerBytes), uint64(s.MemoryBytes)
	}
	d.RedoChecks = b.verify.redoCounts()
	return d
}
