package keymgr

import (
	"bytes"
	"crypto/sha256"
	"fmt"

	"github.com/holdfastdb/holdfast/internal/seal"
)

// A KEK travels to the CMK in a payload that names what it is for, since not every KMS
// binds an EncryptionContext: {1} SHA-256 of the context's AAD (32 bytes) KEK (32 bytes).
const (
	payloadFormat = 1
	payloadSize   = 1 + sha256.Size + seal.KeySize
)

func kekPayload(ec EncryptionContext, raw []byte) []byte {
	sum := sha256.Sum256(ec.AAD())
	b := append(make([]byte, 0, payloadSize), payloadFormat)
	return append(append(b, sum[:]...), raw...)
}

// parsePayload takes the KEK out, if it is for ec.
func parsePayload(ec EncryptionContext, payload []byte) ([]byte, error) {
	if len(payload) != payloadSize || payload[0] != payloadFormat {
		return nil, fmt.Errorf("what the CMK unwrapped has %d bytes and is no KEK of a format that this program reads", len(payload))
	}
	if sum := sha256.Sum256(ec.AAD()); !bytes.Equal(sum[:], payload[1:1+sha256.Size]) {
		return nil, fmt.Errorf("what the CMK unwrapped is not version %d of the KEK of %s: it was moved", ec.KEKVersion, keyID{ec.Project, ec.Branch}.words())
	}
	return payload[1+sha256.Size:], nil
}
