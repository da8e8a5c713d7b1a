// Package walclient is how the other roles reach the safekeepers: it finds the leader of a
// branch, tries again through failovers, and sends again what is not known to be committed.
// The safekeepers make that safe: an append is idempotent (W3) and of a fenced epoch it is
// refused (W2).
package walclient

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/internal/rpc"
)

// Errors on which callers branch. They are wrapped: use errors.Is.
var (
	// ErrFenced means that a higher epoch was opened: this one is over for good.
	ErrFenced = errors.New("fenced by a higher epoch")
	// ErrTruncated means that WAL from the position asked for is held no longer: it is in layers.
	ErrTruncated = errors.New("the WAL asked for is held no longer")
	// ErrClosed is the answer of an Appender or a Client that was closed.
	ErrClosed = errors.New("closed")
)

const (
	attemptTimeout = 5 * time.Second // one call to one safekeeper
	minBackoff     = 5 * time.Millisecond
	maxBackoff     = 250 * time.Millisecond
)

// Client talks to the safekeepers about one branch. It is safe for concurrent use.
type Client struct {
	project, branch string
	addrs           []string
	log             *slog.Logger
	ctx             context.Context // ends with Close
	cancel          context.CancelFunc

	mu struct {
		sync.Mutex
		conns map[string]*grpc.ClientConn
		at    int    // of addrs: which to try when no leader is known
		lead  string // the leader, as far as known
	}
}

// New makes a client of one branch. It connects when it has something to ask.
func New(project, branch string, addrs []string, log *slog.Logger) (*Client, error) {
	if len(addrs) == 0 {
		return nil, fmt.Errorf("branch %s/%s: no safekeepers are configured", project, branch)
	}
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	c := &Client{project: project, branch: branch, addrs: addrs, log: log}
	c.ctx, c.cancel = context.WithCancel(context.Background())
	c.mu.conns = map[string]*grpc.ClientConn{}
	for _, a := range addrs {
		if _, err := c.conn(a); err != nil {
			c.Close()
			return nil, err
		}
	}
	return c, nil
}

// Close ends everything the client is doing.
func (c *Client) Close() error {
	c.cancel()
	c.mu.Lock()
	defer c.mu.Unlock()
	var errs []error
	for _, conn := range c.mu.conns {
		errs = append(errs, conn.Close())
	}
	c.mu.conns = nil
	return errors.Join(errs...)
}

func (c *Client) conn(addr string) (*grpc.ClientConn, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.mu.conns == nil {
		return nil, ErrClosed
	}
	if conn := c.mu.conns[addr]; conn != nil {
		return conn, nil
	}
	conn, err := rpc.Dial(addr)
	if err != nil {
		return nil, err
	}
	c.mu.conns[addr] = conn
	return conn, nil
}

// target is the safekeeper to ask next.
func (c *Client) target() (string, pb.SafekeeperClient, error) {
	c.mu.Lock()
	addr := c.mu.lead
	if addr == "" {
		addr = c.addrs[c.mu.at%len(c.addrs)]
	}
	c.mu.Unlock()
	conn, err := c.conn(addr)
	if err != nil {
		return addr, nil, err
	}
	return addr, pb.NewSafekeeperClient(conn), nil
}

// learn takes from the answer of addr where to go next: to the leader it names, or on.
func (c *Client) learn(addr string, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	lead := ""
	if err == nil {
		lead = addr
	} else if d := rpc.Detail(err); d.GetReason() == pb.ErrorDetail_NOT_LEADER && d.GetLeader() != addr {
		lead = d.GetLeader()
	}
	if c.mu.lead == addr || lead != "" {
		c.mu.lead = lead
	}
	if c.mu.lead == "" {
		c.mu.at++
	}
}

// final tells whether trying again cannot help.
func final(err error) bool {
	switch status.Code(err) {
	case codes.InvalidArgument, codes.NotFound, codes.AlreadyExists, codes.FailedPrecondition, codes.Unimplemented:
		return rpc.Reason(err) != pb.ErrorDetail_NOT_LEADER
	}
	return errors.Is(err, ErrClosed)
}

type backoff struct{ next time.Duration }

func (b *backoff) wait(ctx context.Context) error {
	b.next = min(max(b.next*2, minBackoff), maxBackoff)
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(b.next):
		return nil
	}
}

// call makes one call at the leader, until it is answered, or can never be.
func (c *Client) call(ctx context.Context, what string, fn func(context.Context, pb.SafekeeperClient) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(c.ctx, cancel)()
	var pause backoff
	for {
		addr, client, err := c.target()
		if err == nil {
			attempt, cancel := context.WithTimeout(ctx, attemptTimeout)
			err = fn(attempt, client)
			cancel()
		}
		c.learn(addr, err)
		switch {
		case err == nil:
			return nil
		case c.ctx.Err() != nil:
			err = ErrClosed
		case ctx.Err() == nil && !final(err):
			last := err
			if err = pause.wait(ctx); err == nil {
				continue
			}
			err = fmt.Errorf("%w; the last answer was: %v", err, last)
		}
		return fmt.Errorf("%s, branch %s/%s: %w", what, c.project, c.branch, err)
	}
}

// CreateBranch starts the branch's log at start. It may be called again with the same start.
func (c *Client) CreateBranch(ctx context.Context, start pg.LSN) error {
	return c.call(ctx, "creating the log", func(ctx context.Context, sk pb.SafekeeperClient) error {
		_, err := sk.CreateBranch(ctx, &pb.CreateBranchRequest{Project: c.project, Branch: c.branch, StartLsn: uint64(start)})
		return err
	})
}

// DeleteBranch makes the safekeepers forget the branch. It may be called again.
func (c *Client) DeleteBranch(ctx context.Context) error {
	return c.call(ctx, "deleting the log", func(ctx context.Context, sk pb.SafekeeperClient) error {
		_, err := sk.DeleteBranch(ctx, &pb.DeleteBranchRequest{Project: c.project, Branch: c.branch})
		return err
	})
}

// Epoch is the right to append, until a higher one is opened.
type Epoch struct {
	Number uint64
	Start  pg.LSN // where the branch's log begins
	End    pg.LSN // where it ends, with all that older epochs could commit
}

// OpenEpoch fences all lower epochs. If its answer is lost it opens another: one call may use up several.
func (c *Client) OpenEpoch(ctx context.Context, node string) (Epoch, error) {
	var e Epoch
	err := c.call(ctx, "opening an epoch", func(ctx context.Context, sk pb.SafekeeperClient) error {
		r, err := sk.OpenEpoch(ctx, &pb.OpenEpochRequest{Project: c.project, Branch: c.branch, Node: node})
		e = Epoch{Number: r.GetEpoch(), Start: pg.LSN(r.GetStartLsn()), End: pg.LSN(r.GetEndLsn())}
		return err
	})
	return e, err
}

// ReportDurable tells the safekeepers that WAL below lsn is in layers in the bucket.
func (c *Client) ReportDurable(ctx context.Context, lsn pg.LSN) error {
	return c.call(ctx, "reporting durable WAL", func(ctx context.Context, sk pb.SafekeeperClient) error {
		_, err := sk.ReportDurable(ctx, &pb.ReportDurableRequest{Project: c.project, Branch: c.branch, Lsn: uint64(lsn)})
		return err
	})
}
