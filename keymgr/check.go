package keymgr

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/holdfastdb/holdfast/internal/blob"
	"github.com/holdfastdb/holdfast/internal/boottime"
	"github.com/holdfastdb/holdfast/internal/seal"
	"github.com/holdfastdb/holdfast/keymgr/lease"
)

// projectKeys are a project's plaintext KEKs, and what the bucket says of them.
type projectKeys struct {
	name string
	// checking is held, as a channel of one place, by who calls the KMS for the project: one
	// call at a time, whose answer serves all who wait.
	checking chan struct{}

	mu struct {
		sync.Mutex
		doc  *document
		keks map[uint32]*seal.KEK
		// wipes counts calls of wipe: a KEK that was asked for before one is not kept after.
		wipes uint64
		// What the last check said, for KeyStatus.
		checkedUnixMS int64
		lastError     string
	}
}

func newProjectKeys(name string) *projectKeys {
	p := &projectKeys{name: name, checking: make(chan struct{}, 1)}
	p.mu.keks = make(map[uint32]*seal.KEK)
	return p
}

// wipe forgets the KEKs and tells whether there were any.
func (p *projectKeys) wipe() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	had := len(p.mu.keks) > 0
	for _, k := range p.mu.keks {
		k.Wipe()
	}
	clear(p.mu.keks)
	p.mu.wipes++
	return had
}

func (p *projectKeys) kek(version uint32) (*seal.KEK, uint64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.mu.keks[version], p.mu.wipes
}

// keep takes a KEK, unless the project was wiped since it was asked for.
func (p *projectKeys) keep(version uint32, k *seal.KEK, wipes uint64) (*seal.KEK, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.mu.wipes != wipes {
		k.Wipe()
		return nil, fmt.Errorf("KEK of project %s: %w", p.name, seal.ErrWiped)
	}
	if have := p.mu.keks[version]; have != nil {
		k.Wipe()
		return have, nil
	}
	p.mu.keks[version] = k
	return k, nil
}

// enter waits for the turn to call the KMS.
func (p *projectKeys) enter(ctx context.Context) (leave func(), err error) {
	select {
	case p.checking <- struct{}{}:
		return func() { <-p.checking }, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("waiting for another call to the KMS for project %s: %w", p.name, ctx.Err())
	}
}

// document gives the project's keys as the bucket has them, and reads it again if asked.
func (s *Server) document(ctx context.Context, p *projectKeys, again bool) (*document, error) {
	p.mu.Lock()
	doc := p.mu.doc
	p.mu.Unlock()
	if doc != nil && !again {
		return doc, nil
	}
	doc, err := loadDocument(ctx, s.cfg.BlobStore, p.name)
	if err == nil {
		err = s.allowed(p.name, doc.CMK)
	}
	if err != nil {
		return nil, err
	}
	p.mu.Lock()
	p.mu.doc = doc
	p.mu.Unlock()
	return doc, nil
}

// known gives a project that was created; others leave no trace in memory.
func (s *Server) known(ctx context.Context, name string) (*projectKeys, *document, error) {
	p := s.project(name)
	doc, err := s.document(ctx, p, false)
	if errors.Is(err, blob.ErrNotFound) {
		s.mu.Lock()
		delete(s.mu.projects, name)
		s.mu.Unlock()
	}
	return p, doc, err
}

// check finds out whether the CMK still unwraps the project's KEK, and tells the machine. It
// does nothing if, when it is this call's turn, stale says that it is not needed any more.
// An error means that the answer could not be had or audited.
func (s *Server) check(ctx context.Context, p *projectKeys, stale func() bool) error {
	leave, err := p.enter(ctx)
	if err != nil {
		return err
	}
	defer leave()
	if !stale() {
		return nil
	}
	doc, err := s.document(ctx, p, true)
	if err != nil {
		return err
	}
	began := boottime.Now()
	_, err = s.unwrapKEK(ctx, p, doc, doc.Current)
	outcome := lease.OK
	if err != nil {
		outcome = lease.Unreachable
		if o, _ := outcomeOf(err); o == Denied {
			outcome = lease.Denied
		}
	}
	return s.applyCheck(ctx, p, began, outcome, err)
}

// applyCheck is where a denial takes effect: no lease and no KEK of the project is there
// after it.
func (s *Server) applyCheck(ctx context.Context, p *projectKeys, began lease.Instant, outcome lease.Outcome, cause error) error {
	p.noteCheck(cause)
	s.mu.Lock()
	ended := s.mu.machine.CheckResult(began, boottime.Now(), p.name, outcome)
	delete(s.mu.refused, p.name)
	s.mu.Unlock()
	if outcome != lease.Denied {
		return nil
	}
	var events []Event
	for _, l := range ended {
		events = append(events, Event{Event: "lease.revoked", Outcome: "denied", Project: l.Project, Node: l.Node, Lease: l.ID})
	}
	if p.wipe() {
		events = append(events, Event{Event: "kek.forgotten", Outcome: "denied", Project: p.name})
	}
	if len(events) == 0 {
		return nil
	}
	s.cfg.Logger.Warn("the KMS denies the project's key: its leases are ended and its keys forgotten", "project", p.name, "leases", len(ended))
	return s.audit.append(context.WithoutCancel(ctx), events...)
}

func (p *projectKeys) noteCheck(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.mu.checkedUnixMS = nowUnixMS()
	p.mu.lastError = ""
	if err != nil {
		p.mu.lastError = err.Error()
	}
}

// unwrapKEK asks the KMS, always, and keeps the KEK. The caller has entered p.
func (s *Server) unwrapKEK(ctx context.Context, p *projectKeys, doc *document, version uint32) (*seal.KEK, error) {
	w := doc.find(version)
	if w == nil {
		return nil, fmt.Errorf("version %d of the KEK of project %s is not in %s: %w", version, p.name, documentKey(p.name), seal.ErrDamaged)
	}
	_, wipes := p.kek(version)
	ec := EncryptionContext{Project: p.name, KEKVersion: version}
	// The answer counts for all who wait, not for this caller alone.
	callCtx, cancel := context.WithTimeout(context.WithoutCancel(ctx), providerTimeout)
	defer cancel()
	u, err := s.cfg.Provider.Unwrap(callCtx, doc.CMK, ec, w.Wrapped)
	defer clear(u.Plaintext)
	event := Event{Event: "cmk.unwrap", Project: p.name, CMK: doc.CMK, CMKVersion: w.CMKVersion, KEKVersion: version, RequestID: u.RequestID}
	if err := s.auditProvider(ctx, event, err); err != nil {
		return nil, err
	}
	raw, err := parsePayload(ec, u.Plaintext)
	if err != nil {
		return nil, err
	}
	k, err := seal.NewKEK(raw)
	if err != nil {
		return nil, err
	}
	return p.keep(version, k, wipes)
}

// getKEK gives a KEK from memory, or from the KMS.
func (s *Server) getKEK(ctx context.Context, p *projectKeys, version uint32) (*seal.KEK, error) {
	if k, _ := p.kek(version); k != nil {
		return k, nil
	}
	leave, err := p.enter(ctx)
	if err != nil {
		return nil, err
	}
	defer leave()
	if k, _ := p.kek(version); k != nil {
		return k, nil
	}
	doc, err := s.document(ctx, p, false)
	if err == nil && doc.find(version) == nil {
		doc, err = s.document(ctx, p, true) // another key manager may have added it
	}
	if err != nil {
		return nil, err
	}
	began := boottime.Now()
	k, err := s.unwrapKEK(ctx, p, doc, version)
	if outcome, _ := outcomeOf(err); err != nil && outcome == Denied && version == doc.Current {
		return nil, errors.Join(err, s.applyCheck(ctx, p, began, lease.Denied, err))
	}
	return k, err
}
