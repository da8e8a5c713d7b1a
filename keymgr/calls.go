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
	case errors.Is(err, errRetired):
		return rpc.Error(codes.OutOfRange, nil, "%v", err)
	case errors.Is(err, blob.ErrNotFound):
		return rpc.Error(codes.NotFound, nil, "%v", err)
	case errors.Is(err, seal.ErrDamaged):
		return rpc.Error(codes.DataLoss, nil, "%v", err)
	case errors.Is(err, context.Canceled):
		return rpc.Error(codes.Canceled, nil, "%v", err)
	}
	return rpc.Error(codes.Unavailable, nil, "%v", err)
}

func invalid(format string, args ...any) error {
	return rpc.Error(codes.InvalidArgument, nil, format, args...)
}

func refusal(why lease.Outcome, format string, args ...any) error {
	return refusalBy("", why, format, args...)
}

// refusalBy also says who can end a revocation: clients are told so even if nobody can be asked then.
func refusalBy(controlledBy string, why lease.Outcome, format string, args ...any) error {
	if why == lease.Denied || why == lease.Held {
		return rpc.Error(codes.PermissionDenied, &pb.ErrorDetail{Reason: pb.ErrorDetail_KEY_REVOKED, ControlledBy: controlledBy}, format, args...)
	}
	return rpc.Error(codes.Unavailable, &pb.ErrorDetail{Reason: pb.ErrorDetail_KEY_UNREACHABLE}, format, args...)
}

// use gives a live lease, and its key's, under which alone the contexts' DEKs may be.
func (s *Server) use(ctx context.Context, id string, contexts int, context func(int) *pb.DEKContext) (lease.Lease, []seal.Context, error) {
	if contexts == 0 || contexts > maxBatch {
		return lease.Lease{}, nil, invalid("%d DEKs in one call, want 1..%d", contexts, maxBatch)
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
			return l, nil, invalid("%v", err)
		}
		if err := s.covers(ctx, l, out[i]); err != nil {
			return l, nil, err
		}
	}
	return l, out, nil
}

// covers tells whether a lease is on the key that an object's DEKs are under.
func (s *Server) covers(ctx context.Context, l lease.Lease, c seal.Context) error {
	id := parseKeyID(l.Key)
	if c.Project == id.project {
		key, err := s.resolve(ctx, c.Project, c.Branch)
		if err != nil || key == id {
			return err
		}
	}
	return rpc.Error(codes.PermissionDenied, nil, "the lease is on the key of %s, which is not that of branch %.80q of project %.80q", id.words(), c.Branch, c.Project)
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
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	l, contexts, err := s.use(ctx, req.LeaseId, len(req.Contexts), func(i int) *pb.DEKContext { return req.Contexts[i] })
	if err != nil {
		return nil, err
	}
	k := s.key(parseKeyID(l.Key))
	doc, err := s.document(ctx, k, false)
	if err != nil {
		return nil, s.callError(err)
	}
	kek, err := s.getKEK(ctx, k, doc.Current)
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
	e.Outcome, e.Node, e.Lease = "ok", l.Node, l.ID
	if err := s.audit.append(ctx, parseKeyID(l.Key).event(e)); err != nil {
		return s.callError(err)
	}
	_, err := s.live(l.ID)
	return err
}

// UnwrapDEKs implements pb.KeyManagerServer.
func (s *Server) UnwrapDEKs(ctx context.Context, req *pb.UnwrapDEKsRequest) (*pb.UnwrapDEKsResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	l, contexts, err := s.use(ctx, req.LeaseId, len(req.Deks), func(i int) *pb.DEKContext { return req.Deks[i].GetContext() })
	if err != nil {
		return nil, err
	}
	k := s.key(parseKeyID(l.Key))
	resp := &pb.UnwrapDEKsResponse{Plaintexts: make([][]byte, 0, len(contexts))}
	fail := func(err error) (*pb.UnwrapDEKsResponse, error) {
		for _, raw := range resp.Plaintexts {
			clear(raw)
		}
		return nil, err
	}
	for i, c := range contexts {
		raw, err := s.unwrapDEK(ctx, k, c, req.Deks[i].GetWrapped())
		if errors.Is(err, seal.ErrDamaged) {
			// A key that does not open is worth knowing of: damage, or an attempt to move it.
			event := k.id.event(Event{Event: "dek.unwrapped", Outcome: "failed", Node: l.Node, Lease: l.ID, Objects: objectsOf(contexts[i : i+1])})
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

func (s *Server) unwrapDEK(ctx context.Context, k *keyState, c seal.Context, wrapped []byte) ([]byte, error) {
	version, err := seal.KEKVersion(wrapped)
	if err != nil {
		return nil, err
	}
	kek, err := s.getKEK(ctx, k, version)
	if err != nil {
		return nil, err
	}
	return kek.Unwrap(c, wrapped)
}
