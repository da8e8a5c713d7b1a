package keyring

import (
	"context"
	"crypto/ed25519"
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
	client   pb.KeyManagerClient
	cfg      Config
	identity ed25519.PrivateKey // of this process: it signs its reports
	ctx      context.Context    // ends with Close
	stop     context.CancelFunc
	wg       sync.WaitGroup  // renewals, and the watch
	reports  sync.WaitGroup  // what is being shredded and reported
	telling  context.Context // of reports: it ends a while after Close
	silence  context.CancelFunc
	watching sync.Once
	idle     time.Duration // idleFor; tests have less

	publishing sync.Mutex // orders what the guard is told
	scopes     sync.Map   // of *scope by scopeName; never removed
	mu         struct {
		sync.Mutex
		closed bool
	}
}

// Config is what a ring is made of.
type Config struct {
	Client pb.KeyManagerClient
	Node   string // names the node in the audit log and in receipts
	Guard  Guard  // nil: none
}

// Guard ends the process if it goes on past a lease's end and has not shredded what was under it: a
// process that is stopped, or hangs, cannot do that itself.
type Guard interface {
	// Publish tells the earliest end, on boottime's clock, of a lease of which not all is
	// shredded; 0: there is none. It is called in order, and must not block.
	Publish(earliest time.Duration)
}

// New makes the ring of a node, which leases from the key manager what it needs when it is first
// needed, and renews it in the background. node names the node in the audit log.
//
// A lease's end counts from before it was asked for, on a clock that goes on during
// suspension (invariant K2). Denied renewals end it at once. Close does not call OnShred
// functions.
func New(client pb.KeyManagerClient, node string) Ring {
	return Open(Config{Client: client, Node: node})
}

// Open is New with all that may be said.
func Open(cfg Config) Ring {
	r := &ring{client: cfg.Client, cfg: cfg, idle: idleFor}
	_, r.identity, _ = ed25519.GenerateKey(nil) // never fails: crypto/rand
	r.ctx, r.stop = context.WithCancel(context.Background())
	r.telling, r.silence = context.WithCancel(context.Background())
	return r
}

var errClosed = fmt.Errorf("the key ring is closed: %w", ErrUnreachable)

func (r *ring) scope(project, branch string) (*scope, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.mu.closed {
		return nil, errClosed
	}
	name := scopeName{project, branch}
	if p, ok := r.scopes.Load(name); ok {
		return p.(*scope), nil
	}
	p := newScope(r, name)
	r.scopes.Store(name, p)
	return p, nil
}

// Generate implements Ring.
func (r *ring) Generate(ctx context.Context, c seal.Context) (*seal.Key, []byte, error) {
	if err := c.Validate(); err != nil {
		return nil, nil, err
	}
	p, err := r.scope(c.Project, c.Branch)
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
	p, err := r.scope(c.Project, c.Branch)
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
func (r *ring) OnShred(project, branch string, fn ShredFunc) (cancel func()) {
	p, err := r.scope(project, branch)
	if err != nil {
		return func() {} // closed: there is no lease any more that could end
	}
	return p.onShred(fn)
}

// Live implements Ring.
func (r *ring) Live(project, branch string) error {
	p, ok := r.scopes.Load(scopeName{project, branch})
	if !ok {
		return fmt.Errorf("%w: no lease was taken out on %v", ErrUnreachable, scopeName{project, branch})
	}
	return p.(*scope).lives()
}

// Term implements Ring.
func (r *ring) Term(project, branch string) *seal.Term {
	if p, ok := r.scopes.Load(scopeName{project, branch}); ok {
		return p.(*scope).term()
	}
	return seal.NewTerm(0)
}

// News implements Ring.
func (r *ring) News(project, branch string) <-chan struct{} {
	p, err := r.scope(project, branch)
	if err != nil {
		return nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.mu.news
}

func (r *ring) eachScope(fn func(*scope)) {
	r.scopes.Range(func(_, p any) bool { fn(p.(*scope)); return true })
}

// closeWait bounds how long Close waits for what was shredded before it to be reported.
const closeWait = 2 * time.Second

// Close implements Ring.
func (r *ring) Close() {
	r.mu.Lock()
	r.mu.closed = true
	r.mu.Unlock()
	r.stop()
	r.eachScope(func(p *scope) { p.end(p.currentTerm(), nil) })
	told := make(chan struct{})
	go func() { r.reports.Wait(); close(told) }()
	select {
	case <-told:
	case <-time.After(closeWait):
	}
	r.silence()
	r.wg.Wait()
}

// publish tells the guard the earliest end of a lease that lives or of which something is left.
func (r *ring) publish() {
	if r.cfg.Guard == nil {
		return
	}
	r.publishing.Lock()
	defer r.publishing.Unlock()
	var earliest time.Duration
	r.eachScope(func(p *scope) {
		if end := p.due(); end != 0 && (earliest == 0 || end < earliest) {
			earliest = end
		}
	})
	r.cfg.Guard.Publish(earliest)
}

// callContext bounds a call by the ring's life and a limit.
func (r *ring) callContext(limit time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeout(r.ctx, limit)
}

// askLease asks for a lease, or to renew the lease id.
func (r *ring) askLease(name scopeName, id string, limit time.Duration) (*pb.LeaseResponse, time.Duration, error) {
	ctx, cancel := r.callContext(limit)
	defer cancel()
	asked := boottime.Now()
	req := &pb.LeaseRequest{Project: name.project, Branch: name.branch, Node: r.cfg.Node, LeaseId: id,
		PublicKey: r.identity.Public().(ed25519.PublicKey)} // what Public of an Ed25519 key is
	resp, err := r.client.Lease(ctx, req, grpc.WaitForReady(true))
	if err != nil {
		return nil, 0, callError(err)
	}
	if resp.LeaseId == "" || resp.TtlMs <= 0 {
		return nil, 0, fmt.Errorf("%w: the key manager gave no lease and no error", ErrUnreachable)
	}
	ttl := time.Duration(resp.TtlMs) * time.Millisecond
	return resp, asked + ttl - headroom(ttl), nil
}

// headroom is how long before its lease's end a node begins to shred one that was not renewed: what
// was held under it is to be gone at the end, also on a busy machine.
func headroom(ttl time.Duration) time.Duration { return min(ttl/8, time.Second) }

// callError puts a call's error in the terms of this package. Only an answer that speaks of
// the request itself is for good; all else says nothing of the key, and may pass: a branch that
// took it for damage would stop. A wrapped key that does not open is seal.ErrDamaged.
func callError(err error) error {
	if d := rpc.Detail(err); d.GetReason() == pb.ErrorDetail_KEY_REVOKED {
		return &RevokedError{ControlledBy: d.GetControlledBy(), Message: message(err)}
	}
	switch status.Code(err) {
	case codes.OutOfRange:
		return fmt.Errorf("%w: key manager: %w", ErrRetired, err)
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
