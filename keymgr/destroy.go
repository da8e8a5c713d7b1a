package keymgr

import (
	"context"
	"errors"
	"fmt"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/blob"
	"github.com/holdfastdb/holdfast/keymgr/lease"
)

// DestroyBranchKey implements pb.KeyAdminServer. What the key sealed cannot be opened by anybody from the deletion of the
// document on, with or without the CMK. The index goes last, so that an interrupted call's key is still listed, and can
// be destroyed again.
func (s *Server) DestroyBranchKey(ctx context.Context, req *pb.KeyRef) (*pb.DestroyBranchKeyResponse, error) {
	id := keyID{req.GetProject(), req.GetBranch()}
	if err := id.check(); err != nil {
		return nil, invalid("%v", err)
	}
	if id.branch == "" {
		return nil, invalid("destroying a branch's key in project %s: the branch is missing", id.project)
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	if _, err := s.cfg.BlobStore.Head(ctx, id.indexed()); errors.Is(err, blob.ErrNotFound) {
		return &pb.DestroyBranchKeyResponse{}, nil
	} else if err != nil {
		return nil, s.callError(err)
	}
	if err := s.audit.append(ctx, id.event(Event{Event: "branch.key.destroyed", Outcome: "ok"})); err != nil {
		return nil, s.callError(err)
	}
	if err := s.cfg.BlobStore.Delete(ctx, id.document()); err != nil { // the commit point
		return nil, s.callError(fmt.Errorf("deleting %s: %w", id.document(), err))
	}
	if err := s.forgetKey(ctx, id); err != nil {
		return nil, s.callError(err)
	}
	if err := s.deleteReceipts(ctx, id); err != nil {
		return nil, s.callError(err)
	}
	if err := s.cfg.BlobStore.Delete(ctx, id.indexed()); err != nil {
		return nil, s.callError(fmt.Errorf("deleting %s: %w", id.indexed(), err))
	}
	s.cfg.Logger.Info("a branch's key was destroyed", "key", id.String())
	return &pb.DestroyBranchKeyResponse{}, nil
}

// forgetKey ends the key's leases and wipes its KEKs.
func (s *Server) forgetKey(ctx context.Context, id keyID) error {
	var ended []lease.Lease
	wiped := false
	s.withMachine(func(m *lease.Machine) {
		ended = m.Drop(id.String())
		if k := s.mu.keys[id]; k != nil {
			wiped = k.wipe()
		}
		delete(s.mu.keys, id)
		delete(s.mu.refused, id)
	})
	if wiped {
		s.scrub()
	}
	var events []Event
	for _, l := range ended {
		events = append(events, id.event(Event{Event: "lease.revoked", Outcome: "destroyed", Node: l.Node, Lease: l.ID}))
	}
	if len(events) == 0 {
		return nil
	}
	return s.audit.append(context.WithoutCancel(ctx), events...)
}

// deleteReceipts deletes the receipts of a key that is destroyed; the audit log keeps what became of it.
func (s *Server) deleteReceipts(ctx context.Context, id keyID) error {
	s.receipts.discard(id)
	var objects []string
	err := s.cfg.BlobStore.List(ctx, id.receipts(), func(i blob.Info) error { objects = append(objects, i.Key); return nil })
	if err != nil {
		return fmt.Errorf("listing receipts of %s: %w", id.words(), err)
	}
	for _, o := range objects {
		if err := s.cfg.BlobStore.Delete(ctx, o); err != nil {
			return fmt.Errorf("deleting receipt %s: %w", o, err)
		}
	}
	return nil
}

// discard closes the key's receipts, as they are. One that is being written is waited for: it would be there
// again after its deletion.
func (b *receiptBook) discard(id keyID) {
	b.keeping.Lock()
	defer b.keeping.Unlock()
	b.mu.Lock()
	defer b.mu.Unlock()
	kept := b.mu.open[:0]
	for _, o := range b.mu.open {
		if o.id != id {
			kept = append(kept, o)
		}
	}
	clear(b.mu.open[len(kept):])
	b.mu.open = kept
}
