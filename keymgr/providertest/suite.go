// Package providertest is what every keymgr.Provider must do, as tests that each adapter
// runs.
package providertest

import (
	"bytes"
	"context"
	"errors"
	"testing"

	"github.com/holdfastdb/holdfast/keymgr"
)

// Subject is a provider under test with a key in its service, and the hand of the customer
// on that key. A function that the service cannot do is nil.
type Subject struct {
	Provider keymgr.Provider
	CMK      string
	Disable  func(t *testing.T)
	Enable   func(t *testing.T)
	Rotate   func(t *testing.T)
	Cut      func(t *testing.T) // the service does not answer any more
	BindsAAD bool               // a wrong EncryptionContext is refused, by the service or the adapter
	// NoVersions is set for a service that does not tell its keys' versions.
	NoVersions bool
	// Faults are what can go wrong on the way and in the service; nil: nothing can be made to.
	Faults *Faults
}

// Run runs the suite; open gives a service of its own to each test.
func Run(t *testing.T, open func(t *testing.T) Subject) {
	for _, tc := range []struct {
		name string
		test func(*testing.T, Subject)
	}{
		{"what was wrapped unwraps", testRoundTrip},
		{"another context is refused", testContext},
		{"damage is not a denial", testDamage},
		{"an absent key is denied", testAbsent},
		{"a disabled key is denied until it is enabled", testDisable},
		{"rotation", testRotate},
		{"no answer is unreachable", testUnreachable},
		{"what goes wrong means what it means", testFaults},
		{"a call that is never answered ends with its context", testSwallowed},
		{"a denial that comes late is final", testLateDenial},
		{"the service's log knows the request ids", testRequestIDs},
	} {
		t.Run(tc.name, func(t *testing.T) { tc.test(t, open(t)) })
	}
}

var (
	ec     = keymgr.EncryptionContext{Project: "p1", KEKVersion: 1}
	secret = []byte("a secret of some length")
)

func wrap(t *testing.T, s Subject) keymgr.Wrapped {
	t.Helper()
	w, err := s.Provider.Wrap(t.Context(), s.CMK, ec, secret)
	if err != nil {
		t.Fatalf("Wrap: %v", err)
	}
	if w.RequestID == "" || bytes.Contains(w.Ciphertext, secret) {
		t.Fatalf("Wrap gave request id %q and %q", w.RequestID, w.Ciphertext)
	}
	return w
}

func wantUnwrap(t *testing.T, s Subject, w keymgr.Wrapped) {
	t.Helper()
	u, err := s.Provider.Unwrap(t.Context(), s.CMK, ec, w.Ciphertext)
	if err != nil || !bytes.Equal(u.Plaintext, secret) || u.RequestID == "" || u.RequestID == w.RequestID {
		t.Errorf("Unwrap = %q, request id %q, %v", u.Plaintext, u.RequestID, err)
	}
}

func wantOutcome(t *testing.T, err error, want keymgr.Outcome) {
	t.Helper()
	var pe *keymgr.ProviderError
	if !errors.As(err, &pe) || pe.Outcome != want {
		t.Errorf("error %v, want a ProviderError with outcome %v", err, want)
	}
}

func testRoundTrip(t *testing.T, s Subject) {
	wantUnwrap(t, s, wrap(t, s))
	if _, err := s.Provider.Wrap(t.Context(), s.CMK, ec, make([]byte, keymgr.MaxWrapPlain)); err != nil {
		t.Errorf("wrapping %d bytes: %v", keymgr.MaxWrapPlain, err)
	}
	version, id, err := s.Provider.CurrentVersion(t.Context(), s.CMK)
	if err != nil || version == "" && !s.NoVersions || id == "" {
		t.Errorf("CurrentVersion = %q, request id %q, %v", version, id, err)
	}
}

func testContext(t *testing.T, s Subject) {
	if !s.BindsAAD {
		return
	}
	w := wrap(t, s)
	for _, other := range []keymgr.EncryptionContext{{Project: "p2", KEKVersion: 1}, {Project: "p1", KEKVersion: 2}} {
		_, err := s.Provider.Unwrap(t.Context(), s.CMK, other, w.Ciphertext)
		wantOutcome(t, err, keymgr.Unknown)
	}
}

func testDamage(t *testing.T, s Subject) {
	w := wrap(t, s)
	for _, i := range []int{len(w.Ciphertext) - 1, len(w.Ciphertext) - 17} {
		bad := bytes.Clone(w.Ciphertext)
		bad[i] ^= 1
		_, err := s.Provider.Unwrap(t.Context(), s.CMK, ec, bad)
		wantOutcome(t, err, keymgr.Unknown)
	}
	_, err := s.Provider.Unwrap(t.Context(), s.CMK, ec, nil)
	wantOutcome(t, err, keymgr.Unknown)
}

func testAbsent(t *testing.T, s Subject) {
	_, err := s.Provider.Wrap(t.Context(), s.CMK+"-absent", ec, secret)
	wantOutcome(t, err, keymgr.Denied)
	_, err = s.Provider.Unwrap(t.Context(), s.CMK+"-absent", ec, wrap(t, s).Ciphertext)
	wantOutcome(t, err, keymgr.Denied)
}

func testDisable(t *testing.T, s Subject) {
	w := wrap(t, s)
	s.Disable(t)
	_, err := s.Provider.Unwrap(t.Context(), s.CMK, ec, w.Ciphertext)
	wantOutcome(t, err, keymgr.Denied)
	_, err = s.Provider.Wrap(t.Context(), s.CMK, ec, secret)
	wantOutcome(t, err, keymgr.Denied)
	s.Enable(t)
	wantUnwrap(t, s, w)
}

func testRotate(t *testing.T, s Subject) {
	if s.Rotate == nil {
		return
	}
	old := wrap(t, s)
	s.Rotate(t)
	fresh := wrap(t, s)
	wantUnwrap(t, s, old)
	wantUnwrap(t, s, fresh)
	version, _, err := s.Provider.CurrentVersion(t.Context(), s.CMK)
	if err != nil || version != fresh.Version || version == old.Version {
		t.Errorf("versions: %q before, %q after, current %q, %v", old.Version, fresh.Version, version, err)
	}
}

func testUnreachable(t *testing.T, s Subject) {
	w := wrap(t, s)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := s.Provider.Unwrap(ctx, s.CMK, ec, w.Ciphertext)
	wantOutcome(t, err, keymgr.Unreachable)
	if s.Cut == nil {
		return
	}
	s.Cut(t)
	_, err = s.Provider.Unwrap(t.Context(), s.CMK, ec, w.Ciphertext)
	wantOutcome(t, err, keymgr.Unreachable)
}
