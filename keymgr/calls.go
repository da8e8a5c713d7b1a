package keymgr

import (
	"context"
	"crypto/rand"
	"errors"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/blob"
	"github.com/holdfastdb/holdfast/internal/boottime"
	"github.com/holdfastdb/holdfast/internal/rpc"
	"github.com/holdfastdb/holdfast/internal/seal"
	"github.com/holdfastdb/holdfast/keymgr/lease"
)

func nowUnixMS() int64 { return time.Now().UnixMilli() }

// callError puts what went wrong in the terms of the service.
func (s *Server) callError(err error) error {
	if _, ok := status.FromError(err); ok {
		return err
	}
	var pe *ProviderError
	switch {
	case errors.Is(err, ErrBadCMK):
		return rpc.Error(codes.InvalidArgument, nil, "%v", err)
	case errors.As(err, &pe) && pe.Outcome == Denied:
		return refusal(lease.Denied, "%v", err)
	case errors.As(err, &pe), errors.Is(err, seal.ErrWiped): // wiped meanwhile: why, the next lease tells
		return refusal(lease.Unreachable, "%v", err)
	case errors.Is(err, blob.ErrNotFound):
		return rpc.Error(codes.NotFound, nil, "%v", err)
	case errors.Is(err, seal.ErrDamaged):
		return rpc.Error(codes.DataLoss, nil, "%v", err)
	case errors.Is(err, context.Canceled):
		return rpc.Error(codes.Canceled, nil, "%v", err)
	}
	return rpc.Error(codes.Unavailable, nil, "%v", err)
}

func refusal(why lease.Outcome, format string, args ...any) error {
	if why == lease.Denied {
		return rpc.Error(codes.PermissionDenied, &pb.ErrorDetail{Reason: pb.ErrorDetail_KEY_REVOKED}, format, args...)
	}
	return rpc.Error(codes.Unavailable, &pb.ErrorDetail{Reason: pb.ErrorDetail_KEY_UNREACHABLE}, format, args...)
}

// Lease implements pb.KeyManagerServer.
func (s *Server) Lease(ctx context.Context, req *pb.LeaseRequest) (*pb.LeaseResponse, error) {
	if err := checkProject(req.Project); err != nil {
		return nil, rpc.Error(codes.InvalidArgument, nil, "%v", err)
	}
	if req.Node == "" || len(req.Node) > maxNode {
		return nil, rpc.Error(codes.InvalidArgument, nil, "lease on project %s: the node's name has %d bytes, want 1..%d", req.Project, len(req.Node), maxNode)
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	d, err := s.decide(ctx, req)
	if err != nil {
		return nil, s.callError(err)
	}
	if d.Kind != lease.Grant {
		return nil, s.refuse(ctx, req, d.Why)
	}
	if d.New {
		err := s.audit.append(ctx, Event{Event: "lease.granted", Outcome: "ok", Project: req.Project, Node: req.Node, Lease: d.Lease})
		if err != nil {
			return nil, s.callError(err) // the lease that nobody knows of runs out
		}
	}
	return &pb.LeaseResponse{LeaseId: d.Lease, TtlMs: d.TTL.Milliseconds()}, nil
}

// decide asks the machine, and the KMS when the machine wants it.
func (s *Server) decide(ctx context.Context, req *pb.LeaseRequest) (lease.Decision, error) {
	p, _, err := s.known(ctx, req.Project)
	if err != nil {
		return lease.Decision{}, err
	}
	newID := newLeaseID()
	ask := func() lease.Decision {
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.mu.machine.Request(boottime.Now(), req.Project, req.Node, req.LeaseId, newID)
	}
	d := ask()
	if d.Kind != lease.Check {
		return d, nil
	}
	err = s.check(ctx, p, func() bool {
		d = ask() // a check that this one waited for may have decided
		return d.Kind == lease.Check
	})
	if err != nil || d.Kind != lease.Check {
		return d, err
	}
	if d = ask(); d.Kind == lease.Check {
		return d, refusal(lease.Unreachable, "project %s: the KMS's answer took longer than the check interval of %v, for which it holds", req.Project, s.cfg.CheckInterval)
	}
	return d, nil
}

// refuse says why there is no lease; the audit log has it once per node and check.
func (s *Server) refuse(ctx context.Context, req *pb.LeaseRequest, why lease.Outcome) error {
	s.mu.Lock()
	nodes := s.mu.refused[req.Project]
	if nodes == nil {
		nodes = make(map[string]bool)
		s.mu.refused[req.Project] = nodes
	}
	told := nodes[req.Node]
	nodes[req.Node] = true
	s.mu.Unlock()
	outcome := "unreachable"
	if why == lease.Denied {
		outcome = "denied"
	}
	if !told {
		if err := s.audit.append(ctx, Event{Event: "lease.refused", Outcome: outcome, Project: req.Project, Node: req.Node}); err != nil {
			return s.callError(err)
		}
	}
	p := s.project(req.Project)
	p.mu.Lock()
	defer p.mu.Unlock()
	return refusal(why, "project %s: its key cannot be used: %s", req.Project, p.mu.lastError)
}

// use gives the project of a live lease, whose keys alone the contexts may name.
func (s *Server) use(id string, contexts int, context func(int) *pb.DEKContext) (lease.Lease, []seal.Context, error) {
	if contexts == 0 || contexts > maxBatch {
		return lease.Lease{}, nil, rpc.Error(codes.InvalidArgument, nil, "%d DEKs in one call, want 1..%d", contexts, maxBatch)
	}
	l, err := s.live(id)
	if err != nil {
		return l, nil, err
	}
	out := make([]seal.Context, contexts)
	for i := range out {
		c := context(i)
		out[i] = seal.Context{Purpose: seal.Purpose(c.GetPurpose()), Project: c.GetProject(), Branch: c.GetBranch(), Object: c.GetObject()}
		if err := out[i].Validate(); err != nil {
			return l, nil, rpc.Error(codes.InvalidArgument, nil, "%v", err)
		}
		if out[i].Project != l.Project {
			return l, nil, rpc.Error(codes.PermissionDenied, nil, "the lease is on project %s, not on %.80q", l.Project, out[i].Project)
		}
	}
	return l, out, nil
}

// live gives a lease that lives now. The answer to one that does not is FailedPrecondition:
// the node takes out a new one, and learns then whether it may.
func (s *Server) live(id string) (lease.Lease, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	l, ok := s.mu.machine.Use(boottime.Now(), id)
	if !ok {
		return l, rpc.Error(codes.FailedPrecondition, nil, "there is no such lease, or it ran out: take out a new one")
	}
	return l, nil
}

func objectsOf(contexts []seal.Context) []string {
	objects := make([]string, len(contexts))
	for i, c := range contexts {
		objects[i] = string(c.Purpose) + "/" + c.Branch + "/" + c.Object
	}
	return objects
}

// GenerateDEKs implements pb.KeyManagerServer.
func (s *Server) GenerateDEKs(ctx context.Context, req *pb.GenerateDEKsRequest) (*pb.GenerateDEKsResponse, error) {
	l, contexts, err := s.use(req.LeaseId, len(req.Contexts), func(i int) *pb.DEKContext { return req.Contexts[i] })
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	p := s.project(l.Project)
	doc, err := s.document(ctx, p, false)
	if err != nil {
		return nil, s.callError(err)
	}
	kek, err := s.getKEK(ctx, p, doc.Current)
	if err != nil {
		return nil, s.callError(err)
	}
	resp := &pb.GenerateDEKsResponse{Deks: make([]*pb.DEK, len(contexts))}
	for i, c := range contexts {
		raw := make([]byte, seal.KeySize)
		rand.Read(raw) // never fails: crypto/rand
		w, err := kek.Wrap(doc.Current, c, raw)
		if err != nil {
			return nil, s.callError(err)
		}
		resp.Deks[i] = &pb.DEK{Plaintext: raw, Wrapped: w}
	}
	event := Event{Event: "dek.generated", KEKVersion: doc.Current, Objects: objectsOf(contexts)}
	if err := s.giveOut(ctx, l, event); err != nil {
		for _, d := range resp.Deks {
			clear(d.Plaintext)
		}
		return nil, err
	}
	return resp, nil
}

// giveOut audits that DEKs are given out, and checks that the lease still lives after it.
func (s *Server) giveOut(ctx context.Context, l lease.Lease, e Event) error {
	e.Outcome, e.Project, e.Node, e.Lease = "ok", l.Project, l.Node, l.ID
	if err := s.audit.append(ctx, e); err != nil {
		return s.callError(err)
	}
	_, err := s.live(l.ID)
	return err
}

// UnwrapDEKs implements pb.KeyManagerServer.
func (s *Server) UnwrapDEKs(ctx context.Context, req *pb.UnwrapDEKsRequest) (*pb.UnwrapDEKsResponse, error) {
	l, contexts, err := s.use(req.LeaseId, len(req.Deks), func(i int) *pb.DEKContext { return req.Deks[i].GetContext() })
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	p := s.project(l.Project)
	resp := &pb.UnwrapDEKsResponse{Plaintexts: make([][]byte, 0, len(contexts))}
	fail := func(err error) (*pb.UnwrapDEKsResponse, error) {
		for _, raw := range resp.Plaintexts {
			clear(raw)
		}
		return nil, err
	}
	for i, c := range contexts {
		raw, err := s.unwrapDEK(ctx, p, c, req.Deks[i].GetWrapped())
		if errors.Is(err, seal.ErrDamaged) {
			// A key that does not open is worth knowing of: damage, or an attempt to move it.
			event := Event{Event: "dek.unwrapped", Outcome: "failed", Project: l.Project, Node: l.Node, Lease: l.ID, Objects: objectsOf(contexts[i : i+1])}
			err = errors.Join(err, s.audit.append(ctx, event))
		}
		if err != nil {
			return fail(s.callError(err))
		}
		resp.Plaintexts = append(resp.Plaintexts, raw)
	}
	if err := s.giveOut(ctx, l, Event{Event: "dek.unwrapped", Objects: objectsOf(contexts)}); err != nil {
		return fail(err)
	}
	return resp, nil
}

func (s *Server) unwrapDEK(ctx context.Context, p *projectKeys, c seal.Context, wrapped []byte) ([]byte, error) {
	version, err := seal.KEKVersion(wrapped)
	if err != nil {
		return nil, err
	}
	kek, err := s.getKEK(ctx, p, version)
	if err != nil {
		return nil, err
	}
	return kek.Unwrap(c, wrapped)
}

// KeyStatus implements pb.KeyManagerServer. It checks the key if what is known is old.
func (s *Server) KeyStatus(ctx context.Context, req *pb.KeyStatusRequest) (*pb.KeyStatusResponse, error) {
	if err := checkProject(req.Project); err != nil {
		return nil, rpc.Error(codes.InvalidArgument, nil, "%v", err)
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	p, doc, err := s.known(ctx, req.Project)
	if err != nil {
		return nil, s.callError(err)
	}
	var outcome lease.Outcome
	look := func() (stale bool) {
		s.mu.Lock()
		defer s.mu.Unlock()
		outcome, stale = s.mu.machine.State(boottime.Now(), req.Project)
		return stale
	}
	if look() {
		if err := s.check(ctx, p, look); err != nil {
			return nil, s.callError(err)
		}
		look()
	}
	resp := &pb.KeyStatusResponse{Cmk: doc.CMK, KekVersion: doc.Current, State: "unreachable"}
	switch outcome {
	case lease.OK:
		resp.State = "active"
	case lease.Denied:
		resp.State = "revoked"
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	resp.ProviderError, resp.CheckedUnixMs = p.mu.lastError, p.mu.checkedUnixMS
	return resp, nil
}
