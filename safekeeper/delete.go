package safekeeper

import (
	"context"
	"errors"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/safekeeper/walstate"
)

// DeleteBranch implements pb.SafekeeperServer. The branch's WAL stays in log files, sealed, until these
// are let go; nobody can find it there any more.
func (s *Server) DeleteBranch(ctx context.Context, req *pb.DeleteBranchRequest) (*pb.DeleteBranchResponse, error) {
	n, err := checkName(req.GetProject(), req.GetBranch())
	if err != nil {
		return nil, err
	}
	r, err := s.do(ctx, n, walstate.Command{Kind: walstate.KindDeleteBranch})
	switch {
	case status.Code(err) == codes.NotFound: // there is none, or no more
		return &pb.DeleteBranchResponse{}, nil
	case err != nil:
		return nil, err
	case r.Err != nil && !errors.Is(r.Err, walstate.ErrNoBranch):
		return nil, status.Errorf(codes.Internal, "deleting branch %s: %v", n, r.Err)
	}
	_, gw := s.groupOf(n)
	gw.Lock()
	w := gw.writers[r.Command.Branch]
	delete(gw.writers, r.Command.Branch)
	gw.Unlock()
	if w != nil {
		go w.leave()
	}
	s.log.Info("branch deleted", "project", n.Project, "branch", n.Branch)
	return &pb.DeleteBranchResponse{}, nil
}
