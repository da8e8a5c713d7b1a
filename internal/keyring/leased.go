package keyring

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/boottime"
	"github.com/holdfastdb/holdfast/internal/rpc"
	"github.com/holdfastdb/holdfast/internal/seal"
)

// callTimeout bounds one call to the key manager. It also covers a key manager that is
// just being started.
const callTimeout = 20 * time.Second

// ring is a Ring that leases from a key manager.
type ring struct {
	client pb.KeyManagerClient
	node   string
	ctx    context.Context // ends with Close
	stop   context.CancelFunc
	wg     sync.WaitGroup // renewals

	mu struct {
		sync.Mutex
		closed   bool
		projects map[string]*project
	}
}

// New makes the ring of a node, which leases from the key manager what it needs when it is first
// needed, and renews it in the background. node names the node in the audit log.
//
// A lease's end counts from before it was asked for, on a clock that goes on during
// suspension (invariant K2). Denied renewals end it at once. Close does not call OnShred
// functions.
func New(client pb.KeyManagerClient, node string) Ring {
	r := &ring{client: client, node: node}
	r.ctx, r.stop = context.WithCancel(context.Background())
	r.mu.projects = make(map[string]*project)
	return r
}

func (r *ring) project(name string) (*project, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.mu.closed {
		return nil, fmt.Errorf("the key ring is closed: %w", ErrUnreachable)
	}
	p := r.mu.projects[name]
	if p == nil {
		p = newProject(r, name)
		r.mu.projects[name] = p
	}
	return p, nil
}

// Generate implements Ring.
func (r *ring) Generate(ctx context.Context, c seal.Context) (*seal.Key, []byte, error) {
	if err := c.Validate(); err != nil {
		return nil, nil, err
	}
	p, err := r.project(c.Project)
	if err != nil {
		return nil, nil, err
	}
	if err := p.ensureLease(ctx); err != nil {
		return nil, nil, fmt.Errorf("making a key for %s: %w", c, err)
	}
	made, err := p.generate.do(ctx, c)
	if err != nil {
		return nil, nil, fmt.Errorf("making a key for %s: %w", c, err)
	}
	return made.key, made.wrapped, nil
}

// Open implements Ring.
func (r *ring) Open(ctx context.Context, c seal.Context, wrapped []byte) (*seal.Key, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	p, err := r.project(c.Project)
	if err != nil {
		return nil, err
	}
	if k := p.cached(keyName(c, wrapped)); k != nil {
		return k, nil
	}
	if err := p.ensureLease(ctx); err != nil {
		return nil, fmt.Errorf("opening the key of %s: %w", c, err)
	}
	k, err := p.open.do(ctx, wrappedKey{c, wrapped})
	if err != nil {
		return nil, fmt.Errorf("opening the key of %s: %w", c, err)
	}
	return k, nil
}

// OnShred implements Ring.
func (r *ring) OnShred(project string, fn func(reason error)) (cancel func()) {
	p, err := r.project(project)
	if err != nil {
		return func() {} // closed: there is no lease any more that could end
	}
	return p.onShred(fn)
}

// Close implements Ring.
func (r *ring) Close() {
	r.mu.Lock()
	r.mu.closed = true
	projects := r.mu.projects
	r.mu.Unlock()
	r.stop()
	for _, p := range projects {
		p.end(p.currentTerm(), nil)
	}
	r.wg.Wait()
}

// callContext bounds a call by the ring's life and a limit.
func (r *ring) callContext(limit time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeout(r.ctx, limit)
}

// askLease asks for a lease, or to renew the lease id.
func (r *ring) askLease(project, id string, limit time.Duration) (*pb.LeaseResponse, time.Duration, error) {
	ctx, cancel := r.callContext(limit)
	defer cancel()
	asked := boottime.Now()
	resp, err := r.client.Lease(ctx, &pb.LeaseRequest{Project: project, Node: r.node, LeaseId: id}, grpc.WaitForReady(true))
	if err != nil {
		return nil, 0, callError(err)
	}
	if resp.LeaseId == "" || resp.TtlMs <= 0 {
		return nil, 0, fmt.Errorf("%w: the key manager gave no lease and no error", ErrUnreachable)
	}
	return resp, asked + time.Duration(resp.TtlMs)*time.Millisecond, nil
}

// callError puts a call's error in the terms of this package. Only an answer that speaks of
// the request itself is for good; all else says nothing of the key, and may pass: a branch that
// took it for damage would stop. A wrapped key that does not open is seal.ErrDamaged.
func callError(err error) error {
	if rpc.Reason(err) == pb.ErrorDetail_KEY_REVOKED {
		return fmt.Errorf("%w: %s", ErrRevoked, message(err))
	}
	switch status.Code(err) {
	case codes.DataLoss:
		return fmt.Errorf("%w: key manager: %w", seal.ErrDamaged, err)
	case codes.InvalidArgument, codes.NotFound, codes.PermissionDenied, codes.Unimplemented:
		return fmt.Errorf("key manager: %w", err)
	}
	return fmt.Errorf("%w: %s", ErrUnreachable, message(err))
}

func message(err error) string {
	if st, ok := status.FromError(err); ok {
		return st.Message()
	}
	return err.Error()
}

// isLeaseGone tells that the key manager does not know the lease: it restarted, or the lease
// ran out.
func isLeaseGone(err error) bool { return status.Code(err) == codes.FailedPrecondition }

var errEnded = errors.New("the lease ended meanwhile")
