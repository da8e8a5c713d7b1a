package kmsim

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"crypto/rsa"
	"errors"
	"fmt"
	"slices"
)

// key is a customer's key. Its fields are under the Sim's lock.
type key struct {
	ref      string
	protocol Protocol
	state    State
	revoked  bool // nobody is permitted to use it
	versions []*version

	later    State // the state after usesLeft more uses, if not empty
	usesLeft int
}

type version struct {
	n         int
	id        string // where versions have names rather than numbers
	aead      cipher.AEAD
	rsa       *rsa.PrivateKey // Azure's keys
	destroyed bool
}

// refusal is why a key cannot be used; each protocol has its own words for it.
type refusal int

const (
	usable refusal = iota
	absent
	forbidden
	disabled
	pendingDeletion
	destroyed
)

func known(s State) bool {
	return slices.Contains([]State{Enabled, Disabled, PendingDeletion, Destroyed}, s)
}

func (k *key) set(state State) error {
	if k.state == Destroyed && state != Destroyed {
		return fmt.Errorf("key %s is destroyed", k.ref)
	}
	if !known(state) {
		return fmt.Errorf("state %q is not known", state)
	}
	k.state, k.later = state, ""
	return nil
}

func (k *key) rotate() error {
	v := &version{n: len(k.versions) + 1, id: randomHex(16)}
	if k.protocol == Azure {
		private, err := rsa.GenerateKey(rand.Reader, 2048)
		if err != nil {
			return err
		}
		v.rsa = private
	} else {
		raw := make([]byte, 32)
		rand.Read(raw) // never fails: crypto/rand
		block, err := aes.NewCipher(raw)
		if err != nil {
			return err
		}
		if v.aead, err = cipher.NewGCM(block); err != nil {
			return err
		}
	}
	k.versions = append(k.versions, v)
	return nil
}

func (k *key) current() *version { return k.versions[len(k.versions)-1] }

func (k *key) find(n int) *version {
	if n < 1 || n > len(k.versions) {
		return nil
	}
	return k.versions[n-1]
}

func (k *key) named(id string) *version {
	for _, v := range k.versions {
		if v.id == id {
			return v
		}
	}
	return nil
}

// look gives a key whatever its state, if the caller may know of it.
func (s *Sim) look(ref string) (*key, refusal) {
	k := s.mu.keys[ref]
	switch {
	case k == nil:
		return nil, absent
	case k.revoked:
		return k, forbidden
	}
	return k, usable
}

// useLocked gives a key for encryption or decryption. A use that was refused counts for
// SetStateAfter as well.
func (s *Sim) useLocked(ref string) (*key, refusal) {
	k, why := s.look(ref)
	if k == nil {
		return nil, why
	}
	if k.later != "" {
		if k.usesLeft == 0 {
			k.state, k.later = k.later, ""
		} else {
			k.usesLeft--
		}
	}
	if why != usable {
		return k, why
	}
	switch k.state {
	case Disabled:
		return k, disabled
	case PendingDeletion:
		return k, pendingDeletion
	case Destroyed:
		return k, destroyed
	}
	return k, usable
}

func (v *version) seal(plain, aad []byte) []byte {
	nonce := make([]byte, v.aead.NonceSize())
	rand.Read(nonce)
	return v.aead.Seal(nonce, nonce, plain, aad)
}

var errCiphertext = errors.New("the ciphertext does not open")

func (v *version) open(sealed, aad []byte) ([]byte, error) {
	n := v.aead.NonceSize()
	if len(sealed) < n {
		return nil, errCiphertext
	}
	plain, err := v.aead.Open(nil, sealed[:n], sealed[n:], aad)
	if err != nil {
		return nil, errCiphertext
	}
	return plain, nil
}
