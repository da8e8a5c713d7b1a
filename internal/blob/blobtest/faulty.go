package blobtest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"

	"github.com/holdfastdb/holdfast/internal/blob"
)

// ErrInjected is inside every error that a Faulty made up.
var ErrInjected = errors.New("injected fault")

// Fault is what happens to one call.
type Fault int

// The faults. A remote effect can fail in two ways, and a caller must be right in both.
const (
	None       Fault = iota
	Lost             // the call fails and has no effect
	Unreported       // the call has its effect and is reported as failed
)

// Op names a method of blob.Store, in lower case.
type Op string

// The operations.
const (
	OpGet    Op = "get" // GetRange and Head as well
	OpCreate Op = "create"
	OpSwap   Op = "swap"
	OpDelete Op = "delete"
	OpList   Op = "list"
)

// Faulty passes calls on to a Store and fails some of them.
type Faulty struct {
	store blob.Store

	mu struct {
		sync.Mutex
		decide func(op Op, key string) Fault
		next   []once
		calls  map[Op]int
	}
}

type once struct {
	op     Op
	prefix string
	fault  Fault
}

var _ blob.Store = (*Faulty)(nil)

// NewFaulty fails the calls that decide says; nil: none but those of FailNext. decide is not
// called concurrently.
func NewFaulty(store blob.Store, decide func(op Op, key string) Fault) *Faulty {
	f := &Faulty{store: store}
	f.mu.decide = decide
	f.mu.calls = make(map[Op]int)
	return f
}

// FailNext fails the next call of op on a key that begins with prefix. Several wait in line.
func (f *Faulty) FailNext(op Op, prefix string, fault Fault) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.mu.next = append(f.mu.next, once{op, prefix, fault})
}

// Calls is how many calls of op were made.
func (f *Faulty) Calls(op Op) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.mu.calls[op]
}

func (f *Faulty) fault(op Op, key string) Fault {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.mu.calls[op]++
	for i, o := range f.mu.next {
		if o.op == op && strings.HasPrefix(key, o.prefix) {
			f.mu.next = append(f.mu.next[:i:i], f.mu.next[i+1:]...)
			return o.fault
		}
	}
	if f.mu.decide == nil {
		return None
	}
	return f.mu.decide(op, key)
}

// inject runs call unless the fault loses it.
func inject[T any](f *Faulty, op Op, key string, call func() (T, error)) (T, error) {
	var none T
	fault := f.fault(op, key)
	if fault == Lost {
		return none, fmt.Errorf("%s of %s: %w", op, key, ErrInjected)
	}
	v, err := call()
	if fault == Unreported && err == nil {
		return none, fmt.Errorf("%s of %s, which took effect: %w", op, key, ErrInjected)
	}
	return v, err
}

// Get implements blob.Store.
func (f *Faulty) Get(ctx context.Context, key string) ([]byte, blob.ETag, error) {
	var etag blob.ETag
	data, err := inject(f, OpGet, key, func() (data []byte, err error) {
		data, etag, err = f.store.Get(ctx, key)
		return data, err
	})
	if err != nil {
		return nil, "", err
	}
	return data, etag, nil
}

// GetRange implements blob.Store.
func (f *Faulty) GetRange(ctx context.Context, key string, p []byte, off int64) (int, error) {
	return inject(f, OpGet, key, func() (int, error) { return f.store.GetRange(ctx, key, p, off) })
}

// Head implements blob.Store.
func (f *Faulty) Head(ctx context.Context, key string) (blob.Info, error) {
	return inject(f, OpGet, key, func() (blob.Info, error) { return f.store.Head(ctx, key) })
}

// Create implements blob.Store.
func (f *Faulty) Create(ctx context.Context, key string, r io.Reader, size int64) (blob.ETag, error) {
	return inject(f, OpCreate, key, func() (blob.ETag, error) { return f.store.Create(ctx, key, r, size) })
}

// Swap implements blob.Store.
func (f *Faulty) Swap(ctx context.Context, key string, data []byte, old blob.ETag) (blob.ETag, error) {
	return inject(f, OpSwap, key, func() (blob.ETag, error) { return f.store.Swap(ctx, key, data, old) })
}

// Delete implements blob.Store.
func (f *Faulty) Delete(ctx context.Context, key string) error {
	_, err := inject(f, OpDelete, key, func() (struct{}, error) { return struct{}{}, f.store.Delete(ctx, key) })
	return err
}

// List implements blob.Store.
func (f *Faulty) List(ctx context.Context, prefix string, fn func(blob.Info) error) error {
	_, err := inject(f, OpList, prefix, func() (struct{}, error) { return struct{}{}, f.store.List(ctx, prefix, fn) })
	return err
}
