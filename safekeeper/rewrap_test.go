package safekeeper

import (
	"bytes"
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/rpc"
)

var errNoAnswer = errors.New("test: no answer of all three")

// uses is what all nodes need, by version of the KEK; it fails unless all answer.
func (c *cluster) uses() (map[uint32]int64, error) {
	uses := make(map[uint32]int64)
	for id := range c.peers {
		n := c.nodes[id]
		if n == nil {
			return nil, errNoAnswer
		}
		r, err := n.srv.KeyUse(c.ctx(), &pb.KeyUseRequest{Project: project, Branch: branch})
		if err != nil {
			return nil, err
		}
		for _, u := range r.Uses {
			uses[u.KekVersion] += u.Deks
		}
	}
	return uses, nil
}

// waitUnused waits until no node needs a version.
func (c *cluster) waitUnused(version uint32) {
	c.t.Helper()
	var uses map[uint32]int64
	var err error
	for range 1000 {
		if uses, err = c.uses(); err == nil && uses[version] == 0 && uses[0] == 0 {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	c.t.Fatalf("version %d is still used: %v, %v", version, uses, err)
}

// rewrap asks the leader, whoever it is.
func (c *cluster) rewrap() *pb.RewrapBranchResponse {
	c.t.Helper()
	var err error
	for range 500 {
		var r *pb.RewrapBranchResponse
		r, err = c.nodes[c.leader(branch)].srv.RewrapBranch(c.ctx(), &pb.RewrapBranchRequest{Project: project, Branch: branch})
		if err == nil {
			return r
		}
		if status.Code(err) != codes.Unavailable {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	c.t.Fatalf("RewrapBranch: %v", err)
	return nil
}

func TestRewrap(t *testing.T) {
	t.Parallel()
	c, _, a, w := begin(t, true)
	lead := c.leader(branch)
	_, err := c.nodes[lead%3+1].srv.RewrapBranch(c.ctx(), &pb.RewrapBranchRequest{Project: project, Branch: branch})
	if rpc.Reason(err) != pb.ErrorDetail_NOT_LEADER || rpc.Detail(err).GetLeader() != c.peers[lead] {
		t.Errorf("a follower answers %v", err)
	}
	if _, err := c.nodes[lead].srv.RewrapBranch(c.ctx(), &pb.RewrapBranchRequest{Project: project, Branch: "none"}); status.Code(err) != codes.NotFound {
		t.Errorf("a branch that is not there: %v", err)
	}
	if r := c.rewrap(); r.Rewrapped != 0 || r.KekVersion != 1 || r.BytesWritten != 0 {
		t.Errorf("with nothing to do: %v", r)
	}
	if uses, err := c.uses(); err != nil || uses[1] == 0 {
		t.Errorf("uses: %v, %v; want the DEK of what was appended", uses, err)
	}
	c.ring.RotateKEK()
	c.appendSome(a, w, 20, 300) // the segment goes on
	if r := c.rewrap(); r.Rewrapped == 0 || r.KekVersion != 2 || r.BytesWritten == 0 || r.BytesWritten > 4096 {
		t.Errorf("RewrapBranch: %v", r)
	}
	c.waitUnused(1)
	c.ring.RetireKEK(1)
	c.mustHold(branch, w)
	c.appendSome(a, w, 20, 300)
	c.mustHold(branch, w)
	if uses, err := c.uses(); err != nil || uses[1] != 0 || uses[2] < 2 {
		t.Errorf("uses: %v, %v; want a new DEK of version 2 beside the old ones", uses, err)
	}
	for id := range c.peers {
		c.kill(id, nil)
	}
	c.startAll()
	c.mustHold(branch, w)
	c.appendSome(a, w, 20, 300)
	c.mustHold(branch, w)
}

// TestRewrapOfArchivedWAL: and of a replica that was away, and gets it all by a snapshot.
func TestRewrapOfArchivedWAL(t *testing.T) {
	t.Parallel()
	c, _, a, w := begin(t, false)
	late := c.leader(branch)%3 + 1
	for range 6 {
		c.appendSome(a, w, 300, 1000)
	}
	keys := c.waitArchived(1)
	before := make(map[string][]byte)
	for _, key := range keys {
		before[key], _, _ = c.blob.Get(c.ctx(), key)
	}
	c.stop(late)
	c.ring.RotateKEK()
	if r := c.rewrap(); r.Rewrapped == 0 {
		t.Errorf("RewrapBranch: %v", r)
	}
	for key, data := range before {
		if now, _, err := c.blob.Get(c.ctx(), key); err != nil || !bytes.Equal(now, data) {
			t.Errorf("archived object %s was changed by a re-wrap, or is gone: %v", key, err)
		}
	}
	if _, err := c.uses(); err == nil {
		t.Error("with a replica away, what is used is said to be known")
	}
	g, _ := c.nodes[c.leader(branch)].srv.groupOf(nameOf(branch))
	last := g.Status().Applied
	for i := 0; ; i++ { // until the command itself is in a snapshot only
		if first, err := g.Store().FirstIndex(); err == nil && first > last {
			break
		}
		if i == 100 {
			t.Fatal("the log is not shortened")
		}
		c.appendSome(a, w, 100, 1000)
		time.Sleep(10 * time.Millisecond)
	}
	c.start(late)
	c.waitUnused(1)
	c.ring.RetireKEK(1)
	c.mustHold(branch, w)
	for id := range c.peers {
		c.stop(id)
	}
	c.startAll()
	c.mustHold(branch, w)
}

// TestRewrapIsInterrupted: the leader dies with a command on its way, which may then be in the log or not.
func TestRewrapIsInterrupted(t *testing.T) {
	t.Parallel()
	c, _, a, w := begin(t, true)
	for round := range 4 {
		version := c.ring.RotateKEK()
		lead := c.leader(branch)
		srv := c.nodes[lead].srv
		done := make(chan error, 1)
		go func() {
			ctx, cancel := context.WithTimeout(context.Background(), time.Duration(round)*3*time.Millisecond)
			defer cancel()
			_, err := srv.RewrapBranch(ctx, &pb.RewrapBranchRequest{Project: project, Branch: branch})
			done <- err
		}()
		if round%2 == 1 {
			c.kill(lead, nil)
		}
		t.Logf("round %d: %v", round, <-done)
		c.appendSome(a, w, 20, 300)
		if round%2 == 1 {
			c.start(lead)
		}
		c.rewrap()
		c.waitUnused(version - 1)
		c.ring.RetireKEK(version - 1)
		c.mustHold(branch, w)
	}
}

// TestRotationsUnderLoad retires each version as soon as no replica says that it needs it, while WAL is
// appended, leaders change and replicas restart: whatever is not counted cannot be read any more.
func TestRotationsUnderLoad(t *testing.T) {
	t.Parallel()
	c, cl, a, w := begin(t, true)
	var appending sync.WaitGroup
	ctx, cancel := context.WithCancel(c.ctx())
	appending.Go(func() {
		for ctx.Err() == nil {
			for range 50 {
				begin, wal := w.record(300)
				if err := a.Send(begin, wal, false); err != nil {
					t.Errorf("Send: %v", err)
					return
				}
			}
			if err := a.Wait(c.ctx(), w.at); err != nil {
				t.Errorf("Wait: %v", err)
				return
			}
		}
	})
	for version := uint32(1); version < 8; version++ {
		c.ring.RotateKEK()
		switch version {
		case 3:
			c.kill(c.leader(branch), nil)
		case 5:
			for id := range c.peers {
				if c.nodes[id] == nil {
					c.start(id)
				}
			}
		}
		c.rewrap()
		if version == 3 || version == 4 {
			continue // a replica is away: what it needs is not known
		}
		c.waitUnused(version)
		for v := uint32(1); v <= version; v++ {
			c.ring.RetireKEK(v)
		}
	}
	cancel()
	appending.Wait()
	c.mustHold(branch, w)
	_ = cl
}
