package manager

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"

	"github.com/holdfastdb/holdfast/internal/blob"
)

// clusterKey is the document of everything that exists. It is small: one line a branch or
// endpoint.
const clusterKey = "manager/cluster.json"

// cluster is what exists. It is replaced as a whole, by compare-and-swap.
type cluster struct {
	Version   int           `json:"version"`
	Projects  []projectDoc  `json:"projects"`
	Branches  []branchDoc   `json:"branches"`
	Endpoints []endpointDoc `json:"endpoints"`
	// Leftovers are branches that are being made, rehearsed with or removed: none of them is in use, and
	// what is there of them is removed when that fails, or at the manager's next start.
	Leftovers []branchDoc `json:"leftovers,omitempty"`
}

type projectDoc struct {
	ID  string `json:"id"`
	CMK string `json:"cmk"` // the customer's key, as the key manager's provider names it
}

// branchDoc stands for a branch that has been imported and can be started.
type branchDoc struct {
	ID      string `json:"id"`
	Project string `json:"project"`
	Name    string `json:"name"`
	OwnKey  bool   `json:"own_key,omitempty"` // it has a KEK of its own
}

type endpointDoc struct {
	Name    string `json:"name"`
	Project string `json:"project"`
	Branch  string `json:"branch"`
	Listen  string `json:"listen"`  // host:port of its Postgres
	Running bool   `json:"running"` // what the user wants
}

func (c *cluster) endpoint(name string) *endpointDoc {
	for i := range c.Endpoints {
		if c.Endpoints[i].Name == name {
			return &c.Endpoints[i]
		}
	}
	return nil
}

const documentVersion = 1

// loadCluster reads the document; a bucket without one holds an empty cluster.
func loadCluster(ctx context.Context, store blob.Store) (*cluster, blob.ETag, error) {
	data, tag, err := store.Get(ctx, clusterKey)
	if errors.Is(err, blob.ErrNotFound) {
		return &cluster{Version: documentVersion}, "", nil
	}
	if err != nil {
		return nil, "", fmt.Errorf("reading %s from the bucket: %w", clusterKey, err)
	}
	var c cluster
	if err := json.Unmarshal(data, &c); err != nil {
		return nil, "", fmt.Errorf("document %s in the bucket is damaged: %w", clusterKey, err)
	}
	if c.Version != documentVersion {
		return nil, "", fmt.Errorf("document %s has version %d, this program knows %d", clusterKey, c.Version, documentVersion)
	}
	if err := c.check(); err != nil {
		return nil, "", fmt.Errorf("document %s in the bucket is damaged: %w", clusterKey, err)
	}
	return &c, tag, nil
}

// validName is what ids and names are made of. They become parts of paths below folders that are
// emptied and deleted, and who can write to the bucket is not to choose which those are.
var validName = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,62}$`)

// check sees that names are names, and that what they refer to exists.
func (c *cluster) check() error {
	projects, branches, endpoints := map[string]bool{}, map[branchDoc]bool{}, map[string]bool{}
	for _, p := range c.Projects {
		if !validName.MatchString(p.ID) || projects[p.ID] {
			return fmt.Errorf("project id %.80q is none, or there twice", p.ID)
		}
		projects[p.ID] = true
	}
	for _, b := range c.Branches {
		id := branchDoc{ID: b.ID, Project: b.Project}
		if !validName.MatchString(b.ID) || !validName.MatchString(b.Name) || !projects[b.Project] || branches[id] {
			return fmt.Errorf("branch %.80q, named %.80q: no id or name, of no project, or there twice", b.ID, b.Name)
		}
		branches[id] = true
	}
	for _, b := range c.Leftovers {
		if id := (branchDoc{ID: b.ID, Project: b.Project}); !validName.MatchString(b.ID) || !validName.MatchString(b.Name) || !projects[b.Project] || branches[id] {
			return fmt.Errorf("leftover branch %.80q, named %.80q: no id or name, of no project, or in use", b.ID, b.Name)
		}
	}
	for _, e := range c.Endpoints {
		if !validName.MatchString(e.Name) || endpoints[e.Name] || !branches[branchDoc{ID: e.Branch, Project: e.Project}] {
			return fmt.Errorf("endpoint %.80q: no name, there twice, or of no branch", e.Name)
		}
		endpoints[e.Name] = true
	}
	return nil
}

// casAttempts bounds how often a lost race is tried again.
const casAttempts = 20

// updateCluster applies change to the newest document until the swap succeeds. change may
// run several times; it must depend on its argument only.
//
// A swap whose outcome is unknown is settled by reading again: change must find its own
// work done and leave it so.
func updateCluster(ctx context.Context, store blob.Store, change func(*cluster) error) (*cluster, error) {
	for range casAttempts {
		c, tag, err := loadCluster(ctx, store)
		if err != nil {
			return nil, err
		}
		if err := change(c); err != nil {
			return nil, err
		}
		data, err := json.MarshalIndent(c, "", "  ")
		if err != nil {
			return nil, err
		}
		if tag == "" {
			_, err = store.Create(ctx, clusterKey, bytes.NewReader(data), int64(len(data)))
		} else {
			_, err = store.Swap(ctx, clusterKey, data, tag)
		}
		switch {
		case err == nil:
			return c, nil
		case errors.Is(err, blob.ErrExists), errors.Is(err, blob.ErrPrecondition):
			continue
		default:
			return nil, fmt.Errorf("writing %s to the bucket: %w", clusterKey, err)
		}
	}
	return nil, fmt.Errorf("document %s was changed by others %d times in a row; try again", clusterKey, casAttempts)
}
