package seal

import (
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"slices"
	"sync/atomic"
)

const slotAAD = "holdfast slot v1\n"

// Box seals the slots of a local store under a random key that exists only in this
// process's memory. The sealed bytes have the plaintext's length: nonce counter and GCM tag
// are the caller's to keep, in memory, so that an older content of a slot does not open
// either. A Box is safe for concurrent use and allocates nothing in steady state.
type Box struct {
	k       *Key
	counter atomic.Uint64 // the last one used
}

// Tag proves one sealed content of one slot. The zero Tag is that of none.
type Tag struct {
	counter uint64
	tag     [TagSize]byte
}

// IsZero tells whether t is the tag of nothing.
func (t Tag) IsZero() bool { return t.counter == 0 }

// NewBox makes a Box under a fresh random key, which is of use within a term.
func NewBox(term *Term) (*Box, error) {
	raw := make([]byte, KeySize)
	if _, err := rand.Read(raw); err != nil {
		return nil, fmt.Errorf("making a per-boot key: %w", err)
	}
	k, err := NewKey(raw)
	if err != nil {
		return nil, err
	}
	k.Bind(term)
	return &Box{k: k}, nil
}

// Wipe forgets the key: Seal then returns nil and the zero Tag, Open gives ErrWiped. So it is past
// the term's end.
func (b *Box) Wipe() { b.k.Wipe() }

func (s *scratch) setSlot(slot, counter uint64) {
	s.setNonce(domainSlot, counter)
	s.aad = append(s.aad[:0], slotAAD...)
	s.aad = binary.LittleEndian.AppendUint64(s.aad, slot)
}

// Seal appends plain, sealed for a slot, to dst. It writes nothing beyond that. It returns
// nil, and the zero Tag, only after Wipe or past the term's end.
//
// The nonce is {3, 0, 0, 0} and the counter of Seal calls (8 bytes, big-endian), from 1 on; the
// AAD is "holdfast slot v1\n" and the slot's number (8 bytes, little-endian).
func (b *Box) Seal(dst []byte, slot uint64, plain []byte) ([]byte, Tag) {
	s := scratches.Get().(*scratch)
	defer scratches.Put(s)
	tag := Tag{counter: b.counter.Add(1)}
	s.setSlot(slot, tag.counter)
	s.buf = slices.Grow(s.buf[:0], len(plain)+TagSize)
	sealed, err := b.k.seal(s.buf, s, plain)
	if err != nil { // wiped, or past its term
		return nil, Tag{}
	}
	copy(tag.tag[:], sealed[len(plain):])
	return append(dst, sealed[:len(plain)]...), tag
}

// Open appends the plaintext of what Seal gave with that tag for that slot.
func (b *Box) Open(dst []byte, slot uint64, sealed []byte, tag Tag) ([]byte, error) {
	if tag.IsZero() {
		return nil, fmt.Errorf("opening local slot %d: nothing was sealed there: %w", slot, ErrDamaged)
	}
	s := scratches.Get().(*scratch)
	defer scratches.Put(s)
	s.setSlot(slot, tag.counter)
	s.buf = append(append(s.buf[:0], sealed...), tag.tag[:]...)
	plain, err := b.k.open(slices.Grow(dst, len(sealed)), s, s.buf)
	if err != nil {
		return nil, fmt.Errorf("opening local slot %d: %w", slot, err)
	}
	return plain, nil
}
