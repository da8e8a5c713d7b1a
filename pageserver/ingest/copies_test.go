package ingest

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/holdfastdb/holdfast/internal/blob/dirblob"
	"github.com/holdfastdb/holdfast/internal/keyring/keyringtest"
	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/internal/walrec"
	"github.com/holdfastdb/holdfast/pageserver/keyspace"
	"github.com/holdfastdb/holdfast/pageserver/pageread"
	"github.com/holdfastdb/holdfast/pageserver/timeline"
)

var seedFlag = flag.Uint64("seed", 0, "run the test of copied databases with this seed only")

// cluster is what a naive server has: each database's forks with all their pages; nil is a
// page of zeros. Pages are replaced, never changed.
type cluster map[pg.Oid]map[pg.RelTag][][]byte

func (c cluster) clone() cluster {
	n := cluster{}
	for db, forks := range c {
		n[db] = map[pg.RelTag][][]byte{}
		for tag, pages := range forks {
			n[db][tag] = slices.Clone(pages)
		}
	}
	return n
}

// copyRun ingests random records into a timeline, and does the same to a cluster.
type copyRun struct {
	t   *testing.T
	rng *rand.Rand
	cfg timeline.Config
	tl  *timeline.Timeline

	core       *Core
	maxSources int

	now     cluster
	past    map[pg.LSN]cluster // by the ends of records
	records []*walrec.Record
	at      pg.LSN
	copied  int
}

const (
	spaceOid  pg.Oid = 1663
	rmGeneric        = 20
	firstDB   pg.Oid = 5
	databases        = 6
)

func newCopyRun(t *testing.T, seed uint64) *copyRun {
	rng := rand.New(rand.NewPCG(seed, 10))
	store, err := dirblob.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	r := &copyRun{t: t, rng: rng, now: cluster{}, past: map[pg.LSN]cluster{}, at: startLSN, maxSources: 1 + rng.IntN(5)}
	r.cfg = timeline.Config{Project: "proj", Branch: "main", Store: store, Ring: keyringtest.New(), Log: slog.New(slog.DiscardHandler),
		Materialize: func(key keyspace.Key, h timeline.History) ([]byte, error) { return pageread.Fold(key, &h) },
		FlushAge:    -1, FlushBytes: int64(20000 + rng.IntN(200000)), LayerBytes: int64(10000 + rng.IntN(60000)),
		CompactAfter: 1 + rng.IntN(4), MaxStack: 1 + rng.IntN(3), ImageAfter: 1 + rng.IntN(4), HistoryBytes: int64(1 + rng.IntN(20000)),
		BlockCacheBytes: 1 << 20}
	if r.tl, err = timeline.Create(t.Context(), r.cfg, r.at); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.tl.Close() })
	state := State{EarlyOffsets: -1}
	state.Control.CheckPointCopy = pg.CheckPoint{TimelineID: 1, NextXid: 1000, NextOid: 20000, NextMulti: 1, OldestXid: 700, OldestMulti: 1}
	r.core = New(r, state, r.at)
	r.core.maxSources = r.maxSources
	r.now[firstDB] = map[pg.RelTag][][]byte{}
	r.past[r.at] = r.now.clone()
	r.store()
	return r
}

func (r *copyRun) Get(ctx context.Context, key keyspace.Key, lsn pg.LSN) (timeline.History, error) {
	return r.tl.Get(ctx, key, lsn)
}

func (r *copyRun) Scan(ctx context.Context, from, to keyspace.Key, lsn pg.LSN, fn func(keyspace.Key, timeline.Value) error) error {
	return r.tl.Scan(ctx, from, to, lsn, fn)
}

func (r *copyRun) Page(ctx context.Context, key keyspace.Key, lsn pg.LSN, page []byte) error {
	return pageread.Page(ctx, r.tl, key, lsn, page)
}

func (r *copyRun) Stage(ctx context.Context, begin pg.LSN, entries []timeline.Entry) error {
	at := max(begin+1, r.tl.LastLSN())
	for i := range entries {
		entries[i].LSN = at
	}
	return r.tl.Put(ctx, entries, at)
}

// store puts what is ingested.
func (r *copyRun) store() { r.put(r.at) }

func (r *copyRun) put(upTo pg.LSN) {
	r.t.Helper()
	if err := r.tl.Put(r.t.Context(), r.core.Take(upTo), upTo); err != nil {
		r.t.Fatal(err)
	}
}

func (r *copyRun) ingest(rec *walrec.Record) {
	r.t.Helper()
	if r.core.Barrier(rec) && rec.LSN > r.tl.LastLSN() {
		r.put(rec.LSN)
	}
	if err := r.core.Apply(r.t.Context(), rec); err != nil {
		r.t.Fatal(err)
	}
}

// record ingests a record of WAL; the cluster is as after it.
func (r *copyRun) record(raw []byte) {
	r.t.Helper()
	rec := new(walrec.Record)
	if err := walrec.ParseInto(rec, raw, r.at, r.next()); err != nil {
		r.t.Fatal(err)
	}
	r.ingest(rec)
	r.records = append(r.records, rec)
	r.at = rec.End
	r.past[r.at] = r.now.clone()
	if r.rng.IntN(3) == 0 {
		r.store()
	}
}

// next is where the next record ends. (Ends need not fit lengths here.)
func (r *copyRun) next() pg.LSN { return r.at + 256 }

// reopen opens the timeline anew, as after a crash, and ingests again what was not durable.
func (r *copyRun) reopen() {
	r.t.Helper()
	r.tl.Close()
	var err error
	if r.tl, err = timeline.Open(r.t.Context(), r.cfg); err != nil {
		r.t.Fatal(err)
	}
	last := r.tl.LastLSN()
	h, err := r.tl.Get(r.t.Context(), keyspace.Checkpoint(), last)
	if err != nil {
		r.t.Fatal(err)
	}
	if h.Base == nil { // nothing was durable
		r.t.Fatal("the branch's state was lost")
	}
	state, err := ParseState(h.Base.Data)
	if err != nil {
		r.t.Fatal(err)
	}
	r.core = New(r, state, last)
	r.core.maxSources = r.maxSources
	for _, rec := range r.records {
		if rec.End > last {
			r.ingest(rec)
		}
	}
	r.store()
}

// blockRecord makes a record of the generic resource manager, or with a page, of a page image.
func blockRecord(tag pg.RelTag, block pg.BlockNumber, isBase bool, data, page []byte) []byte {
	const hasImage, hasData, willInit = 0x10, 0x20, 0x40
	flags := byte(tag.Fork)
	rmid, info := byte(rmGeneric), byte(0)
	switch {
	case page != nil:
		flags |= hasImage
		rmid, info = rmXLOG, xlogFPI
	case isBase:
		flags |= willInit
	}
	if data != nil {
		flags |= hasData
	}
	b := make([]byte, 24)
	b = append(b, 0, flags)
	b = le.AppendUint16(b, uint16(len(data)))
	if page != nil {
		b = le.AppendUint16(b, uint16(len(page)))
		b = append(b, 0, 0, 2) // no hole, to be applied
	}
	b = append(b, words(uint32(tag.Tablespace), uint32(tag.Database), uint32(tag.Relation), uint32(block))...)
	b = append(append(b, page...), data...)
	le.PutUint32(b, uint32(len(b)))
	b[16], b[17] = info, rmid
	le.PutUint32(b[20:], walrec.CRC(b))
	return b
}

func (r *copyRun) plain(rmid, info uint8, data []byte) {
	r.record(walrec.Build(rmid, info, 0, 0, data))
}

func (r *copyRun) anyDB() (pg.Oid, bool) {
	list := slices.Sorted(maps.Keys(r.now))
	if len(list) == 0 {
		return 0, false
	}
	return list[r.rng.IntN(len(list))], true
}

func copyTag(db pg.Oid, n int) pg.RelTag {
	return pg.RelTag{RelFileNode: pg.RelFileNode{Tablespace: spaceOid, Database: db, Relation: pg.Oid(100 + n/2)}, Fork: pg.ForkNumber(n % 2 * int(pg.InitFork))}
}

// blockNumbers are the blocks that are written. The gap is wider than what an extension fills
// with zeros: what is not hidden there would show.
var blockNumbers = []int{0, 1, 2, maxZeroed + 10, maxZeroed + 11}

// write changes, or makes, a page.
func (r *copyRun) write(tag pg.RelTag) {
	block := blockNumbers[r.rng.IntN(len(blockNumbers))]
	forks := r.now[tag.Database]
	if grow := block + 1 - len(forks[tag]); grow > 0 {
		forks[tag] = append(forks[tag], make([][]byte, grow)...)
	}
	page := make([]byte, pg.BlockSize)
	copy(page, forks[tag][block])
	off := 100 + 8*r.rng.IntN(20)
	data := append([]byte{byte(off), byte(off >> 8), 8, 0}, le.AppendUint64(nil, r.rng.Uint64())...)
	isBase, image := r.rng.IntN(8) == 0, []byte(nil)
	switch {
	case r.rng.IntN(8) == 0:
		clear(page)
		copy(page[off:], data[4:])
		image, data = page, nil
	case isBase: // a page from nothing: what redo does not clear, the reader has
		clear(page)
		fallthrough
	default:
		copy(page[off:], data[4:])
		pg.SetPageLSN(page, r.next())
	}
	forks[tag][block] = page
	r.record(blockRecord(tag, pg.BlockNumber(block), isBase, data, image))
}

func (r *copyRun) truncate(tag pg.RelTag) {
	tag.Fork = pg.MainFork
	n := blockNumbers[r.rng.IntN(len(blockNumbers))]
	pages := r.now[tag.Database][tag]
	if pages == nil {
		pages = [][]byte{}
	}
	r.now[tag.Database][tag] = pages[:min(n, len(pages))]
	r.plain(rmSMGR, smgrTruncate, truncation(tag, uint32(n), truncateHeap))
}

func (r *copyRun) drop(tag pg.RelTag) {
	for f := pg.MainFork; f <= pg.InitFork; f++ {
		delete(r.now[tag.Database], forkOf(tag, f))
	}
	r.plain(rmXact, 0x80, append(make([]byte, 8), words(1<<2, 1, uint32(tag.Tablespace), uint32(tag.Database), uint32(tag.Relation))...))
}

func (r *copyRun) copy(dst, src pg.Oid) {
	forks := map[pg.RelTag][][]byte{}
	for tag, pages := range r.now[src] {
		tag.Database = dst
		forks[tag] = slices.Clone(pages)
	}
	r.now[dst] = forks
	r.copied++
	r.plain(rmDBase, 0x00, words(uint32(dst), uint32(spaceOid), uint32(src), uint32(spaceOid)))
}

func (r *copyRun) step() {
	src, ok := r.anyDB()
	tag := copyTag(src, r.rng.IntN(6))
	switch n := r.rng.IntN(100); {
	case n < 4 || !ok: // by its log: an empty one
		db := firstDB + pg.Oid(r.rng.IntN(databases))
		if r.now[db] == nil {
			r.now[db] = map[pg.RelTag][][]byte{}
			r.plain(rmDBase, 0x10, words(uint32(db), uint32(spaceOid)))
		}
	case n < 12:
		if dst := firstDB + pg.Oid(r.rng.IntN(databases)); dst != src { // one that is there is replaced, as by recovery
			r.copy(dst, src)
		}
	case n < 17 && len(r.now) > 1:
		delete(r.now, src)
		r.plain(rmDBase, 0x20, words(uint32(src), 1, uint32(spaceOid)))
	case n < 21:
		r.truncate(tag)
	case n < 24:
		r.drop(tag)
	case n < 80:
		r.write(tag)
	case n < 84:
		r.store()
		if err := r.tl.Flush(r.t.Context()); err != nil {
			r.t.Fatal(err)
		}
	case n < 87:
		r.store()
		if err := errors.Join(r.tl.Flush(r.t.Context()), r.tl.Compact(r.t.Context())); err != nil {
			r.t.Fatal(err)
		}
	case n < 89:
		r.reopen()
	default:
		r.store()
		r.check(r.at - 256*pg.LSN(r.rng.IntN(1+min(60, int(r.at-startLSN)/256))))
	}
}

// check compares all that can be read at an LSN with the cluster as of then.
func (r *copyRun) check(lsn pg.LSN) {
	r.t.Helper()
	release, err := r.tl.Pin(lsn)
	if errors.Is(err, timeline.ErrTooOld) {
		return
	}
	if err != nil {
		r.t.Fatal(err)
	}
	defer release()
	want := r.past[lsn]
	page := make([]byte, pg.BlockSize)
	for db := firstDB; db < firstDB+databases; db++ {
		have := map[pg.RelTag]int{}
		from, to := keyspace.DatabaseRange(keyspace.KindRelSize, spaceOid, db)
		err := r.tl.Scan(r.t.Context(), from, to, lsn, func(key keyspace.Key, v timeline.Value) error {
			k, err := keyspace.Parse(key)
			have[k.Rel] = int(le.Uint32(v.Data))
			return err
		})
		if err != nil {
			r.t.Fatal(err)
		}
		for tag, pages := range want[db] {
			if n, ok := have[tag]; !ok || n != len(pages) {
				r.t.Fatalf("at %v: %v has %d blocks (%v), want %d", lsn, tag, n, ok, len(pages))
			}
			for _, b := range blockNumbers {
				if b >= len(pages) {
					break
				}
				p := pages[b]
				if p == nil {
					p = make([]byte, pg.BlockSize)
				}
				if err := pageread.Page(r.t.Context(), r.tl, keyspace.RelPage(tag, pg.BlockNumber(b)), lsn, page); err != nil {
					r.t.Fatalf("at %v: %v", lsn, err)
				}
				if !bytes.Equal(page, p) {
					r.t.Fatalf("at %v: block %d of %v\nhas  %x\nwant %x", lsn, b, tag, page[:300], p[:300])
				}
			}
		}
		if len(have) != len(want[db]) {
			r.t.Fatalf("at %v: database %d has %d forks, want %d", lsn, db, len(have), len(want[db]))
		}
	}
}

// TestCopiesAgainstNaiveCopies copies, changes, drops and makes again databases at random, with
// flushes, compactions and crashes in between, and reads the present and the past.
func TestCopiesAgainstNaiveCopies(t *testing.T) {
	seeds := []uint64{*seedFlag}
	if *seedFlag == 0 {
		seeds = nil
		for s := range uint64(60) {
			seeds = append(seeds, s+1)
		}
	}
	for _, seed := range seeds {
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) {
			r := newCopyRun(t, seed)
			if err := r.tl.Flush(t.Context()); err != nil {
				t.Fatal(err)
			}
			for range 250 {
				r.step()
			}
			if r.copied == 0 {
				t.Error("no database was copied")
			}
			r.store()
			for range 2 {
				for lsn := r.at; lsn >= startLSN && lsn > r.tl.HorizonLSN(); lsn -= 256 {
					r.check(lsn)
				}
				if err := errors.Join(r.tl.Flush(t.Context()), r.tl.Compact(t.Context())); err != nil {
					t.Fatal(err)
				}
				r.reopen()
			}
		})
	}
}

// TestACopyCostsItsRelationsNotItsPages counts what the record makes of a database of 8 GB.
func TestACopyCostsItsRelationsNotItsPages(t *testing.T) {
	const forks = 300
	for _, blocks := range []uint32{1, 3500} {
		b := newBench(t)
		for i := range pg.Oid(forks) {
			b.put([]timeline.Entry{{Key: keyspace.RelSize(rel(100 + i)),
				Value: timeline.Value{LSN: b.at, Kind: timeline.Image, Data: binary.LittleEndian.AppendUint32(nil, blocks)}}})
		}
		count := func() (n int) {
			for _, list := range b.versions {
				n += len(list)
			}
			return n
		}
		before := count()
		b.apply(rmDBase, 0x00, 1000, words(6, 1663, 5, 1663))
		// The folder, its place, the old relation map's end, the branch's counters.
		if n := count() - before; n != forks+4 || b.staged != 0 {
			t.Errorf("a copy of %d forks of %d blocks makes %d values and stages %d; want %d, and none", forks, blocks, n, b.staged, forks+4)
		}
	}
}

// A copy of a copy, and so on, ends at a folder that was copied page by page.
func TestLongChainsOfCopiesAreCutShort(t *testing.T) {
	b, r := newBench(t), rel(100)
	b.full(r, 2, 0xCC)
	longest := 0
	for i := range uint32(3 * maxSources) {
		b.apply(rmDBase, 0x00, 1000, words(6+i, 1663, 5+i, 1663))
		r.Database = pg.Oid(6 + i)
		if have := b.fill(r, 1, b.at); have != 0xCC {
			t.Fatalf("copy %d has %#02x, want 0xcc", i, have)
		}
		if h := b.history(keyspace.Copy(keyspace.Dir{Tablespace: 1663, Database: r.Database})); h.Base != nil {
			list, err := timeline.ParseSources(h.Base.Data)
			if err != nil {
				t.Fatal(err)
			}
			longest = max(longest, len(list))
		}
	}
	if longest != maxSources {
		t.Errorf("a page has to be looked for in up to %d folders, want %d", longest, maxSources)
	}
}
