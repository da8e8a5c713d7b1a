package manager

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/holdfastdb/holdfast/internal/blob/dirblob"
)

func goodCluster() *cluster {
	return &cluster{Version: documentVersion,
		Projects:  []projectDoc{{ID: "p1", CMK: "dev"}},
		Branches:  []branchDoc{{ID: "b1", Project: "p1", Name: "main"}},
		Endpoints: []endpointDoc{{Name: "main", Project: "p1", Branch: "b1", Listen: "127.0.0.1:1", Running: true}}}
}

func TestHostileDocumentIsRefused(t *testing.T) {
	store, err := dirblob.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	write := func(c *cluster) {
		t.Helper()
		data, err := json.Marshal(c)
		if err != nil {
			t.Fatal(err)
		}
		if err := store.Delete(t.Context(), clusterKey); err != nil {
			t.Fatal(err)
		}
		if _, err := store.Create(t.Context(), clusterKey, strings.NewReader(string(data)), int64(len(data))); err != nil {
			t.Fatal(err)
		}
	}
	write(goodCluster())
	have, _, err := loadCluster(t.Context(), store)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(goodCluster(), have); diff != "" {
		t.Error(diff)
	}
	for name, spoil := range map[string]func(*cluster){
		// An endpoint's folder is emptied and deleted: its name must not lead elsewhere.
		"endpoint's name is a path":    func(c *cluster) { c.Endpoints[0].Name = "../../etc" },
		"endpoint without a name":      func(c *cluster) { c.Endpoints[0].Name = "" },
		"endpoint is the folder":       func(c *cluster) { c.Endpoints[0].Name = "." },
		"endpoint's name has a slash":  func(c *cluster) { c.Endpoints[0].Name = "a/b" },
		"endpoint twice":               func(c *cluster) { c.Endpoints = append(c.Endpoints, c.Endpoints[0]) },
		"endpoint of no branch":        func(c *cluster) { c.Endpoints[0].Branch = "b2" },
		"endpoint of another project":  func(c *cluster) { c.Endpoints[0].Project = "p2" },
		"branch's id is a path":        func(c *cluster) { c.Branches[0].ID = ".." },
		"branch of no project":         func(c *cluster) { c.Branches[0].Project = "p2" },
		"branch twice":                 func(c *cluster) { c.Branches = append(c.Branches, c.Branches[0]) },
		"project's id is a path":       func(c *cluster) { c.Projects[0].ID = "../x" },
		"project's id has a new line":  func(c *cluster) { c.Projects[0].ID = "p1\n" },
		"a version that is not known":  func(c *cluster) { c.Version = 2 },
		"project is there twice":       func(c *cluster) { c.Projects = append(c.Projects, c.Projects[0]) },
		"branch's name is not a name":  func(c *cluster) { c.Branches[0].Name = strings.Repeat("x", 100) },
		"endpoint's name is too long":  func(c *cluster) { c.Endpoints[0].Name = strings.Repeat("x", 64) },
		"endpoint's name is an option": func(c *cluster) { c.Endpoints[0].Name = "-x" },
	} {
		c := goodCluster()
		spoil(c)
		write(c)
		if _, _, err := loadCluster(t.Context(), store); err == nil || !strings.Contains(err.Error(), clusterKey) {
			t.Errorf("%s: %v, want an error that names %s", name, err, clusterKey)
		}
	}
}
