package pageserver

import (
	"context"
	"errors"

	"github.com/holdfastdb/holdfast/internal/auxfile"
	"github.com/holdfastdb/holdfast/internal/keyring"
	"github.com/holdfastdb/holdfast/internal/seal"
)

// openAux gives the value of an aux file in a logical message. Any user may write such a
// message: one that does not open under the project's key is not the compute's, and is passed
// over. When the key cannot be used, nothing is known of the message, and ingest waits.
func (f *follower) openAux(ctx context.Context, sealed []byte) ([]byte, error) {
	value, err := auxfile.Open(ctx, f.b.srv.cfg.Ring.Open, f.b.name.project, f.b.name.branch, sealed)
	switch {
	case err == nil:
		return value, nil
	case errors.Is(err, keyring.ErrRevoked), errors.Is(err, keyring.ErrUnreachable), errors.Is(err, seal.ErrWiped), ctx.Err() != nil:
		return nil, asLookup(err)
	}
	if !f.auxRefused { // once, or users could fill the log; without the error, which may quote what they wrote (K1)
		f.auxRefused = true
		f.b.log.Warn("a logical message claims to carry a file, and does not open under the project's key; this and more of them are passed over")
	}
	return nil, nil
}
