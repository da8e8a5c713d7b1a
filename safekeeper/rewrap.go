package safekeeper

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/keyring"
	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/internal/seal"
	"github.com/holdfastdb/holdfast/safekeeper/group"
	"github.com/holdfastdb/holdfast/safekeeper/walstate"
)

const useWAL = "WAL"

// made is a DEK that a writer made, and where the log ended then.
type made struct {
	object  string
	version uint32 // of the KEK
	at      pg.LSN
}

// noteMade remembers a DEK of which no append may have been applied yet.
func (w *writer) noteMade(object string, wrapped []byte) {
	version, err := seal.KEKVersion(wrapped)
	if err != nil {
		version = 0
	}
	w.made = append(w.unapplied(), made{object, version, w.tail})
}

// unapplied lists the DEKs that the branch's index may not have, and that may still come into it: those of
// which all that is applied is from before, and the one in use.
func (w *writer) unapplied() (list []made) {
	b, err := lookup(w.g, w.name)
	for _, m := range w.made {
		if err != nil || b.End <= m.at || w.key != nil && m.object == w.context.Object {
			list = append(list, m)
		}
	}
	return list
}

// dropKey has the next append begin a segment, under a DEK of the KEK's current version.
func (w *writer) dropKey() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.key = nil
}

// KeyUse implements pb.SafekeeperServer: which versions of the KEK the WAL's DEKs are under, as
// far as this replica has applied. The leader's answer has what is on its way as well; where no
// replica leads, there is none.
func (s *Server) KeyUse(_ context.Context, req *pb.KeyUseRequest) (*pb.KeyUseResponse, error) {
	resp := &pb.KeyUseResponse{}
	for i, g := range s.groups {
		if g.Leader() == 0 {
			return nil, s.failure(g, walstate.Name{Project: req.GetProject(), Branch: req.GetBranch()}, group.ErrNotLeader)
		}
		// In this order: what a writer has had applied since is in the index.
		inFlight, err := s.writerKeys(i)
		if err != nil {
			return nil, err
		}
		g.View(func(st *walstate.State) {
			for _, b := range st.Branches() {
				if (req.GetProject() == "" || req.GetProject() == b.Name.Project) && (req.GetBranch() == "" || req.GetBranch() == b.Name.Branch) {
					resp.Uses = append(resp.Uses, usesOf(b, inFlight[b.No])...)
				}
			}
		})
	}
	return resp, nil
}

// writerKeys are the DEKs of a group's writers of which no append may be applied yet, by branch.
func (s *Server) writerKeys(i int) (map[uint32][]made, error) {
	g, gw := s.groups[i], &s.writers[i]
	lead, err := g.Leadership()
	if err != nil && g.Leader() == s.cfg.NodeID {
		return nil, s.failure(g, walstate.Name{}, err) // it leads, and has not applied what others left it
	}
	keys := make(map[uint32][]made)
	gw.Lock()
	var writers map[uint32]*writer
	if lead != nil && gw.lead == lead {
		writers = maps.Clone(gw.writers)
	}
	gw.Unlock()
	for no, w := range writers {
		w.mu.Lock() // waits for a DEK that is being made
		keys[no] = w.unapplied()
		w.mu.Unlock()
	}
	return keys, nil
}

func usesOf(b *walstate.Branch, inFlight []made) (list []*pb.KeyUse) {
	versions := make(map[uint32]int64)
	known := make(map[string]bool)
	for _, d := range b.DEKs {
		known[d.Object] = true
		v, err := seal.KEKVersion(d.Wrapped)
		if err != nil {
			v = 0
		}
		versions[v]++
	}
	for _, m := range inFlight {
		if !known[m.object] {
			versions[m.version]++
		}
	}
	if b.Unindexed > 0 {
		versions[0]++
	}
	for v, n := range versions {
		list = append(list, &pb.KeyUse{Project: b.Name.Project, Branch: b.Name.Branch, What: useWAL, KekVersion: v, Deks: n})
	}
	return list
}

// RewrapBranch implements pb.SafekeeperServer. It is for the leader. The WAL stays as it is; a
// command of some KB for each 256 DEKs tells all replicas their new forms.
func (s *Server) RewrapBranch(ctx context.Context, req *pb.RewrapBranchRequest) (*pb.RewrapBranchResponse, error) {
	n, err := checkName(req.GetProject(), req.GetBranch())
	if err != nil {
		return nil, err
	}
	g, gw := s.groupOf(n)
	w, err := s.writer(g, gw, n)
	if err != nil {
		return nil, err
	}
	// First: from here on nothing is proposed under the DEK in use, so none of its WAL comes into the log, with the
	// old form, after the command that replaces it.
	w.dropKey()
	resp := &pb.RewrapBranchResponse{}
	for {
		more, err := s.rewrapOnce(ctx, g, n, resp)
		if err != nil {
			return nil, s.failure(g, n, err)
		}
		if !more {
			return resp, nil
		}
	}
}

// rewrapOnce re-wraps what is not under the current version, as far as that is known yet.
func (s *Server) rewrapOnce(ctx context.Context, g *group.Group, n walstate.Name, resp *pb.RewrapBranchResponse) (more bool, err error) {
	old := deksNotUnder(g, n, resp.KekVersion)
	for len(old) > 0 {
		batch := old[:min(len(old), walstate.MaxRewraps)]
		old = old[len(batch):]
		list := make([]keyring.Wrapped, len(batch))
		for i, d := range batch {
			list[i] = keyring.Wrapped{DEK: d.Wrapped,
				Context: seal.Context{Purpose: seal.PurposeWAL, Project: n.Project, Branch: n.Branch, Object: d.Object}}
		}
		fresh, version, err := s.cfg.Ring.Rewrap(ctx, list)
		if err != nil {
			return false, fmt.Errorf("re-wrapping keys of WAL: %w", err)
		}
		resp.KekVersion = version
		changed, size, err := s.applyRewraps(ctx, n, batch, fresh)
		if err != nil {
			return false, err
		}
		resp.Rewrapped += changed
		resp.BytesWritten += size
		more = more || changed > 0
	}
	return more, nil
}

// deksNotUnder copies the DEKs of a branch that are not under a version of the KEK.
func deksNotUnder(g *group.Group, n walstate.Name, version uint32) (list []walstate.DEK) {
	g.View(func(st *walstate.State) {
		b := st.Lookup(n)
		if b == nil {
			return
		}
		for _, d := range b.DEKs {
			if v, err := seal.KEKVersion(d.Wrapped); err != nil || v != version {
				list = append(list, d)
			}
		}
	})
	return list
}

// applyRewraps puts new forms into the replicated state. A command that was lost, or applied and reported as
// lost, is an error: the next call finds what is left to do.
func (s *Server) applyRewraps(ctx context.Context, n walstate.Name, old []walstate.DEK, fresh [][]byte) (changed, size int64, err error) {
	c := walstate.Command{Kind: walstate.KindRewrap}
	for i, d := range old {
		if !bytes.Equal(d.Wrapped, fresh[i]) {
			c.Rewraps = append(c.Rewraps, walstate.Rewrap{Object: []byte(d.Object), Old: d.Wrapped, Fresh: fresh[i]})
			size += int64(len(d.Object) + len(d.Wrapped) + len(fresh[i]) + 6)
		}
	}
	if len(c.Rewraps) == 0 {
		return 0, 0, nil
	}
	r, err := s.do(ctx, n, c)
	if err != nil {
		return 0, 0, err
	}
	if errors.Is(r.Err, walstate.ErrNoBranch) {
		return 0, 0, noBranch(n)
	}
	return int64(len(c.Rewraps)), size, r.Err
}
