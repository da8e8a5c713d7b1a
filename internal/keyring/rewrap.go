package keyring

import (
	"context"
	"errors"
	"fmt"

	"google.golang.org/grpc"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/seal"
)

// Wrapped is a wrapped DEK, and what it is for.
type Wrapped struct {
	Context seal.Context
	DEK     []byte
}

// ErrRetired means that a DEK is wrapped under a version of the KEK that was destroyed. A newer
// form of it is kept where the DEK is kept, unless nobody needed it any more.
var ErrRetired = errors.New("the version of the key under which it is wrapped was retired")

// Rewrapper is the part of a Ring that rotations of the KEK need.
type Rewrapper interface {
	// Rewrap wraps DEKs of one branch again, under the current version of the KEK, which it
	// tells. Those that are under it already come back as they were. No DEK gets here in the clear.
	// It needs a live lease, as Open does.
	Rewrap(ctx context.Context, list []Wrapped) (rewrapped [][]byte, kekVersion uint32, err error)
}

// Rewrap implements Ring.
func (r *ring) Rewrap(ctx context.Context, list []Wrapped) (rewrapped [][]byte, version uint32, err error) {
	if len(list) == 0 {
		return nil, 0, nil
	}
	first := list[0].Context
	for _, w := range list {
		if err := w.Context.Validate(); err != nil {
			return nil, 0, err
		}
		if w.Context.Project != first.Project || w.Context.Branch != first.Branch {
			return nil, 0, fmt.Errorf("re-wrapping the keys of %s and of %s at once", first, w.Context)
		}
	}
	p, err := r.scope(first.Project, first.Branch)
	if err != nil {
		return nil, 0, err
	}
	if err := p.ensureLease(ctx); err != nil {
		return nil, 0, fmt.Errorf("re-wrapping keys as of %s: %w", first, err)
	}
	for len(list) > 0 {
		n := min(len(list), maxBatch)
		resp, err := p.rewrap(ctx, list[:n])
		if err != nil {
			return nil, 0, fmt.Errorf("re-wrapping keys as of %s: %w", first, err)
		}
		rewrapped, version = append(rewrapped, resp.Wrapped...), resp.KekVersion
		list = list[n:]
	}
	return rewrapped, version, nil
}

// rewrap makes one call.
func (p *scope) rewrap(ctx context.Context, list []Wrapped) (resp *pb.RewrapDEKsResponse, err error) {
	req := &pb.UnwrapDEKsRequest{}
	for _, w := range list {
		req.Deks = append(req.Deks, &pb.WrappedDEK{Context: dekContext(w.Context), Wrapped: w.DEK})
	}
	_, err = p.withLease(func(callCtx context.Context, id string) (err error) {
		req.LeaseId = id
		resp, err = p.ring.client.RewrapDEKs(callCtx, req, grpc.WaitForReady(true))
		return err
	})
	if err != nil {
		return nil, err
	}
	if len(resp.Wrapped) != len(list) {
		return nil, fmt.Errorf("%w: the key manager wrapped %d keys of %d", ErrUnreachable, len(resp.Wrapped), len(list))
	}
	return resp, ctx.Err()
}
