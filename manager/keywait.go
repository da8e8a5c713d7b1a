package manager

import (
	"context"
	"time"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/keyloss"
)

// ExitKey is the exit status of a compute that ended, or did not start, since a key cannot be used. It
// is started again when the key can be, and not before.
const ExitKey = 5

// States of an endpoint that waits for its key.
const (
	stateKeyRevoked     = "key revoked"
	stateKeyUnreachable = "key unreachable"
)

// Bounds of the wait for a key. A question costs the KMS a call at most as often as the key manager
// allows.
const (
	askKeyEvery  = 500 * time.Millisecond
	askKeyTime   = 5 * time.Second        // for one answer
	keyBackoff   = 250 * time.Millisecond // between starts that fail for a key that can be used
	maxKeyPause  = 2 * time.Second
	keyFailsFast = 5 * time.Second
)

// keyWaiter is how a supervisor waits for the key of its endpoint.
type keyWaiter struct {
	ask    func(context.Context) (*pb.KeyStatusResponse, error) // nil: there is nobody to ask, and no wait
	refuse *refuser
	pause  time.Duration // before the next start, when those before failed at once
}

// keyState is the endpoint's state while its key's is st.
func keyState(st *pb.KeyStatusResponse) string {
	if st.GetState() == keyloss.Revoked {
		return stateKeyRevoked
	}
	return stateKeyUnreachable
}

// waitForKey waits until the key can be used, and answers clients meanwhile. Of an agent that ended
// for a key that can be used, it waits longer and longer: another node may lack it still.
func (s *supervisor) waitForKey(ctx context.Context, lived time.Duration) {
	w := &s.child.key
	if lived > keyFailsFast {
		w.pause = 0
	}
	told := ""
	for first := true; ; first = false {
		st := s.askKey(ctx)
		if ctx.Err() != nil {
			return
		}
		notice := keyloss.Of(s.doc.Project, st)
		w.refuse.open(notice)
		if keyloss.Usable(st.State) {
			s.set(stateStarting, "")
			if first { // nothing changed since the agent ended
				w.pause = min(max(2*w.pause, keyBackoff), maxKeyPause)
			}
			sleep(ctx, w.pause)
			return
		}
		w.pause = 0
		if words := notice.String(); words != told {
			told = words
			s.log.Error("the endpoint waits for its key", "state", st.State, "controlled_by", keyloss.Controller(st))
			s.child.tell("endpoint " + s.doc.Name + " waits: " + words)
			s.set(keyState(st), words)
		}
		sleep(ctx, askKeyEvery)
	}
}

// askKey asks for the key's state. No answer is one, too: without a key manager nothing runs.
func (s *supervisor) askKey(ctx context.Context) *pb.KeyStatusResponse {
	ctx, cancel := context.WithTimeout(ctx, askKeyTime)
	defer cancel()
	st, err := s.child.key.ask(ctx)
	if err != nil {
		return &pb.KeyStatusResponse{State: keyloss.Unreachable, ControlledBy: "its KMS, behind the key manager"}
	}
	return st
}

func sleep(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}

// Waits says for which key the first endpoint waits; empty if it does not.
func (m *Manager) Waits() string {
	s, err := m.find(firstEndpoint)
	if err != nil {
		return ""
	}
	switch st := s.status(); st.State {
	case stateKeyRevoked, stateKeyUnreachable:
		return st.Error
	}
	return ""
}
