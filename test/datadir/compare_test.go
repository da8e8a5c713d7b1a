package datadir

import (
	"bytes"
	"testing"

	"github.com/holdfastdb/holdfast/internal/pg"
)

func TestMapsMayLackBitsOnlyInCopies(t *testing.T) {
	const behind = 100
	page := func(at int, b byte) []byte {
		p := make([]byte, pg.BlockSize)
		p[0], p[behind] = 1, 3
		p[at] = b
		return p
	}
	for _, c := range []struct {
		what               string
		database, relation pg.Oid
		fork               pg.ForkNumber
		have               []byte
		differs            bool
	}{
		{"the same", 50000, 60000, pg.VMFork, page(behind, 3), false},
		{"an empty map", 50000, 60000, pg.VMFork, page(behind, 0), true},
		{"an empty map of a shared relation", 0, 1260, pg.VMFork, page(behind, 0), true},
		{"an empty map of a copy", 50000, 1259, pg.VMFork, page(behind, 0), false},
		{"a bit less in a copy", 50000, 1259, pg.VMFork, page(behind, 1), false},
		{"a bit more in a copy", 50000, 1259, pg.VMFork, page(behind, 7), true},
		{"a header's bit less in a copy", 50000, 1259, pg.VMFork, page(0, 0), true},
		{"an empty page of a copy", 50000, 1259, pg.MainFork, page(behind, 0), true},
	} {
		want := page(behind, 3)
		cmp := Comparison{Primary: true}
		node := pg.RelFileNode{Tablespace: pg.DefaultTablespaceOid, Database: c.database, Relation: c.relation}
		cmp.page(pg.RelTag{RelFileNode: node, Fork: c.fork}, 0, c.have, want)
		if (len(cmp.problems) > 0) != c.differs {
			t.Errorf("%s: %q", c.what, cmp.problems)
		}
		if !bytes.Equal(want, page(behind, 3)) {
			t.Errorf("%s: the directory's page was changed", c.what)
		}
	}
}
