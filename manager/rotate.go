package manager

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/blob"
	"github.com/holdfastdb/holdfast/internal/keyloss"
	"github.com/holdfastdb/holdfast/internal/keyring"
	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/internal/rpc"
	"github.com/holdfastdb/holdfast/internal/seal"
)

// A rotation of the KEK is the key manager's new version, and then every DEK wrapped under it:
// those of the safekeepers' WAL, of the page server's layers, and of the manager's own secrets.
// Each part does its own, and may be asked again at any time; the manager goes on until none needs an
// older version, and tells what does otherwise.

const (
	// rewrapPatience is for how long a rotation waits until nothing needs an older version: what is
	// in work comes in under the version it was made with.
	rewrapPatience = 2 * time.Minute
	rewrapPause    = 500 * time.Millisecond
	// partTimeout bounds one call to one part.
	partTimeout = 30 * time.Second
	// ingestPatience is for how long the page server may be behind the safekeepers before it is said
	// that what it needs is not known.
	ingestPatience = 10 * time.Second
)

const useSecrets = "secrets"

// RotateKEK implements pb.ManagerServer.
func (m *Manager) RotateKEK(ctx context.Context, r *pb.ManagerRotateRequest) (*pb.KeyUsesResponse, error) {
	unlock, err := m.lockBranches(ctx) // a branch that is being made has DEKs that nobody would ask for
	if err != nil {
		return nil, err
	}
	defer unlock()
	if !r.FinishOnly {
		if _, err := m.keyAdmin.RotateKEK(ctx, r.Key); err != nil {
			return nil, err
		}
	}
	return m.finishRotation(ctx, r.Key)
}

// finishRotation re-wraps until nothing needs an older version, or patience is over.
func (m *Manager) finishRotation(ctx context.Context, key *pb.KeyRef) (*pb.KeyUsesResponse, error) {
	deadline := time.Now().Add(rewrapPatience)
	var rewrapped, written int64
	for {
		k, err := m.keyOf(ctx, key)
		if err != nil {
			return nil, err
		}
		n, size, errs := m.rewrapAll(ctx, k)
		if len(errs) > 0 {
			// Branches cannot be made or removed meanwhile, of other keys either: no patience with one that is revoked.
			if err := m.mayRewrap(ctx, key); err != nil {
				return nil, err
			}
		}
		rewrapped, written = rewrapped+n, written+size
		uses := m.usesOf(ctx, k)
		for _, err := range errs {
			uses.Errors = append(uses.Errors, err.Error())
		}
		if len(uses.Errors) > 0 {
			uses.MayBeRetired = nil
		}
		uses.Rewrapped, uses.BytesWritten = rewrapped, written
		if len(uses.Errors) == 0 && onlyCurrent(uses) || time.Now().After(deadline) {
			return uses, nil
		}
		select {
		case <-ctx.Done():
			return uses, nil
		case <-time.After(rewrapPause):
		}
	}
}

// mayRewrap fails if a key cannot be used.
func (m *Manager) mayRewrap(ctx context.Context, ref *pb.KeyRef) error {
	st, err := m.keymgr.KeyStatus(ctx, &pb.KeyStatusRequest{Project: ref.GetProject(), Branch: ref.GetBranch()})
	if err != nil || pb.KeyUsable(st.State) {
		return nil // what did not work is tried again
	}
	return rpc.Error(codes.PermissionDenied, &pb.ErrorDetail{Reason: pb.ErrorDetail_KEY_REVOKED}, "no DEK can be wrapped again now: %v", keyloss.Of(ref.GetProject(), st))
}

func onlyCurrent(r *pb.KeyUsesResponse) bool {
	return !slices.ContainsFunc(r.Uses, func(u *pb.KeyUse) bool { return u.KekVersion != r.Versions.Current })
}

// key is a key and the branches whose DEKs are under it.
type key struct {
	versions *pb.KeyVersionsResponse
	branches []branchDoc
}

// keyOf finds the key that a reference names.
func (m *Manager) keyOf(ctx context.Context, ref *pb.KeyRef) (*key, error) {
	v, err := m.keyAdmin.KeyVersions(ctx, ref)
	if err != nil {
		return nil, err
	}
	c, _, err := loadCluster(ctx, m.cfg.Store)
	if err != nil {
		return nil, rpc.Error(codes.Unavailable, nil, "%v", err)
	}
	project, branch, own := strings.Cut(v.Key, "/")
	k := &key{versions: v}
	for _, b := range c.Branches {
		if b.Project == project && (own && b.ID == branch || !own && !b.OwnKey) {
			k.branches = append(k.branches, b)
		}
	}
	return k, nil
}

// rewrapAll asks every part once.
func (m *Manager) rewrapAll(ctx context.Context, k *key) (deks, size int64, errs []error) {
	for _, b := range k.branches {
		for _, part := range []func(context.Context, branchDoc) (*pb.RewrapBranchResponse, error){m.rewrapWAL, m.rewrapLayers, m.rewrapPassword} {
			r, err := part(ctx, b)
			if err != nil {
				errs = append(errs, fmt.Errorf("re-wrapping keys of branch %s: %w", b.Name, err))
			}
			deks += r.GetRewrapped()
			size += r.GetBytesWritten()
		}
	}
	return deks, size, errs
}

// rewrapWAL asks the safekeeper that leads the branch's group.
func (m *Manager) rewrapWAL(ctx context.Context, b branchDoc) (*pb.RewrapBranchResponse, error) {
	var errs []error
	for i, client := range m.safekeepers {
		callCtx, cancel := context.WithTimeout(ctx, partTimeout)
		r, err := client.RewrapBranch(callCtx, &pb.RewrapBranchRequest{Project: b.Project, Branch: b.ID})
		cancel()
		if err == nil {
			return r, nil
		}
		errs = append(errs, fmt.Errorf("safekeeper at %s: %w", m.cfg.Safekeepers[i], err))
	}
	return nil, errors.Join(errs...)
}

func (m *Manager) rewrapLayers(ctx context.Context, b branchDoc) (*pb.RewrapBranchResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, partTimeout)
	defer cancel()
	return m.pageserver.RewrapBranch(ctx, &pb.RewrapBranchRequest{Project: b.Project, Branch: b.ID})
}

// rewrapPassword replaces the wrapped DEK in the header of the superuser's sealed password.
func (m *Manager) rewrapPassword(ctx context.Context, b branchDoc) (*pb.RewrapBranchResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, partTimeout)
	defer cancel()
	name := passwordKey(b.Project, b.ID)
	sealed, tag, err := m.cfg.Store.Get(ctx, name)
	if errors.Is(err, blob.ErrNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	old, err := seal.WrappedDEK(sealed)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	fresh, version, err := m.cfg.Ring.Rewrap(ctx, []keyring.Wrapped{{Context: passwordContext(b.Project, b.ID), DEK: old}})
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	r := &pb.RewrapBranchResponse{KekVersion: version}
	if bytes.Equal(old, fresh[0]) {
		return r, nil
	}
	if sealed, err = seal.ReplaceWrappedDEK(sealed, fresh[0]); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	// A lost race, or a write whose outcome is not known: the next turn looks.
	if _, err = m.cfg.Store.Swap(ctx, name, sealed, tag); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	r.Rewrapped, r.BytesWritten = 1, int64(len(sealed))
	return r, nil
}

// KeyUses implements pb.ManagerServer.
func (m *Manager) KeyUses(ctx context.Context, ref *pb.KeyRef) (*pb.KeyUsesResponse, error) {
	k, err := m.keyOf(ctx, ref)
	if err != nil {
		return nil, err
	}
	busy := true
	select {
	case <-m.started:
		select {
		case m.branchTurn <- struct{}{}:
			defer func() { <-m.branchTurn }()
			busy = false
		default:
		}
	default:
	}
	uses := m.usesOf(ctx, k)
	if busy {
		uses.Errors = append(uses.Errors, "a branch is being made or removed, or a key rotated: what that needs is not known")
		uses.MayBeRetired = nil
	}
	return uses, nil
}

// usesOf asks every part what it needs. Nothing may be retired unless all answered.
func (m *Manager) usesOf(ctx context.Context, k *key) *pb.KeyUsesResponse {
	resp := &pb.KeyUsesResponse{Versions: k.versions}
	for _, b := range k.branches {
		for _, part := range []func(context.Context, branchDoc) ([]*pb.KeyUse, error){m.usesOfWAL, m.usesOfLayers, m.usesOfPassword} {
			uses, err := part(ctx, b)
			resp.Uses = append(resp.Uses, uses...)
			if err != nil {
				resp.Errors = append(resp.Errors, fmt.Sprintf("branch %s: %v", b.Name, err))
			}
		}
	}
	slices.SortStableFunc(resp.Uses, func(a, b *pb.KeyUse) int {
		return cmp.Or(cmp.Compare(a.Branch, b.Branch), cmp.Compare(a.What, b.What), cmp.Compare(a.KekVersion, b.KekVersion))
	})
	resp.MayBeRetired = retirable(resp)
	return resp
}

// retirable lists the versions that nothing uses.
func retirable(r *pb.KeyUsesResponse) (versions []uint32) {
	used := map[uint32]bool{r.Versions.Current: true}
	for _, u := range r.Uses {
		used[u.KekVersion] = true
	}
	if len(r.Errors) > 0 || used[0] { // 0: of DEKs whose version is not known
		return nil
	}
	for _, v := range r.Versions.Keks {
		if !used[v.Version] {
			versions = append(versions, v.Version)
		}
	}
	return versions
}

// usesOfWAL asks every safekeeper: one that is behind still needs what the others do not. The replicas have the
// same DEKs, so of each version the most that one of them counts is told.
func (m *Manager) usesOfWAL(ctx context.Context, b branchDoc) (uses []*pb.KeyUse, err error) {
	most := make(map[uint32]*pb.KeyUse)
	for i, client := range m.safekeepers {
		callCtx, cancel := context.WithTimeout(ctx, partTimeout)
		r, callErr := client.KeyUse(callCtx, &pb.KeyUseRequest{Project: b.Project, Branch: b.ID})
		cancel()
		if callErr != nil {
			err = errors.Join(err, fmt.Errorf("safekeeper at %s: %w", m.cfg.Safekeepers[i], callErr))
		}
		for _, u := range r.GetUses() {
			if have := most[u.KekVersion]; have == nil || have.Deks < u.Deks {
				most[u.KekVersion] = u
			}
		}
	}
	for _, u := range most {
		uses = append(uses, u)
	}
	return uses, err
}

// usesOfLayers asks the page server, once it has read all WAL that there is now: WAL may carry messages with DEKs of
// their own, of which nobody knows before.
func (m *Manager) usesOfLayers(ctx context.Context, b branchDoc) ([]*pb.KeyUse, error) {
	ctx, cancel := context.WithTimeout(ctx, partTimeout)
	defer cancel()
	if err := m.waitIngested(ctx, b); err != nil {
		return nil, err
	}
	r, err := m.pageserver.KeyUse(ctx, &pb.KeyUseRequest{Project: b.Project, Branch: b.ID})
	if err != nil {
		return nil, fmt.Errorf("pageserver: %w", err)
	}
	return r.Uses, nil
}

func (m *Manager) waitIngested(ctx context.Context, b branchDoc) error {
	ctx, cancel := context.WithTimeout(ctx, ingestPatience)
	defer cancel()
	end, err := m.endOfLog(ctx, b)
	if err != nil {
		return err
	}
	for {
		st, err := m.pageserver.Status(ctx, &pb.PageServerStatusRequest{})
		if err != nil {
			return fmt.Errorf("pageserver: %w", err)
		}
		var at pg.LSN
		for _, s := range st.Branches {
			if s.Project == b.Project && s.Branch == b.ID {
				at = pg.LSN(s.IngestedLsn)
			}
		}
		if at >= end {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("pageserver: it has read WAL up to %v of %v: what the rest needs is not known", at, end)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// endOfLog is where the log ends by what the safekeepers that answer say.
func (m *Manager) endOfLog(ctx context.Context, b branchDoc) (end pg.LSN, err error) {
	answered := 0
	for i, client := range m.safekeepers {
		st, callErr := client.Status(ctx, &pb.SafekeeperStatusRequest{})
		if callErr != nil {
			err = errors.Join(err, fmt.Errorf("safekeeper at %s: %w", m.cfg.Safekeepers[i], callErr))
			continue
		}
		answered++
		for _, s := range st.Branches {
			if s.Project == b.Project && s.Branch == b.ID {
				end = max(end, pg.LSN(s.EndLsn))
			}
		}
	}
	if answered > len(m.safekeepers)/2 { // one of them has all that was acknowledged
		return end, nil
	}
	return end, err
}

func (m *Manager) usesOfPassword(ctx context.Context, b branchDoc) ([]*pb.KeyUse, error) {
	ctx, cancel := context.WithTimeout(ctx, partTimeout)
	defer cancel()
	sealed, _, err := m.cfg.Store.Get(ctx, passwordKey(b.Project, b.ID))
	if errors.Is(err, blob.ErrNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	wrapped, err := seal.WrappedDEK(sealed)
	if err != nil {
		return nil, err
	}
	version, err := seal.KEKVersion(wrapped)
	if err != nil {
		return nil, err
	}
	return []*pb.KeyUse{{Project: b.Project, Branch: b.ID, What: useSecrets, KekVersion: version, Deks: 1}}, nil
}

// rotateWhenDue makes new versions of KEKs that have reached the age at which that is wanted, and finishes rotations
// that were interrupted.
func (m *Manager) rotateWhenDue(ctx context.Context) {
	defer close(m.rotateDone)
	tick := time.NewTicker(rotateLookEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if err := m.rotateDue(ctx, time.Now()); err != nil && ctx.Err() == nil {
			m.cfg.Log.Warn("keys could not all be rotated that are due; it is tried again", "error", err)
		}
	}
}

// rotateLookEvery is how often it is looked which keys are due. The age that the check has to find is of days.
const rotateLookEvery = time.Minute

func (m *Manager) rotateDue(ctx context.Context, now time.Time) error {
	c, _, err := loadCluster(ctx, m.cfg.Store)
	if err != nil {
		return err
	}
	var refs []*pb.KeyRef
	for _, p := range c.Projects {
		refs = append(refs, &pb.KeyRef{Project: p.ID})
	}
	for _, b := range c.Branches {
		if b.OwnKey {
			refs = append(refs, &pb.KeyRef{Project: b.Project, Branch: b.ID})
		}
	}
	var errs []error
	for _, ref := range refs {
		v, err := m.keyAdmin.KeyVersions(ctx, ref)
		switch {
		case err != nil:
		case due(v, m.cfg.RotateEvery, now):
			m.cfg.Log.Info("the KEK has reached the age at which it is rotated", "key", v.Key, "version", v.Current)
			_, err = m.RotateKEK(ctx, &pb.ManagerRotateRequest{Key: ref})
		case len(v.Keks) > 1:
			err = m.finishInterrupted(ctx, ref)
		}
		if status.Code(err) != codes.PermissionDenied { // a key that is revoked is not rotated
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// finishInterrupted goes on with a rotation whose caller went away.
func (m *Manager) finishInterrupted(ctx context.Context, ref *pb.KeyRef) error {
	k, err := m.keyOf(ctx, ref)
	if err != nil || onlyCurrent(m.usesOf(ctx, k)) {
		return err
	}
	_, err = m.RotateKEK(ctx, &pb.ManagerRotateRequest{Key: ref, FinishOnly: true})
	return err
}

// due tells whether a key's current KEK is to be replaced: by the key's own rule or, without one, by the default.
func due(v *pb.KeyVersionsResponse, byDefault time.Duration, now time.Time) bool {
	every := cmp.Or(time.Duration(v.RotateEveryMs)*time.Millisecond, byDefault)
	if every == 0 {
		return false
	}
	for _, k := range v.Keks {
		if k.Version == v.Current {
			return k.CreatedUnixMs > 0 && now.Sub(time.UnixMilli(k.CreatedUnixMs)) >= every
		}
	}
	return false
}
