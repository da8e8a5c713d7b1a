package safekeeper

import (
	"testing"

	"github.com/holdfastdb/holdfast/safekeeper/walstate"
)

func nameOf(branch string) walstate.Name { return walstate.Name{Project: project, Branch: branch} }

func TestAppendAndRead(t *testing.T) {
	c := newCluster(t, small(), false)
	c.startAll()
	cl := c.client(branch)
	e, a := c.open(cl)
	if e.Number != 1 || e.Start != startLSN || e.End != startLSN {
		t.Fatalf("first epoch is %+v", e)
	}
	w := newWAL(startLSN)
	c.appendSome(a, w, 200, 300)
	c.appendSome(a, w, 3, 20000) // across pages
	c.mustHold(branch, w)
}
