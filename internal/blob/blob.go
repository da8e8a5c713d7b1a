// Package blob is the vocabulary of object storage: named immutable objects and a few
// small documents that are replaced by compare-and-swap.
//
// Keys are slash-separated, relative, of [a-zA-Z0-9._=-] segments, at most 512 bytes; no key is a
// folder of another. A Store is safe for concurrent use. A write that returned nil is
// durable and visible to every later call. A write that returned an error other than
// ErrExists or ErrPrecondition may or may not have happened: the caller must look.
package blob

import (
	"context"
	"errors"
	"io"
)

// Errors on which callers branch.
var (
	ErrNotFound     = errors.New("object not found")
	ErrExists       = errors.New("object exists already")
	ErrPrecondition = errors.New("object was changed by someone else")
)

// ETag identifies one version of an object.
type ETag string

// Info describes an object.
type Info struct {
	Key  string
	Size int64
	ETag ETag
}

// Store is a bucket.
type Store interface {
	// Get reads a whole small object (documents). Objects over 64 MiB are refused.
	Get(ctx context.Context, key string) ([]byte, ETag, error)
	// GetRange fills p from the object's offset off, with io.ReaderAt's rules.
	GetRange(ctx context.Context, key string, p []byte, off int64) (int, error)
	// Head describes an object.
	Head(ctx context.Context, key string) (Info, error)
	// Create writes an object that must not exist yet (ErrExists). size is exact.
	Create(ctx context.Context, key string, r io.Reader, size int64) (ETag, error)
	// Swap replaces a document whose ETag is still old (ErrPrecondition, ErrNotFound).
	Swap(ctx context.Context, key string, data []byte, old ETag) (ETag, error)
	// Delete removes an object; deleting one that is absent is no error.
	Delete(ctx context.Context, key string) error
	// List calls fn for every object whose key starts with prefix, in key order.
	List(ctx context.Context, prefix string, fn func(Info) error) error
}
