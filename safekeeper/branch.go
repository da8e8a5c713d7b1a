package safekeeper

import (
	"context"
	"errors"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/internal/seal"
	"github.com/holdfastdb/holdfast/safekeeper/group"
	"github.com/holdfastdb/holdfast/safekeeper/walstate"
)

// commandTimeout bounds a command other than an append.
const commandTimeout = 10 * time.Second

// maxNode bounds the name of a compute, in bytes.
const maxNode = 256

func checkName(project, branch string) (walstate.Name, error) {
	n := walstate.Name{Project: project, Branch: branch}
	if err := (seal.Context{Purpose: seal.PurposeWAL, Project: project, Branch: branch, Object: "x"}).Validate(); err != nil {
		return n, status.Errorf(codes.InvalidArgument, "branch %q of project %q: %v", branch, project, err)
	}
	return n, nil
}

// do applies a command to a branch that exists.
func (s *Server) do(ctx context.Context, n walstate.Name, c walstate.Command) (walstate.Result, error) {
	ctx, cancel := context.WithTimeout(ctx, commandTimeout)
	defer cancel()
	g, _ := s.groupOf(n)
	if c.Kind != walstate.KindCreateBranch {
		if _, err := g.Leadership(); err != nil {
			return walstate.Result{}, s.failure(g, n, err)
		}
		b, err := lookup(g, n)
		if err != nil {
			return walstate.Result{}, err
		}
		c.Branch = b.No
	}
	r, err := g.Do(ctx, c)
	if err != nil {
		return r, s.failure(g, n, err)
	}
	return r, nil
}

// branchView is a copy of what a branch is at one moment.
type branchView struct {
	No                  uint32
	Epoch               uint64
	Start, End, Durable pg.LSN
	Held                pg.LSN // End, or where pieces of a record end that go on from there
}

func lookup(g *group.Group, n walstate.Name) (v branchView, err error) {
	err = noBranch(n)
	g.View(func(st *walstate.State) {
		if b := st.Lookup(n); b != nil {
			v, err = viewOf(b), nil
		}
	})
	return v, err
}

func viewOf(b *walstate.Branch) branchView {
	return branchView{No: b.No, Epoch: b.Epoch, Start: b.Start, End: b.End, Durable: b.Durable, Held: max(b.End, b.Held)}
}

// CreateBranch implements pb.SafekeeperServer.
func (s *Server) CreateBranch(ctx context.Context, req *pb.CreateBranchRequest) (*pb.CreateBranchResponse, error) {
	n, err := checkName(req.GetProject(), req.GetBranch())
	if err != nil {
		return nil, err
	}
	start := pg.LSN(req.GetStartLsn())
	if start == 0 || start != start.Align() {
		return nil, status.Errorf(codes.InvalidArgument, "branch %s: no log can begin at %s", n, start)
	}
	r, err := s.do(ctx, n, walstate.Command{Kind: walstate.KindCreateBranch, Name: n, Begin: start})
	if err != nil {
		return nil, err
	}
	if errors.Is(r.Err, walstate.ErrOtherStart) {
		return nil, status.Errorf(codes.AlreadyExists, "branch %s exists, and its log does not begin at %s", n, start)
	}
	return &pb.CreateBranchResponse{}, nil
}

// OpenEpoch implements pb.SafekeeperServer (W2).
func (s *Server) OpenEpoch(ctx context.Context, req *pb.OpenEpochRequest) (*pb.OpenEpochResponse, error) {
	n, err := checkName(req.GetProject(), req.GetBranch())
	if err != nil {
		return nil, err
	}
	if len(req.GetNode()) > maxNode {
		return nil, status.Errorf(codes.InvalidArgument, "branch %s: the node's name has %d bytes, at most %d are possible", n, len(req.GetNode()), maxNode)
	}
	r, err := s.do(ctx, n, walstate.Command{Kind: walstate.KindOpenEpoch, Node: req.GetNode()})
	if err != nil {
		return nil, err
	}
	if r.Err != nil {
		return nil, noBranch(n)
	}
	s.log.Info("epoch opened", "project", n.Project, "branch", n.Branch, "epoch", r.Epoch, "node", req.GetNode(), "end", r.End)
	return &pb.OpenEpochResponse{Epoch: r.Epoch, StartLsn: uint64(r.Start), EndLsn: uint64(r.End)}, nil
}

// ReportDurable implements pb.SafekeeperServer.
func (s *Server) ReportDurable(ctx context.Context, req *pb.ReportDurableRequest) (*pb.ReportDurableResponse, error) {
	n, err := checkName(req.GetProject(), req.GetBranch())
	if err != nil {
		return nil, err
	}
	r, err := s.do(ctx, n, walstate.Command{Kind: walstate.KindDurable, Begin: pg.LSN(req.GetLsn())})
	switch {
	case err != nil:
		return nil, err
	case errors.Is(r.Err, walstate.ErrNoBranch):
		return nil, noBranch(n)
	case r.Err != nil:
		return nil, status.Errorf(codes.InvalidArgument, "branch %s: WAL at %s cannot be durable: the log does not reach it", n, pg.LSN(req.GetLsn()))
	}
	return &pb.ReportDurableResponse{}, nil
}

// Status implements pb.SafekeeperServer.
func (s *Server) Status(context.Context, *pb.SafekeeperStatusRequest) (*pb.SafekeeperStatusResponse, error) {
	out := &pb.SafekeeperStatusResponse{NodeId: s.cfg.NodeID}
	for i, g := range s.groups {
		st := g.Status()
		first, err := g.Store().FirstIndex()
		if err != nil {
			return nil, err
		}
		out.Groups = append(out.Groups, &pb.GroupStatus{Group: uint64(i), Term: st.Term, Leader: st.Lead, Commit: st.Commit,
			Applied: st.Applied, FirstIndex: first})
		out.DiskBytes += uint64(g.Store().Bytes())
		g.View(func(state *walstate.State) {
			for _, b := range state.Branches() {
				out.Branches = append(out.Branches, &pb.BranchStatus{Project: b.Name.Project, Branch: b.Name.Branch, Epoch: b.Epoch,
					StartLsn: uint64(b.Start), EndLsn: uint64(b.End), DurableLsn: uint64(b.Durable)})
			}
		})
	}
	return out, nil
}
