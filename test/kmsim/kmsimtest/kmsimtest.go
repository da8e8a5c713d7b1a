// Package kmsimtest puts a provider that talks to kmsim through the conformance suite, with
// every fault that kmsim knows.
package kmsimtest

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/holdfastdb/holdfast/keymgr/providertest"
	"github.com/holdfastdb/holdfast/test/kmsim"
)

// Start runs a server for the test; caFile has its authority.
func Start(t testing.TB) (s *kmsim.Server, caFile string) {
	t.Helper()
	s, err := kmsim.Listen("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	caFile = filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(caFile, s.CAPEM, 0o600); err != nil {
		t.Fatal(err)
	}
	return s, caFile
}

// Key makes a key.
func Key(t testing.TB, s *kmsim.Server, p kmsim.Protocol) (ref string) {
	t.Helper()
	ref, err := s.CreateKey(p, "orders")
	if err != nil {
		t.Fatal(err)
	}
	return ref
}

// Subject is the customer's hand on a key and the faults of its service; the provider and
// how it names the key are for the caller to add.
func Subject(s *kmsim.Server, ref string) providertest.Subject {
	must := func(t *testing.T, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	state := func(st kmsim.State) func(*testing.T) {
		return func(t *testing.T) { t.Helper(); must(t, s.SetState(ref, st)) }
	}
	fault := func(f kmsim.Fault) func(*testing.T) {
		return func(*testing.T) { s.SetFault(f) }
	}
	return providertest.Subject{
		BindsAAD: true,
		Disable:  state(kmsim.Disabled),
		Enable:   state(kmsim.Enabled),
		Rotate:   func(t *testing.T) { must(t, s.Rotate(ref)) },
		Cut:      func(t *testing.T) { must(t, s.Close()) },
		Faults: &providertest.Faults{
			Throttle: fault(kmsim.Throttle), Break: fault(kmsim.Internal), Impersonate: fault(kmsim.Impostor),
			Expire: fault(kmsim.BadCredential), Heal: fault(kmsim.NoFault),
			Slow:          func(*testing.T) { s.SetLatency(20 * time.Millisecond) },
			Swallow:       func(*testing.T) <-chan struct{} { s.SetFault(kmsim.BlackHole); return s.Swallowed() },
			Withdraw:      func(t *testing.T) { must(t, s.Revoke(ref, true)) },
			GiveBack:      func(t *testing.T) { must(t, s.Revoke(ref, false)) },
			Schedule:      state(kmsim.PendingDeletion),
			Destroy:       state(kmsim.Destroyed),
			DestroyOldest: func(t *testing.T) { must(t, s.DestroyVersion(ref, 1)) },
			DisableAfter:  func(t *testing.T, uses int) { must(t, s.SetStateAfter(ref, kmsim.Disabled, uses)) },
			Log: func() []providertest.Call {
				var calls []providertest.Call
				for _, e := range s.Log() {
					calls = append(calls, providertest.Call{Op: e.Op, ID: e.RequestID, CallersID: e.CallersID})
				}
				return calls
			},
		},
	}
}
