// Package shredreport signs and verifies a process's word that it has shredded what it held
// under a key. The process makes an Ed25519 key when it starts, keeps it in its memory only and names
// its public half in every request for a lease; so a report that verifies under the key that a lease
// was asked for with was made by the process that held that lease.
package shredreport

import (
	"bytes"
	"crypto/ed25519"
	"errors"
	"fmt"

	"google.golang.org/protobuf/proto"

	"github.com/holdfastdb/holdfast/internal/api/pb"
)

// header keeps a signature from being one of anything else.
const header = "holdfast shred report v1\n"

const (
	maxText    = 1024 // of a name or reason, in bytes
	maxDropped = 256  // lines
)

// signed gives the bytes that are signed: header, and the report without its signature, marshaled
// in the order of its fields. The message has neither maps nor, as checked here, unknown fields, so
// that every program marshals it alike.
func signed(r *pb.ShredReport) ([]byte, error) {
	if len(r.ProtoReflect().GetUnknown()) > 0 {
		return nil, errors.New("shred report: it has fields that this program does not know")
	}
	c := proto.CloneOf(r)
	c.Signature = nil
	body, err := proto.MarshalOptions{Deterministic: true}.Marshal(c)
	if err != nil {
		return nil, fmt.Errorf("shred report: %w", err)
	}
	return append([]byte(header), body...), nil
}

// Sign sets the report's public key and signature.
func Sign(r *pb.ShredReport, key ed25519.PrivateKey) error {
	public, ok := key.Public().(ed25519.PublicKey)
	if !ok {
		return errors.New("shred report: no Ed25519 key")
	}
	r.PublicKey = public
	b, err := signed(r)
	if err != nil {
		return err
	}
	r.Signature = ed25519.Sign(key, b)
	return nil
}

// Verify checks a report's form and its signature under its own public key. Whose key that
// is, the lease tells.
func Verify(r *pb.ShredReport) error {
	if err := check(r); err != nil {
		return err
	}
	b, err := signed(r)
	if err != nil {
		return err
	}
	if !ed25519.Verify(r.PublicKey, b, r.Signature) {
		return fmt.Errorf("shred report of node %q for lease %s: the signature is not that of its key", r.Node, r.LeaseId)
	}
	return nil
}

// VerifyBy is Verify, and the key must be the one given.
func VerifyBy(r *pb.ShredReport, public []byte) error {
	if !bytes.Equal(r.GetPublicKey(), public) {
		return fmt.Errorf("shred report of node %q for lease %s: it is signed with a key that the lease was not asked for with", r.GetNode(), r.GetLeaseId())
	}
	return Verify(r)
}

func check(r *pb.ShredReport) error {
	if r == nil || r.LeaseId == "" || r.Key == "" || r.Node == "" {
		return errors.New("shred report: lease, key and node are required")
	}
	if len(r.PublicKey) != ed25519.PublicKeySize || len(r.Signature) != ed25519.SignatureSize {
		return fmt.Errorf("shred report of node %.80q: public key and signature have %d and %d bytes, want %d and %d", r.Node,
			len(r.PublicKey), len(r.Signature), ed25519.PublicKeySize, ed25519.SignatureSize)
	}
	if len(r.Dropped) > maxDropped {
		return fmt.Errorf("shred report of node %.80q: %d lines of what was dropped, the most is %d", r.Node, len(r.Dropped), maxDropped)
	}
	for _, text := range append([]string{r.LeaseId, r.Key, r.Branch, r.Node, r.Reason}, r.Dropped...) {
		if len(text) > maxText {
			return fmt.Errorf("shred report of node %.80q: a text of it has %d bytes, the most is %d", r.Node, len(text), maxText)
		}
	}
	if r.Keys < 0 || r.KeysWipedUnixUs < 0 || r.ShreddedUnixUs < r.KeysWipedUnixUs {
		return fmt.Errorf("shred report of node %.80q: all was shredded at %d, before the keys were wiped at %d (microseconds since 1970), or a number is negative", r.Node, r.ShreddedUnixUs, r.KeysWipedUnixUs)
	}
	return nil
}
