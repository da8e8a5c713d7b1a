package datadir

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"fmt"
	"maps"
	"path"
	"slices"
	"strconv"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/pg"
)

var le = binary.LittleEndian

// pagesAtOnce is the most that GetPages gives.
const pagesAtOnce = 128

// Comparison sets what a page server gives at an LSN against a directory.
type Comparison struct {
	Client pb.PageServerClient
	At     *pb.ReadPoint
	Want   *Directory
	// Primary says that the directory is one of a server that wrote: such a server extends
	// files before it logs what goes there, and has maps of its own. Otherwise it is of one that did
	// nothing but recover from WAL, whose pages must be the same in each byte.
	Primary bool
	// Mask copies a page without what may differ. nil: nothing may.
	Mask func(tag pg.RelTag, block uint32, page []byte) ([]byte, error)
	// Heap tells relations whose free space maps are checked against their pages. nil: none.
	Heap func(pg.RelFileNode) bool

	Counts   Counts
	problems []string
}

// Counts are what a comparison looked at.
type Counts struct {
	Relations, Pages, SLRUPages, Files int
	Empty                              int // pages without content of which WAL does not tell
	Unlogged                           int // pages of unlogged relations, left out
	FSMPages                           int
	FSMSlots, FSMEqual                 int // slots of bottom pages that both have
}

func (c Counts) String() string {
	return fmt.Sprintf("%d pages of %d relation forks, %d SLRU pages, %d files equal; left out: %d empty pages that WAL does not tell of, %d of unlogged relations; free space maps: %d pages, %d of %d slots equal",
		c.Pages, c.Relations, c.SLRUPages, c.Files, c.Empty, c.Unlogged, c.FSMPages, c.FSMEqual, c.FSMSlots)
}

func (c *Comparison) problem(format string, args ...any) {
	c.problems = append(c.problems, fmt.Sprintf(format, args...))
}

// Run compares everything and returns what differs. An error means that the comparison could
// not be made.
func (c *Comparison) Run(ctx context.Context) (problems []string, err error) {
	c.Counts, c.problems = Counts{}, nil
	have, err := List(ctx, c.Client, c.At, c.Want.databases())
	if err != nil {
		return nil, err
	}
	for _, tag := range slices.SortedFunc(maps.Keys(c.Want.Relations), compareTags) {
		if err := c.relation(ctx, tag, have); err != nil {
			return nil, err
		}
	}
	for _, tag := range slices.SortedFunc(maps.Keys(have), compareTags) {
		_, exists := c.Want.Relations[tag]
		if !exists && tag.Fork != pg.FSMFork && tag.Fork != pg.VMFork && !c.skipped(tag) {
			c.problem("%v exists only at the page server", tag)
		}
	}
	for k := pg.CLog; k <= pg.CommitTS; k++ {
		if err := c.slru(ctx, k); err != nil {
			return nil, err
		}
	}
	return c.problems, nil
}

func compareTags(a, b pg.RelTag) int {
	return cmp.Or(cmp.Compare(a.Tablespace, b.Tablespace), cmp.Compare(a.Database, b.Database), cmp.Compare(a.Relation, b.Relation), cmp.Compare(a.Fork, b.Fork))
}

// databases lists the databases that the directory has.
func (d *Directory) databases() (list []pg.Oid) {
	for name := range d.Files {
		if dir := path.Dir(path.Dir(name)); dir != "base" || path.Base(name) != "PG_VERSION" {
			continue
		}
		if oid, err := strconv.ParseUint(path.Base(path.Dir(name)), 10, 32); err == nil {
			list = append(list, pg.Oid(oid))
		}
	}
	return list
}

// List gives the sizes of all forks of some databases, and of the shared relations.
func List(ctx context.Context, client pb.PageServerClient, at *pb.ReadPoint, databases []pg.Oid) (map[pg.RelTag]uint32, error) {
	all := map[pg.RelTag]uint32{}
	list := func(tablespace, database pg.Oid) error {
		r, err := client.ListRelations(ctx, &pb.ListRelationsRequest{At: at, Tablespace: uint32(tablespace), Database: uint32(database)})
		if err != nil {
			return err
		}
		for _, f := range r.Relations {
			node := pg.RelFileNode{Tablespace: tablespace, Database: database, Relation: pg.Oid(f.Relation)}
			all[pg.RelTag{RelFileNode: node, Fork: pg.ForkNumber(f.Fork)}] = f.Blocks
		}
		return nil
	}
	if err := list(pg.GlobalTablespaceOid, 0); err != nil {
		return nil, err
	}
	for _, db := range databases {
		if err := list(pg.DefaultTablespaceOid, db); err != nil {
			return nil, err
		}
	}
	return all, nil
}

// Relation reads a whole fork.
func Relation(ctx context.Context, client pb.PageServerClient, at *pb.ReadPoint, tag pg.RelTag, blocks uint32) ([]byte, error) {
	all := make([]byte, 0, int(blocks)*pg.BlockSize)
	for b := uint32(0); b < blocks; b += pagesAtOnce {
		r, err := client.GetPages(ctx, &pb.GetPagesRequest{At: at, Block: b, Count: min(pagesAtOnce, blocks-b),
			Rel: &pb.RelFork{Tablespace: uint32(tag.Tablespace), Database: uint32(tag.Database), Relation: uint32(tag.Relation), Fork: uint32(tag.Fork)}})
		if err != nil {
			return nil, err
		}
		all = append(all, r.Pages...)
	}
	return all, nil
}

func (c *Comparison) skipped(tag pg.RelTag) bool {
	return tag.Fork != pg.InitFork && c.Want.IsUnlogged(tag.RelFileNode)
}

func (c *Comparison) relation(ctx context.Context, tag pg.RelTag, sizes map[pg.RelTag]uint32) error {
	want := c.Want.Relations[tag]
	blocks := uint32(len(want) / pg.BlockSize)
	size, exists := sizes[tag]
	switch {
	case c.skipped(tag):
		c.Counts.Unlogged += int(blocks)
		return nil
	case !exists && tag.Fork == pg.FSMFork:
		c.Counts.FSMPages += int(blocks)
		return nil
	case !exists && c.Primary && SaysNothing(want):
		c.Counts.Empty += int(blocks)
		return nil
	case !exists:
		c.problem("%v with %d blocks is missing", tag, blocks)
		return nil
	case size > blocks && tag.Fork != pg.FSMFork:
		c.problem("%v has %d blocks, want %d", tag, size, blocks)
	}
	have, err := Relation(ctx, c.Client, c.At, tag, size)
	if err != nil {
		c.problem("%v: %v", tag, err)
		return ctx.Err()
	}
	c.Counts.Relations++
	if tag.Fork == pg.FSMFork {
		c.freeSpaceMap(tag, have, want)
		return nil
	}
	for i := range blocks {
		w := want[int(i)*pg.BlockSize:][:pg.BlockSize]
		switch {
		case i < size:
			c.page(tag, i, have[int(i)*pg.BlockSize:][:pg.BlockSize], w)
		case c.Primary && SaysNothing(w):
			c.Counts.Empty++
		default:
			c.problem("%v has %d blocks, want %d", tag, size, blocks)
			return nil
		}
	}
	return nil
}

func (c *Comparison) page(tag pg.RelTag, block uint32, have, want []byte) {
	c.Counts.Pages++
	if bytes.Equal(have, want) {
		return
	}
	if c.Primary && tag.Fork == pg.VMFork && copied(tag) {
		want = bytes.Clone(want)
		for i := pageHeaderSize; i < len(want); i++ {
			want[i] &= have[i]
		}
	}
	a, b := have, want
	if c.Mask != nil {
		var errA, errB error
		a, errA = c.Mask(tag, block, have)
		b, errB = c.Mask(tag, block, want)
		if errA != nil || errB != nil {
			c.problem("%v block %d: here %v, there %v", tag, block, errA, errB)
			return
		}
	}
	for i := range a {
		if a[i] != b[i] {
			c.problem("%v block %d differs from byte %d on: %x at the page server, %x there (LSNs %v, %v)", tag, block, i,
				a[i:min(i+8, len(a))], b[i:min(i+8, len(b))], pg.PageLSN(have), pg.PageLSN(want))
			return
		}
	}
}

// copied tells that CREATE DATABASE may have copied a relation: then it has a lower number than
// its database. The copy of a map's page is logged as if all behind its header were a hole.
func copied(tag pg.RelTag) bool { return tag.Database != 0 && tag.Relation < tag.Database }

// The layout of a free space map's page: fp_next_slot, inner nodes, then a slot for each page
// below (fsm_internals.h).
const (
	fsmNodesAt   = pageHeaderSize + 4
	fsmInner     = pg.BlockSize/2 - 1
	fsmSlotsAt   = fsmNodesAt + fsmInner
	fsmCategory  = pg.BlockSize / 256 // bytes of free space that a slot counts in
	fsmFirstLeaf = 2                  // the first page of the bottom level
)

// freeSpaceMap counts the slots of the first bottom page that are the same, and checks for a heap that none tells
// much more than there is. The map is a hint; recovery, too, leaves a slot alone while a
// fifth of the page is free.
func (c *Comparison) freeSpaceMap(tag pg.RelTag, have, want []byte) {
	c.Counts.FSMPages += len(have) / pg.BlockSize
	const at = fsmFirstLeaf*pg.BlockSize + fsmSlotsAt
	if len(have) <= at {
		return
	}
	main := c.Want.Relations[pg.RelTag{RelFileNode: tag.RelFileNode}]
	slots := have[at : (fsmFirstLeaf+1)*pg.BlockSize]
	slots = slots[:min(len(slots), len(main)/pg.BlockSize)]
	for i, category := range slots {
		if len(want) >= (fsmFirstLeaf+1)*pg.BlockSize {
			c.Counts.FSMSlots++
			if want[at+i] == category {
				c.Counts.FSMEqual++
			}
		}
		p := main[i*pg.BlockSize:][:pg.BlockSize]
		if c.Heap == nil || !c.Heap(tag.RelFileNode) || SaysNothing(p) || category == 255 {
			continue
		}
		if free := int(le.Uint16(p[14:])) - int(le.Uint16(p[12:])); int(category)*fsmCategory > free+pg.BlockSize/5 {
			c.problem("%v: heap block %d is said to have %d bytes free, it has %d", tag, i, int(category)*fsmCategory, free)
		}
	}
}

func (c *Comparison) slru(ctx context.Context, k pg.SLRUKind) error {
	r, err := c.Client.ListSLRU(ctx, &pb.ListSLRURequest{At: c.At, Slru: uint32(k)})
	if err != nil {
		return err
	}
	have := map[uint32]bool{}
	for _, n := range r.Pages {
		have[n] = true
		p, err := c.Client.GetPages(ctx, &pb.GetPagesRequest{At: c.At, Slru: uint32(k), Block: n, Count: 1})
		switch want := c.Want.SLRU[k][n]; {
		case err != nil:
			c.problem("%s page %d: %v", k.Dir(), n, err)
		case want == nil:
			c.problem("page %d of %s exists only at the page server", n, k.Dir())
		case !bytes.Equal(p.Pages, want):
			c.problem("page %d of %s differs", n, k.Dir())
		default:
			c.Counts.SLRUPages++
		}
	}
	for n, want := range c.Want.SLRU[k] {
		if !have[n] && !allZero(want) { // a file's pages before the first one that was made
			c.problem("page %d of %s is missing", n, k.Dir())
		}
	}
	return ctx.Err()
}

// Startup compares the small files that a compute would start from with those of the
// directory, and gives the whole state for a caller that looks at more.
func (c *Comparison) Startup(ctx context.Context) (st *pb.StartupStateResponse, problems []string, err error) {
	st, err = c.Client.StartupState(ctx, &pb.StartupStateRequest{At: c.At})
	if err != nil {
		return nil, nil, err
	}
	have := map[string]string{}
	for _, f := range st.Files {
		have[f.Path] = string(f.Data)
	}
	for _, name := range slices.Sorted(maps.Keys(c.Want.Files)) {
		switch data, ok := have[name]; {
		case !ok && name == "PG_VERSION": // the agent's own
		case !ok:
			problems = append(problems, name+" is missing")
		case data != c.Want.Files[name]:
			problems = append(problems, name+" differs")
		default:
			c.Counts.Files++
		}
	}
	for name := range have {
		if _, ok := c.Want.Files[name]; !ok && isComparedFile(name) {
			problems = append(problems, name+" exists only at the page server")
		}
	}
	return st, problems, nil
}

func isComparedFile(name string) bool {
	base := path.Base(name)
	return base == "pg_filenode.map" || base == "PG_VERSION" || path.Dir(name) == "pg_twophase"
}
