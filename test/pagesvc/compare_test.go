package pagesvc

import (
	"bytes"
	"encoding/binary"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/pagemask"
	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/test/datadir"
)

func loadDirectory(t testing.TB, dir string) *datadir.Directory {
	t.Helper()
	d, err := datadir.Load(dir)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// comparison sets what the page server gives at an LSN against a directory.
type comparison struct {
	t     testing.TB
	w     *world
	at    *pb.ReadPoint
	want  *datadir.Directory
	kinds map[pg.RelFileNode]pagemask.Kind
}

func (c *comparison) errors(problems []string) {
	c.t.Helper()
	for _, p := range problems[:min(len(problems), 25)] {
		c.t.Error(p)
	}
}

func (c *comparison) comparison() *datadir.Comparison {
	return &datadir.Comparison{Client: c.w.client, At: c.at, Want: c.want, Primary: true,
		Mask: func(tag pg.RelTag, block uint32, page []byte) ([]byte, error) {
			return mask(tag.Fork, block, c.kinds[tag.RelFileNode], page)
		},
		Heap: func(r pg.RelFileNode) bool { return c.kinds[r] == pagemask.Heap }}
}

func (c *comparison) run() {
	c.t.Helper()
	d := c.comparison()
	problems, err := d.Run(c.t.Context())
	if err != nil {
		c.t.Fatal(err)
	}
	c.errors(problems)
	c.t.Logf("at %v: %v", pg.LSN(c.at.Lsn), d.Counts)
}

// startup compares what a compute would start from with what the directory has.
func (c *comparison) startup() {
	c.t.Helper()
	r, problems, err := c.comparison().Startup(c.t.Context())
	if err != nil {
		c.t.Fatal(err)
	}
	c.errors(problems)
	ctl, err := pg.ParseControlFile(r.ControlFile)
	if err != nil {
		c.t.Fatal(err)
	}
	want := *c.want.Control
	want.CheckPoint, want.CheckPointCopy.Redo, want.UnloggedLSN = 0, 0, 0
	ctl.CheckPoint, ctl.CheckPointCopy.Redo, ctl.UnloggedLSN = 0, 0, 0
	ctl.Time, want.Time = 0, 0
	if d := cmp.Diff(&want, ctl); d != "" {
		c.t.Errorf("pg_control (-directory +page server):\n%s", d)
	}
	if have, want := pg.LSN(r.PrevRecordLsn), c.want.Control.CheckPoint; have != want {
		c.t.Errorf("the last record is at %v, want %v", have, want)
	}
}

var le = binary.LittleEndian

// mask copies a page without what WAL does not determine: what belongs to nothing, hints,
// command ids.
func mask(fork pg.ForkNumber, block uint32, k pagemask.Kind, p []byte) ([]byte, error) {
	p = bytes.Clone(p)
	if datadir.SaysNothing(p) {
		clear(p)
		return p, nil
	}
	return p, pagemask.Mask(p, pagemask.Place{Fork: fork, Block: pg.BlockNumber(block), Kind: k},
		pagemask.Hints|pagemask.AllVisible|pagemask.Unlogged|pagemask.Ahead)
}
