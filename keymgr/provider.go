package keymgr

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"strconv"
)

// Provider is a key management service: it holds CMKs, which never leave it, and wraps
// small secrets under them. Each vendor's adapter is a package below this one; providertest
// is what all of them must do. A Provider is safe for concurrent use and keeps no answers:
// every call asks the service, since the answer is what a lease rests on.
//
// An error is a *ProviderError. An adapter retries nothing that was answered.
type Provider interface {
	// Wrap encrypts plain, at most MaxWrapPlain bytes, under the current version of the CMK, bound to
	// ec where the service can (Azure's cannot; the payload carries the binding as well).
	Wrap(ctx context.Context, cmk string, ec EncryptionContext, plain []byte) (Wrapped, error)
	// Unwrap decrypts what Wrap gave, under whichever version wrapped it.
	Unwrap(ctx context.Context, cmk string, ec EncryptionContext, wrapped []byte) (Unwrapped, error)
	// CurrentVersion names the version that Wrap uses now.
	CurrentVersion(ctx context.Context, cmk string) (version, requestID string, err error)
}

// MaxWrapPlain is the most that every service wraps directly: RSA-OAEP-256 with a key of
// 2,048 bits, Azure's smallest, takes 190 bytes.
const MaxWrapPlain = 190

// Wrapped is a provider's answer to Wrap.
type Wrapped struct {
	Ciphertext []byte
	Version    string // of the CMK, as far as the service tells
	RequestID  string // under which the service's own log has the call
}

// Unwrapped is a provider's answer to Unwrap. Plaintext is the caller's to wipe.
type Unwrapped struct {
	Plaintext []byte
	RequestID string
}

// EncryptionContext says what a wrapped KEK is for. It is bound into the wrap.
type EncryptionContext struct {
	Project    string
	Branch     string // empty: the project's own KEK
	KEKVersion uint32
}

// Map is ec as AWS's EncryptionContext.
func (ec EncryptionContext) Map() map[string]string {
	m := map[string]string{
		"holdfast:project": ec.Project,
		"holdfast:kek":     strconv.FormatUint(uint64(ec.KEKVersion), 10),
	}
	if ec.Branch != "" {
		m["holdfast:branch"] = ec.Branch
	}
	return m
}

// AAD is ec as additional authenticated data (Google Cloud KMS, transit, PKCS#11, local). It
// is injective: version 2, of branches, says where the project's name ends.
func (ec EncryptionContext) AAD() []byte {
	if ec.Branch == "" {
		b := append([]byte(nil), "holdfast kek v1\n"...)
		b = binary.LittleEndian.AppendUint32(b, ec.KEKVersion)
		return append(b, ec.Project...)
	}
	b := append([]byte(nil), "holdfast kek v2\n"...)
	b = binary.LittleEndian.AppendUint32(b, ec.KEKVersion)
	for _, part := range []string{ec.Project, ec.Branch} {
		b = binary.LittleEndian.AppendUint16(b, uint16(len(part))) // names have at most maxName bytes
		b = append(b, part...)
	}
	return b
}

// Outcome is what a failed call to a provider means for the key.
type Outcome int

// The outcomes. What is not known to be a denial must not be taken for one, nor the reverse:
// Denied shreds at once, the others when the lease runs out.
const (
	// Unknown: an answer that says nothing about whether the key may be used.
	Unknown Outcome = iota
	// Denied: the service refuses the key: disabled, deleted, scheduled for deletion, or
	// access to it withdrawn.
	Denied
	// Unreachable: no answer, or one that asks to try later (throttling, internal errors).
	Unreachable
)

func (o Outcome) String() string {
	switch o {
	case Denied:
		return "denied"
	case Unreachable:
		return "unreachable"
	}
	return "unknown"
}

// ErrBadCMK is wrapped by the error of a call with a CMK that no provider could have.
var ErrBadCMK = errors.New("no such kind of CMK")

// ProviderError is a failed call to a provider.
type ProviderError struct {
	Outcome   Outcome
	Op        string // "wrap", "unwrap", "current version"
	CMK       string
	RequestID string // empty if the service gave none
	Err       error
}

func (e *ProviderError) Error() string {
	id := e.RequestID
	if id == "" {
		id = "none"
	}
	return fmt.Sprintf("KMS: %s under key %s: %s (%v; request id %s)", e.Op, e.CMK, e.Outcome, e.Err, id)
}

func (e *ProviderError) Unwrap() error { return e.Err }

// outcomeOf is Unreachable for a call that ran out of time before it was answered.
func outcomeOf(err error) (Outcome, string) {
	var pe *ProviderError
	if errors.As(err, &pe) {
		return pe.Outcome, pe.RequestID
	}
	if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) {
		return Unreachable, ""
	}
	return Unknown, ""
}
