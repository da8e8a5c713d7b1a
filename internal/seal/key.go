package seal

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"encoding/binary"
	"errors"
	"fmt"
	"reflect"
	"runtime"
	"sync"
)

// Errors on which callers branch. They are wrapped: use errors.Is.
var (
	// ErrWiped is the answer of every use of a key that was wiped.
	ErrWiped = errors.New("the key was wiped")
	// ErrDamaged means that sealed bytes do not open: they were changed, cut or moved, or
	// belong to another key.
	ErrDamaged = errors.New("sealed bytes are damaged or not where they belong")
)

const (
	// KeySize is the size of a raw key, in bytes (AES-256).
	KeySize = 32
	// TagSize is what sealing adds to a chunk or to a stretch of WAL, in bytes.
	TagSize = 16

	nonceSize = 12
)

// A domain is a nonce's first byte.
type domain byte

const (
	domainFile domain = 1
	domainWAL  domain = 2
	domainSlot domain = 3
)

// OpenFunc gives the key that is inside wrapped, if it was wrapped for c.
type OpenFunc func(ctx context.Context, c Context, wrapped []byte) (*Key, error)

// Key is one DEK. It keeps no raw key bytes, only the expanded AES schedule in one heap object,
// which Go's collector does not move; Wipe zeroes it. Pages of the heap are kept out of swap and core
// files by internal/hardening. A Key is safe for concurrent use.
type Key struct {
	openOnly bool
	term     *Term // set before anybody uses the key

	mu struct {
		sync.RWMutex
		aead cipher.AEAD // nil once wiped
	}
	// used keeps nonces unique.
	used struct {
		sync.Mutex
		writer  bool   // a Writer took the key
		nextWAL uint64 // Invariant: no WAL counter at or above it has sealed yet
	}
}

// NewKey takes a fresh raw key, 32 random bytes that nothing was sealed with yet, and wipes raw.
func NewKey(raw []byte) (*Key, error) { return newKey(raw, false) }

// NewOpenKey takes a raw key that may have sealed already, and wipes raw. The Key only
// opens: what counters were used under it is not known.
func NewOpenKey(raw []byte) (*Key, error) { return newKey(raw, true) }

func newKey(raw []byte, openOnly bool) (*Key, error) {
	defer clear(raw)
	if len(raw) != KeySize {
		return nil, fmt.Errorf("raw key has %d bytes, want %d", len(raw), KeySize)
	}
	block, err := aes.NewCipher(raw)
	if err != nil {
		return nil, fmt.Errorf("expanding a key: %w", err)
	}
	aead, err := cipher.NewGCM(block)
	zero(block) // GCM has its own copy of the schedule
	if err != nil {
		return nil, fmt.Errorf("setting up AES-GCM: %w", err)
	}
	k := &Key{openOnly: openOnly, term: endless}
	k.mu.aead = aead
	// A key that is dropped without Wipe leaves no schedule in freed memory.
	runtime.AddCleanup(k, func(aead cipher.AEAD) { zero(aead) }, aead)
	return k, nil
}

// zero clears what the pointer inside v points to.
func zero(v any) {
	if p := reflect.ValueOf(v); p.Kind() == reflect.Pointer {
		p.Elem().SetZero()
	}
}

// Wipe forgets the key, after the uses that are under way. Every later use gives ErrWiped.
func (k *Key) Wipe() {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.mu.aead != nil {
		zero(k.mu.aead)
		k.mu.aead = nil
	}
}

// claimWriter lets one Writer seal under k, ever.
func (k *Key) claimWriter() error {
	if k.openOnly {
		return errOpenOnly
	}
	k.used.Lock()
	defer k.used.Unlock()
	if k.used.writer {
		return errors.New("the key has sealed another file already: each file needs a DEK of its own")
	}
	k.used.writer = true
	return nil
}

// claimWAL lets a WAL counter be used if it is above all that were.
func (k *Key) claimWAL(counter uint64) error {
	if k.openOnly {
		return errOpenOnly
	}
	k.used.Lock()
	defer k.used.Unlock()
	if counter < k.used.nextWAL || counter == ^uint64(0) {
		return fmt.Errorf("WAL counter %d, want %d or more: a counter that was used once must not seal again", counter, k.used.nextWAL)
	}
	k.used.nextWAL = counter + 1
	return nil
}

var errOpenOnly = errors.New("the key was unwrapped, not made here, and so may only open")

// scratch is what an AEAD call needs on the heap, since it goes through an interface.
type scratch struct {
	nonce [nonceSize]byte
	aad   []byte
	buf   []byte
}

var scratches = sync.Pool{New: func() any { return &scratch{aad: make([]byte, 0, 512)} }}

func (s *scratch) setNonce(d domain, counter uint64) {
	s.nonce = [nonceSize]byte{0: byte(d)}
	binary.BigEndian.PutUint64(s.nonce[4:], counter)
}

// usableLocked tells why the key is not to be used.
func (k *Key) usableLocked() error {
	switch {
	case k.mu.aead == nil:
		return ErrWiped
	case k.term.expired():
		return errExpired
	}
	return nil
}

// seal appends ciphertext and tag under s's nonce and AAD.
func (k *Key) seal(dst []byte, s *scratch, plain []byte) ([]byte, error) {
	k.mu.RLock()
	defer k.mu.RUnlock()
	if err := k.usableLocked(); err != nil {
		return nil, err
	}
	return k.mu.aead.Seal(dst, s.nonce[:], plain, s.aad), nil
}

// open appends the plaintext. dst may be sealed[:0].
func (k *Key) open(dst []byte, s *scratch, sealed []byte) ([]byte, error) {
	k.mu.RLock()
	defer k.mu.RUnlock()
	if err := k.usableLocked(); err != nil {
		return nil, err
	}
	plain, err := k.mu.aead.Open(dst, s.nonce[:], sealed, s.aad)
	if err != nil {
		return nil, ErrDamaged
	}
	return plain, nil
}
