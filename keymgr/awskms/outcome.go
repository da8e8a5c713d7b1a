package awskms

import (
	"context"
	"errors"
	"fmt"
	"net/http"

	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	"github.com/aws/aws-sdk-go-v2/service/kms/types"
	"github.com/aws/smithy-go"

	"github.com/holdfastdb/holdfast/keymgr"
)

// outcomes are AWS KMS's errors by their codes, from its API reference: Encrypt, Decrypt, DescribeKey
// ("Errors") and "Common Error Types". A code that is not here says nothing of the key,
// such as InvalidCiphertextException, IncorrectKeyException, ValidationException, and those about
// our credentials: ExpiredTokenException, UnrecognizedClientException, InvalidSignatureException.
var outcomes = map[string]keymgr.Outcome{
	"AccessDeniedException": keymgr.Denied,
	"DisabledException":     keymgr.Denied,
	"NotFoundException":     keymgr.Denied, // deleted, and the waiting period is over

	"KeyUnavailableException":    keymgr.Unreachable,
	"DependencyTimeoutException": keymgr.Unreachable,
	"KMSInternalException":       keymgr.Unreachable,
	"InternalFailure":            keymgr.Unreachable,
	"ServiceUnavailable":         keymgr.Unreachable,
	"ThrottlingException":        keymgr.Unreachable,
	"LimitExceededException":     keymgr.Unreachable,
}

// invalidState covers deletion that is pending as well as a custom key store's every
// failure: only the key's state tells which.
const invalidState = "KMSInvalidStateException"

// states are the states of a key for which it was refused, from the "Key states of AWS KMS
// keys" of the developer guide.
var states = map[types.KeyState]keymgr.Outcome{
	types.KeyStateDisabled:               keymgr.Denied,
	types.KeyStatePendingDeletion:        keymgr.Denied,
	types.KeyStatePendingReplicaDeletion: keymgr.Denied,
	types.KeyStatePendingImport:          keymgr.Denied, // imported material that was deleted or ran out
	types.KeyStateUnavailable:            keymgr.Unreachable,
	types.KeyStateCreating:               keymgr.Unreachable,
	types.KeyStateUpdating:               keymgr.Unreachable,
}

// classify says what a failed call means. Only an answer that AWS gave a request id to can
// deny: an answer without one is a proxy's.
func classify(err error) keymgr.Outcome {
	var op, inner *smithy.OperationError
	if errors.As(err, &op) && errors.As(op.Err, &inner) {
		return keymgr.Unknown // STS or another that gives out credentials refused, not the KMS
	}
	var answer *awshttp.ResponseError
	if !errors.As(err, &answer) || answer.HTTPStatusCode() == 0 {
		return keymgr.Unreachable
	}
	var api smithy.APIError
	if errors.As(err, &api) && answer.RequestID != "" {
		if outcome, ok := outcomes[api.ErrorCode()]; ok {
			return outcome
		}
	}
	if code := answer.HTTPStatusCode(); code >= http.StatusInternalServerError || code == http.StatusTooManyRequests {
		return keymgr.Unreachable
	}
	return keymgr.Unknown
}

func requestIDOf(err error) []string {
	var answer *awshttp.ResponseError
	if errors.As(err, &answer) && answer.RequestID != "" {
		return []string{answer.RequestID}
	}
	return nil
}

// refused is the error of a failed Encrypt or Decrypt.
func (p *Provider) refused(ctx context.Context, c *call, err error) error {
	c.ids = append(c.ids, requestIDOf(err)...)
	var api smithy.APIError
	if !errors.As(err, &api) || api.ErrorCode() != invalidState || len(requestIDOf(err)) == 0 {
		return c.fail(classify(err), err)
	}
	meta, describeErr := p.describe(ctx, c)
	if describeErr != nil {
		return c.fail(keymgr.Unknown, fmt.Errorf("%w; and the key's state cannot be learned (kms:DescribeKey): %w", err, describeErr))
	}
	return c.fail(states[meta.KeyState], fmt.Errorf("%w; the key's state is %s", err, meta.KeyState))
}
