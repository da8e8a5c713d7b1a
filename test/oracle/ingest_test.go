package oracle

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/google/go-cmp/cmp"

	"github.com/holdfastdb/holdfast/internal/pagemask"
	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/internal/walrec"
	"github.com/holdfastdb/holdfast/pageserver/ingest"
	"github.com/holdfastdb/holdfast/pageserver/keyspace"
	"github.com/holdfastdb/holdfast/pageserver/timeline"
)

// An ingester follows the same WAL with the page server's own code. Of what that makes it
// keeps all but pages: those of the past are the replayer's. Those that it makes at once are
// compared with the replayer's.
type ingester struct {
	*replayer
	core   *ingest.Core
	values map[keyspace.Key]timeline.Value
	images map[keyspace.Key][]byte // of the record under way
}

func newIngester(r *replayer) *ingester {
	g := &ingester{replayer: r, values: map[keyspace.Key]timeline.Value{}, images: map[keyspace.Key][]byte{}}
	for key, data := range describe(r.state, true) {
		g.values[key] = timeline.Value{Kind: timeline.Image, Data: []byte(data)}
	}
	g.core = ingest.New(g, ingest.State{EarlyOffsets: -1, Control: *r.control}, r.control.CheckPoint)
	return g
}

// describe gives a state as the values that ingest makes, pages left out; free space maps
// only if asked for, since ingest's are larger.
func describe(s *state, fsm bool) map[keyspace.Key]string {
	list := map[keyspace.Key]string{}
	for tag, pages := range s.rels {
		if fsm || tag.Fork != pg.FSMFork {
			list[keyspace.RelSize(tag)] = string(le.AppendUint32(nil, uint32(len(pages))))
		}
	}
	slru := map[pg.SLRUKind][]uint32{}
	for p := range s.slru {
		slru[p.Kind] = append(slru[p.Kind], p.Page)
	}
	for kind, pages := range slru {
		list[keyspace.SLRUExtents(kind)] = string(ingest.MarshalSLRUPages(pages))
	}
	for dir, data := range s.relmaps {
		list[keyspace.RelMap(folder(dir))] = string(data)
	}
	for dir := range s.dirs {
		list[keyspace.Database(folder(dir))] = ingest.VersionFile
	}
	for xid, data := range s.twoPhase {
		list[keyspace.TwoPhase(xid)] = string(data)
	}
	return list
}

// folder is the reverse of pg.DatabasePath.
func folder(dir string) (tablespace, database pg.Oid) {
	if dir == "global" {
		return pg.GlobalTablespaceOid, 0
	}
	n, err := strconv.ParseUint(strings.TrimPrefix(dir, "base/"), 10, 32)
	if err != nil {
		panic("a database is left in a tablespace that the workload dropped: " + dir)
	}
	return pg.DefaultTablespaceOid, pg.Oid(n)
}

// apply comes before the replayer changes its pages.
func (g *ingester) apply(rec *walrec.Record) error {
	if rec.RmID == rmXLOG && rec.Info&0xF0 == 0 {
		g.checkCounters(rec)
	}
	if err := g.core.Apply(context.Background(), rec); err != nil {
		return err
	}
	clear(g.images)
	g.put(g.core.Take(rec.End))
	return nil
}

// checkImages compares the pages that a record's images became at once with what it made of
// the replayer's.
func (g *ingester) checkImages(rec *walrec.Record) error {
	for i := range rec.Blocks {
		b := &rec.Blocks[i]
		have, ok := g.images[keyspace.RelPage(b.Rel, b.Block)]
		if want := g.rels[b.Rel][b.Block]; ok && !bytes.Equal(have, want) {
			return fmt.Errorf("%s at %v: ingest's image of block %d of %v differs from the page at %d",
				walrec.Name(rec.RmID, rec.Info), rec.LSN, b.Block, b.Rel, pagemask.Difference(have, want))
		}
	}
	return nil
}

// checkCounters compares what records made of the counters with what the server wrote when
// it shut down. (The oldest xid with a timestamp moves on the server without a record, too.)
func (g *ingester) checkCounters(rec *walrec.Record) {
	want, err := pg.ParseCheckPoint(rec.MainData)
	if err != nil {
		g.t.Fatal(err)
	}
	of := func(c *pg.CheckPoint) [4]uint64 {
		return [...]uint64{c.NextXid, uint64(c.NextMulti), uint64(c.NextMultiOffset), uint64(c.NewestCommitTsXid)}
	}
	if d := cmp.Diff(of(&want), of(&g.core.State().Control.CheckPointCopy)); d != "" {
		g.t.Errorf("before the checkpoint at %v: next xid, multixact, member; newest xid with a timestamp (-server +ingest):\n%s", rec.LSN, d)
	}
}

func (g *ingester) put(entries []timeline.Entry) {
	for _, e := range entries {
		switch {
		case e.Key[0] == byte(keyspace.KindRelPage) && e.Kind == timeline.Image:
			g.images[e.Key] = slices.Clone(e.Data)
		case e.Key[0] == byte(keyspace.KindRelPage), e.Key[0] == byte(keyspace.KindSLRUPage):
		case e.Kind == timeline.Tombstone:
			delete(g.values, e.Key)
		default:
			e.Data = slices.Clone(e.Data)
			g.values[e.Key] = e.Value
		}
	}
}

// report compares the values that are left with what the replay says.
func (g *ingester) report() {
	have := map[keyspace.Key]string{}
	for key, v := range g.values {
		k, err := keyspace.Parse(key)
		if err != nil {
			g.t.Fatal(err)
		}
		switch k.Kind {
		case keyspace.KindCheckpoint, keyspace.KindDropped, keyspace.KindAuxFile, keyspace.KindCopy:
			continue
		case keyspace.KindRelSize:
			if k.Rel.Fork == pg.FSMFork {
				continue
			}
		}
		have[key] = string(v.Data)
	}
	want := describe(g.state, false)
	g.t.Logf("ingest: %d values besides pages", len(have))
	wrong := 0
	all := maps.Clone(want)
	maps.Copy(all, have)
	for key := range all {
		h, inHave := have[key]
		w, inWant := want[key]
		if inHave == inWant && h == w {
			continue
		}
		if wrong++; wrong < 20 {
			k, _ := keyspace.Parse(key)
			g.t.Errorf("%+v: ingest has %x (%v), the replay has %x (%v)", k, h, inHave, w, inWant)
		}
	}
}

func (g *ingester) Get(_ context.Context, key keyspace.Key, _ pg.LSN) (h timeline.History, err error) {
	if v, ok := g.values[key]; ok {
		h.Base = &v
	}
	return h, nil
}

func (g *ingester) Scan(_ context.Context, from, to keyspace.Key, _ pg.LSN, fn func(keyspace.Key, timeline.Value) error) error {
	for _, key := range slices.SortedFunc(maps.Keys(g.values), keyspace.Key.Compare) {
		if key.Compare(from) < 0 || key.Compare(to) >= 0 {
			continue
		}
		if err := fn(key, g.values[key]); err != nil {
			return err
		}
	}
	return nil
}

func (g *ingester) Page(_ context.Context, key keyspace.Key, _ pg.LSN, page []byte) error {
	k, err := keyspace.Parse(key)
	if err == nil && int(k.Block) < len(g.rels[k.Rel]) { // beyond: an FSM page that only ingest has
		copy(page, g.rels[k.Rel][k.Block])
	}
	return err
}

func (g *ingester) Stage(_ context.Context, _ pg.LSN, entries []timeline.Entry) error {
	g.put(entries)
	return nil
}
