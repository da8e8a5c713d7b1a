package keyring

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/boottime"
	"github.com/holdfastdb/holdfast/internal/hardening"
	"github.com/holdfastdb/holdfast/internal/seal"
	"github.com/holdfastdb/holdfast/internal/shredreport"
)

// shredding is what is told of one lease's end.
type shredding struct {
	p      *scope
	term   uint64
	reason error
	fns    []ShredFunc
	report *pb.ShredReport
}

// end wipes a term's keys and then, unless the ring is closed (reason nil), tells those who hold
// plaintext. It does nothing for a term that has ended.
func (p *scope) end(term uint64, reason error) {
	defer p.ring.publish()
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.mu.live || p.mu.term != term {
		return
	}
	p.mu.bound.End()
	wiped := p.mu.keys.wipe()
	s := &shredding{p: p, term: term, reason: reason, report: &pb.ShredReport{LeaseId: p.mu.leaseID, Key: p.mu.key, Branch: p.name.branch,
		Node: p.ring.cfg.Node, Pid: int64(os.Getpid()), Keys: int64(wiped), KeysWipedUnixUs: time.Now().UnixMicro()}}
	for _, fn := range p.mu.shred {
		s.fns = append(s.fns, fn)
	}
	p.mu.live, p.mu.leaseID, p.mu.why = false, "", reason
	p.mu.shred = make(map[uint64]ShredFunc)
	p.newsLocked()
	if reason == nil {
		p.mu.why = errClosed
		return
	}
	s.report.Reason = cut(reason.Error())
	p.mu.shredding[term] = p.mu.end
	p.ring.reports.Add(1)
	go s.run()
}

// run has everything dropped, tells the guard, overwrites what was freed, and tells the key manager.
func (s *shredding) run() {
	defer s.p.ring.reports.Done()
	s.drop()
	// The guard is told before the scrub: with a large heap that takes longer than the guard would wait,
	// and a role of many projects must not die because one of them was shredded slowly.
	s.p.mu.Lock()
	delete(s.p.mu.shredding, s.term)
	s.p.mu.Unlock()
	s.p.ring.publish()
	hardening.Scrub()
	s.report.ShreddedUnixUs = max(time.Now().UnixMicro(), s.report.KeysWipedUnixUs) // the wall clock may be set back
	s.p.ring.tell(s.report)
}

// drop runs the functions, each by itself: none waits for a slow one.
func (s *shredding) drop() {
	var mu sync.Mutex
	var wg sync.WaitGroup
	for _, fn := range s.fns {
		wg.Go(func() {
			dropped := fn(s.reason)
			mu.Lock()
			defer mu.Unlock()
			s.report.Dropped = append(s.report.Dropped, dropped...)
		})
	}
	wg.Wait()
	slices.Sort(s.report.Dropped)
	if n := len(s.report.Dropped); n > maxDropped {
		s.report.Dropped = append(s.report.Dropped[:maxDropped-1], fmt.Sprintf("and %d more", n-maxDropped+1))
	}
	for i, d := range s.report.Dropped {
		s.report.Dropped[i] = cut(d)
	}
}

// Bounds of a report: what is longer, the key manager refuses.
const (
	maxDropped = 200
	maxWords   = 1000
)

// cut bounds a text, and makes it one that a message may carry.
func cut(text string) string {
	if len(text) <= maxWords {
		return strings.ToValidUTF8(text, "?")
	}
	return strings.ToValidUTF8(text[:maxWords], "?") + "…"
}

// How long, and how often, it is tried to tell the key manager. A node that is cut off for longer is
// in the receipt as one that did not answer, with the time at which its lease had run out.
const (
	reportFor     = 2 * time.Minute
	reportTimeout = 5 * time.Second
	reportFirst   = 100 * time.Millisecond
	reportMost    = 5 * time.Second
)

// tell reports until the key manager has taken it. It may hear the same twice.
func (r *ring) tell(report *pb.ShredReport) {
	if err := shredreport.Sign(report, r.identity); err != nil {
		return // cannot be marshaled, so cannot be sent
	}
	deadline := boottime.Now() + reportFor
	for wait := reportFirst; boottime.Now() < deadline; wait = min(2*wait, reportMost) {
		if final := r.tellOnce(report); final {
			return
		}
		select {
		case <-time.After(wait):
		case <-r.telling.Done():
			return
		}
	}
}

// due is the earliest end of the scope's leases that live or of which something is left; 0: none.
func (p *scope) due() (earliest time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.mu.live {
		earliest = p.mu.end
	}
	for _, end := range p.mu.shredding {
		if earliest == 0 || end < earliest {
			earliest = end
		}
	}
	return earliest
}

// lives tells whether the lease lives; if not, why.
func (p *scope) lives() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case p.liveLocked():
		return nil
	case p.mu.live: // it ran out, and nobody has noticed yet
		return fmt.Errorf("%w: the lease on %v ran out", ErrUnreachable, p.name)
	case p.mu.why == nil:
		return fmt.Errorf("%w: no lease was taken out on %v", ErrUnreachable, p.name)
	case errors.Is(p.mu.why, ErrRevoked), errors.Is(p.mu.why, ErrUnreachable):
		return p.mu.why
	}
	return fmt.Errorf("%w: %w", ErrUnreachable, p.mu.why)
}

func (p *scope) term() *seal.Term {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.mu.live {
		return p.mu.bound
	}
	return seal.NewTerm(0)
}
