package azurekv

import (
	"encoding/binary"
	"fmt"
	"regexp"
)

// envelope is what Wrap gives out; the package's comment draws it.
type envelope struct {
	version    string
	signature  []byte
	ciphertext []byte
}

const format = 1

func (e envelope) marshal() []byte {
	b := append([]byte{format, byte(len(e.version))}, e.version...)
	b = binary.LittleEndian.AppendUint16(b, uint16(len(e.signature)))
	return append(append(b, e.signature...), e.ciphertext...)
}

// versionForm keeps what is no version out of the URL that is asked.
var versionForm = regexp.MustCompile(`^[A-Za-z0-9]+$`)

func parseEnvelope(b []byte) (envelope, error) {
	bad := func() (envelope, error) {
		return envelope{}, fmt.Errorf("%d bytes that were not wrapped for Azure Key Vault", len(b))
	}
	if len(b) < 2 || b[0] != format {
		return bad()
	}
	version, rest := int(b[1]), b[2:]
	if len(rest) < version+2 || !versionForm.Match(rest[:version]) {
		return bad()
	}
	e := envelope{version: string(rest[:version])}
	signature, rest := int(binary.LittleEndian.Uint16(rest[version:])), rest[version+2:]
	if len(rest) <= signature {
		return bad()
	}
	e.signature, e.ciphertext = rest[:signature], rest[signature:]
	return e, nil
}
