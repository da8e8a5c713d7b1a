package gcpkms

import (
	"context"
	"errors"
	"fmt"

	"cloud.google.com/go/kms/apiv1/kmspb"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/holdfastdb/holdfast/keymgr"
)

// refusal is an error of a call, and whether Google's service is who gave it.
type refusal struct {
	err      error
	isAnswer bool
}

func (r *refusal) Error() string { return r.err.Error() }
func (r *refusal) Unwrap() error { return r.err }

// outcomes are gRPC's codes as Google's APIs use them ("Errors" of the Google Cloud API design
// guide). FailedPrecondition is not here: only the version's state tells what it means. Other
// codes say nothing of the key, such as InvalidArgument (a ciphertext that does not open) and
// Unauthenticated (our credentials).
var outcomes = map[codes.Code]keymgr.Outcome{
	codes.PermissionDenied: keymgr.Denied,
	codes.NotFound:         keymgr.Denied,

	codes.Unavailable:       keymgr.Unreachable,
	codes.DeadlineExceeded:  keymgr.Unreachable,
	codes.Canceled:          keymgr.Unreachable,
	codes.ResourceExhausted: keymgr.Unreachable,
	codes.Internal:          keymgr.Unreachable,
	codes.Aborted:           keymgr.Unreachable,
}

// notOfTheKey are reasons (google.api.ErrorReason) to deny permission that lie in how the
// caller's project is set up.
var notOfTheKey = map[string]bool{"SERVICE_DISABLED": true, "BILLING_DISABLED": true, "CONSUMER_INVALID": true, "USER_PROJECT_DENIED": true,
	"API_KEY_INVALID": true, "ACCESS_TOKEN_SCOPE_INSUFFICIENT": true, "RATE_LIMIT_EXCEEDED": true}

func classify(err error) keymgr.Outcome {
	st, _ := status.FromError(err)
	outcome := outcomes[st.Code()]
	if outcome != keymgr.Denied {
		return outcome
	}
	var r *refusal
	if !errors.As(err, &r) || !r.isAnswer {
		return keymgr.Unknown
	}
	for _, d := range st.Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok && notOfTheKey[info.Reason] {
			return keymgr.Unknown
		}
	}
	return keymgr.Denied
}

// states are the states of a version for which it was refused ("Key states" of Cloud KMS).
var states = map[kmspb.CryptoKeyVersion_CryptoKeyVersionState]keymgr.Outcome{
	kmspb.CryptoKeyVersion_DISABLED:                     keymgr.Denied,
	kmspb.CryptoKeyVersion_DESTROY_SCHEDULED:            keymgr.Denied,
	kmspb.CryptoKeyVersion_DESTROYED:                    keymgr.Denied,
	kmspb.CryptoKeyVersion_PENDING_EXTERNAL_DESTRUCTION: keymgr.Denied,
	kmspb.CryptoKeyVersion_PENDING_GENERATION:           keymgr.Unreachable,
	kmspb.CryptoKeyVersion_PENDING_IMPORT:               keymgr.Unreachable,
}

// refused is the error of a failed Encrypt, whose version is empty, or Decrypt.
func (p *Provider) refused(ctx context.Context, c *call, version string, err error) error {
	if status.Code(err) != codes.FailedPrecondition {
		return c.fail(classify(err), err)
	}
	state, stateErr := p.state(ctx, c, version)
	if stateErr != nil {
		return c.fail(keymgr.Unknown, fmt.Errorf("%w; and the version's state cannot be learned (roles/cloudkms.viewer): %w", err, stateErr))
	}
	return c.fail(states[state], fmt.Errorf("%w; the version's state is %v", err, state))
}

func (p *Provider) state(ctx context.Context, c *call, version string) (kmspb.CryptoKeyVersion_CryptoKeyVersionState, error) {
	if version == "" {
		k, err := ask(ctx, c, p.client.GetCryptoKey, &kmspb.GetCryptoKeyRequest{Name: c.cmk})
		return k.GetPrimary().GetState(), err
	}
	v, err := ask(ctx, c, p.client.GetCryptoKeyVersion, &kmspb.GetCryptoKeyVersionRequest{Name: c.cmk + "/cryptoKeyVersions/" + version})
	return v.GetState(), err
}
