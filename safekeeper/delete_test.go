package safekeeper

import (
	"errors"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/pg"
)

// What is deleted stays so over a restart of all, whatever of it the logs still hold; a branch of the name made
// anew is empty.
func TestADeletedBranchIsGone(t *testing.T) {
	t.Parallel()
	c, cl, a, w := begin(t, true)
	c.appendSome(a, w, 5, 20000)
	for range 2 { // as if the first answer was lost
		if err := cl.DeleteBranch(c.ctx()); err != nil {
			t.Fatal(err)
		}
	}
	for ctx := c.ctx(); c.ring.Waiting(project) > 0; { // a lease that somebody waits for is renewed for ever
		if ctx.Err() != nil {
			t.Fatal("the deleted branch's writer holds its lease")
		}
		time.Sleep(time.Millisecond)
	}
	if err := cl.ReportDurable(c.ctx(), startLSN); status.Code(errors.Unwrap(err)) != codes.NotFound {
		t.Errorf("ReportDurable on a deleted branch: %v, want NotFound", err)
	}
	for id := range c.peers {
		c.kill(id, nil)
	}
	c.startAll()
	if _, err := cl.OpenEpoch(c.ctx(), "n"); status.Code(errors.Unwrap(err)) != codes.NotFound {
		t.Errorf("OpenEpoch after a restart: %v, want NotFound", err)
	}
	if _, b := c.open(c.client(branch)); b == nil {
		t.Fatal("the branch cannot be made anew")
	} else {
		fresh := newWAL(startLSN)
		c.appendSome(b, fresh, 10, 300)
		c.mustHold(branch, fresh)
	}
}

// A reader that follows a branch is told of its end.
func TestReadersOfADeletedBranchEnd(t *testing.T) {
	t.Parallel()
	c, cl, _, w := begin(t, true)
	seen := make(chan struct{}, 1)
	ended := make(chan error, 1)
	go func() {
		ended <- cl.Follow(c.ctx(), startLSN, func(_ []*pb.SealedWAL, committed pg.LSN) error {
			if committed == w.at {
				select {
				case seen <- struct{}{}:
				default:
				}
			}
			return nil
		})
	}()
	<-seen
	if err := c.client(branch).DeleteBranch(c.ctx()); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; status.Code(errors.Unwrap(err)) != codes.NotFound {
		t.Errorf("Follow: %v, want NotFound", err)
	}
}

// An archive that nobody refers to any more would stay for ever.
func TestADeletedBranchsArchiveGoes(t *testing.T) {
	t.Parallel()
	c, cl, a, w := begin(t, false)
	for range 8 {
		c.appendSome(a, w, 300, 1000)
	}
	c.waitArchived(1)
	if err := cl.DeleteBranch(c.ctx()); err != nil {
		t.Fatal(err)
	}
	c.waitArchived(-1)
}
