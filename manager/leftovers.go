package manager

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/blob"
	"github.com/holdfastdb/holdfast/internal/walclient"
)

func (c *cluster) branch(name string) *branchDoc {
	i := slices.IndexFunc(c.Branches, func(b branchDoc) bool { return b.Name == name })
	if i < 0 {
		return nil
	}
	return &c.Branches[i]
}

// holds tells whether the endpoint is the branch's.
func (c *cluster) holds(endpoint, branch string) bool {
	e := c.endpoint(endpoint)
	return e != nil && e.Branch == branch
}

func (c *cluster) addLeftover(b branchDoc) {
	if !slices.Contains(c.Leftovers, b) {
		c.Leftovers = append(c.Leftovers, b)
	}
}

func (c *cluster) dropLeftover(b branchDoc) {
	c.Leftovers = slices.DeleteFunc(c.Leftovers, func(l branchDoc) bool { return l == b })
}

// retire takes a branch and its endpoints out of use.
func (c *cluster) retire(b branchDoc) {
	c.Branches = slices.DeleteFunc(c.Branches, func(o branchDoc) bool { return o == b })
	c.Endpoints = slices.DeleteFunc(c.Endpoints, func(e endpointDoc) bool { return e.Project == b.Project && e.Branch == b.ID })
	c.addLeftover(b)
}

// removeLeftover removes all that is kept of a branch that stands among the leftovers, its key last, and then the note
// of it. It needs no key. It may be done again, and interrupted anywhere.
func (m *Manager) removeLeftover(ctx context.Context, b branchDoc) error {
	c, _, err := loadCluster(ctx, m.cfg.Store)
	if err != nil {
		return err
	}
	if !slices.Contains(c.Leftovers, b) {
		return nil // it is in use: the write that made it so was reported to have failed
	}
	if err := m.dropEndpoints(ctx, b); err != nil {
		return err
	}
	if _, err := m.pageserver.DeleteBranch(ctx, &pb.DeleteBranchRequest{Project: b.Project, Branch: b.ID}); err != nil {
		return fmt.Errorf("removing branch %s from the pageserver: %w", b.ID, err)
	}
	if err := m.deleteLog(ctx, b); err != nil {
		return err
	}
	if err := m.deleteObjects(ctx, b); err != nil {
		return err
	}
	if b.OwnKey {
		if _, err := m.keyAdmin.DestroyBranchKey(ctx, &pb.KeyRef{Project: b.Project, Branch: b.ID}); err != nil {
			return fmt.Errorf("destroying the key of branch %s: %w", b.ID, err)
		}
	}
	_, err = updateCluster(ctx, m.cfg.Store, func(c *cluster) error { c.dropLeftover(b); return nil })
	return err
}

// dropEndpoints kills the branch's endpoints, and deletes what is of them on this machine.
func (m *Manager) dropEndpoints(ctx context.Context, b branchDoc) error {
	m.mu.Lock()
	var gone []*supervisor
	for name, s := range m.mu.endpoints {
		if s.doc.Project == b.Project && s.doc.Branch == b.ID {
			gone = append(gone, s)
			delete(m.mu.endpoints, name)
		}
	}
	m.mu.Unlock()
	for _, s := range gone {
		if err := s.kill(ctx); err != nil {
			return fmt.Errorf("ending endpoint %s: %w", s.doc.Name, err)
		}
		m.deleteFiles(s.doc.Name)
	}
	if len(gone) == 0 { // of an earlier manager; a branch's endpoint has its name
		if err := removeDir(filepath.Join(m.cfg.ComputeDir, b.Name)); err != nil {
			return err
		}
		m.deleteFiles(b.Name)
	}
	return removeDir(filepath.Join(m.cfg.ComputeDir, "initdb-"+b.ID))
}

// deleteFiles deletes an endpoint's configuration and logs.
func (m *Manager) deleteFiles(endpoint string) {
	log := filepath.Join(m.cfg.LogDir, "endpoint-"+endpoint+".log")
	for _, f := range []string{m.endpointFile(endpoint), log, log + ".old"} {
		if err := os.Remove(f); err != nil && !errors.Is(err, os.ErrNotExist) {
			m.cfg.Log.Warn("a file of an endpoint that is gone could not be deleted", "error", err)
		}
	}
}

func (m *Manager) endpointFile(name string) string {
	return filepath.Join(m.cfg.Dir, "endpoint-"+name+".yaml")
}

func (m *Manager) deleteLog(ctx context.Context, b branchDoc) error {
	client, err := walclient.New(b.Project, b.ID, m.cfg.Safekeepers, m.cfg.Log)
	if err != nil {
		return err
	}
	defer client.Close()
	return client.DeleteBranch(ctx)
}

// keptForKeymgr are the objects of a branch that the key manager deletes itself, with the key.
var keptForKeymgr = []string{"keys.json", "receipts/"}

// deleteObjects deletes what the bucket still has of a branch: the superuser's password, archived WAL.
func (m *Manager) deleteObjects(ctx context.Context, b branchDoc) error {
	prefix := "projects/" + b.Project + "/branches/" + b.ID + "/"
	var keys []string
	err := m.cfg.Store.List(ctx, prefix, func(i blob.Info) error {
		name := strings.TrimPrefix(i.Key, prefix)
		if !slices.ContainsFunc(keptForKeymgr, func(kept string) bool { return strings.HasPrefix(name, kept) }) {
			keys = append(keys, i.Key)
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("listing %s in the bucket: %w", prefix, err)
	}
	for _, key := range keys {
		if err := m.cfg.Store.Delete(ctx, key); err != nil {
			return fmt.Errorf("deleting %s from the bucket: %w", key, err)
		}
	}
	return nil
}

// Times between attempts to remove what an earlier manager left.
const (
	sweepFirst = time.Second
	sweepMost  = time.Minute
)

// sweep removes the branches that an earlier manager was making, rehearsing with or removing when it ended. Those
// of this manager are not among them: none is made before left was read. It tries again until it succeeds or ctx ends.
func (m *Manager) sweep(ctx context.Context, left []branchDoc) {
	for wait := sweepFirst; len(left) > 0; wait = min(2*wait, sweepMost) {
		left = slices.DeleteFunc(slices.Clone(left), func(b branchDoc) bool {
			attempt, cancel := context.WithTimeout(ctx, undoTimeout)
			defer cancel()
			err := m.removeLeftover(attempt, b)
			if err != nil && ctx.Err() == nil {
				m.cfg.Log.Warn("what is left of a branch could not be removed; trying again", "branch", b.ID, "error", err)
			}
			return err == nil
		})
		if len(left) == 0 {
			return
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return
		}
	}
}
