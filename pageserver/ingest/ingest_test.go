package ingest

import (
	"errors"
	"hash/crc32"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/internal/walrec"
	"github.com/holdfastdb/holdfast/pageserver/keyspace"
	"github.com/holdfastdb/holdfast/pageserver/redo"
	"github.com/holdfastdb/holdfast/pageserver/timeline"
)

const (
	rmBtree = 11
	rmGin   = 13
)

func TestBlocksAreFiledAndRelationsGrow(t *testing.T) {
	b, r := newBench(t), rel(100)
	b.apply(rmBtree, 0, 1000, nil, initBlock(r, 0))
	b.apply(rmBtree, 0, 1000, nil, changeBlock(r, 0))
	b.apply(rmBtree, 0, 1000, nil, changeBlock(r, 3)) // blocks 1 and 2 are a gap
	if have := b.size(r); have != 4 {
		t.Errorf("the relation has %d blocks, want 4", have)
	}
	for block, want := range map[pg.BlockNumber]int{0: 1, 1: 0, 3: 1} {
		h := b.history(keyspace.RelPage(r, block))
		if h.Base == nil || h.Base.Kind != timeline.Init || len(h.Changes) != want {
			t.Errorf("block %d: base %v and %d changes, want an Init and %d", block, h.Base, len(h.Changes), want)
		}
	}
	b.restart()
	b.apply(rmGin, 0, 0, nil, changeBlock(r, 1))
	if have := b.size(r); have != 4 {
		t.Errorf("after a change inside it the relation has %d blocks, want 4", have)
	}
}

func TestHostileBlockReferencesAreErrors(t *testing.T) {
	b, bad := newBench(t), rel(100)
	bad.Fork = 7
	if b.try(rmBtree, 0, 0, nil, changeBlock(bad, 0)) == nil {
		t.Error("a reference to fork 7 is taken")
	}
	if b.try(rmBtree, 0, 0, nil, changeBlock(rel(100), 0xFFFFFFFF)) == nil {
		t.Error("a reference to the invalid block is taken")
	}
	if b.try(rmXLOG, xlogFPI, 0, nil, changeBlock(rel(100), 0)) == nil {
		t.Error("a full-page image record without an image is taken")
	}
	b.apply(rmXLOG, xlogFPIForHint, 0, nil, changeBlock(rel(100), 0))
	if have := b.size(rel(100)); have != -1 {
		t.Errorf("a hint without an image made a relation of %d blocks", have)
	}
}

func TestNoRecordPanics(t *testing.T) {
	for rmid := range uint8(22) {
		for kind := 0; kind < 256; kind += 16 {
			for n := 0; n < 40; n += 3 {
				b := newBench(t)
				_ = b.try(rmid, uint8(kind), 3, slices.Repeat([]byte{0xFF}, n))
				_ = b.try(rmid, uint8(kind), 3, make([]byte, n))
			}
		}
	}
}

func TestXidsAdvance(t *testing.T) {
	b := newBench(t)
	cp := b.core.state.checkPoint()
	b.apply(rmStandby, 0, 0, nil)
	if cp.NextXid != 1000 {
		t.Errorf("xid 0 made the next xid %d", cp.NextXid)
	}
	b.apply(rmStandby, 0, 1004, nil)
	b.apply(rmStandby, 0, 1001, nil)
	if cp.NextXid != 1005 {
		t.Errorf("the next xid is %d, want 1005", cp.NextXid)
	}
}

func TestCheckpoints(t *testing.T) {
	b := newBench(t)
	cp := b.core.state.checkPoint()
	b.apply(rmXLOG, xlogNextOid, 0, words(30000))
	b.apply(rmStandby, 0, 2000, nil)
	older := pg.CheckPoint{TimelineID: 1, NextXid: 1500, NextOid: 100, NextMulti: 50, NextMultiOffset: 60, OldestXid: 800, OldestXidDB: 1, OldestMulti: 2, Time: 77}
	b.apply(rmXLOG, xlogCheckpointOnline, 0, older.Marshal())
	if cp.NextXid != 2001 || cp.NextOid != 30000 || cp.NextMulti != 50 || cp.OldestXid != 800 || cp.OldestMulti != 2 {
		t.Errorf("after an online checkpoint: %+v", *cp)
	}
	older.OldestMultiDB = 16384 // another database has the oldest one now, which is the same
	b.apply(rmXLOG, xlogCheckpointShutdown, 0, older.Marshal())
	if cp.NextXid != 1500 || cp.NextOid != 100 || cp.OldestMultiDB != 16384 {
		t.Errorf("a shutdown checkpoint is not believed: %+v", *cp)
	}
	older.TimelineID = 2
	if b.try(rmXLOG, xlogCheckpointOnline, 0, older.Marshal()) == nil {
		t.Error("a checkpoint of another PostgreSQL timeline is taken")
	}
	if b.try(rmXLOG, xlogEndOfRecovery, 0, words(0, 0, 2, 1)) == nil {
		t.Error("a promotion to another PostgreSQL timeline is taken")
	}
}

func TestCommitTimestampsFollowTheParameter(t *testing.T) {
	b := newBench(t)
	commit := make([]byte, 8)
	parameters := func(on byte) []byte { return append(words(100, 8, 10, 0, 64, 1), 0, on) }
	b.apply(rmXact, 0, 1000, commit)
	if have := b.slruPages(pg.CommitTS); have != nil {
		t.Errorf("commit_ts has pages %v while it is off", have)
	}
	b.apply(rmXLOG, xlogParameterChange, 0, parameters(1))
	b.apply(rmXact, 0, 2000, commit)
	if have := b.slruPages(pg.CommitTS); !slices.Equal(have, []uint32{1, 2}) {
		t.Errorf("commit_ts has pages %v, want that of the next xid, and the commit's", have)
	}
	if cp := b.core.state.checkPoint(); cp.OldestCommitTsXid != 1001 || cp.NewestCommitTsXid != 2000 {
		t.Errorf("commit_ts goes from %d to %d, want 1001 to 2000", cp.OldestCommitTsXid, cp.NewestCommitTsXid)
	}
	b.apply(rmXLOG, xlogParameterChange, 0, parameters(0))
	if have := b.slruPages(pg.CommitTS); have != nil {
		t.Errorf("commit_ts has pages %v after it was switched off", have)
	}
}

func TestCommitMarksSubtransactionsAcrossPages(t *testing.T) {
	b := newBench(t)
	data := append(make([]byte, 8), words(1<<1, 2, clogPerPage, clogPerPage+1)...) // xinfo: subxacts
	b.apply(rmXact, 0x80, clogPerPage-1, data)
	if have := b.slruPages(pg.CLog); !slices.Equal(have, []uint32{0, 1}) {
		t.Fatalf("pg_xact has pages %v, want 0 and 1", have)
	}
	page := make([]byte, pg.BlockSize)
	if err := b.Page(t.Context(), keyspace.SLRUPage(pg.CLog, 1), b.at, page); err != nil {
		t.Fatal(err)
	}
	if page[0] != 1|1<<2 {
		t.Errorf("the second page begins with %#02x, want two commits", page[0])
	}
	if have := b.core.state.checkPoint().NextXid; have != clogPerPage+2 {
		t.Errorf("the next xid is %d, want %d", have, clogPerPage+2)
	}
}

func TestPreparedTransactionsHaveFiles(t *testing.T) {
	b := newBench(t)
	header := le.AppendUint32(nil, 0x57F94534)
	header = append(header, words(0, 1500, 5)...) // total_len, xid, database
	header = append(header, make([]byte, 8)...)   // prepared_at
	header = append(header, words(10, 0, 0, 0, 0, 0, 0)...)
	header = append(header, 0, 0, 5, 0)          // initfileinval, padding, gidlen
	header = append(header, make([]byte, 16)...) // origin
	header = append(header, "gid1\x00\x00\x00\x00"...)
	b.apply(rmXact, 0x10, 1500, header)
	h := b.history(keyspace.TwoPhase(1500))
	if h.Base == nil {
		t.Fatal("there is no file")
	}
	n := len(h.Base.Data) - 4
	if !slices.Equal(h.Base.Data[:n], header) || le.Uint32(h.Base.Data[n:]) != crc32.Checksum(header, pg.Castagnoli) {
		t.Error("the file is not the record's data and its CRC")
	}
	b.apply(rmXact, 0x30|0x80, 0, append(make([]byte, 8), words(1<<4, 1500)...)) // xinfo: two-phase
	if b.history(keyspace.TwoPhase(1500)).Base != nil {
		t.Error("the file is there after COMMIT PREPARED")
	}
	if have := b.slruPages(pg.CLog); !slices.Equal(have, []uint32{0}) {
		t.Errorf("pg_xact has pages %v, want 0", have)
	}
}

func TestHeapRecordsClearMapsAndAreFollowed(t *testing.T) {
	b, r := newBench(t), rel(100)
	deletion := []byte{0, 0, 0, 0, 1, 0, 0, 1} // xmax, offset, infobits, flags: all-visible cleared
	b.apply(rmHeap, 0x10, 1000, deletion, changeBlock(r, 5))
	if have := b.size(forkOf(r, pg.VMFork)); have != 1 {
		t.Errorf("the visibility map has %d blocks, want 1", have)
	}
	if h := b.history(keyspace.RelPage(forkOf(r, pg.VMFork), 0)); len(h.Changes) != 1 {
		t.Errorf("the visibility map's page has %d changes, want 1", len(h.Changes))
	}
	insert := []byte{1, 0, 0}
	b.apply(rmHeap, 0x00, 1000, insert, changeBlock(r, 5))
	b.apply(rmHeap, 0x00, 1000, insert, changeBlock(r, 5))
	fsm := forkOf(r, pg.FSMFork)
	for block, want := range []int{1, 1, 1} { // two upper levels, and the slot; each once
		if h := b.history(keyspace.RelPage(fsm, pg.BlockNumber(block))); len(h.Changes) != want {
			t.Errorf("block %d of the free space map has %d changes, want %d", block, len(h.Changes), want)
		}
	}
	page := make([]byte, pg.BlockSize)
	if err := b.Page(t.Context(), keyspace.RelPage(fsm, 0), b.at, page); err != nil {
		t.Fatal(err)
	}
	if page[28+4095] != 255 {
		t.Errorf("the root's first slot is %d, want 255", page[28+4095])
	}
}

func TestFileCopyOfAPageWithoutRedo(t *testing.T) {
	b := newBench(t)
	b.core.maxSources = 0 // each page is copied
	b.apply(rmBtree, 0, 1000, nil, initBlock(rel(100), 0))
	b.pageErr = &redo.UnsupportedError{Record: "Gin/INSERT"}
	b.apply(rmDBase, 0x00, 1000, words(6, 1663, 5, 1663))
	b.pageErr = nil
	copied := rel(100)
	copied.Database = 6
	var unsupported *redo.UnsupportedError
	err := b.Page(t.Context(), keyspace.RelPage(copied, 0), b.at, make([]byte, pg.BlockSize))
	if !errors.As(err, &unsupported) || unsupported.Record != "Gin/INSERT" {
		t.Errorf("reading the copy gives %v", err)
	}
}

func TestDatabasesAreCopiedAndDropped(t *testing.T) {
	b, r := newBench(t), rel(100)
	page := make([]byte, pg.BlockSize)
	page[5000] = 77
	b.put([]timeline.Entry{
		{Key: keyspace.RelSize(r), Value: timeline.Value{LSN: b.at, Kind: timeline.Image, Data: words(2)}},
		{Key: keyspace.RelPage(r, 1), Value: timeline.Value{LSN: b.at, Kind: timeline.Image, Data: page}},
		{Key: keyspace.RelMap(1663, 5), Value: timeline.Value{LSN: b.at, Kind: timeline.Image, Data: []byte("map")}},
	})
	b.apply(rmDBase, 0x00, 1000, words(6, 1663, 5, 1663))
	copied := r
	copied.Database = 6
	have := make([]byte, pg.BlockSize)
	if err := b.Page(t.Context(), keyspace.RelPage(copied, 1), b.at, have); err != nil || have[5000] != 77 {
		t.Errorf("the copied page has %d, %v; want 77", have[5000], err)
	}
	if b.size(copied) != 2 || b.history(keyspace.RelMap(1663, 6)).Base == nil || b.history(keyspace.Database(1663, 6)).Base == nil {
		t.Error("the copy lacks its sizes, its relation map or its folder")
	}
	b.apply(rmDBase, 0x20, 1000, words(6, 1, 1663))
	if b.size(copied) != -1 || b.history(keyspace.RelMap(1663, 6)).Base != nil || b.history(keyspace.Database(1663, 6)).Base != nil {
		t.Error("something is left of the dropped database")
	}
	b.apply(rmDBase, 0x10, 1000, words(7, 1663))
	if h := b.history(keyspace.Database(1663, 7)); h.Base == nil || string(h.Base.Data) != "15\n" {
		t.Error("a database made by its log has no folder")
	}
}

func TestRelationMapsAndOrigins(t *testing.T) {
	b := newBench(t)
	m := make([]byte, 512)
	m[100] = 9
	b.apply(rmRelMap, 0, 0, append(words(5, 1663, 512), m...))
	if h := b.history(keyspace.RelMap(1663, 5)); h.Base == nil || h.Base.Data[100] != 9 || le.Uint32(h.Base.Data[504:]) == 0 {
		t.Error("the relation map is not kept with its CRC")
	}
	if b.try(rmRelMap, 0, 0, append(words(5, 1663, 100), m[:100]...)) == nil {
		t.Error("a relation map of 100 bytes is taken")
	}
	set := append(le.AppendUint64(nil, 0x5000), 3, 0, 0, 0, 0, 0, 0, 0)
	b.apply(rmReplOrigin, 0x00, 0, set)
	b.restart()
	if d := cmp.Diff(map[uint16]pg.LSN{3: 0x5000}, b.core.State().Origins); d != "" {
		t.Errorf("origins (-want +have):\n%s", d)
	}
	if f := b.core.State().OriginsFile(); len(f) != 4+16+4 || f[4] != 3 {
		t.Errorf("the origins' file is %x", f)
	}
	b.apply(rmReplOrigin, 0x10, 0, []byte{3, 0})
	if len(b.core.State().Origins) != 0 {
		t.Error("the dropped origin is still there")
	}
}

func TestImagesReplaceHistory(t *testing.T) {
	// An Image needs a stored page image, which only a real record has: tests over real WAL
	// (test/pagesvc) cover it. Here: what has no image to apply is a change.
	b, r := newBench(t), rel(100)
	b.apply(rmGin, 0, 0, nil, walrec.Block{Rel: r, Block: 0, HasImage: true})
	if h := b.history(keyspace.RelPage(r, 0)); len(h.Changes) != 1 {
		t.Errorf("a record with an image only to compare with is filed %d times, want once", len(h.Changes))
	}
}
