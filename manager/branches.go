package manager

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"slices"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/rpc"
)

// ListBranches lists the branches that can be used, with their endpoints.
func (m *Manager) ListBranches(ctx context.Context, _ *pb.ListBranchesRequest) (*pb.ListBranchesResponse, error) {
	c, _, err := loadCluster(ctx, m.cfg.Store)
	if err != nil {
		return nil, rpc.Error(codes.Unavailable, nil, "%v", err)
	}
	resp := &pb.ListBranchesResponse{}
	for _, b := range c.Branches {
		resp.Branches = append(resp.Branches, m.describeBranch(b))
	}
	return resp, nil
}

func (m *Manager) describeBranch(b branchDoc) *pb.ManagedBranch {
	d := &pb.ManagedBranch{Id: b.ID, Project: b.Project, Name: b.Name, OwnKey: b.OwnKey}
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, s := range m.mu.endpoints {
		if s.doc.Project == b.Project && s.doc.Branch == b.ID {
			d.Endpoints = append(d.Endpoints, s.status())
		}
	}
	slices.SortFunc(d.Endpoints, func(a, b *pb.Endpoint) int { return cmp.Compare(a.Name, b.Name) })
	return d
}

// lockBranches waits for the turn to make or remove a branch: one at a time, since each has an initdb, and a
// name is to be given once.
func (m *Manager) lockBranches(ctx context.Context) (unlock func(), err error) {
	select {
	case <-m.started:
	case <-ctx.Done():
		return nil, rpc.Error(codes.Unavailable, nil, "the manager is starting: try again")
	}
	select {
	case m.branchTurn <- struct{}{}:
		return func() { <-m.branchTurn }, nil
	case <-ctx.Done():
		return nil, rpc.Error(codes.Unavailable, nil, "another branch is being made or removed, or a rehearsal runs: %v", ctx.Err())
	}
}

// CreateBranch makes a branch by initdb, with an endpoint of its name.
//
// Interrupted anywhere nothing half-made is used: until it is whole the branch stands among the leftovers, which
// are removed when this call fails, or at the manager's next start.
func (m *Manager) CreateBranch(ctx context.Context, r *pb.MakeBranchRequest) (*pb.ManagedBranch, error) {
	if !validName.MatchString(r.Name) {
		return nil, rpc.Error(codes.InvalidArgument, nil, "branch name %.80q: want 1 to 63 of [a-z0-9-], the first no hyphen", r.Name)
	}
	if r.Cmk != "" && !r.OwnKey {
		return nil, rpc.Error(codes.InvalidArgument, nil, "a branch without a key of its own is under its project's CMK")
	}
	unlock, err := m.lockBranches(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	b := branchDoc{ID: newID(), Project: r.Project, Name: r.Name, OwnKey: r.OwnKey}
	e, err := m.branchEndpoint(&b, r.Listen)
	if err != nil {
		return nil, err
	}
	if err := m.claimBranch(ctx, &b); err != nil {
		return nil, err
	}
	e.Project = b.Project
	err = m.makeBranch(ctx, b, e, r.Cmk, rand.Text(), true)
	if err == nil {
		err = m.publishBranch(ctx, b, e)
	}
	if err != nil {
		return nil, m.undoBranch(b, err)
	}
	return m.openBranch(ctx, b, e)
}

// branchEndpoint is the endpoint of a new branch.
func (m *Manager) branchEndpoint(b *branchDoc, listen string) (endpointDoc, error) {
	if listen == "" {
		var err error
		if listen, err = freeAddress(); err != nil {
			return endpointDoc{}, rpc.Error(codes.Unavailable, nil, "finding a free port of loopback: %v", err)
		}
	}
	if _, _, err := net.SplitHostPort(listen); err != nil {
		return endpointDoc{}, rpc.Error(codes.InvalidArgument, nil, "address %q: want HOST:PORT: %v", listen, err)
	}
	return endpointDoc{Name: b.Name, Branch: b.ID, Listen: listen, Running: true}, nil
}

func freeAddress() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	return l.Addr().String(), l.Close()
}

// claimBranch notes durably that the branch is about to be made: what is made of it can be found and removed
// from then on.
func (m *Manager) claimBranch(ctx context.Context, b *branchDoc) error {
	_, err := updateCluster(ctx, m.cfg.Store, func(c *cluster) error {
		switch {
		case b.Project == "" && len(c.Projects) == 1:
			b.Project = c.Projects[0].ID
		case b.Project == "":
			return rpc.Error(codes.InvalidArgument, nil, "there are %d projects: name one", len(c.Projects))
		case !slices.ContainsFunc(c.Projects, func(p projectDoc) bool { return p.ID == b.Project }):
			return rpc.Error(codes.NotFound, nil, "there is no project %q", b.Project)
		}
		if c.branch(b.Name) != nil || c.endpoint(b.Name) != nil {
			return rpc.Error(codes.AlreadyExists, nil, "there is a branch or an endpoint %s already", b.Name)
		}
		if slices.ContainsFunc(c.Leftovers, func(l branchDoc) bool { return l.Name == b.Name && l.ID != b.ID }) {
			// Its endpoint's folder has the name, and is about to be emptied.
			return rpc.Error(codes.Unavailable, nil, "an earlier branch %s is being removed: try again, or use another name", b.Name)
		}
		c.addLeftover(*b)
		return nil
	})
	return err
}

// makeBranch makes the branch's key, if it has its own, and its content. keep has the superuser's password kept, sealed,
// for `holdfast psql`.
func (m *Manager) makeBranch(ctx context.Context, b branchDoc, e endpointDoc, cmk, password string, keep bool) error {
	if b.OwnKey { // before anything of it is sealed
		if _, err := m.keymgr.CreateBranchKey(ctx, &pb.CreateBranchKeyRequest{Project: b.Project, Branch: b.ID, Cmk: cmk}); err != nil {
			return fmt.Errorf("making the key of branch %s: %w", b.Name, err)
		}
	}
	if keep {
		if err := m.sealPassword(ctx, b, password); err != nil {
			return err
		}
	}
	if err := m.initBranch(ctx, e, password); err != nil {
		return fmt.Errorf("making branch %s: %w", b.Name, err)
	}
	if _, err := m.pageserver.Attach(ctx, &pb.AttachRequest{Project: b.Project, Branch: b.ID}); err != nil {
		return fmt.Errorf("attaching branch %s to the pageserver: %w", b.Name, err)
	}
	return nil
}

// publishBranch is the commit point: from then on the branch is there. If the write's outcome is not known it
// looks: a branch that is there needs its endpoint run.
func (m *Manager) publishBranch(ctx context.Context, b branchDoc, e endpointDoc) error {
	_, err := updateCluster(ctx, m.cfg.Store, func(c *cluster) error {
		if slices.Contains(c.Branches, b) { // by a try of this call that was reported to have lost a race
			return nil
		}
		c.dropLeftover(b)
		c.Branches, c.Endpoints = append(c.Branches, b), append(c.Endpoints, e)
		return nil
	})
	if err == nil {
		return nil
	}
	c, _, loadErr := loadCluster(ctx, m.cfg.Store)
	if loadErr == nil && slices.Contains(c.Branches, b) {
		return nil
	}
	return errors.Join(err, loadErr)
}

// openBranch starts a new branch's endpoint.
func (m *Manager) openBranch(ctx context.Context, b branchDoc, e endpointDoc) (*pb.ManagedBranch, error) {
	s := m.addEndpoint(e)
	s.start()
	if err := s.waitReady(ctx, false); err != nil {
		return nil, rpc.Error(codes.Unavailable, nil, "branch %s is made, but its endpoint does not run: %v", b.Name, err)
	}
	return m.describeBranch(b), nil
}

func (m *Manager) addEndpoint(e endpointDoc) *supervisor {
	s := m.newEndpoint(e)
	m.mu.Lock()
	defer m.mu.Unlock()
	m.mu.endpoints[e.Name] = s
	return s
}

// undoTimeout bounds the removal of what a failed call has made; what is left of it goes at the next start.
const undoTimeout = time.Minute

// undoBranch removes what a failed call has made, and adds to its error what could not be removed.
func (m *Manager) undoBranch(b branchDoc, cause error) error {
	ctx, cancel := context.WithTimeout(context.Background(), undoTimeout) // who called may be gone
	defer cancel()
	if err := m.removeLeftover(ctx, b); err != nil {
		m.cfg.Log.Warn("what was made of a branch could not be removed; it is at the next start", "branch", b.ID, "error", err)
	}
	return asStatus(cause)
}

// DeleteBranch removes a branch for good. From its first write on the branch is among the leftovers: interrupted,
// the removal goes on at the next call or start.
func (m *Manager) DeleteBranch(ctx context.Context, r *pb.RemoveBranchRequest) (*pb.DeleteBranchResponse, error) {
	unlock, err := m.lockBranches(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	var b branchDoc
	_, err = updateCluster(ctx, m.cfg.Store, func(c *cluster) error {
		if i := slices.IndexFunc(c.Leftovers, func(l branchDoc) bool { return l.Name == r.Name }); i >= 0 && c.branch(r.Name) == nil {
			b = c.Leftovers[i]
			return nil
		}
		found := c.branch(r.Name)
		switch {
		case found == nil:
			return rpc.Error(codes.NotFound, nil, "there is no branch %q; `holdfast branch list` names them", r.Name)
		case c.holds(firstEndpoint, found.ID):
			return rpc.Error(codes.FailedPrecondition, nil, "branch %s is the one of endpoint %s, without which no cluster starts", r.Name, firstEndpoint)
		}
		b = *found
		c.retire(b)
		return nil
	})
	if err != nil {
		return nil, asStatus(err)
	}
	if err := m.removeLeftover(ctx, b); err != nil {
		return nil, rpc.Error(codes.Unavailable, nil, "branch %s is out of use, but not all of it could be removed: %v; try again", r.Name, err)
	}
	return &pb.DeleteBranchResponse{}, nil
}

// asStatus keeps a call's own error, and makes any other one Unavailable.
func asStatus(err error) error {
	if _, ok := status.FromError(err); ok {
		return err
	}
	return rpc.Error(codes.Unavailable, nil, "%v", err)
}
