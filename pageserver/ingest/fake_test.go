package ingest

import (
	"context"
	"encoding/binary"
	"slices"
	"testing"

	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/internal/walrec"
	"github.com/holdfastdb/holdfast/pageserver/keyspace"
	"github.com/holdfastdb/holdfast/pageserver/pageread"
	"github.com/holdfastdb/holdfast/pageserver/timeline"
)

var le = binary.LittleEndian

// past is a branch's past in memory.
type past struct {
	versions map[keyspace.Key][]timeline.Value // in the order of putting
	staged   int
	scans    int
	pageErr  error // what Page answers instead
}

func (p *past) put(entries []timeline.Entry) {
	for _, e := range entries {
		e.Data = slices.Clone(e.Data)
		p.versions[e.Key] = append(p.versions[e.Key], e.Value)
	}
}

// Get finds the pages of a copy, too, in the way that the timeline is to find them.
func (p *past) Get(_ context.Context, key keyspace.Key, lsn pg.LSN) (timeline.History, error) {
	dir, _ := key.PageDir()
	note, _ := p.newest(keyspace.Copy(dir), 0, lsn)
	if note.Base == nil || key[0] != byte(keyspace.KindRelPage) {
		h, _ := p.newest(key, 0, lsn)
		return h, nil
	}
	h, whole := p.newest(key, note.Base.LSN, lsn)
	under := &h
	sources, err := timeline.ParseSources(note.Base.Data)
	for _, s := range sources {
		if whole {
			break
		}
		under.Origin = &timeline.Origin{Key: key.In(s.Dir)}
		under.Origin.History, whole = p.newest(under.Origin.Key, s.Above, s.UpTo)
		under = &under.Origin.History
	}
	return h, err
}

// newest gives the versions of (above, lsn], back to a base; whole tells that they need no more.
func (p *past) newest(key keyspace.Key, above, lsn pg.LSN) (h timeline.History, whole bool) {
	for _, v := range slices.Backward(p.versions[key]) {
		switch {
		case v.LSN > lsn:
		case v.LSN <= above:
			return h, false
		case v.Kind == timeline.Tombstone:
			return h, true
		case v.Kind == timeline.Delta:
			h.Changes = slices.Insert(h.Changes, 0, v)
		default:
			h.Base = &v
			return h, true
		}
	}
	return h, false
}

func (p *past) Scan(ctx context.Context, from, to keyspace.Key, lsn pg.LSN, fn func(keyspace.Key, timeline.Value) error) error {
	p.scans++
	var keys []keyspace.Key
	for k := range p.versions {
		if k.Compare(from) >= 0 && k.Compare(to) < 0 {
			keys = append(keys, k)
		}
	}
	slices.SortFunc(keys, keyspace.Key.Compare)
	for _, k := range keys {
		if h, _ := p.Get(ctx, k, lsn); h.Base != nil {
			if err := fn(k, *h.Base); err != nil {
				return err
			}
		}
	}
	return nil
}

func (p *past) Page(ctx context.Context, key keyspace.Key, lsn pg.LSN, page []byte) error {
	if p.pageErr != nil {
		return p.pageErr
	}
	return pageread.Page(ctx, p, key, lsn, page)
}

func (p *past) Stage(_ context.Context, begin pg.LSN, entries []timeline.Entry) error {
	p.staged += len(entries)
	for i := range entries {
		entries[i].LSN = begin + 1
	}
	p.put(entries)
	return nil
}

// bench is a Core over a past, and the WAL's end.
type bench struct {
	t testing.TB
	*past
	core *Core
	at   pg.LSN
}

const startLSN pg.LSN = 0x1000000

func newBench(t testing.TB) *bench {
	b := &bench{t: t, past: &past{versions: map[keyspace.Key][]timeline.Value{}}, at: startLSN}
	state := State{EarlyOffsets: -1}
	state.Control.CheckPointCopy = pg.CheckPoint{TimelineID: 1, NextXid: 1000, NextOid: 20000, NextMulti: 1, OldestXid: 700, OldestMulti: 1}
	b.core = New(b.past, state, b.at)
	return b
}

// apply ingests a record of its own batch, and checks that the stored state is the Core's.
func (b *bench) apply(rmid, info uint8, xid pg.TransactionID, data []byte, blocks ...walrec.Block) {
	b.t.Helper()
	if err := b.try(rmid, info, xid, data, blocks...); err != nil {
		b.t.Fatal(err)
	}
}

func (b *bench) try(rmid, info uint8, xid pg.TransactionID, data []byte, blocks ...walrec.Block) error {
	rec := &walrec.Record{LSN: b.at, End: b.at + 64, Xid: xid, RmID: rmid, Info: info, MainData: data, Blocks: blocks}
	if len(blocks) == 0 {
		rec.Raw = walrec.Build(rmid, info, xid, b.at-64, data)
	} else {
		rec.Raw = make([]byte, 64)
	}
	return b.ingest(rec)
}

func (b *bench) ingest(rec *walrec.Record) error {
	if err := b.core.Apply(b.t.Context(), rec); err != nil {
		return err
	}
	b.at = rec.End
	b.put(b.core.Take(b.at))
	h, _ := b.Get(b.t.Context(), keyspace.Checkpoint(), b.at)
	stored, err := ParseState(h.Base.Data)
	if err != nil {
		return err
	}
	if stored.PrevRecord != rec.LSN {
		b.t.Errorf("the state says that the last record is at %v, it is at %v", stored.PrevRecord, rec.LSN)
	}
	return nil
}

// restart begins a new Core from what is stored.
func (b *bench) restart() {
	h, _ := b.Get(b.t.Context(), keyspace.Checkpoint(), b.at)
	state, err := ParseState(h.Base.Data)
	if err != nil {
		b.t.Fatal(err)
	}
	b.core = New(b.past, state, b.at)
}

func (b *bench) size(tag pg.RelTag) int {
	h, _ := b.Get(b.t.Context(), keyspace.RelSize(tag), b.at)
	if h.Base == nil {
		return -1
	}
	n, err := ParseSize(h.Base)
	if err != nil {
		b.t.Fatal(err)
	}
	return int(n)
}

func (b *bench) history(key keyspace.Key) timeline.History {
	h, _ := b.Get(b.t.Context(), key, b.at)
	return h
}

func (b *bench) slruPages(kind pg.SLRUKind) []uint32 {
	h := b.history(keyspace.SLRUExtents(kind))
	if h.Base == nil {
		return nil
	}
	list, err := SLRUPages(h.Base.Data)
	if err != nil {
		b.t.Fatal(err)
	}
	return list
}

func words(v ...uint32) []byte {
	var b []byte
	for _, w := range v {
		b = le.AppendUint32(b, w)
	}
	return b
}

func rel(n pg.Oid) pg.RelTag {
	return pg.RelTag{RelFileNode: pg.RelFileNode{Tablespace: 1663, Database: 5, Relation: n}}
}

func forkOf(tag pg.RelTag, f pg.ForkNumber) pg.RelTag { tag.Fork = f; return tag }

func initBlock(tag pg.RelTag, n pg.BlockNumber) walrec.Block {
	return walrec.Block{Rel: tag, Block: n, WillInit: true}
}

func changeBlock(tag pg.RelTag, n pg.BlockNumber) walrec.Block {
	return walrec.Block{Rel: tag, Block: n}
}
