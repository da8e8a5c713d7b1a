package keyring

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"google.golang.org/grpc"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/boottime"
	"github.com/holdfastdb/holdfast/internal/seal"
)

// scope is a ring's part for one branch, or for what of a project is no branch's: at most one
// lease, and the keys under it.
type scope struct {
	ring     *ring
	name     scopeName
	generate batcher[seal.Context, madeKey]
	open     batcher[wrappedKey, *seal.Key]

	mu struct {
		sync.Mutex
		// term numbers leases from 1 on, renewals and the key manager's restarts not counted; a key
		// that was asked for in one term is of no use in another.
		term      uint64
		live      bool
		leaseID   string
		key       string        // of which the lease is, as the key manager said: PROJECT or PROJECT/BRANCH
		end       time.Duration // on boottime's clock
		used      time.Duration // likewise: when somebody last wanted something under a lease
		ttl       time.Duration
		bound     *seal.Term    // that of the keys; it ends when the lease does
		why       error         // why there is no lease: of the last one's end, or of the last refusal
		renewNow  chan struct{} // of the term's keeper
		acquiring *acquisition
		keys      *keySet
		shred     map[uint64]ShredFunc
		nextShred uint64
		shredding map[uint64]time.Duration // ends of leases, by term, of which not all is shredded yet
		news      chan struct{}            // closed, and replaced, when something may have changed; see News
	}
}

type scopeName struct{ project, branch string }

func (n scopeName) String() string {
	if n.branch == "" {
		return "project " + n.project
	}
	return "project " + n.project + ", branch " + n.branch
}

// acquisition is a call for a first lease, which several may wait for.
type acquisition struct {
	done chan struct{}
	err  error
}

type madeKey struct {
	key     *seal.Key
	wrapped []byte
}

type wrappedKey struct {
	context seal.Context
	wrapped []byte
}

func newScope(r *ring, name scopeName) *scope {
	p := &scope{ring: r, name: name}
	p.generate.call, p.generate.drop = p.callGenerate, func(m madeKey) { m.key.Wipe() }
	p.open.call, p.open.drop = p.callOpen, func(*seal.Key) {} // it stays in the ring for the next
	p.mu.keys = newKeySet()
	p.mu.shred = make(map[uint64]ShredFunc)
	p.mu.shredding = make(map[uint64]time.Duration)
	p.mu.news = make(chan struct{})
	return p
}

func (p *scope) currentTerm() uint64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.mu.term
}

// liveLocked also notices a lease that ran out while the machine slept.
func (p *scope) liveLocked() bool { return p.mu.live && boottime.Now() < p.mu.end }

// useLocked is liveLocked for who wants something under the lease, which so is not idle.
func (p *scope) useLocked() bool {
	p.mu.used = boottime.Now()
	return p.mu.live && p.mu.used < p.mu.end
}

// idleLocked tells whether nobody has a use for the lease: a branch's that was deleted, or moved elsewhere.
func (p *scope) idleLocked(now time.Duration) bool {
	return len(p.mu.shred) == 0 && now-p.mu.used >= p.ring.idle
}

// cached gives a key at hand, if the lease lives.
func (p *scope) cached(name string) *seal.Key {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.useLocked() {
		return nil
	}
	return p.mu.keys.get(name)
}

func (p *scope) onShred(fn ShredFunc) (cancel func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	id := p.mu.nextShred
	p.mu.nextShred++
	p.mu.shred[id] = fn
	return func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		delete(p.mu.shred, id)
		p.mu.used = boottime.Now()
	}
}

// ensureLease takes out a lease if there is none.
func (p *scope) ensureLease(ctx context.Context) error {
	p.mu.Lock()
	if p.useLocked() {
		p.mu.Unlock()
		return nil
	}
	a := p.mu.acquiring
	if a == nil {
		a = &acquisition{done: make(chan struct{})}
		p.mu.acquiring = a
		stale := p.mu.term
		go func() {
			p.end(stale, ErrUnreachable) // a lease that slept past its end, if any
			a.err = p.acquire()
			p.ring.publish()
			p.mu.Lock()
			p.mu.acquiring = nil
			p.mu.Unlock()
			close(a.done)
		}()
	}
	p.mu.Unlock()
	select {
	case <-a.done:
		return a.err
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (p *scope) acquire() error {
	resp, end, err := p.ring.askLease(p.name, "", callTimeout)
	if err != nil {
		p.mu.Lock()
		p.mu.why = err
		p.mu.Unlock()
		return err
	}
	r := p.ring
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.mu.closed {
		return errClosed
	}
	r.startWatch() // under the lock: nothing is added to wg once Close waits for it
	p.mu.Lock()
	defer p.mu.Unlock()
	p.mu.term++
	p.mu.live, p.mu.renewNow = true, make(chan struct{}, 1)
	p.mu.bound = seal.NewTerm(end)
	p.extendLocked(resp, end)
	p.newsLocked()
	r.wg.Add(1)
	go p.keep(p.mu.term, p.mu.renewNow)
	return nil
}

func (p *scope) extendLocked(resp *pb.LeaseResponse, end time.Duration) {
	p.mu.leaseID, p.mu.end, p.mu.key = resp.LeaseId, end, cmp.Or(resp.Key, p.name.project) // an older key manager names none
	p.mu.bound.Extend(end)
	p.mu.ttl = time.Duration(resp.TtlMs) * time.Millisecond
}

// renewal is what came of asking for a renewal.
type renewal struct {
	resp *pb.LeaseResponse
	end  time.Duration
	err  error
}

// keeper renews one term's lease.
type keeper struct {
	p       *scope
	term    uint64
	renewAt time.Duration
	asking  bool
	again   bool // it was told to renew while it was asking: the answer may be older than the news
	answers chan renewal
	cause   error // why the lease is not renewed, if it is not
}

// lookEvery bounds the wait between looks at the clock: a timer does not run while the
// machine sleeps.
const lookEvery = time.Second

// idleFor is how long a lease is renewed that nobody uses.
const idleFor = 10 * time.Minute

var errIdle = errors.New("nobody has used it")

// keep renews a term's lease at about a third of its time, and ends the term when the lease
// is denied or runs out, also while an answer is waited for.
func (p *scope) keep(term uint64, renewNow <-chan struct{}) {
	defer p.ring.wg.Done()
	k := &keeper{p: p, term: term, answers: make(chan renewal, 1), cause: ErrUnreachable}
	p.mu.Lock()
	k.renewAt = p.mu.end - p.mu.ttl*2/3
	p.mu.Unlock()
	for {
		wait, alive := k.step()
		if !alive {
			return
		}
		timer := time.NewTimer(wait)
		select {
		case <-p.ring.ctx.Done():
			timer.Stop()
			return // Close ends the term
		case <-renewNow:
			k.renewAt, k.again = boottime.Now(), k.asking
		case r := <-k.answers:
			k.answered(r)
		case <-timer.C:
		}
		timer.Stop()
	}
}

// step ends the term if its time has come, or asks for a renewal, and gives how long to wait.
func (k *keeper) step() (wait time.Duration, alive bool) {
	p := k.p
	p.mu.Lock()
	now := boottime.Now()
	live, end, ttl, id := p.mu.live && p.mu.term == k.term, p.mu.end, p.mu.ttl, p.mu.leaseID
	idle := !k.asking && now >= k.renewAt && p.idleLocked(now)
	p.mu.Unlock()
	if live && now >= end {
		p.end(k.term, fmt.Errorf("the lease on %s ran out: %w", p.name, k.cause))
		live = false
	}
	if live && idle {
		p.end(k.term, fmt.Errorf("the lease on %s was let go: %w", p.name, errIdle))
		live = false
	}
	if !live {
		return 0, false
	}
	if !k.asking && now >= k.renewAt {
		k.asking = true
		p.ring.wg.Go(func() {
			resp, end, err := p.ring.askLease(p.name, id, min(end-now, ttl/2))
			k.answers <- renewal{resp, end, err}
		})
	}
	wait = min(end-now, lookEvery)
	if !k.asking {
		wait = min(wait, k.renewAt-now)
	}
	return wait, true
}

func (k *keeper) answered(r renewal) {
	k.asking = false
	switch {
	case errors.Is(r.err, ErrRevoked):
		k.p.end(k.term, fmt.Errorf("the lease on %s was not renewed: %w", k.p.name, r.err))
	case r.err != nil:
		k.cause = errors.Join(ErrUnreachable, r.err)
		k.p.mu.Lock()
		k.renewAt = boottime.Now() + k.p.mu.ttl/10
		k.p.mu.Unlock()
	default:
		k.cause = ErrUnreachable
		k.renewAt = k.p.renewed(k.term, r.resp, r.end)
	}
	if k.again {
		k.renewAt, k.again = boottime.Now(), false
	}
}

// renewed extends the term unless it ended meanwhile, and gives when to renew again.
func (p *scope) renewed(term uint64, resp *pb.LeaseResponse, end time.Duration) time.Duration {
	defer p.ring.publish()
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.mu.live && p.mu.term == term && boottime.Now() < p.mu.end {
		p.extendLocked(resp, end)
	}
	return p.mu.end - p.mu.ttl*2/3
}

// renewSoon has the keeper renew at once: a call's error said something about the lease.
func (p *scope) renewSoon() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.renewSoonLocked()
}

func (p *scope) renewSoonLocked() {
	if p.mu.live {
		select {
		case p.mu.renewNow <- struct{}{}:
		default:
		}
	}
}

// withLease makes a call under the lease. If the key manager does not know the lease, it asks
// for another, under which the term goes on, and calls once more.
func (p *scope) withLease(call func(ctx context.Context, leaseID string) error) (term uint64, err error) {
	for attempt := 0; ; attempt++ {
		p.mu.Lock()
		id, live := p.mu.leaseID, p.liveLocked()
		term = p.mu.term
		p.mu.Unlock()
		if !live {
			return term, fmt.Errorf("%w: %w", ErrUnreachable, errEnded)
		}
		ctx, cancel := p.ring.callContext(callTimeout)
		err := call(ctx, id)
		cancel()
		if err == nil {
			return term, nil
		}
		if !isLeaseGone(err) || attempt > 0 {
			err = callError(err)
			if errors.Is(err, ErrRevoked) {
				p.renewSoon() // whose answer decides over the term
			}
			return term, err
		}
		resp, end, err := p.ring.askLease(p.name, id, callTimeout)
		if errors.Is(err, ErrRevoked) {
			p.end(term, fmt.Errorf("the lease on %s was not renewed: %w", p.name, err))
		}
		if err != nil {
			return term, err
		}
		p.renewed(term, resp, end)
	}
}

func dekContext(c seal.Context) *pb.DEKContext {
	return &pb.DEKContext{Purpose: string(c.Purpose), Project: c.Project, Branch: c.Branch, Object: c.Object}
}

func (p *scope) callGenerate(contexts []seal.Context) ([]madeKey, error) {
	req := &pb.GenerateDEKsRequest{}
	for _, c := range contexts {
		req.Contexts = append(req.Contexts, dekContext(c))
	}
	var resp *pb.GenerateDEKsResponse
	term, err := p.withLease(func(ctx context.Context, id string) (err error) {
		req.LeaseId = id
		resp, err = p.ring.client.GenerateDEKs(ctx, req, grpc.WaitForReady(true))
		return err
	})
	if err != nil {
		return nil, err
	}
	raws := make([][]byte, len(resp.Deks))
	for i, d := range resp.Deks {
		raws[i] = d.Plaintext
	}
	keys, err := newKeys(raws, len(contexts), seal.NewKey)
	if err != nil {
		return nil, err
	}
	made := make([]madeKey, len(contexts))
	for i, d := range resp.Deks {
		made[i] = madeKey{keys[i], d.Wrapped}
	}
	return made, p.admit(term, func() {
		for _, m := range made {
			m.key.Bind(p.mu.bound)
			p.mu.keys.track(m.key)
		}
	}, func() {
		for _, m := range made {
			m.key.Wipe()
		}
	})
}

func (p *scope) callOpen(wrapped []wrappedKey) ([]*seal.Key, error) {
	req := &pb.UnwrapDEKsRequest{}
	for _, w := range wrapped {
		req.Deks = append(req.Deks, &pb.WrappedDEK{Context: dekContext(w.context), Wrapped: w.wrapped})
	}
	var resp *pb.UnwrapDEKsResponse
	term, err := p.withLease(func(ctx context.Context, id string) (err error) {
		req.LeaseId = id
		resp, err = p.ring.client.UnwrapDEKs(ctx, req, grpc.WaitForReady(true))
		return err
	})
	if err != nil {
		return nil, err
	}
	keys, err := newKeys(resp.Plaintexts, len(wrapped), seal.NewOpenKey)
	if err != nil {
		return nil, err
	}
	return keys, p.admit(term, func() {
		for i, w := range wrapped {
			name := keyName(w.context, w.wrapped)
			if have := p.mu.keys.get(name); have != nil { // asked for twice
				keys[i].Wipe()
				keys[i] = have
				continue
			}
			keys[i].Bind(p.mu.bound)
			p.mu.keys.put(name, keys[i])
		}
	}, func() {
		for _, k := range keys {
			k.Wipe()
		}
	})
}

// newKeys takes the raw keys of an answer, as many as were asked for. If it fails nothing is left of any of them.
func newKeys(raws [][]byte, want int, take func(raw []byte) (*seal.Key, error)) (keys []*seal.Key, err error) {
	defer func() {
		if err == nil {
			return
		}
		for _, raw := range raws {
			clear(raw)
		}
		for _, k := range keys {
			k.Wipe()
		}
	}()
	if len(raws) != want {
		return nil, fmt.Errorf("%w: the key manager gave %d keys, want %d", ErrUnreachable, len(raws), want)
	}
	for _, raw := range raws {
		k, err := take(raw)
		if err != nil {
			return keys, fmt.Errorf("key manager: %w", err)
		}
		keys = append(keys, k)
	}
	return keys, nil
}

// admit takes keys into the ring, or wipes them if the term in which they were asked for
// has ended.
func (p *scope) admit(term uint64, take, wipe func()) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.mu.term != term || !p.liveLocked() {
		wipe()
		return fmt.Errorf("%w: %w", ErrUnreachable, errEnded)
	}
	take()
	return nil
}
