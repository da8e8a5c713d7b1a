package timeline

import (
	"errors"
	"fmt"
	"time"

	"github.com/holdfastdb/holdfast/internal/keyring"
)

// remains is what of a timeline's plaintext was wiped.
type remains struct {
	versions int // of the open layer and those that were being flushed
	blocks   int // of layers, opened
	images   int // of pages that were read often
}

// shredWait bounds how long a shredding waits for calls that are under way, within what the process's
// guard allows (internal/leaseguard). They see that the timeline failed before they give a result.
const shredWait = time.Second

// shred is what the ring calls when the lease is over. It drops all plaintext (K2), and waits for
// those who were working on some: what they hold is dropped, too, when they are gone.
func (t *Timeline) shred(reason error) (dropped []string) {
	wiped := t.revoked(reason)
	dropped = []string{
		fmt.Sprintf("branch %s: %d page versions of the open layer", t.cfg.Branch, wiped.versions),
		fmt.Sprintf("branch %s: %d opened blocks of layers, %d page images", t.cfg.Branch, wiped.blocks, wiped.images)}
	if !t.idle(shredWait) {
		dropped = append(dropped, fmt.Sprintf("branch %s: calls that were under way have not ended within %v; they give no result", t.cfg.Branch, shredWait))
	}
	t.closeFiles()
	return dropped
}

// revoked ends the timeline because its key may not be used.
func (t *Timeline) revoked(reason error) remains {
	if !errors.Is(reason, keyring.ErrRevoked) {
		reason = fmt.Errorf("%w: %w", keyring.ErrRevoked, reason)
	}
	return t.fail(fmt.Errorf("branch %s: %w", t.cfg.Branch, reason))
}

// idle waits until nothing works on the timeline any more.
func (t *Timeline) idle(limit time.Duration) bool {
	done := make(chan struct{})
	go func() { t.wg.Wait(); close(done) }()
	deadline := time.After(limit)
	select {
	case <-done:
	case <-deadline:
		return false
	}
	for {
		t.mu.Lock()
		busy := t.mu.view.refs.Load() > 1 // one is the timeline's own
		t.mu.Unlock()
		if !busy {
			return true
		}
		select {
		case <-time.After(time.Millisecond):
		case <-deadline:
			return false
		}
	}
}
