package walclient

import (
	"context"
	"errors"
	"fmt"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/internal/rpc"
)

// maxNotFound is after how many replicas in a row that do not know the branch nobody does:
// one that was away hears of it a moment later.
const maxNotFound = 10

// Follow calls fn with the committed WAL from from on, in order and without gaps, and goes
// on as the log grows. The first chunk may begin below from. committed is how far the log is
// committed; fn is also called with that alone. The chunks are fn's to keep.
//
// It goes from replica to replica as they come and go, and returns only when ctx ends, fn
// returns an error, or the WAL cannot be had any more (ErrTruncated, a branch that does not exist).
func (c *Client) Follow(ctx context.Context, from pg.LSN, fn func(chunks []*pb.SealedWAL, committed pg.LSN) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(c.ctx, cancel)()
	f := follower{c: c, at: from, fn: fn}
	var pause backoff
	notFound := 0
	c.mu.Lock()
	first := c.mu.at
	c.mu.Unlock()
	for i := first; ; i++ {
		progress, err := f.follow(ctx, c.addrs[i%len(c.addrs)])
		if progress {
			pause, notFound = backoff{}, 0
		}
		if status.Code(err) == codes.NotFound {
			notFound++
		}
		switch {
		case f.err != nil:
			return f.err
		case c.ctx.Err() != nil:
			return ErrClosed
		case ctx.Err() != nil:
			return ctx.Err()
		case rpc.Reason(err) == pb.ErrorDetail_TRUNCATED:
			return fmt.Errorf("branch %s/%s: %w: %w", c.project, c.branch, ErrTruncated, err)
		case status.Code(err) == codes.InvalidArgument, notFound >= maxNotFound, errors.Is(err, ErrClosed):
			return fmt.Errorf("reading WAL of branch %s/%s from %s: %w", c.project, c.branch, f.at, err)
		}
		if pause.next == maxBackoff && i%len(c.addrs) == 0 {
			c.log.Warn("no safekeeper gives WAL", "project", c.project, "branch", c.branch, "from", f.at, "err", err)
		}
		if err := pause.wait(ctx); err != nil {
			return err
		}
	}
}

// errReached ends a Follow that has an end.
var errReached = errors.New("reached")

// Read calls fn with the chunks that hold the committed WAL from from to until.
func (c *Client) Read(ctx context.Context, from, until pg.LSN, fn func(*pb.SealedWAL) error) error {
	err := c.Follow(ctx, from, func(chunks []*pb.SealedWAL, _ pg.LSN) error {
		for _, ch := range chunks {
			if err := fn(ch); err != nil {
				return err
			}
			if pg.LSN(ch.GetEndLsn()) >= until {
				return errReached
			}
		}
		return nil
	})
	if err == errReached {
		return nil
	}
	return err
}

// TruncatedAt is where the log begins by what an ErrTruncated says.
func TruncatedAt(err error) pg.LSN { return pg.LSN(rpc.Detail(err).GetBeginLsn()) }

type follower struct {
	c         *Client
	at        pg.LSN // what fn got reaches to here
	committed pg.LSN
	fn        func([]*pb.SealedWAL, pg.LSN) error
	err       error // fn's
}

// follow reads from one replica until it fails.
func (f *follower) follow(ctx context.Context, addr string) (progress bool, err error) {
	conn, err := f.c.conn(addr)
	if err != nil {
		return false, err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := pb.NewSafekeeperClient(conn).Read(ctx, &pb.ReadRequest{Project: f.c.project, Branch: f.c.branch, FromLsn: uint64(f.at)})
	if err != nil {
		return false, err
	}
	for {
		r, err := stream.Recv()
		if err != nil {
			return progress, err
		}
		if err := f.take(r); err != nil {
			return progress, err
		}
		progress = true
	}
}

func (f *follower) take(r *pb.ReadResponse) error {
	chunks := r.GetChunks()
	at := f.at
	for i, ch := range chunks {
		if begin := pg.LSN(ch.GetBeginLsn()); begin > at || i > 0 && begin != at || pg.LSN(ch.GetEndLsn()) <= at {
			return fmt.Errorf("a safekeeper sent WAL %s to %s where %s was to follow", begin, pg.LSN(ch.GetEndLsn()), at)
		}
		at = pg.LSN(ch.GetEndLsn())
	}
	// Replicas learn of commits at different times: the news never goes back.
	f.committed = max(f.committed, pg.LSN(r.GetCommittedLsn()))
	if f.err = f.fn(chunks, f.committed); f.err != nil {
		return f.err
	}
	f.at = at
	return nil
}
