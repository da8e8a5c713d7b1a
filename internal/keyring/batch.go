package keyring

import (
	"context"
	"errors"
	"sync"
)

// maxBatch is how many requests go into one call.
const maxBatch = 256

// batcher gathers the requests that come while a call is under way into the next one.
type batcher[Q, A any] struct {
	// call answers all of its requests, or fails for all.
	call func([]Q) ([]A, error)
	// drop takes an answer for which nobody waits any more.
	drop func(A)

	mu struct {
		sync.Mutex
		waiting []*request[Q, A]
		running bool
	}
}

type request[Q, A any] struct {
	q    Q
	a    A
	err  error
	done chan struct{}

	mu   sync.Mutex
	gone bool // nobody waits
}

// do waits for the answer, or for ctx's end.
func (b *batcher[Q, A]) do(ctx context.Context, q Q) (A, error) {
	r := &request[Q, A]{q: q, done: make(chan struct{})}
	b.mu.Lock()
	b.mu.waiting = append(b.mu.waiting, r)
	if !b.mu.running {
		b.mu.running = true
		go b.run()
	}
	b.mu.Unlock()
	select {
	case <-r.done:
		return r.a, r.err
	case <-ctx.Done():
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	select {
	case <-r.done: // both at once: take it
		return r.a, r.err
	default:
	}
	r.gone = true
	var none A
	return none, ctx.Err()
}

// run makes calls until nobody waits.
func (b *batcher[Q, A]) run() {
	for {
		b.mu.Lock()
		n := min(len(b.mu.waiting), maxBatch)
		batch := b.mu.waiting[:n:n]
		b.mu.waiting = b.mu.waiting[n:]
		if n == 0 {
			b.mu.waiting, b.mu.running = nil, false
			b.mu.Unlock()
			return
		}
		b.mu.Unlock()
		b.answer(batch)
	}
}

// answer makes one call for a batch. If it fails over one of them (a wrapped key that is
// damaged), the others must not fail with it: each is then called for by itself.
func (b *batcher[Q, A]) answer(batch []*request[Q, A]) {
	qs := make([]Q, len(batch))
	for i, r := range batch {
		qs[i] = r.q
	}
	as, err := b.call(qs)
	if err != nil && len(batch) > 1 && !errors.Is(err, ErrRevoked) && !errors.Is(err, ErrUnreachable) {
		for i := range batch {
			b.answer(batch[i : i+1])
		}
		return
	}
	for i, r := range batch {
		r.mu.Lock()
		if r.err = err; err == nil {
			r.a = as[i]
			if r.gone {
				b.drop(r.a)
			}
		}
		close(r.done)
		r.mu.Unlock()
	}
}
