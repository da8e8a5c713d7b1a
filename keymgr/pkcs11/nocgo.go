//go:build !cgo

package pkcs11

import (
	"errors"

	"github.com/holdfastdb/holdfast/keymgr"
)

// Open says that this program cannot load libraries.
func Open(Config) (keymgr.Provider, error) {
	return nil, errors.New("kms.pkcs11: this program was built without cgo (CGO_ENABLED=0) and cannot load a token's library: build it with a C compiler")
}
