// Package keyringtest is a key ring without a key manager, for the tests of the packages
// that use one: keys are wrapped under a random key of the ring, bound to their contexts, and
// Revoke and Restore act as the customer's hand on the KMS.
package keyringtest

import (
	"context"
	"crypto/rand"
	"fmt"
	"sync"

	"github.com/holdfastdb/holdfast/internal/keyring"
	"github.com/holdfastdb/holdfast/internal/seal"
)

// Ring is a keyring.Ring that lives in one process.
type Ring struct {
	mu struct {
		sync.Mutex
		keks     map[uint32]*seal.KEK // by version; a retired one is gone
		current  uint32
		err      error // what Generate and Open answer now; nil: they work
		closed   bool
		keys     map[string][]*seal.Key // given out, by project
		shred    map[string]map[int]keyring.ShredFunc
		nextID   int
		term     *seal.Term // of the keys given out since the last Restore
		news     chan struct{}
		opened   int
		generate int
	}
}

var _ keyring.Ring = (*Ring)(nil)

// New makes a ring of its own: what another one wrapped does not open.
func New() *Ring {
	r := &Ring{}
	r.mu.keks = make(map[uint32]*seal.KEK)
	r.RotateKEK()
	r.mu.keys = make(map[string][]*seal.Key)
	r.mu.term, r.mu.news = seal.Endless(), make(chan struct{})
	r.mu.shred = make(map[string]map[int]keyring.ShredFunc)
	return r
}

// Revoke does what a disabled CMK does, at once: all keys given out are wiped, the OnShred
// functions run, and nothing opens until Restore.
func (r *Ring) Revoke() { r.end(fmt.Errorf("test: %w", keyring.ErrRevoked)) }

// Cut does what losing the key manager past the lease's end does; until Restore.
func (r *Ring) Cut() { r.end(fmt.Errorf("test: %w", keyring.ErrUnreachable)) }

// Restore makes Generate and Open work again. Keys that were wiped stay so.
func (r *Ring) Restore() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.mu.err, r.mu.term = nil, seal.Endless()
	close(r.mu.news)
	r.mu.news = make(chan struct{})
}

// Expire does what the end of a lease does that nobody has noticed yet, as on a machine that slept: keys
// refuse and Live says no, but no OnShred function runs; until Restore.
func (r *Ring) Expire() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.mu.term.End()
}

// Live implements keyring.Ring.
func (r *Ring) Live(string, string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case r.mu.closed:
		return fmt.Errorf("test: the ring was closed: %w", keyring.ErrUnreachable)
	case r.mu.err != nil:
		return r.mu.err
	case !r.mu.term.Live():
		return fmt.Errorf("test: the lease ran out: %w", keyring.ErrUnreachable)
	}
	return nil
}

// Term implements keyring.Ring.
func (r *Ring) Term(string, string) *seal.Term {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.mu.term
}

// News implements keyring.Ring: Restore is news.
func (r *Ring) News(string, string) <-chan struct{} {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.mu.news
}

// Calls is how many keys were made and opened.
func (r *Ring) Calls() (generated, opened int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.mu.generate, r.mu.opened
}

func (r *Ring) end(reason error) {
	r.mu.Lock()
	r.mu.err = reason
	r.mu.term.End()
	for _, keys := range r.mu.keys {
		for _, k := range keys {
			k.Wipe()
		}
	}
	var fns []keyring.ShredFunc
	for _, byID := range r.mu.shred {
		for _, fn := range byID {
			fns = append(fns, fn)
		}
	}
	clear(r.mu.keys)
	clear(r.mu.shred)
	r.mu.Unlock()
	var wg sync.WaitGroup
	for _, fn := range fns {
		wg.Go(func() { fn(reason) })
	}
	wg.Wait()
}

// Generate implements keyring.Ring.
func (r *Ring) Generate(ctx context.Context, c seal.Context) (*seal.Key, []byte, error) {
	if err := r.usable(ctx, c); err != nil {
		return nil, nil, err
	}
	raw := make([]byte, seal.KeySize)
	rand.Read(raw) // never fails: crypto/rand
	wrapped, err := r.wrap(c, raw)
	if err != nil {
		return nil, nil, err
	}
	k, err := seal.NewKey(raw)
	if err != nil {
		return nil, nil, err
	}
	return k, wrapped, r.track(c, k, true)
}

// Open implements keyring.Ring.
func (r *Ring) Open(ctx context.Context, c seal.Context, wrapped []byte) (*seal.Key, error) {
	if err := r.usable(ctx, c); err != nil {
		return nil, err
	}
	raw, err := r.unwrap(c, wrapped)
	if err != nil {
		return nil, err
	}
	k, err := seal.NewOpenKey(raw)
	if err != nil {
		return nil, err
	}
	return k, r.track(c, k, false)
}

func (r *Ring) usable(ctx context.Context, c seal.Context) error {
	if err := c.Validate(); err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.mu.closed {
		return fmt.Errorf("test: the ring was closed: %w", keyring.ErrUnreachable)
	}
	if r.mu.err != nil {
		return r.mu.err
	}
	return ctx.Err()
}

// track remembers a key to wipe; the ring may have been revoked since the call began.
func (r *Ring) track(c seal.Context, k *seal.Key, generated bool) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.mu.err != nil {
		k.Wipe()
		return r.mu.err
	}
	k.Bind(r.mu.term)
	if generated {
		r.mu.generate++
	} else {
		r.mu.opened++
	}
	r.mu.keys[c.Project] = append(r.mu.keys[c.Project], k)
	return nil
}

// OnShred implements keyring.Ring.
// It takes all branches of a project for one.
func (r *Ring) OnShred(project, _ string, fn keyring.ShredFunc) (cancel func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	id := r.mu.nextID
	r.mu.nextID++
	if r.mu.shred[project] == nil {
		r.mu.shred[project] = make(map[int]keyring.ShredFunc)
	}
	r.mu.shred[project][id] = fn
	return func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		delete(r.mu.shred[project], id)
	}
}

// Waiting counts the OnShred functions of a project that wait for the end of its lease.
func (r *Ring) Waiting(project string) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.mu.shred[project])
}

// Close implements keyring.Ring: it wipes, and calls no OnShred function.
func (r *Ring) Close() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.mu.closed = true
	for _, keys := range r.mu.keys {
		for _, k := range keys {
			k.Wipe()
		}
	}
	clear(r.mu.keys)
	clear(r.mu.shred)
}
