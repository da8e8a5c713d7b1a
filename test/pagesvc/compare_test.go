package pagesvc

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/pagemask"
	"github.com/holdfastdb/holdfast/internal/pg"
)

// directory is what a stock data directory holds.
type directory struct {
	rels    map[pg.RelTag][]byte
	slru    map[pg.SLRUKind]map[uint32][]byte
	files   map[string]string // relation maps, versions, two-phase state
	control *pg.ControlFile
}

func loadDirectory(t testing.TB, dir string) *directory {
	t.Helper()
	d := &directory{rels: map[pg.RelTag][]byte{}, slru: map[pg.SLRUKind]map[uint32][]byte{}, files: map[string]string{}}
	err := filepath.WalkDir(dir, func(p string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		name, _ := filepath.Rel(dir, p)
		b, err := os.ReadFile(p)
		if err != nil {
			return err
		}
		base := filepath.Base(name)
		if tag, segment, ok := pg.ParseRelPath(name); ok && segment == 0 {
			d.rels[tag] = b
		} else if kind, first, ok := pg.ParseSLRUPath(name); ok {
			if d.slru[kind] == nil {
				d.slru[kind] = map[uint32][]byte{}
			}
			for i := 0; i < len(b)/pg.BlockSize; i++ {
				d.slru[kind][first+uint32(i)] = b[i*pg.BlockSize:][:pg.BlockSize]
			}
		} else if name == "global/pg_control" {
			d.control, err = pg.ParseControlFile(b)
		} else if base == "pg_filenode.map" || base == "PG_VERSION" || strings.HasPrefix(name, "pg_twophase/") {
			d.files[name] = string(b)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// comparison sets what the page server gives at an LSN against a directory.
type comparison struct {
	t      testing.TB
	w      *world
	at     *pb.ReadPoint
	want   *directory
	kinds  map[pg.RelFileNode]pagemask.Kind
	errors int

	pages, empty, unlogged, fsm int
}

func (c *comparison) errorf(format string, args ...any) {
	c.t.Helper()
	if c.errors++; c.errors < 25 {
		c.t.Errorf(format, args...)
	}
}

func (c *comparison) run() {
	c.t.Helper()
	have := map[pg.RelTag]uint32{}
	for name := range c.want.files {
		var db uint32
		if _, err := fmt.Sscanf(name, "base/%d/PG_VERSION", &db); err == nil {
			c.list(have, pg.DefaultTablespaceOid, pg.Oid(db))
		}
	}
	c.list(have, pg.GlobalTablespaceOid, 0)
	for tag, want := range c.want.rels {
		c.relation(tag, have, want)
	}
	for tag := range have {
		if _, ok := c.want.rels[tag]; !ok && tag.Fork != pg.FSMFork && tag.Fork != pg.VMFork {
			c.errorf("%v exists only here", tag)
		}
	}
	for k := pg.CLog; k <= pg.CommitTS; k++ {
		c.slru(k)
	}
	c.t.Logf("at %v: %d pages equal, %d empty pages that WAL does not tell of, %d pages of unlogged relations, %d map pages left",
		pg.LSN(c.at.Lsn), c.pages, c.empty, c.unlogged, c.fsm)
}

func (c *comparison) list(have map[pg.RelTag]uint32, tablespace, db pg.Oid) {
	c.t.Helper()
	r, err := c.w.client.ListRelations(c.t.Context(), &pb.ListRelationsRequest{At: c.at, Tablespace: uint32(tablespace), Database: uint32(db)})
	if err != nil {
		c.t.Fatal(err)
	}
	for _, f := range r.Relations {
		have[pg.RelTag{RelFileNode: pg.RelFileNode{Tablespace: tablespace, Database: db, Relation: pg.Oid(f.Relation)}, Fork: pg.ForkNumber(f.Fork)}] = f.Blocks
	}
}

func (c *comparison) isUnlogged(r pg.RelFileNode) bool {
	_, ok := c.want.rels[pg.RelTag{RelFileNode: r, Fork: pg.InitFork}]
	return ok
}

func (c *comparison) relation(tag pg.RelTag, sizes map[pg.RelTag]uint32, want []byte) {
	blocks := uint32(len(want) / pg.BlockSize)
	size, exists := sizes[tag]
	switch {
	case tag.Fork != pg.InitFork && c.isUnlogged(tag.RelFileNode):
		c.unlogged += int(blocks)
		return
	case !exists && tag.Fork == pg.FSMFork, !exists && saysNothing(want):
		c.fsm += int(blocks)
		return
	case !exists:
		c.errorf("%v with %d blocks is missing", tag, blocks)
		return
	case size > blocks && tag.Fork != pg.FSMFork:
		c.errorf("%v has %d blocks, want %d", tag, size, blocks)
	}
	have, err := c.w.relation(c.t.Context(), c.at, tag, size)
	switch {
	case err != nil:
		c.errorf("%v: %v", tag, err)
		return
	case tag.Fork == pg.FSMFork:
		c.freeSpaceMap(tag, have)
		return
	}
	for i := uint32(0); i < blocks; i++ {
		w := want[int(i)*pg.BlockSize:][:pg.BlockSize]
		if i >= size {
			if !zeros(w) { // the primary extends files before it logs what goes there
				c.errorf("%v has %d blocks, want %d", tag, size, blocks)
				return
			}
			c.empty++
			continue
		}
		c.page(tag, i, have[int(i)*pg.BlockSize:][:pg.BlockSize], w)
	}
}

func saysNothing(b []byte) bool {
	for ; len(b) > 0; b = b[pg.BlockSize:] {
		if !zeros(b[:pg.BlockSize]) {
			return false
		}
	}
	return true
}

func zerosOnly(b []byte) bool { return bytes.Count(b, []byte{0}) == len(b) }

// freeSpaceMap checks that no slot of a bottom page tells much more than there is. The map is
// a hint; recovery, too, leaves a slot alone while a fifth of the page is free.
func (c *comparison) freeSpaceMap(tag pg.RelTag, have []byte) {
	heap := c.want.rels[pg.RelTag{RelFileNode: tag.RelFileNode}]
	if c.kinds[tag.RelFileNode] != pagemask.Heap {
		return
	}
	for b := 2; b < len(have)/pg.BlockSize && b < 3; b++ {
		leaves := have[b*pg.BlockSize:][28+4095 : pg.BlockSize]
		for i, category := range leaves {
			if (i+1)*pg.BlockSize > len(heap) {
				break
			}
			p := heap[i*pg.BlockSize:][:pg.BlockSize]
			free := int(binary.LittleEndian.Uint16(p[14:])) - int(binary.LittleEndian.Uint16(p[12:]))
			if int(category)*32 > free+pg.BlockSize/5 && !zeros(p) && category != 255 {
				c.errorf("%v: heap block %d is said to have %d bytes free, it has %d", tag, i, int(category)*32, free)
			}
		}
		c.fsm++
	}
}

func (c *comparison) page(tag pg.RelTag, block uint32, have, want []byte) {
	if bytes.Equal(have, want) {
		c.pages++
		return
	}
	a, errA := mask(tag.Fork, block, c.kinds[tag.RelFileNode], have)
	b, errB := mask(tag.Fork, block, c.kinds[tag.RelFileNode], want)
	if errA != nil || errB != nil {
		c.errorf("%v block %d: here %v, there %v", tag, block, errA, errB)
		return
	}
	if tag.Fork == pg.VMFork { // CREATE DATABASE logs a map's page as if all of it were a hole
		for i := range a {
			b[i] &= a[i]
		}
	}
	for i := range a {
		if a[i] != b[i] {
			c.errorf("%v (%v pages) block %d differs from byte %d on: %x here, %x there (LSNs %v, %v)", tag, c.kinds[tag.RelFileNode], block, i,
				a[i:min(i+8, len(a))], b[i:min(i+8, len(b))], pg.PageLSN(have), pg.PageLSN(want))
			return
		}
	}
	c.pages++
}

func (c *comparison) slru(k pg.SLRUKind) {
	r, err := c.w.client.ListSLRU(c.t.Context(), &pb.ListSLRURequest{At: c.at, Slru: uint32(k)})
	if err != nil {
		c.errorf("%v", err)
		return
	}
	have := map[uint32]bool{}
	for _, n := range r.Pages {
		have[n] = true
		p, err := c.w.client.GetPages(c.t.Context(), &pb.GetPagesRequest{At: c.at, Slru: uint32(k), Block: n, Count: 1})
		switch want := c.want.slru[k][n]; {
		case err != nil:
			c.errorf("%v", err)
		case want == nil:
			c.errorf("page %d of %s exists only here", n, k.Dir())
		case !bytes.Equal(p.Pages, want):
			c.errorf("page %d of %s differs", n, k.Dir())
		default:
			c.pages++
		}
	}
	for n, want := range c.want.slru[k] {
		if !have[n] && !zerosOnly(want) {
			c.errorf("page %d of %s is missing", n, k.Dir())
		}
	}
}

// startup compares what a compute would start from with what the directory has.
func (c *comparison) startup() {
	c.t.Helper()
	r, err := c.w.client.StartupState(c.t.Context(), &pb.StartupStateRequest{At: c.at})
	if err != nil {
		c.t.Fatal(err)
	}
	have := map[string]string{}
	for _, f := range r.Files {
		if f.Path != "postgresql.conf" && f.Path != "postgresql.auto.conf" && f.Path != "pg_hba.conf" && f.Path != "pg_ident.conf" {
			have[f.Path] = string(f.Data)
		}
	}
	if d := cmp.Diff(c.want.files, have); d != "" {
		c.errorf("files (-directory +page server):\n%s", d)
	}
	ctl, err := pg.ParseControlFile(r.ControlFile)
	if err != nil {
		c.t.Fatal(err)
	}
	want := *c.want.control
	want.CheckPoint, want.CheckPointCopy.Redo, want.UnloggedLSN = 0, 0, 0
	ctl.CheckPoint, ctl.CheckPointCopy.Redo, ctl.UnloggedLSN = 0, 0, 0
	ctl.Time, want.Time = 0, 0
	if d := cmp.Diff(&want, ctl); d != "" {
		c.errorf("pg_control (-directory +page server):\n%s", d)
	}
	if have, want := pg.LSN(r.PrevRecordLsn), c.want.control.CheckPoint; have != want {
		c.errorf("the last record is at %v, want %v", have, want)
	}
}

var le = binary.LittleEndian

// mask copies a page without what WAL does not determine: what belongs to nothing, hints,
// command ids.
func mask(fork pg.ForkNumber, block uint32, k pagemask.Kind, p []byte) ([]byte, error) {
	p = bytes.Clone(p)
	if zeros(p) {
		clear(p)
		return p, nil
	}
	return p, pagemask.Mask(p, pagemask.Place{Fork: fork, Block: pg.BlockNumber(block), Kind: k},
		pagemask.Hints|pagemask.AllVisible|pagemask.Unlogged|pagemask.Ahead)
}
