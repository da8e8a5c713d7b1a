package timeline

import (
	"context"
	"errors"
	"time"

	"github.com/holdfastdb/holdfast/internal/blob"
	"github.com/holdfastdb/holdfast/internal/keyring"
)

// backoff waits longer and longer between tries, and logs the first failure of a series.
type backoff struct {
	cfg  *Config
	next time.Duration
}

func (c *Config) backoff() backoff { return backoff{cfg: c, next: c.retryMin} }

// sleep waits before another try after err; false: ctx ended.
func (b *backoff) sleep(ctx context.Context, err error) bool {
	if b.next == b.cfg.retryMin && ctx.Err() == nil {
		b.cfg.Log.Warn("a call failed and is tried again until it works", "error", err)
	}
	timer := time.NewTimer(b.next)
	defer timer.Stop()
	b.next = min(2*b.next, b.cfg.retryMax)
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return true
	}
}

// temporary tells whether the same call may work later.
func temporary(err error) bool {
	switch {
	case errors.Is(err, blob.ErrNotFound), errors.Is(err, blob.ErrExists), errors.Is(err, blob.ErrPrecondition),
		errors.Is(err, keyring.ErrRevoked), errors.Is(err, ErrSuperseded), errors.Is(err, ErrClosed),
		errors.Is(err, errWiped):
		return false
	}
	return true
}
