// Package keyring is how a node comes by DEKs: it makes and opens them through a key
// manager while it holds a lease on the project, and forgets them when the lease is gone.
package keyring

import (
	"context"
	"errors"

	"github.com/holdfastdb/holdfast/internal/seal"
)

// Errors on which callers branch. They are wrapped: use errors.Is.
var (
	// ErrRevoked means that the customer's KMS denies the project's key: what is sealed
	// stays shut until the customer enables the key again.
	ErrRevoked = errors.New("the project's key is disabled in the customer's KMS")
	// ErrUnreachable means that no answer about the key could be had. Trying again may help.
	ErrUnreachable = errors.New("the project's key cannot be checked")
)

// Ring holds the DEKs of one node, under one lease for each project. It is safe for
// concurrent use.
//
// A Key that it returned stays usable only while the lease lives: when it ends, the ring
// wipes every key of the project, and their users get seal.ErrWiped.
type Ring interface {
	// Generate makes a DEK for a new object and returns it with its wrapped form, which the
	// caller stores beside the object. The key seals one file, or WAL under rising counters.
	Generate(ctx context.Context, c seal.Context) (key *seal.Key, wrapped []byte, err error)

	// Open unwraps the DEK of an object. It has seal.OpenFunc's signature. The ring keeps the
	// keys it opened, within bounds; the caller may ask again for each use. They only open.
	// A wrapped key that is none of the object's is seal.ErrDamaged.
	Open(ctx context.Context, c seal.Context, wrapped []byte) (*seal.Key, error)

	Rewrapper

	// OnShred calls fn once when the project's lease ends, whatever the reason, after the
	// keys were wiped, on a goroutine of its own: the node then drops all it holds of the
	// project in plaintext. fn may close the ring.
	// If the project has no lease yet, Generate or Open takes one out. A later lease needs a
	// new OnShred. cancel makes that fn is not called any more.
	OnShred(project string, fn func(reason error)) (cancel func())

	// Close wipes all keys and lets the leases go. It calls no OnShred function: who closes
	// the ring drops its plaintext as well.
	Close()
}
