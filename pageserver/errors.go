package pageserver

import (
	"context"
	"errors"
	"fmt"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/blob"
	"github.com/holdfastdb/holdfast/internal/keyring"
	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/internal/rpc"
	"github.com/holdfastdb/holdfast/internal/seal"
	"github.com/holdfastdb/holdfast/internal/walclient"
	"github.com/holdfastdb/holdfast/pageserver/pageread"
	"github.com/holdfastdb/holdfast/pageserver/redo"
	"github.com/holdfastdb/holdfast/pageserver/timeline"
)

// A damage stops a branch for good: its WAL or its layers are not what they should be, and
// trying again would read the same.
type damage struct {
	what string
	err  error
}

func (d *damage) Error() string { return fmt.Sprintf("%s: %v", d.what, d.err) }
func (d *damage) Unwrap() error { return d.err }

// status makes an error of a branch into the answer of a call.
func (b *branch) status(err error) error {
	if err == nil {
		return nil
	}
	if _, ok := status.FromError(err); ok {
		return err
	}
	code, detail := classify(err)
	return rpc.Error(code, detail, "branch %s: %v", b.name.branch, err)
}

func classify(err error) (codes.Code, *pb.ErrorDetail) {
	var unsupported *redo.UnsupportedError
	var page *pageread.Error
	var bad *damage
	switch {
	case errors.Is(err, keyring.ErrRevoked):
		return codes.PermissionDenied, &pb.ErrorDetail{Reason: pb.ErrorDetail_KEY_REVOKED}
	case errors.Is(err, keyring.ErrUnreachable), errors.Is(err, seal.ErrWiped): // past the lease's end: why, the next lease tells
		return codes.Unavailable, &pb.ErrorDetail{Reason: pb.ErrorDetail_KEY_UNREACHABLE}
	case errors.As(err, &unsupported):
		return codes.FailedPrecondition, &pb.ErrorDetail{Reason: pb.ErrorDetail_UNSUPPORTED_RECORD}
	case errors.Is(err, walclient.ErrTruncated):
		return codes.DataLoss, &pb.ErrorDetail{Reason: pb.ErrorDetail_TRUNCATED}
	case errors.As(err, &bad):
		return codes.DataLoss, &pb.ErrorDetail{Reason: pb.ErrorDetail_BAD_WAL}
	case errors.As(err, &page):
		return codes.DataLoss, nil
	case errors.Is(err, timeline.ErrTooOld):
		return codes.FailedPrecondition, &pb.ErrorDetail{Reason: pb.ErrorDetail_TRUNCATED}
	case errors.Is(err, blob.ErrNotFound):
		return codes.NotFound, nil
	case errors.Is(err, context.Canceled):
		return codes.Canceled, nil
	case errors.Is(err, context.DeadlineExceeded):
		return codes.DeadlineExceeded, nil
	}
	return codes.Unavailable, nil
}

func lateError(b *branch, want, have pg.LSN) error {
	return rpc.Error(codes.Unavailable, nil, "branch %s: waiting for %v, WAL is ingested up to %v", b.name.branch, want, have)
}
