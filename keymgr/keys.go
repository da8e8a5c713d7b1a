package keymgr

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/holdfastdb/holdfast/internal/blob"
	"github.com/holdfastdb/holdfast/internal/boottime"
	"github.com/holdfastdb/holdfast/internal/seal"
)

// keyState is a key's plaintext KEKs, and what the bucket says of them.
type keyState struct {
	id keyID
	// checking is held, as a channel of one place, by who calls the KMS for the key: one
	// call at a time, whose answer serves all who wait.
	checking chan struct{}
	// adopting is held from taking a document until its hold, or its end, is in force.
	adopting sync.Mutex

	mu struct {
		sync.Mutex
		doc    *document // as it was read last; never altered
		readAt time.Duration
		keks   map[uint32]*seal.KEK
		// wipes counts calls of wipe: a KEK that was asked for before one is not kept after.
		wipes uint64
		// What the last check said, for KeyStatus.
		checkedUnixMS int64
		lastError     string
		lastRequestID string
	}
}

func newKeyState(id keyID) *keyState {
	k := &keyState{id: id, checking: make(chan struct{}, 1)}
	k.mu.keks = make(map[uint32]*seal.KEK)
	return k
}

// wipe forgets the KEKs and tells whether there were any.
func (k *keyState) wipe() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	had := len(k.mu.keks) > 0
	for _, kek := range k.mu.keks {
		kek.Wipe()
	}
	clear(k.mu.keks)
	k.mu.wipes++
	return had
}

func (k *keyState) kek(version uint32) (*seal.KEK, uint64) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.mu.keks[version], k.mu.wipes
}

// keep takes a KEK, unless the key was wiped since it was asked for, or is held back: who asked may not have
// known that yet.
func (k *keyState) keep(version uint32, kek *seal.KEK, wipes uint64) (*seal.KEK, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.mu.wipes != wipes || k.mu.doc != nil && k.mu.doc.Hold != nil {
		kek.Wipe()
		return nil, fmt.Errorf("KEK of %s: %w", k.id.words(), seal.ErrWiped)
	}
	if have := k.mu.keks[version]; have != nil {
		kek.Wipe()
		return have, nil
	}
	k.mu.keks[version] = kek
	return kek, nil
}

// enter waits for the turn to call the KMS.
func (k *keyState) enter(ctx context.Context) (leave func(), err error) {
	select {
	case k.checking <- struct{}{}:
		return func() { <-k.checking }, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("waiting for another call to the KMS for %s: %w", k.id.words(), ctx.Err())
	}
}

func (k *keyState) known() *document {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.mu.doc
}

// take remembers the document as the bucket has it now, and gives the newest that was read:
// answers of the bucket may come out of order. The caller holds adopting.
func (k *keyState) take(doc *document) *document {
	k.mu.Lock()
	defer k.mu.Unlock()
	if have := k.mu.doc; have != nil && have.Revision > doc.Revision {
		return have
	}
	k.mu.doc, k.mu.readAt = doc, boottime.Now()
	return doc
}

// document gives the key as the bucket has it, and reads it again if asked.
func (s *Server) document(ctx context.Context, k *keyState, again bool) (*document, error) {
	if doc := k.known(); doc != nil && !again {
		return doc, nil
	}
	doc, err := loadDocument(ctx, s.cfg.BlobStore, k.id)
	if err == nil {
		err = s.allowed(k.id, doc.CMK)
	}
	if err == nil {
		err = s.allowed(k.id, doc.find(doc.Current).CMK)
	}
	if err != nil {
		return nil, err
	}
	if doc.old {
		if err := s.index(ctx, k.id); err != nil {
			return nil, fmt.Errorf("listing %s among the keys: %w", k.id.words(), err)
		}
	}
	return s.adopt(ctx, k, doc)
}

// update changes the key's document (see updateDocument) and takes it as what is known. A hold
// that is in it takes effect. If the bucket has an older document than was read before, then somebody put it
// back: what was read is changed, and takes its place. Else a hold would be in a document that take does not
// believe, and KEKs that the older one lacks would be lost.
func (s *Server) update(ctx context.Context, k *keyState, change func(*document) error) (*document, error) {
	doc, err := updateDocument(ctx, s.cfg.BlobStore, k.id, func(d *document) error {
		if have := k.known(); have != nil && have.Revision > d.Revision {
			s.cfg.Logger.Warn("the bucket has an older document of a key than it had: the newest takes its place", "key", k.id, "revision", d.Revision, "had", have.Revision)
			*d = *have.clone()
		}
		return change(d)
	})
	if err != nil {
		return nil, err
	}
	return s.adopt(ctx, k, doc)
}

// key is the in-memory state of a key.
func (s *Server) key(id keyID) *keyState {
	s.mu.Lock()
	defer s.mu.Unlock()
	k := s.mu.keys[id]
	if k == nil {
		k = newKeyState(id)
		s.mu.keys[id] = k
	}
	return k
}

// known gives a key that was made; others leave no trace in memory.
func (s *Server) known(ctx context.Context, id keyID) (*keyState, *document, error) {
	k := s.key(id)
	doc, err := s.document(ctx, k, false)
	if errors.Is(err, blob.ErrNotFound) {
		s.mu.Lock()
		delete(s.mu.keys, id)
		s.mu.Unlock()
	}
	return k, doc, err
}
