// Package pageclient asks the page server for what a compute has not written itself. It is
// pgfs.Remote over gRPC.
//
// A read(2) of Postgres hangs on every answer, and Postgres makes an error of it that a user
// sees. So a page server that is gone, restarts, or does not serve the branch yet is waited
// for, as long as the caller's context lives; only what trying again cannot help becomes an
// error. Requests are not held back to be gathered: the kernel's read-ahead already asks for
// ranges, and calls share one HTTP/2 connection.
package pageclient

import (
	"context"
	"fmt"
	"log/slog"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/holdfastdb/holdfast/compute/pgfs"
	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/internal/rpc"
)

const (
	maxCount       = 128 // blocks in one GetPages call
	attemptTimeout = 30 * time.Second
	firstBackoff   = 5 * time.Millisecond
	maxBackoff     = 500 * time.Millisecond
	// maxUnclear is how many times in a row an answer that may or may not pass is tried again.
	maxUnclear   = 5
	warnInterval = 10 * time.Second
)

// Client reads one branch from a page server.
type Client struct {
	server   pb.PageServerClient
	project  string
	branch   string
	log      *slog.Logger
	lastWarn atomic.Int64 // when it was last said that the server is waited for; ns since 1970
}

// New makes a Client over a connection, which stays the caller's.
func New(conn grpc.ClientConnInterface, project, branch string, log *slog.Logger) *Client {
	return &Client{server: pb.NewPageServerClient(conn), project: project, branch: branch, log: log}
}

// StartupState waits until the page server has the log up to lsn and gives what a compute
// needs to start exactly there.
func (c *Client) StartupState(ctx context.Context, lsn pg.LSN) (*pb.StartupStateResponse, error) {
	var resp *pb.StartupStateResponse
	err := c.call(ctx, "start-up state", func(ctx context.Context) (err error) {
		resp, err = c.server.StartupState(ctx, &pb.StartupStateRequest{At: c.exactly(lsn)})
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("asking the page server for the start-up state at %v: %w", lsn, err)
	}
	return resp, nil
}

// exactly is for what must be as of one LSN: the state that a start is made from.
func (c *Client) exactly(lsn pg.LSN) *pb.ReadPoint {
	return &pb.ReadPoint{Project: c.project, Branch: c.branch, Lsn: uint64(lsn)}
}

// At is the branch for a compute that started at lsn, in an epoch.
func (c *Client) At(lsn pg.LSN, epoch uint64) *Remote {
	return &Remote{client: c, start: lsn, epoch: epoch}
}

// Remote implements pgfs.Remote.
//
// Folders and status pages are asked for when Postgres first looks at them, which may be long
// after the start, when the start itself is older than the history that is kept. They are
// read as of now: this compute is the branch's only writer, and what it has not looked at yet
// it has not changed, but for status pages whose WAL is a step ahead of them, which then
// take the same change twice, as in recovery.
type Remote struct {
	client *Client
	start  pg.LSN
	epoch  uint64
}

// atLeast is for what only this compute changes. If a later one was started, its changes are
// not to be seen: the page server refuses then (W2).
func (r *Remote) atLeast(lsn pg.LSN) *pb.ReadPoint {
	return &pb.ReadPoint{Project: r.client.project, Branch: r.client.branch, Lsn: uint64(lsn), Latest: true, Epoch: r.epoch}
}

var (
	_ pgfs.Remote = (*Remote)(nil)
	_ pgfs.Past   = (*Remote)(nil)
)

func pagesOf(rel pg.RelTag, at *pb.ReadPoint) *pb.GetPagesRequest {
	return &pb.GetPagesRequest{At: at, Rel: &pb.RelFork{Tablespace: uint32(rel.Tablespace),
		Database: uint32(rel.Database), Relation: uint32(rel.Relation), Fork: uint32(rel.Fork)}}
}

// Pages gives blocks of a relation as of atLeast or later.
func (r *Remote) Pages(ctx context.Context, rel pg.RelTag, block pg.BlockNumber, count int, atLeast pg.LSN) ([]byte, error) {
	pages, err := r.pages(ctx, pagesOf(rel, r.atLeast(atLeast)), uint32(block), count)
	if err != nil {
		return nil, r.lost(ctx, fmt.Errorf("reading relation %v, blocks %d to %d, at %v: %w", rel, block, int(block)+count-1, atLeast, err))
	}
	return pages, nil
}

// PagesAt gives blocks of a relation exactly as of an LSN, for comparison: what goes wrong is
// the caller's to tell, no user's read fails.
func (r *Remote) PagesAt(ctx context.Context, rel pg.RelTag, block pg.BlockNumber, count int, lsn pg.LSN) ([]byte, error) {
	at := r.atLeast(lsn)
	at.Latest = false
	pages, err := r.pages(ctx, pagesOf(rel, at), uint32(block), count)
	if rpc.Reason(err) == pb.ErrorDetail_TRUNCATED {
		err = fmt.Errorf("%w: %w", pgfs.ErrTooOld, err)
	}
	if err != nil {
		return nil, fmt.Errorf("reading relation %v, blocks %d to %d, exactly at %v: %w", rel, block, int(block)+count-1, lsn, err)
	}
	return pages, nil
}

// SLRU gives pages of an SLRU area as of the start or later.
func (r *Remote) SLRU(ctx context.Context, kind pg.SLRUKind, page uint32, count int) ([]byte, error) {
	pages, err := r.pages(ctx, &pb.GetPagesRequest{At: r.atLeast(r.start), Slru: uint32(kind)}, page, count)
	if err != nil {
		return nil, r.lost(ctx, fmt.Errorf("reading %s, pages %d to %d, at %v: %w", kind.Dir(), page, int(page)+count-1, r.start, err))
	}
	return pages, nil
}

func (r *Remote) pages(ctx context.Context, req *pb.GetPagesRequest, block uint32, count int) ([]byte, error) {
	var all []byte
	for count > 0 {
		req.Block, req.Count = block, uint32(min(count, maxCount))
		var resp *pb.GetPagesResponse
		err := r.client.call(ctx, "pages", func(ctx context.Context) (err error) {
			resp, err = r.client.server.GetPages(ctx, req)
			return err
		})
		if err != nil {
			return nil, err
		}
		n := len(resp.Pages) / pg.BlockSize
		switch {
		case len(resp.Pages)%pg.BlockSize != 0 || n > int(req.Count):
			return nil, fmt.Errorf("the page server answered %d bytes when %d blocks were asked for", len(resp.Pages), req.Count)
		case resp.Lsn < req.At.Lsn: // P1: never a page from before
			return nil, fmt.Errorf("the page server answered as of %v", pg.LSN(resp.Lsn))
		case all == nil:
			all = resp.Pages
		default:
			all = append(all, resp.Pages...)
		}
		if n < int(req.Count) {
			break
		}
		block, count = block+uint32(n), count-n
	}
	return all, nil
}

// Relations lists the forks in a database's folder as of the start or later.
func (r *Remote) Relations(ctx context.Context, tablespace, database pg.Oid) ([]pgfs.RelationSize, error) {
	var resp *pb.ListRelationsResponse
	err := r.client.call(ctx, "relations", func(ctx context.Context) (err error) {
		resp, err = r.client.server.ListRelations(ctx, &pb.ListRelationsRequest{At: r.atLeast(r.start),
			Tablespace: uint32(tablespace), Database: uint32(database)})
		return err
	})
	if err != nil {
		return nil, r.lost(ctx, fmt.Errorf("listing the relations of %s at %v: %w", pg.DatabasePath(tablespace, database), r.start, err))
	}
	sizes := make([]pgfs.RelationSize, 0, len(resp.Relations))
	for _, s := range resp.Relations {
		if s.Fork > uint32(pg.InitFork) {
			return nil, fmt.Errorf("listing the relations of %s: the page server names fork %d", pg.DatabasePath(tablespace, database), s.Fork)
		}
		tag := pg.RelTag{RelFileNode: pg.RelFileNode{Tablespace: tablespace, Database: database, Relation: pg.Oid(s.Relation)}, Fork: pg.ForkNumber(s.Fork)}
		sizes = append(sizes, pgfs.RelationSize{Rel: tag, Blocks: pg.BlockNumber(s.Blocks)})
	}
	return sizes, nil
}

// SLRUPages lists the pages of an SLRU area as of the start or later.
func (r *Remote) SLRUPages(ctx context.Context, kind pg.SLRUKind) ([]uint32, error) {
	var resp *pb.ListSLRUResponse
	err := r.client.call(ctx, "status pages", func(ctx context.Context) (err error) {
		resp, err = r.client.server.ListSLRU(ctx, &pb.ListSLRURequest{At: r.atLeast(r.start), Slru: uint32(kind)})
		return err
	})
	if err != nil {
		return nil, r.lost(ctx, fmt.Errorf("listing the pages of %s at %v: %w", kind.Dir(), r.start, err))
	}
	return resp.Pages, nil
}

// lost says in the log what Postgres will only call an input/output error.
func (r *Remote) lost(ctx context.Context, err error) error {
	if ctx.Err() == nil {
		r.client.log.Error("a read fails for good", "error", err)
	}
	return err
}

// verdict is what to do about a failed call.
type verdict int

const (
	retry   verdict = iota // the server is away, or the key is: it will come back, or the agent ends this
	attach                 // the server does not serve the branch yet
	unclear                // may pass
	final
)

func judge(err error) verdict {
	switch rpc.Reason(err) {
	case pb.ErrorDetail_KEY_REVOKED, pb.ErrorDetail_KEY_UNREACHABLE:
		return retry // K2: the end of this compute's lease ends the wait
	case pb.ErrorDetail_UNSUPPORTED_RECORD, pb.ErrorDetail_BAD_WAL, pb.ErrorDetail_TRUNCATED, pb.ErrorDetail_FENCED:
		return final
	}
	switch status.Code(err) {
	case codes.Unavailable, codes.DeadlineExceeded, codes.Canceled, codes.Aborted, codes.ResourceExhausted:
		return retry
	case codes.NotFound:
		return attach
	case codes.Internal, codes.Unknown:
		return unclear
	}
	return final
}

// call makes a call until it succeeds, ctx ends, or trying again cannot help.
func (c *Client) call(ctx context.Context, what string, fn func(context.Context) error) error {
	backoff := firstBackoff
	for doubts := 0; ; {
		err := c.attempt(ctx, fn)
		if err == nil {
			return nil
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		v := judge(err)
		if v == attach || v == unclear {
			if doubts++; doubts > maxUnclear {
				return err
			}
		}
		switch v {
		case final:
			return err
		case attach:
			aerr := c.attempt(ctx, func(ctx context.Context) error {
				_, err := c.server.Attach(ctx, &pb.AttachRequest{Project: c.project, Branch: c.branch})
				return err
			})
			if aerr != nil && judge(aerr) == final {
				return fmt.Errorf("%w; and attaching the branch failed: %w", err, aerr)
			}
		}
		c.warn(what, err)
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(backoff):
		}
		backoff = min(2*backoff, maxBackoff)
	}
}

func (c *Client) attempt(ctx context.Context, fn func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, attemptTimeout)
	defer cancel()
	return fn(ctx)
}

func (c *Client) warn(what string, err error) {
	now, last := time.Now().UnixNano(), c.lastWarn.Load()
	if now-last > int64(warnInterval) && c.lastWarn.CompareAndSwap(last, now) {
		c.log.Warn("waiting for the page server", "for", what, "error", err)
	}
}
