package manager

import (
	"context"
	"errors"
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
	askKeyFirst  = 500 * time.Millisecond // for the first, for which clients wait too
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
	if st.GetState() == pb.KeyRevoked {
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
		limit := askKeyTime
		if first {
			limit = askKeyFirst
		}
		st := s.askKey(ctx, limit)
		if ctx.Err() != nil {
			return
		}
		words := s.showWait(st)
		if pb.KeyUsable(st.State) {
			s.set(stateStarting, "")
			if first { // nothing changed since the agent ended
				w.pause = min(max(2*w.pause, keyBackoff), maxKeyPause)
			}
			sleep(ctx, w.pause)
			return
		}
		w.pause = 0
		if words != told {
			told = words
			s.log.Error("the endpoint waits for its key", "state", st.State, "controlled_by", keyloss.Controller(st))
			s.child.tell("endpoint " + s.doc.Name + " waits: " + words)
		}
		sleep(ctx, askKeyEvery)
	}
}

// showWait shows clients, and who asks for the endpoint's state, what the key manager said of the key.
func (s *supervisor) showWait(st *pb.KeyStatusResponse) (words string) {
	notice := keyloss.Of(s.doc.Project, st)
	words = notice.String()
	if !pb.KeyUsable(st.State) {
		s.set(keyState(st), words)
	}
	s.child.key.refuse.open(notice)
	return words
}

// keyPatience is for how long who asks for a start is kept waiting for a key: one that was enabled a
// moment ago may not be known to be.
const keyPatience = 3 * time.Second

// waitAWhile is waitReady for a user who is waiting for the answer.
func (s *supervisor) waitAWhile(ctx context.Context) error {
	began := time.Now()
	for {
		err := s.waitReady(ctx, false)
		if !errors.Is(err, errWaitsForKey) || time.Since(began) > keyPatience {
			return err
		}
		sleep(ctx, askKeyEvery/5)
	}
}

// askKey asks for the key's state. No answer is one, too: without a key manager nothing runs.
func (s *supervisor) askKey(ctx context.Context, limit time.Duration) *pb.KeyStatusResponse {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	st, err := s.child.key.ask(ctx)
	if err != nil {
		return &pb.KeyStatusResponse{State: pb.KeyUnreachable, ControlledBy: "its KMS, behind the key manager"}
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

// leaseAgain takes this process's own lease again, if it may need one: a key is not back, for who looks at
// its state, while a node that lost its lease has none.
func (m *Manager) leaseAgain(doc endpointDoc) {
	ctx, cancel := context.WithTimeout(context.Background(), askKeyTime)
	defer cancel()
	if _, err := m.openPassword(ctx, doc.Project, doc.Branch); err != nil {
		m.cfg.Log.Info("the key is not used by the manager for now", "endpoint", doc.Name, "error", err)
	}
}
