package safekeeper

import (
	"context"
	"errors"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/keyring"
	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/internal/rpc"
	"github.com/holdfastdb/holdfast/internal/seal"
	"github.com/holdfastdb/holdfast/safekeeper/group"
	"github.com/holdfastdb/holdfast/safekeeper/walstate"
	"github.com/holdfastdb/holdfast/safekeeper/walstore"
)

func fenced(n walstate.Name, mine, now uint64) error {
	return rpc.Error(codes.FailedPrecondition, &pb.ErrorDetail{Reason: pb.ErrorDetail_FENCED},
		"branch %s: epoch %d is fenced, epoch %d was opened", n, mine, now)
}

func gap(n walstate.Name, begin, end pg.LSN) error {
	return rpc.Error(codes.FailedPrecondition, &pb.ErrorDetail{Reason: pb.ErrorDetail_GAP, EndLsn: uint64(end)},
		"branch %s: WAL from %s does not continue the log, which ends at %s", n, begin, end)
}

func badWAL(n walstate.Name, begin pg.LSN, err error) error {
	return rpc.Error(codes.InvalidArgument, &pb.ErrorDetail{Reason: pb.ErrorDetail_BAD_WAL},
		"branch %s: the bytes from %s are not whole, CRC-valid WAL records: %v", n, begin, err)
}

func truncated(n walstate.Name, from, begin pg.LSN) error {
	return rpc.Error(codes.FailedPrecondition, &pb.ErrorDetail{Reason: pb.ErrorDetail_TRUNCATED, BeginLsn: uint64(begin)},
		"branch %s: WAL at %s is in layers and no longer kept here; the log begins at %s", n, from, begin)
}

func noBranch(n walstate.Name) error {
	return status.Errorf(codes.NotFound, "branch %s does not exist on the safekeepers", n)
}

// failure makes an error of this program into what a caller gets.
func (s *Server) failure(g *group.Group, n walstate.Name, err error) error {
	switch {
	case errors.Is(err, group.ErrNotLeader):
		lead := g.Leader()
		if lead == s.cfg.NodeID {
			lead = 0 // not ready yet, or not any more
		}
		return rpc.Error(codes.Unavailable, &pb.ErrorDetail{Reason: pb.ErrorDetail_NOT_LEADER, Leader: s.cfg.Peers[lead]},
			"safekeeper %d does not lead the group of branch %s", s.cfg.NodeID, n)
	case errors.Is(err, group.ErrFull), errors.Is(err, group.ErrStopped):
		if cause := g.Err(); cause != nil {
			err = cause
		}
		return rpc.Error(codes.Unavailable, &pb.ErrorDetail{Reason: pb.ErrorDetail_NOT_LEADER},
			"safekeeper %d, branch %s: %v", s.cfg.NodeID, n, err)
	case errors.Is(err, keyring.ErrRevoked):
		return rpc.Error(codes.PermissionDenied, &pb.ErrorDetail{Reason: pb.ErrorDetail_KEY_REVOKED}, "branch %s: %v", n, err)
	case errors.Is(err, keyring.ErrUnreachable), errors.Is(err, seal.ErrWiped):
		return rpc.Error(codes.Unavailable, &pb.ErrorDetail{Reason: pb.ErrorDetail_KEY_UNREACHABLE}, "branch %s: %v", n, err)
	case errors.Is(err, walstore.ErrDamaged):
		return status.Errorf(codes.DataLoss, "safekeeper %d, branch %s: %v", s.cfg.NodeID, n, err)
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return status.FromContextError(err).Err()
	}
	if _, ok := status.FromError(err); ok {
		return err
	}
	return status.Errorf(codes.Unavailable, "safekeeper %d, branch %s: %v", s.cfg.NodeID, n, err)
}
