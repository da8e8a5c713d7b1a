package keymgr

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/holdfastdb/holdfast/internal/boottime"
	"github.com/holdfastdb/holdfast/internal/seal"
	"github.com/holdfastdb/holdfast/keymgr/lease"
)

// check finds out whether the CMK still unwraps the key's KEK, and tells the machine. It
// does nothing if, when it is this call's turn, stale says that it is not needed any more.
// An error means that the answer could not be had or audited.
func (s *Server) check(ctx context.Context, k *keyState, stale func() bool) error {
	leave, err := k.enter(ctx)
	if err != nil {
		return err
	}
	defer leave()
	if !stale() {
		return nil
	}
	began := boottime.Now()
	doc, err := s.reread(ctx, k)
	if err != nil {
		return errors.Join(err, s.applyCheck(ctx, k, began, lease.Unknown, err))
	}
	if doc.Hold != nil {
		return nil // what the KMS says does not matter
	}
	began = boottime.Now()
	for _, probe := range doc.probes() {
		_, err = s.unwrapKEK(ctx, k, doc, probe.Version)
		if errors.Is(err, seal.ErrWiped) {
			err = nil // the KMS said yes; the KEK was forgotten meanwhile, and is asked for when it is needed
		}
		if err != nil {
			break
		}
	}
	return s.applyCheck(ctx, k, began, leaseOutcome(err), err)
}

const (
	rereadTimeout = 2 * time.Second
	// trustDocument is for how long a key's document is believed to be as it was read, while the bucket
	// does not answer: an outage of the bucket is no revocation. It bounds how late a hold, made
	// through another key manager, can be heard of.
	trustDocument = time.Minute
)

// reread gives the key as the bucket has it now, or as it had it a short while ago.
func (s *Server) reread(ctx context.Context, k *keyState) (*document, error) {
	// A caller that goes away must not look like a bucket that does not answer.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), rereadTimeout)
	defer cancel()
	doc, err := s.document(ctx, k, true)
	if err == nil || !errors.Is(err, errBucket) {
		return doc, err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.mu.doc == nil || boottime.Now()-k.mu.readAt > trustDocument {
		return nil, err
	}
	return k.mu.doc, nil
}

// leaseOutcome is what a check's error, or none, means for leases.
func leaseOutcome(err error) lease.Outcome {
	if err == nil {
		return lease.OK
	}
	switch outcome, _ := outcomeOf(err); outcome {
	case Denied:
		return lease.Denied
	case Unreachable:
		return lease.Unreachable
	}
	return lease.Unknown
}

// applyCheck is where a denial takes effect: no lease and no KEK of the key is there
// after it.
func (s *Server) applyCheck(ctx context.Context, k *keyState, began lease.Instant, outcome lease.Outcome, cause error) error {
	k.noteCheck(cause)
	var ended []lease.Lease
	s.withMachine(func(m *lease.Machine) {
		ended = m.CheckResult(began, boottime.Now(), k.id.String(), outcome)
		delete(s.mu.refused, k.id)
	})
	if outcome != lease.Denied {
		return nil
	}
	return s.revoked(ctx, k, causeDenied, ended)
}

// adopt takes a key's document as it is now: with its grace, and its hold, which takes effect
// here. It gives the newest document that was read.
func (s *Server) adopt(ctx context.Context, k *keyState, doc *document) (*document, error) {
	doc, ended, held := s.enforce(k, doc)
	if !held {
		return doc, nil
	}
	return doc, s.revoked(ctx, k, causeHeld, ended)
}

// enforce tells whether the key is held from now on, and which leases that ended.
func (s *Server) enforce(k *keyState, doc *document) (_ *document, ended []lease.Lease, held bool) {
	k.adopting.Lock()
	defer k.adopting.Unlock()
	doc = k.take(doc)
	name := k.id.String()
	s.withMachine(func(m *lease.Machine) {
		now := boottime.Now()
		m.SetGrace(now, name, time.Duration(doc.graceMS(s.cfg.Grace.Milliseconds()))*time.Millisecond)
		switch {
		case doc.Hold != nil && !m.Held(name):
			held = true
			ended = m.Hold(now, name)
			delete(s.mu.refused, k.id)
		case doc.Hold == nil && m.Held(name):
			m.Release(now, name)
		}
	})
	return doc, ended, held
}

// revoked finishes a revocation whose leases the machine has ended.
func (s *Server) revoked(ctx context.Context, k *keyState, cause string, ended []lease.Lease) error {
	wiped := k.wipe()
	if wiped {
		s.scrub()
	}
	if len(ended) > 0 {
		s.receipts.open(k, cause, ended, true)
		s.cfg.Logger.Warn("the key is revoked: its leases are ended and its keys forgotten", "key", k.id, "cause", cause, "leases", len(ended))
	}
	var events []Event
	for _, l := range ended {
		events = append(events, k.id.event(Event{Event: "lease.revoked", Outcome: cause, Node: l.Node, Lease: l.ID}))
	}
	if wiped {
		events = append(events, k.id.event(Event{Event: "kek.forgotten", Outcome: cause}))
	}
	if len(events) == 0 {
		return nil
	}
	return s.audit.append(context.WithoutCancel(ctx), events...)
}

// event names the key in an event.
func (id keyID) event(e Event) Event {
	e.Project, e.Branch = id.project, id.branch
	return e
}

func (k *keyState) noteCheck(err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.mu.checkedUnixMS = nowUnixMS()
	k.mu.lastError, k.mu.lastRequestID = "", ""
	if err != nil {
		k.mu.lastError = err.Error()
		_, k.mu.lastRequestID = outcomeOf(err)
	}
}

// unwrapKEK asks the KMS, always, and keeps the KEK. The caller has entered k.
func (s *Server) unwrapKEK(ctx context.Context, k *keyState, doc *document, version uint32) (*seal.KEK, error) {
	w := doc.find(version)
	if w == nil && version > 0 && version < doc.Current {
		return nil, fmt.Errorf("version %d of the KEK of %s: %w; the current one is %d", version, k.id.words(), errRetired, doc.Current)
	}
	if w == nil {
		return nil, fmt.Errorf("version %d of the KEK of %s is not in %s: %w", version, k.id.words(), k.id.document(), seal.ErrDamaged)
	}
	_, wipes := k.kek(version)
	payload, err := s.unwrapPayload(ctx, k.id, w)
	if err != nil {
		return nil, err
	}
	defer clear(payload)
	raw, err := parsePayload(k.id.context(version), payload)
	if err != nil {
		return nil, err
	}
	kek, err := seal.NewKEK(raw)
	if err != nil {
		return nil, err
	}
	return k.keep(version, kek, wipes)
}

// unwrapPayload has the CMK unwrap a KEK's payload, which the caller wipes, in one audited call.
func (s *Server) unwrapPayload(ctx context.Context, id keyID, w *kekVersion) ([]byte, error) {
	if err := s.allowed(id, w.CMK); err != nil {
		return nil, err
	}
	// The answer counts for all who wait, not for this caller alone.
	callCtx, cancel := context.WithTimeout(context.WithoutCancel(ctx), providerTimeout)
	defer cancel()
	u, err := s.cfg.Provider.Unwrap(callCtx, w.CMK, id.context(w.Version), w.Wrapped)
	event := id.event(Event{Event: "cmk.unwrap", CMK: w.CMK, CMKVersion: w.CMKVersion, KEKVersion: w.Version, RequestID: u.RequestID})
	if err := s.auditProvider(ctx, event, err); err != nil {
		clear(u.Plaintext)
		return nil, err
	}
	return u.Plaintext, nil
}

// getKEK gives a KEK from memory, or from the KMS.
func (s *Server) getKEK(ctx context.Context, k *keyState, version uint32) (*seal.KEK, error) {
	if kek, _ := k.kek(version); kek != nil {
		return kek, nil
	}
	leave, err := k.enter(ctx)
	if err != nil {
		return nil, err
	}
	defer leave()
	if kek, _ := k.kek(version); kek != nil {
		return kek, nil
	}
	doc, err := s.document(ctx, k, false)
	if err == nil && doc.find(version) == nil {
		doc, err = s.document(ctx, k, true) // another key manager may have added it
	}
	if err != nil {
		return nil, err
	}
	if doc.Hold != nil {
		return nil, refusal(lease.Held, "%s: its key is held back", k.id.words())
	}
	began := boottime.Now()
	kek, err := s.unwrapKEK(ctx, k, doc, version)
	if outcome, _ := outcomeOf(err); err != nil && outcome == Denied && version == doc.Current {
		return nil, errors.Join(err, s.applyCheck(ctx, k, began, lease.Denied, err))
	}
	return kek, err
}
