package keyringtest

import (
	"context"
	"crypto/rand"
	"fmt"

	"github.com/holdfastdb/holdfast/internal/keyring"
	"github.com/holdfastdb/holdfast/internal/seal"
)

// RotateKEK makes a new version of the KEK, under which keys are wrapped from then on, and
// tells its number.
func (r *Ring) RotateKEK() uint32 {
	raw := make([]byte, seal.KeySize)
	rand.Read(raw) // never fails: crypto/rand
	kek, err := seal.NewKEK(raw)
	if err != nil {
		panic(err) // the size is right
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.mu.current++
	r.mu.keks[r.mu.current] = kek
	return r.mu.current
}

// RetireKEK destroys a version of the KEK: what is wrapped under it does not open again.
func (r *Ring) RetireKEK(version uint32) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.mu.keks, version)
}

func (r *Ring) wrap(c seal.Context, raw []byte) ([]byte, error) {
	r.mu.Lock()
	version, kek := r.mu.current, r.mu.keks[r.mu.current]
	r.mu.Unlock()
	return kek.Wrap(version, c, raw)
}

func (r *Ring) unwrap(c seal.Context, wrapped []byte) ([]byte, error) {
	version, err := seal.KEKVersion(wrapped)
	if err != nil {
		return nil, err
	}
	r.mu.Lock()
	kek := r.mu.keks[version]
	r.mu.Unlock()
	if kek == nil {
		return nil, fmt.Errorf("test: version %d of the KEK is not there: %w", version, keyring.ErrRetired)
	}
	return kek.Unwrap(c, wrapped)
}

// Rewrap implements keyring.Ring.
func (r *Ring) Rewrap(ctx context.Context, list []keyring.Wrapped) (rewrapped [][]byte, kekVersion uint32, err error) {
	r.mu.Lock()
	kekVersion = r.mu.current
	r.mu.Unlock()
	for _, w := range list {
		if err := r.usable(ctx, w.Context); err != nil {
			return nil, 0, err
		}
		fresh := w.DEK
		if v, err := seal.KEKVersion(w.DEK); err != nil || v != kekVersion {
			raw, err := r.unwrap(w.Context, w.DEK)
			if err != nil {
				return nil, 0, err
			}
			if fresh, err = r.wrap(w.Context, raw); err != nil {
				return nil, 0, err
			}
		}
		rewrapped = append(rewrapped, fresh)
	}
	return rewrapped, kekVersion, nil
}
