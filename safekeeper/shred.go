package safekeeper

import (
	"context"
	"fmt"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/holdfastdb/holdfast/safekeeper/group"
	"github.com/holdfastdb/holdfast/safekeeper/walstate"
)

// A safekeeper's disk, its Raft log and what it gives to readers is ciphertext, which goes on without a
// key. In plaintext it holds what a leader was sent and has not sealed yet.

// errShut is the answer to an append that waited when the lease ended.
var errShut = status.Error(codes.Unavailable, "the lease on the branch's key has ended")

func newWriter(s *Server, g *group.Group, lead *group.Leadership, n walstate.Name, no uint32) *writer {
	w := &writer{s: s, g: g, lead: lead, name: n, no: no, noShred: func() {}}
	w.shut.waits, w.shut.cut = context.WithCancel(context.Background())
	return w
}

// waits ends when the lease is over.
func (w *writer) waits() context.Context {
	w.shut.Lock()
	defer w.shut.Unlock()
	return w.shut.waits
}

// cut ends all waits with WAL in hand.
func (w *writer) cut() {
	w.shut.Lock()
	defer w.shut.Unlock()
	w.shut.cut()
	w.shut.waits, w.shut.cut = context.WithCancel(context.Background())
}

// noLeaseTimeout bounds how long plaintext waits for a key while there is no lease: who asks for one
// meanwhile asks on, and the append, which comes again, finds it.
const noLeaseTimeout = 2 * time.Second

// bounded bounds the wait for a key.
func (w *writer) bounded(ctx context.Context) (context.Context, context.CancelFunc) {
	limit := keyTimeout
	if w.s.cfg.Ring.Live(w.name.Project, w.name.Branch) != nil {
		limit = noLeaseTimeout
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	stop := context.AfterFunc(w.waits(), cancel)
	return ctx, func() { stop(); cancel() }
}

// shred is what the ring calls when the lease is over (K2). Whoever holds the writer is made to let go.
func (w *writer) shred(error) []string {
	for w.cut(); !w.mu.TryLock(); w.cut() {
		time.Sleep(time.Millisecond) // until a seal or a scan that is under way has ended
	}
	defer w.mu.Unlock()
	w.key = nil
	if w.scanner != nil {
		w.scanner.Wipe()
	}
	return []string{fmt.Sprintf("branch %s: WAL on its way into the log, as leader", w.name.Branch)}
}
