package pagesvc

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/test/datadir"
)

// kind says how a relation's pages are masked.
type kind int

const (
	plainPages kind = iota
	heapPages
	btreePages
	sequencePages
	indexPages // of other kinds than btree
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
	kinds map[pg.RelFileNode]kind
}

func (c *comparison) errors(problems []string) {
	c.t.Helper()
	for _, p := range problems[:min(len(problems), 25)] {
		c.t.Error(p)
	}
}

func (c *comparison) comparison() *datadir.Comparison {
	return &datadir.Comparison{Client: c.w.client, At: c.at, Want: c.want, Primary: true,
		Mask: func(tag pg.RelTag, page []byte) ([]byte, error) {
			return mask(tag.Fork, c.kinds[tag.RelFileNode], page)
		},
		Heap: func(r pg.RelFileNode) bool { return c.kinds[r] == heapPages }}
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

// mask copies a page without what WAL does not determine (bufmask.c and the access methods'
// rules): what belongs to nothing, hints, command ids.
func mask(fork pg.ForkNumber, k kind, p []byte) ([]byte, error) {
	p = bytes.Clone(p)
	switch {
	case fork == pg.VMFork:
		clear(p[:24])
		return p, nil
	case datadir.SaysNothing(p):
		clear(p)
		return p, nil
	case fork == pg.InitFork:
		clear(p[:8])
	}
	lower, upper, special := int(le.Uint16(p[12:])), int(le.Uint16(p[14:])), int(le.Uint16(p[16:]))
	if lower < 24 || lower > upper || upper > special || special > len(p) {
		return nil, fmt.Errorf("corrupt header: lower %d upper %d special %d", lower, upper, special)
	}
	clear(p[lower:upper])
	if k == heapPages || k == btreePages {
		le.PutUint16(p[10:], le.Uint16(p[10:])&^7)
		clear(p[20:24])
	}
	if k == btreePages && special == len(p)-16 && le.Uint16(p[special+12:])&8 != 0 {
		return p, nil // the metapage has no line pointers
	}
	used := make([]bool, len(p))
	for at := 24; at+4 <= lower; at += 4 {
		item := le.Uint32(p[at:])
		off, flags, n := int(item&0x7FFF), item>>15&3, int(item>>17)
		if off+n > len(p) {
			return nil, fmt.Errorf("corrupt line pointer at %d", at)
		}
		for i := off; i < off+n; i++ {
			used[i] = true
		}
		switch {
		case k == btreePages && flags == 3:
			le.PutUint32(p[at:], item&^(3<<15)|1<<15)
		case k == heapPages && flags == 1 && n >= 23:
			t := p[off : off+n]
			le.PutUint16(t[20:], le.Uint16(t[20:])&^0x0F20) // hints of xmin and xmax, HEAP_COMBOCID
			clear(t[8:12])
		case k == sequencePages && n == 41:
			clear(p[off+24 : off+n]) // WAL is ahead by up to 32 values
		}
	}
	for i := upper; i < special; i++ {
		if !used[i] {
			p[i] = 0
		}
	}
	if k == btreePages && special == len(p)-16 {
		le.PutUint16(p[special+12:], le.Uint16(p[special+12:])&^(1<<5|1<<6))
		clear(p[special+14:])
	}
	return p, nil
}
