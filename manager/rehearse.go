package manager

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/rpc"
)

// Bounds of a rehearsal. What is measured is no bound: a loaded machine makes it slow, not wrong.
const (
	rehearsalMargin = 15 * time.Second // beyond the published bound, for what must have ended by it
	rehearsalReturn = 2 * time.Minute  // from the resumption to the first row
	rehearsalHand   = 15 * time.Minute // for the customer's part, with WaitForDenial
	rehearsalRows   = 100
	rehearsalPoll   = 50 * time.Millisecond
)

// rehearsal is one revocation and return on a throwaway branch, which stands among the leftovers all the time:
// whatever ends the rehearsal, the branch is removed.
type rehearsal struct {
	m        *Manager
	req      *pb.RehearseRequest
	tell     func(*pb.RehearseEvent) error
	branch   branchDoc
	endpoint endpointDoc
	password string // of this branch's superuser; it is kept nowhere
	led      ledger
	others   neighbours
}

// Rehearse implements pb.ManagerServer.
func (m *Manager) Rehearse(req *pb.RehearseRequest, stream pb.Manager_RehearseServer) error {
	ctx := stream.Context()
	if req.WaitForDenial && req.Cmk == "" {
		return rpc.Error(codes.InvalidArgument, nil, "name a CMK that was made for it: disabling the project's own would shut the project")
	}
	unlock, err := m.lockBranches(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	r := &rehearsal{m: m, req: req, tell: stream.Send, password: rand.Text()}
	id := newID()
	r.branch = branchDoc{ID: id, Project: req.Project, Name: "rehearsal-" + id[:8], OwnKey: true}
	if r.endpoint, err = m.branchEndpoint(&r.branch, ""); err != nil {
		return err
	}
	if err := m.claimBranch(ctx, &r.branch); err != nil {
		return asStatus(err)
	}
	r.endpoint.Project = r.branch.Project
	err = r.run(ctx)
	if err := r.remove(); err != nil {
		m.cfg.Log.Warn("what is left of a rehearsal could not be removed; it is at the next start", "branch", r.branch.ID, "error", err)
	}
	if err != nil {
		return asStatus(fmt.Errorf("the rehearsal failed: %w", err))
	}
	return nil
}

// remove is done although who asked may be gone.
func (r *rehearsal) remove() error {
	ctx, cancel := context.WithTimeout(context.Background(), undoTimeout)
	defer cancel()
	_ = r.step("removing branch %s, all that was kept of it, and its key", r.branch.Name) // nobody may listen any more
	return r.m.removeLeftover(ctx, r.branch)
}

func (r *rehearsal) step(format string, args ...any) error {
	return r.tell(&pb.RehearseEvent{Step: fmt.Sprintf(format, args...)})
}

// measured tells a measured step. It was measured where the time is known: here it is only said.
func (r *rehearsal) measured(what string, took time.Duration) error {
	return r.tell(&pb.RehearseEvent{Measure: what, TookUs: took.Microseconds()})
}

func (r *rehearsal) ref() *pb.KeyRef {
	return &pb.KeyRef{Project: r.branch.Project, Branch: r.branch.ID}
}

func (r *rehearsal) run(ctx context.Context) error {
	if err := r.prepare(ctx); err != nil {
		return err
	}
	bound, err := r.revocation(ctx)
	if err != nil {
		return err
	}
	if err := r.resumption(ctx); err != nil {
		return err
	}
	return r.measured("published bound: from the first denial until no node can use the key, without the time to kill", bound)
}

// prepare makes the branch, and writes rows to it.
func (r *rehearsal) prepare(ctx context.Context) error {
	if err := r.step("making branch %s, with a key of its own under %s", r.branch.Name, cmp.Or(r.req.Cmk, "the project's CMK")); err != nil {
		return err
	}
	if err := r.m.makeBranch(ctx, r.branch, r.endpoint, r.req.Cmk, r.password, false); err != nil {
		return err
	}
	if err := r.step("starting its endpoint at %s", r.endpoint.Listen); err != nil {
		return err
	}
	s := r.m.addEndpoint(r.endpoint)
	s.start()
	if err := s.waitReady(ctx, true); err != nil {
		return err
	}
	if err := r.led.create(ctx, r.connect); err != nil {
		return err
	}
	var err error
	r.others, err = r.m.lookAround(ctx, r.branch)
	return err
}

// revocation has the key denied while rows are written, and measures what follows.
func (r *rehearsal) revocation(ctx context.Context) (bound time.Duration, err error) {
	watch, err := r.watch(ctx)
	if err != nil {
		return 0, err
	}
	defer watch.close()
	if err := watch.writing(ctx, &r.led); err != nil {
		return 0, err
	}
	begun, st, err := r.deny(ctx)
	if err != nil {
		return 0, err
	}
	bound = time.Duration(st.BoundMs) * time.Millisecond
	limited, cancel := context.WithTimeout(ctx, bound+rehearsalMargin)
	defer cancel()
	ended, err := watch.wait(limited)
	if err != nil {
		return 0, err
	}
	refused, words, err := r.refusal(limited)
	if err != nil {
		return 0, err
	}
	if err := errors.Join(
		r.step("%d rows were acknowledged; connections ended: %s", r.led.acknowledged(), watch.words()),
		r.step("new connections are told: %s", words),
		r.measured("revoke to all connections ended", ended.Sub(begun)),
		r.measured("revoke to new connections refused", refused.Sub(begun)),
	); err != nil {
		return 0, err
	}
	return bound, errors.Join(r.receipt(limited, begun), r.others.unmoved(ctx, r.m))
}

// deny holds the branch's key back, or waits until the customer has disabled its CMK.
func (r *rehearsal) deny(ctx context.Context) (begun time.Time, st *pb.KeyStatusResponse, err error) {
	if r.req.WaitForDenial {
		if err := r.step("DISABLE %s IN ITS KMS NOW (waiting for at most %v)", r.req.Cmk, rehearsalHand); err != nil {
			return begun, nil, err
		}
		st, err = r.await(ctx, rehearsalHand, func(state string) bool { return state == pb.KeyRevoked })
		return time.Now(), st, err
	}
	if err := r.step("holding the branch's key back, as `holdfast key revoke` does; rows are being written"); err != nil {
		return begun, nil, err
	}
	begun = time.Now()
	st, err = r.m.keyAdmin.RevokeKey(ctx, &pb.RevokeKeyRequest{Key: r.ref(), Reason: "rehearsal"})
	return begun, st, err
}

// await polls the branch's key until its state is wanted.
func (r *rehearsal) await(ctx context.Context, limit time.Duration, wanted func(state string) bool) (*pb.KeyStatusResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	for {
		st, err := r.m.keymgr.KeyStatus(ctx, &pb.KeyStatusRequest{Project: r.branch.Project, Branch: r.branch.ID})
		if err == nil && wanted(st.State) {
			return st, nil
		}
		select {
		case <-time.After(rehearsalPoll):
		case <-ctx.Done():
			return nil, fmt.Errorf("waiting for the key's state to change: %w", errors.Join(err, ctx.Err()))
		}
	}
}

// receipt waits until every node has reported, and tells what each did when.
func (r *rehearsal) receipt(ctx context.Context, begun time.Time) error {
	for {
		list, err := r.m.keyAdmin.ListReceipts(ctx, r.ref())
		if err == nil && len(list.Receipts) > 0 && complete(list.Receipts) {
			took := time.Since(begun)
			for _, receipt := range list.Receipts {
				if err := r.tell(&pb.RehearseEvent{Step: "the receipt is complete:", Receipt: receipt}); err != nil {
					return err
				}
			}
			return r.measured("revoke to the receipt complete: every process has wiped its keys and dropped what it held", took)
		}
		select {
		case <-time.After(rehearsalPoll):
		case <-ctx.Done():
			return fmt.Errorf("the receipt is not complete: %w", errors.Join(err, ctx.Err()))
		}
	}
}

// complete tells whether all receipts of the branch's one revocation are. There can be a second: of a node that
// asked in between.
func complete(list []*pb.Receipt) bool {
	for _, r := range list {
		if !r.Complete {
			return false
		}
	}
	return true
}

// resumption gives the key back, measures until rows come, and looks for what was acknowledged.
func (r *rehearsal) resumption(ctx context.Context) error {
	begun, err := r.allow(ctx)
	if err != nil {
		return err
	}
	limited, cancel := context.WithTimeout(ctx, rehearsalReturn)
	defer cancel()
	rows, err := r.led.await(limited, r.connect)
	took := time.Since(begun)
	if err != nil {
		return fmt.Errorf("after the resumption no rows came: %w", err)
	}
	if err := r.measured("resume to the first rows", took); err != nil {
		return err
	}
	if err := r.led.check(rows); err != nil {
		return err
	}
	if err := r.led.write(limited, r.connect); err != nil {
		return fmt.Errorf("writing after the resumption: %w", err)
	}
	return errors.Join(r.step("all %d acknowledged rows are there, and rows can be written", r.led.acknowledged()),
		r.others.unmoved(ctx, r.m), r.step("no other key and no other endpoint noticed"))
}

// allow ends the hold, or waits until the customer has enabled the CMK again.
func (r *rehearsal) allow(ctx context.Context) (begun time.Time, err error) {
	if r.req.WaitForDenial {
		if err := r.step("ENABLE %s IN ITS KMS AGAIN (waiting for at most %v)", r.req.Cmk, rehearsalHand); err != nil {
			return begun, err
		}
		_, err = r.await(ctx, rehearsalHand, func(state string) bool { return state == pb.KeyActive || state == pb.KeyResuming })
		return time.Now(), err
	}
	if err := r.step("giving the key back, as `holdfast key resume` does"); err != nil {
		return begun, err
	}
	begun = time.Now()
	_, err = r.m.keyAdmin.ResumeKey(ctx, r.ref())
	return begun, err
}

// neighbours is how everything but the rehearsal's branch is.
type neighbours struct {
	not       branchDoc
	endpoints map[string]string
	keys      map[string]string
}

func (m *Manager) lookAround(ctx context.Context, not branchDoc) (neighbours, error) {
	n := neighbours{not: not, endpoints: make(map[string]string), keys: make(map[string]string)}
	list, err := m.ListEndpoints(ctx, nil)
	if err != nil {
		return n, err
	}
	for _, e := range list.Endpoints {
		if e.Branch != not.ID {
			n.endpoints["endpoint "+e.Name] = fmt.Sprintf("%s in epoch %d, process %d", e.State, e.Epoch, e.Pid)
		}
	}
	keys, err := m.keyAdmin.ListKeys(ctx, &pb.ListKeysRequest{})
	if err != nil {
		return n, fmt.Errorf("listing the keys: %w", err)
	}
	for _, k := range keys.Keys {
		if k.Key != not.Project+"/"+not.ID {
			n.keys["key "+k.Key] = k.State
		}
	}
	return n, nil
}

// unmoved fails if an endpoint or key is not as it was. What came or went meanwhile is its user's doing.
func (n neighbours) unmoved(ctx context.Context, m *Manager) error {
	now, err := m.lookAround(ctx, n.not)
	if err != nil {
		return err
	}
	var errs []error
	differ := func(was, is map[string]string) {
		for name, w := range was {
			if i, ok := is[name]; ok && i != w {
				errs = append(errs, fmt.Errorf("%s noticed: it was %s and is %s", name, w, i))
			}
		}
	}
	differ(n.endpoints, now.endpoints)
	differ(n.keys, now.keys)
	return errors.Join(errs...)
}
