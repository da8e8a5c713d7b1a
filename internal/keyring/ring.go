// Package keyring is how a node comes by DEKs: it makes and opens them through a key
// manager while it holds a lease on their branch, and forgets them when the lease is gone.
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

// RevokedError is an ErrRevoked with what the key manager said of it.
type RevokedError struct {
	ControlledBy string // who can end it, in words; empty: it was not said
	Message      string
}

func (e *RevokedError) Error() string { return ErrRevoked.Error() + ": " + e.Message }

// Unwrap makes it an ErrRevoked.
func (e *RevokedError) Unwrap() error { return ErrRevoked }

// ControlledBy tells who can end the revocation that err is of, in words for users; empty: it is
// none, or it is not known.
func ControlledBy(err error) string {
	if e := (*RevokedError)(nil); errors.As(err, &e) {
		return e.ControlledBy
	}
	return ""
}

// Ring holds the DEKs of one node, under one lease for each branch. It is safe for
// concurrent use.
//
// A Key that it returned stays usable only while the lease lives: when it ends, the ring
// wipes every key of the branch, and their users get seal.ErrWiped. The same they get past the
// lease's end when the ring has not wiped yet. A lease under which nobody has asked for a key for 10 minutes,
// and of whose end nobody wants to hear (OnShred), is let go: so that of a branch that is gone ends.
type Ring interface {
	// Generate makes a DEK for a new object and returns it with its wrapped form, which the
	// caller stores beside the object. The key seals one file, or WAL under rising counters.
	Generate(ctx context.Context, c seal.Context) (key *seal.Key, wrapped []byte, err error)

	// Open unwraps the DEK of an object. It has seal.OpenFunc's signature. The ring keeps the
	// keys it opened, within bounds; the caller may ask again for each use. They only open.
	// A wrapped key that is none of the object's is seal.ErrDamaged.
	Open(ctx context.Context, c seal.Context, wrapped []byte) (*seal.Key, error)

	Rewrapper

	// OnShred calls fn once when the lease on the branch's key ends, whatever the reason, after
	// the keys were wiped, on a goroutine of its own: the node then drops all it holds of the
	// branch in plaintext, and says in words what that was, for the receipt. The node's report goes
	// out when all functions of the lease have returned. fn may close the ring; Close then waits
	// its bounded time for the report, in vain.
	// If the branch has no lease yet, Generate or Open takes one out. A later lease needs a
	// new OnShred. cancel makes that fn is not called any more.
	OnShred(project, branch string, fn ShredFunc) (cancel func())

	// Live tells, by the exact clock, whether the branch's lease lives; if not, why: ErrRevoked
	// or ErrUnreachable. Whoever answers from plaintext asks it right before the answer leaves.
	Live(project, branch string) error

	// Term is that of the branch's lease, for keys that are not the ring's but live no longer than
	// the lease. If there is no lease it has ended.
	Term(project, branch string) *seal.Term

	// News is closed when it may be worth while to ask again for a branch whose key was denied:
	// the key manager gave notice of it.
	News(project, branch string) <-chan struct{}

	// Close wipes all keys and lets the leases go. It calls no OnShred function: who closes
	// the ring drops its plaintext as well. It waits a bounded time for reports of what was shredded before.
	Close()
}

// ShredFunc drops what a node holds in plaintext, for a reason, and tells in words what that was.
type ShredFunc func(reason error) (dropped []string)
