package pageserver

import (
	"context"

	"google.golang.org/grpc/codes"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/rpc"
	"github.com/holdfastdb/holdfast/pageserver/timeline"
)

// DeleteBranch stops serving a branch and deletes all that this server keeps of it. The manifest goes first:
// from then on there is no branch, whatever is interrupted.
func (s *Server) DeleteBranch(ctx context.Context, r *pb.DeleteBranchRequest) (*pb.DeleteBranchResponse, error) {
	cfg := s.timelineConfig(r.Project, r.Branch)
	if err := cfg.Validate(); err != nil {
		return nil, rpc.Error(codes.InvalidArgument, nil, "%v", err)
	}
	s.imports.Lock() // one that is under way would put it back
	defer s.imports.Unlock()
	name := branchName{r.Project, r.Branch}
	b, err := s.beginDeleting(name)
	if err != nil {
		return nil, err
	}
	gone := b == nil
	defer func() { s.endDeleting(name, gone) }()
	if b != nil {
		b.stop()
		select {
		case <-b.done:
			gone = true
		case <-ctx.Done(): // the next call waits for it again: nothing is deleted under who may write
			return nil, rpc.Error(codes.Unavailable, nil, "waiting until branch %s has stopped: %v", r.Branch, ctx.Err())
		}
	}
	if err := timeline.Delete(ctx, cfg); err != nil {
		return nil, rpc.Error(codes.Unavailable, nil, "deleting branch %s: %v", r.Branch, err)
	}
	s.log.Info("branch deleted", "project", r.Project, "branch", r.Branch)
	return &pb.DeleteBranchResponse{}, nil
}

// beginDeleting takes a branch out of service: until endDeleting it cannot be attached.
func (s *Server) beginDeleting(name branchName) (*branch, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.mu.closed || s.mu.deleting[name] {
		return nil, rpc.Error(codes.Unavailable, nil, "branch %s is being deleted, or this page server is shutting down", name.branch)
	}
	s.mu.deleting[name] = true
	return s.mu.branches[name], nil
}

// endDeleting forgets the branch if it has stopped.
func (s *Server) endDeleting(name branchName, gone bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.mu.deleting, name)
	if gone {
		delete(s.mu.branches, name)
	}
}
