// Package kmsim plays the key management services of AWS, Google, Azure and of Vault and
// OpenBao (transit): one TLS server that speaks their wire protocols well enough for the official
// clients, through which alone it is used. Keys can be disabled, scheduled for deletion, destroyed,
// rotated and withdrawn, at once or after a number of uses; calls can be throttled, delayed,
// swallowed, or answered by what is no KMS; and every call is in a log under the request id
// that the client was told.
//
// It is for tests and demonstrations. Keys are in memory only, request signatures and tokens are
// not verified (who calls is noted, not proven), and nothing here says how a real cloud behaves
// beyond what its documentation says.
package kmsim

import (
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"sync"
	"time"
)

// Protocol is whose API a key belongs to.
type Protocol string

// The protocols.
const (
	AWS     Protocol = "aws"
	Google  Protocol = "google"
	Azure   Protocol = "azure"
	Transit Protocol = "transit"
)

// State is whether a key may be used.
type State string

// The states. Deletion that is pending can be taken back, destruction cannot.
const (
	Enabled         State = "enabled"
	Disabled        State = "disabled"
	PendingDeletion State = "pending deletion"
	Destroyed       State = "destroyed"
)

// Fault is what happens to every call to a KMS until it is cleared.
type Fault string

// The faults. Identity services (STS, Microsoft's login) know BadIdentity only.
const (
	NoFault       Fault = ""
	Throttle      Fault = "throttle"       // too many requests
	Internal      Fault = "internal"       // the service failed, or is sealed
	BlackHole     Fault = "black hole"     // calls arrive and are never answered
	Impostor      Fault = "impostor"       // a proxy answers 403 in the service's place
	BadCredential Fault = "bad credential" // the caller's credential has run out
	BadIdentity   Fault = "bad identity"   // no credential is given out
	Latency       Fault = "latency"        // answered after Sim.SetLatency's time
)

// Entry is a call in the service's log.
type Entry struct {
	Time      time.Time `json:"time"`
	RequestID string    `json:"request_id"`
	Protocol  Protocol  `json:"protocol"`
	Op        string    `json:"op"`
	Key       string    `json:"key"`
	Principal string    `json:"principal"`
	Outcome   string    `json:"outcome"`              // "ok", or the protocol's error code
	CallersID string    `json:"callers_id,omitempty"` // where a protocol lets the caller name its calls
}

// Sim is the service. It is safe for concurrent use.
type Sim struct {
	mu struct {
		sync.Mutex
		keys    map[string]*key // by reference
		fault   Fault
		latency time.Duration
		log     []Entry
		roles   map[string]string // assumed roles by access key, applications by token
	}
	swallowed chan struct{} // one entry per call in the black hole
	closed    chan struct{}
	close     sync.Once
}

// New gives a service without keys.
func New() *Sim {
	s := &Sim{swallowed: make(chan struct{}, 1024), closed: make(chan struct{})}
	s.mu.keys = make(map[string]*key)
	s.mu.roles = make(map[string]string)
	return s
}

// Close lets go of calls that are held.
func (s *Sim) Close() { s.close.Do(func() { close(s.closed) }) }

// SetFault makes a fault happen from the next call on; NoFault ends it.
func (s *Sim) SetFault(f Fault) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mu.fault = f
}

// SetLatency delays every answer.
func (s *Sim) SetLatency(d time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mu.fault, s.mu.latency = Latency, d
}

// Swallowed has an entry for each call that the black hole took.
func (s *Sim) Swallowed() <-chan struct{} { return s.swallowed }

// Log is every call so far, in the order of their ends.
func (s *Sim) Log() []Entry {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]Entry(nil), s.mu.log...)
}

func (s *Sim) faultNow() (Fault, time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.mu.fault, s.mu.latency
}

func (s *Sim) record(e Entry) {
	s.mu.Lock()
	defer s.mu.Unlock()
	e.Time = time.Now().UTC()
	s.mu.log = append(s.mu.log, e)
}

// nameOf is who holds a credential that this service gave out, or the credential itself.
func (s *Sim) nameOf(credential string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	if name := s.mu.roles[credential]; name != "" {
		return name
	}
	return credential
}

func (s *Sim) giveCredential(prefix, name string) string {
	credential := prefix + randomHex(8)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mu.roles[credential] = name
	return credential
}

// KeyInfo describes a key.
type KeyInfo struct {
	Ref      string   `json:"ref"` // as its protocol's clients name it
	Protocol Protocol `json:"protocol"`
	State    State    `json:"state"`
	Versions int      `json:"versions"`
	Revoked  bool     `json:"revoked"`
}

// Keys describes the keys, in no order.
func (s *Sim) Keys() []KeyInfo {
	s.mu.Lock()
	defer s.mu.Unlock()
	infos := make([]KeyInfo, 0, len(s.mu.keys))
	for _, k := range s.mu.keys {
		infos = append(infos, KeyInfo{Ref: k.ref, Protocol: k.protocol, State: k.state, Versions: len(k.versions), Revoked: k.revoked})
	}
	return infos
}

// CreateKey makes a key, enabled, and gives its reference: for AWS an ARN, for Google a
// resource name, for transit MOUNT/keys/NAME, for Azure keys/NAME, which the vault's
// URL precedes.
func (s *Sim) CreateKey(p Protocol, name string) (string, error) {
	ref, err := refOf(p, name)
	if err != nil {
		return "", err
	}
	k := &key{ref: ref, protocol: p, state: Enabled}
	if err := k.rotate(); err != nil {
		return "", err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.mu.keys[ref] != nil {
		return "", fmt.Errorf("there is a key %s already", ref)
	}
	s.mu.keys[ref] = k
	return ref, nil
}

func refOf(p Protocol, name string) (string, error) {
	switch p {
	case AWS:
		return "arn:aws:kms:" + Region + ":" + Account + ":key/" + name, nil
	case Google:
		return "projects/demo/locations/global/keyRings/holdfast/cryptoKeys/" + name, nil
	case Azure:
		return "keys/" + name, nil
	case Transit:
		return "transit/keys/" + name, nil
	}
	return "", fmt.Errorf("protocol %q is not known: want %s, %s, %s or %s", p, AWS, Google, Azure, Transit)
}

// change works on a key, or says that there is none.
func (s *Sim) change(ref string, fn func(*key) error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	k := s.mu.keys[ref]
	if k == nil {
		return fmt.Errorf("there is no key %s", ref)
	}
	return fn(k)
}

// SetState makes a key usable or not. A destroyed key stays destroyed.
func (s *Sim) SetState(ref string, state State) error {
	return s.change(ref, func(k *key) error { return k.set(state) })
}

// SetStateAfter changes the state when the key has been used a number of times more: a
// service that takes a while to do as it was told.
func (s *Sim) SetStateAfter(ref string, state State, uses int) error {
	return s.change(ref, func(k *key) error {
		if !known(state) {
			return fmt.Errorf("state %q is not known", state)
		}
		k.later, k.usesLeft = state, uses
		return nil
	})
}

// Rotate gives the key a new version, which encrypts from now on.
func (s *Sim) Rotate(ref string) error { return s.change(ref, (*key).rotate) }

// Revoke withdraws, or gives back, everybody's permission to use the key.
func (s *Sim) Revoke(ref string, revoked bool) error {
	return s.change(ref, func(k *key) error { k.revoked = revoked; return nil })
}

// DestroyVersion makes what a version encrypted unreadable; versions count from 1.
func (s *Sim) DestroyVersion(ref string, n int) error { return s.setDestroyed(ref, n, true) }

// RestoreVersion takes a version's destruction back, as Google's RestoreCryptoKeyVersion does before it is
// final, and as who has a backup can elsewhere.
func (s *Sim) RestoreVersion(ref string, n int) error { return s.setDestroyed(ref, n, false) }

func (s *Sim) setDestroyed(ref string, n int, destroyed bool) error {
	return s.change(ref, func(k *key) error {
		v := k.find(n)
		if v == nil {
			return fmt.Errorf("key %s has no version %d", ref, n)
		}
		v.destroyed = destroyed
		return nil
	})
}

func randomHex(n int) string {
	b := make([]byte, n)
	rand.Read(b) // never fails: crypto/rand
	return hex.EncodeToString(b)
}

// newID is a request id, in the form of a UUID.
func newID() string {
	h := randomHex(16)
	return h[:8] + "-" + h[8:12] + "-" + h[12:16] + "-" + h[16:20] + "-" + h[20:]
}
