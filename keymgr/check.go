package keymgr

import (
	"context"
	"errors"
	"fmt"

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
	doc, err := s.document(ctx, k, true)
	if err != nil {
		return err
	}
	began := boottime.Now()
	for _, probe := range doc.probes() {
		if _, err = s.unwrapKEK(ctx, k, doc, probe.Version); err != nil {
			break
		}
	}
	return s.applyCheck(ctx, k, began, leaseOutcome(err), err)
}

// leaseOutcome is what a check's error, or none, means for leases.
func leaseOutcome(err error) lease.Outcome {
	if err == nil {
		return lease.OK
	}
	if o, _ := outcomeOf(err); o == Denied {
		return lease.Denied
	}
	return lease.Unreachable
}

// applyCheck is where a denial takes effect: no lease and no KEK of the key is there
// after it.
func (s *Server) applyCheck(ctx context.Context, k *keyState, began lease.Instant, outcome lease.Outcome, cause error) error {
	k.noteCheck(cause)
	s.mu.Lock()
	ended := s.mu.machine.CheckResult(began, boottime.Now(), k.id.String(), outcome)
	delete(s.mu.refused, k.id)
	s.mu.Unlock()
	if outcome != lease.Denied {
		return nil
	}
	var events []Event
	for _, l := range ended {
		events = append(events, k.id.event(Event{Event: "lease.revoked", Outcome: "denied", Node: l.Node, Lease: l.ID}))
	}
	if k.wipe() {
		events = append(events, k.id.event(Event{Event: "kek.forgotten", Outcome: "denied"}))
	}
	if len(events) == 0 {
		return nil
	}
	s.cfg.Logger.Warn("the KMS denies the key: its leases are ended and its keys forgotten", "key", k.id, "leases", len(ended))
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
	began := boottime.Now()
	kek, err := s.unwrapKEK(ctx, k, doc, version)
	if outcome, _ := outcomeOf(err); err != nil && outcome == Denied && version == doc.Current {
		return nil, errors.Join(err, s.applyCheck(ctx, k, began, lease.Denied, err))
	}
	return kek, err
}
