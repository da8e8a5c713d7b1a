package seal

import (
	"crypto/rand"
	"encoding/binary"
	"fmt"
)

const (
	wrapVersion = 1
	wrapAAD     = "holdfast dek v1\n"
	wrapHeader  = 1 + 4 + nonceSize

	// WrappedSize is the size of a wrapped DEK, in bytes.
	WrappedSize = wrapHeader + KeySize + TagSize
)

// KEK wraps DEKs. It is safe for concurrent use, and Wipe ends it as it does a Key.
//
// A wrapped DEK has 65 bytes:
//
//	0   1   version, 1
//	1   4   version of the KEK, little-endian
//	5   12  nonce, random
//	17  48  DEK under AES-256-GCM, and the tag; AAD: "holdfast dek v1\n", bytes 0..4, context
//
// Random nonces bound one KEK to 2^32 wraps (NIST SP 800-38D, 8.3: a chance of 2^-32 that two
// are equal). A wrap is made for each layer file and for each stretch of about 16 MiB of
// WAL: 2^32 of them are 64 PiB of one project's data, or 136 years of one a second. A KEK is
// rotated long before.
type KEK struct{ k *Key }

// NewKEK takes a raw KEK of 32 bytes and wipes raw.
func NewKEK(raw []byte) (*KEK, error) {
	k, err := newKey(raw, true)
	if err != nil {
		return nil, err
	}
	return &KEK{k: k}, nil
}

// Wipe forgets the KEK.
func (k *KEK) Wipe() { k.k.Wipe() }

func (s *scratch) setWrap(header []byte, c Context) {
	s.nonce = [nonceSize]byte(header[5:wrapHeader])
	s.aad = append(append(s.aad[:0], wrapAAD...), header[:5]...)
	s.aad = c.AppendTo(s.aad)
}

// Wrap seals a raw DEK for c. version is the KEK's own, so that Unwrap's caller knows which
// KEK to take.
func (k *KEK) Wrap(version uint32, c Context, dek []byte) ([]byte, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	if len(dek) != KeySize {
		return nil, fmt.Errorf("wrapping the key of %s: it has %d bytes, want %d", c, len(dek), KeySize)
	}
	b := make([]byte, wrapHeader, WrappedSize)
	b[0] = wrapVersion
	binary.LittleEndian.PutUint32(b[1:], version)
	rand.Read(b[5:]) // never fails: crypto/rand
	s := scratches.Get().(*scratch)
	defer scratches.Put(s)
	s.setWrap(b, c)
	wrapped, err := k.k.seal(b, s, dek)
	if err != nil {
		return nil, fmt.Errorf("wrapping the key of %s: %w", c, err)
	}
	return wrapped, nil
}

// KEKVersion tells which version of the KEK wrapped a DEK. Whatever else it is given is
// ErrDamaged: users can put bytes of their own where a wrapped DEK is looked for (auxfile), and
// an error that says "try again" would be repeated for ever.
func KEKVersion(wrapped []byte) (uint32, error) {
	if len(wrapped) != WrappedSize {
		return 0, fmt.Errorf("%w: wrapped DEK has %d bytes, want %d", ErrDamaged, len(wrapped), WrappedSize)
	}
	if wrapped[0] != wrapVersion {
		return 0, fmt.Errorf("%w: wrapped DEK has format version %d, this program reads version %d", ErrDamaged, wrapped[0], wrapVersion)
	}
	return binary.LittleEndian.Uint32(wrapped[1:]), nil
}

// Unwrap gives the raw DEK, which the caller wipes.
func (k *KEK) Unwrap(c Context, wrapped []byte) ([]byte, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	if _, err := KEKVersion(wrapped); err != nil {
		return nil, fmt.Errorf("unwrapping the key of %s: %w", c, err)
	}
	s := scratches.Get().(*scratch)
	defer scratches.Put(s)
	s.setWrap(wrapped, c)
	dek, err := k.k.open(nil, s, wrapped[wrapHeader:])
	if err != nil {
		return nil, fmt.Errorf("unwrapping the key of %s: %w", c, err)
	}
	return dek, nil
}
