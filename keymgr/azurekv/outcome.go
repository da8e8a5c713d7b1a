package azurekv

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/runtime"
	"github.com/Azure/azure-sdk-for-go/sdk/azidentity"

	"github.com/holdfastdb/holdfast/keymgr"
)

// requestIDHeader is set in every answer of a vault.
const requestIDHeader = "X-Ms-Request-Id"

// notOfTheKey are inner codes of 403 Forbidden that speak of where the call came from, not of
// the key ("Azure Key Vault REST API error codes").
var notOfTheKey = map[string]bool{"ForbiddenByFirewall": true, "ForbiddenByConnection": true}

// vaultError is the body of a vault's refusal.
type vaultError struct {
	Error struct {
		Code       string
		Message    string
		InnerError struct{ Code string }
	}
}

// refused is the error of a failed call. Only a vault denies, and its answers have a request
// id and a body that says so.
func (c *call) refused(err error) error {
	var login *azidentity.AuthenticationFailedError
	var answer *azcore.ResponseError
	switch {
	case errors.As(err, &login) && login.RawResponse != nil:
		return c.fail(keymgr.Unknown, err) // who gives out credentials refused, not the vault
	case !errors.As(err, &answer) || answer.RawResponse == nil:
		return c.fail(keymgr.Unreachable, err)
	}
	var body vaultError
	payload, readErr := runtime.Payload(answer.RawResponse)
	if readErr == nil {
		readErr = json.Unmarshal(payload, &body)
	}
	isVault := readErr == nil && body.Error.Code != "" && answer.RawResponse.Header.Get(requestIDHeader) != ""
	inner := body.Error.InnerError.Code
	said := fmt.Errorf("status %d, code %.80q, inner code %.80q: %.300q", answer.StatusCode, body.Error.Code, inner, body.Error.Message)
	switch status := answer.StatusCode; {
	case status == http.StatusForbidden && isVault && body.Error.Code == "Forbidden" && !notOfTheKey[inner],
		status == http.StatusNotFound && isVault && body.Error.Code == "KeyNotFound":
		return c.fail(keymgr.Denied, said)
	case status >= 500, status == http.StatusTooManyRequests, status == http.StatusRequestTimeout,
		status == http.StatusConflict: // the key is being deleted or recovered
		return c.fail(keymgr.Unreachable, said)
	}
	return c.fail(keymgr.Unknown, said)
}
