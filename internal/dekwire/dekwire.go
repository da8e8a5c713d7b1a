// Package dekwire seals DEKs on their way from the key manager to a node. gRPC, its buffers and its
// pools copy every message, keep the copies for as long as they like and wipe none; with what is
// here they only ever hold ciphertext, and a raw DEK is in slices that both ends clear (invariant K1).
//
// Each call has keys of its own: request and response carry a fresh public key (ECDH on P-256), and from
// the shared secret, the call's name, its lease and all that it asks for HKDF-SHA256 makes one AES-256-GCM key,
// under which DEK number i is sealed with nonce i. An answer so opens for the call that asked for it, in
// its place, and nowhere else.
//
// It keeps what is only read from being of use. It authenticates nobody: who can put themselves between
// the ends can be either of them, until there is mutual TLS (invariant A1).
package dekwire

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/ecdh"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"reflect"
)

const (
	label   = "holdfast dek wire v1\n"
	keySize = 32
)

// ask is what a call's key is bound to.
type ask struct {
	call, lease string
	parts       []string // all that is asked for
}

// info is the ask's one encoding: each part after its length.
func (a ask) info() string {
	h := sha256.New()
	for _, p := range append([]string{a.call, a.lease}, a.parts...) {
		var n [8]byte
		binary.LittleEndian.PutUint64(n[:], uint64(len(p)))
		h.Write(n[:])
		h.Write([]byte(p))
	}
	return label + string(h.Sum(nil))
}

// box seals and opens the DEKs of one call.
type box struct{ aead cipher.AEAD }

func newBox(own *ecdh.PrivateKey, theirs, clientKey, serverKey []byte, a ask) (*box, error) {
	public, err := ecdh.P256().NewPublicKey(theirs)
	if err != nil {
		return nil, fmt.Errorf("exchange key of %d bytes: %w", len(theirs), err)
	}
	shared, err := own.ECDH(public)
	if err != nil {
		return nil, fmt.Errorf("exchange of keys: %w", err)
	}
	defer clear(shared)
	salt := sha256.Sum256(append(append([]byte(nil), clientKey...), serverKey...))
	raw, err := hkdf.Key(sha256.New, shared, salt[:], a.info(), keySize)
	if err != nil {
		return nil, fmt.Errorf("deriving the call's key: %w", err)
	}
	defer clear(raw)
	block, err := aes.NewCipher(raw)
	if err != nil {
		return nil, err
	}
	aead, err := cipher.NewGCM(block)
	zero(block) // GCM has its own copy of the schedule
	if err != nil {
		return nil, err
	}
	return &box{aead: aead}, nil
}

// zero clears what the pointer inside v points to.
func zero(v any) {
	if p := reflect.ValueOf(v); p.Kind() == reflect.Pointer {
		p.Elem().SetZero()
	}
}

func (b *box) wipe() { zero(b.aead) }

func (b *box) nonce(i int) []byte {
	return binary.BigEndian.AppendUint64(make([]byte, b.aead.NonceSize()-8, b.aead.NonceSize()), uint64(i))
}

func (b *box) seal(i int, raw []byte) []byte { return b.aead.Seal(nil, b.nonce(i), raw, nil) }

func (b *box) open(i int, sealed []byte) ([]byte, error) {
	raw, err := b.aead.Open(nil, b.nonce(i), sealed, nil)
	if err != nil {
		return nil, errors.New("a DEK does not open: it was not sealed for this call")
	}
	return raw, nil
}

// openAll replaces sealed DEKs by raw ones. If one does not open, none stays open.
func (b *box) openAll(deks [][]byte) error {
	for i, sealed := range deks {
		raw, err := b.open(i, sealed)
		if err != nil {
			for _, opened := range deks[:i] {
				clear(opened)
			}
			return err
		}
		deks[i] = raw
	}
	return nil
}

func newKey() (*ecdh.PrivateKey, error) {
	k, err := ecdh.P256().GenerateKey(rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("making an exchange key: %w", err)
	}
	return k, nil
}
