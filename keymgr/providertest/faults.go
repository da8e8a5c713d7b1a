package providertest

import (
	"context"
	"errors"
	"strings"
	"testing"

	"github.com/holdfastdb/holdfast/keymgr"
)

// Faults make a service fail, and show what it saw. A function that does not apply is nil.
type Faults struct {
	Throttle      func(t *testing.T) // answers that there are too many requests
	Break         func(t *testing.T) // answers that it failed
	Impersonate   func(t *testing.T) // a proxy forbids in its place
	Expire        func(t *testing.T) // the caller's credential has run out
	Slow          func(t *testing.T) // answers, but late
	Swallow       func(t *testing.T) (arrived <-chan struct{})
	Heal          func(t *testing.T) // ends any of the above
	Withdraw      func(t *testing.T) // nobody may use the key
	GiveBack      func(t *testing.T) // undoes Withdraw
	Schedule      func(t *testing.T) // deletion; Subject.Enable undoes it
	DestroyOldest func(t *testing.T) // the first version of the key, for good
	Destroy       func(t *testing.T) // the key, for good
	DisableAfter  func(t *testing.T, uses int)
	Log           func() []Call
}

// Call is a call in the service's own log.
type Call struct {
	Op string
	ID string // what the service called it
	// CallersID is what the caller called it, where the service takes that down.
	CallersID string
}

func wantNot(t *testing.T, err error, unwanted keymgr.Outcome) {
	t.Helper()
	var pe *keymgr.ProviderError
	if !errors.As(err, &pe) || pe.Outcome == unwanted {
		t.Errorf("error %v, want a ProviderError with another outcome than %v", err, unwanted)
	}
}

// testFaults goes through what can happen, one after another with the same provider: what
// is healed must not have left anything behind.
func testFaults(t *testing.T, s Subject) {
	f := s.Faults
	if f == nil {
		return
	}
	w := wrap(t, s)
	for _, tc := range []struct {
		name     string
		do, undo func(*testing.T)
		want     keymgr.Outcome
		most     int // how often one call may ask the service the same
	}{
		{"throttled", f.Throttle, f.Heal, keymgr.Unreachable, 1},
		{"failed", f.Break, f.Heal, keymgr.Unreachable, 1},
		{"our credential has run out", f.Expire, f.Heal, keymgr.Unknown, 2}, // the second time with a new one
		{"permission withdrawn", f.Withdraw, f.GiveBack, keymgr.Denied, 1},
		{"deletion scheduled", f.Schedule, s.Enable, keymgr.Denied, 1},
	} {
		if tc.do == nil {
			continue
		}
		tc.do(t)
		for op, try := range map[string]func() error{
			"wrap":            func() error { _, err := s.Provider.Wrap(t.Context(), s.CMK, ec, secret); return err },
			"unwrap":          func() error { _, err := s.Provider.Unwrap(t.Context(), s.CMK, ec, w.Ciphertext); return err },
			"current version": func() error { _, _, err := s.Provider.CurrentVersion(t.Context(), s.CMK); return err },
		} {
			if op == "current version" && tc.name == "deletion scheduled" {
				continue // some services still describe such a key
			}
			before := len(f.Log())
			err := try()
			var pe *keymgr.ProviderError
			if !errors.As(err, &pe) || pe.Outcome != tc.want || pe.Op != op || pe.CMK != s.CMK {
				t.Errorf("%s, %s: %v, want a ProviderError of this call with outcome %v", tc.name, op, err, tc.want)
			}
			asked := make(map[string]int)
			for _, c := range f.Log()[before:] {
				if asked[c.Op]++; asked[c.Op] > tc.most {
					t.Errorf("%s, %s: the service was asked %s again after it had answered", tc.name, op, c.Op)
				}
			}
		}
		tc.undo(t)
		wantUnwrap(t, s, w)
	}
	testImpostor(t, s, w)
	testLastFaults(t, s, w)
}

// testImpostor: an answer that is not the service's must not shred.
func testImpostor(t *testing.T, s Subject, w keymgr.Wrapped) {
	s.Faults.Impersonate(t)
	_, err := s.Provider.Wrap(t.Context(), s.CMK, ec, secret)
	wantNot(t, err, keymgr.Denied)
	_, err = s.Provider.Unwrap(t.Context(), s.CMK, ec, w.Ciphertext)
	wantNot(t, err, keymgr.Denied)
	s.Faults.Heal(t)
	wantUnwrap(t, s, w)
	s.Faults.Slow(t)
	wantUnwrap(t, s, w)
	s.Faults.Heal(t)
}

// testLastFaults does what cannot be undone.
func testLastFaults(t *testing.T, s Subject, w keymgr.Wrapped) {
	if s.Faults.DestroyOldest != nil {
		s.Rotate(t)
		fresh := wrap(t, s)
		s.Faults.DestroyOldest(t)
		_, err := s.Provider.Unwrap(t.Context(), s.CMK, ec, w.Ciphertext)
		wantOutcome(t, err, keymgr.Denied)
		wantUnwrap(t, s, fresh)
		w = fresh
	}
	s.Faults.Destroy(t)
	_, err := s.Provider.Unwrap(t.Context(), s.CMK, ec, w.Ciphertext)
	wantOutcome(t, err, keymgr.Denied)
	_, err = s.Provider.Wrap(t.Context(), s.CMK, ec, secret)
	wantOutcome(t, err, keymgr.Denied)
}

func testSwallowed(t *testing.T, s Subject) {
	if s.Faults == nil {
		return
	}
	w := wrap(t, s)
	arrived := s.Faults.Swallow(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	result := make(chan error, 1)
	go func() {
		_, err := s.Provider.Unwrap(ctx, s.CMK, ec, w.Ciphertext)
		result <- err
	}()
	<-arrived
	cancel()
	wantOutcome(t, <-result, keymgr.Unreachable)
	s.Faults.Heal(t)
	wantUnwrap(t, s, w)
}

// testLateDenial: a service may take a while to do as it was told, but does not go back.
func testLateDenial(t *testing.T, s Subject) {
	if s.Faults == nil {
		return
	}
	w := wrap(t, s)
	s.Faults.DisableAfter(t, 3)
	wantUnwrap(t, s, w)
	denied := false
	for range 8 {
		_, err := s.Provider.Unwrap(t.Context(), s.CMK, ec, w.Ciphertext)
		if err != nil || denied {
			wantOutcome(t, err, keymgr.Denied)
			denied = true
		}
	}
	if !denied {
		t.Error("the key was disabled and its use never denied")
	}
}

// testRequestIDs: what we say we asked, the service must have in its log: the two logs can
// be held against each other.
func testRequestIDs(t *testing.T, s Subject) {
	if s.Faults == nil {
		return
	}
	inLog := func(what, ids string) {
		t.Helper()
		for _, id := range strings.Fields(ids) {
			found := false
			for _, c := range s.Faults.Log() {
				found = found || c.ID == id || c.CallersID == id
			}
			if !found {
				t.Errorf("%s: the service's log does not have request %s", what, id)
			}
		}
		if ids == "" {
			t.Errorf("%s has no request id", what)
		}
	}
	w := wrap(t, s)
	inLog("Wrap", w.RequestID)
	u, err := s.Provider.Unwrap(t.Context(), s.CMK, ec, w.Ciphertext)
	if err != nil {
		t.Fatal(err)
	}
	inLog("Unwrap", u.RequestID)
	_, id, err := s.Provider.CurrentVersion(t.Context(), s.CMK)
	if err != nil {
		t.Fatal(err)
	}
	inLog("CurrentVersion", id)
	s.Disable(t)
	_, err = s.Provider.Unwrap(t.Context(), s.CMK, ec, w.Ciphertext)
	var pe *keymgr.ProviderError
	if !errors.As(err, &pe) {
		t.Fatal(err)
	}
	inLog("a denial", pe.RequestID)
}
