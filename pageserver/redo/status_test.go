package redo

import (
	"bytes"
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/internal/walrec"
)

func record(t *testing.T, rmid, info uint8, xid pg.TransactionID, fields ...any) *walrec.Record {
	t.Helper()
	var data []byte
	for _, f := range fields {
		switch v := f.(type) {
		case uint32:
			data = le.AppendUint32(data, v)
		case uint64:
			data = le.AppendUint64(data, v)
		case []byte:
			data = append(data, v...)
		default:
			t.Fatalf("field of type %T", f)
		}
	}
	rec, err := walrec.Parse(walrec.Build(rmid, info, xid, 8, data), 0x1000028, 0x1000100)
	if err != nil {
		t.Fatal(err)
	}
	return rec
}

// TestCommitAcrossPages: subtransactions on several pages of pg_xact and pg_commit_ts.
func TestCommitAcrossPages(t *testing.T) {
	const hasInfo, hasSubxacts = 0x80, uint32(2)
	rec := record(t, rmXact, hasInfo, clogPerPage-1, uint64(777), hasSubxacts, uint32(2), uint32(clogPerPage), uint32(clogPerPage+5))
	pages, err := SLRUPages(rec)
	if err != nil {
		t.Fatal(err)
	}
	last := uint32(clogPerPage-1) / commitTSPerPage
	want := []SLRUPage{{pg.CLog, 0}, {pg.CLog, 1}, {pg.CommitTS, last}}
	if clogPerPage/commitTSPerPage != last {
		want = append(want, SLRUPage{pg.CommitTS, clogPerPage / commitTSPerPage})
	}
	if d := cmp.Diff(want, pages); d != "" {
		t.Error(d)
	}
	p := bytes.Repeat([]byte{0xFF}, pg.BlockSize)
	if err := ApplySLRU(pg.CLog, 0, p, rec); err != nil || p[pg.BlockSize-1] != 0x7F { // the last of four: committed
		t.Errorf("%v, %#x", err, p[pg.BlockSize-1])
	}
	p = make([]byte, pg.BlockSize)
	if err := ApplySLRU(pg.CLog, 1, p, rec); err != nil || p[0] != 1 || p[1] != 1<<2 {
		t.Errorf("%v, %x", err, p[:2])
	}
	if err := ApplySLRU(pg.CLog, 2, p, rec); !errors.Is(err, ErrUntouched) {
		t.Error(err)
	}
	p = make([]byte, pg.BlockSize)
	at := (clogPerPage - 1) % commitTSPerPage * commitTSEntry
	if err := ApplySLRU(pg.CommitTS, last, p, rec); err != nil || le.Uint64(p[at:]) != 777 {
		t.Errorf("%v, %x", err, p[at:at+10])
	}
}

// TestMultiXactAcrossPages: the last multixact of a page of offsets, and members that go
// on on the next page.
func TestMultiXactAcrossPages(t *testing.T) {
	first := uint32(membersPerPage - 2)
	rec := record(t, rmMultiXact, multiXactCreate, 0, uint32(offsetsPerPage-1), first, uint32(4),
		uint32(101), uint32(0), uint32(102), uint32(1), uint32(103), uint32(4), uint32(104), uint32(5))
	pages, err := SLRUPages(rec)
	if err != nil {
		t.Fatal(err)
	}
	want := []SLRUPage{{pg.MultiXactOffsets, 0}, {pg.MultiXactOffsets, 1}, {pg.MultiXactMembers, 0}, {pg.MultiXactMembers, 1}}
	if d := cmp.Diff(want, pages); d != "" {
		t.Error(d)
	}
	made := map[SLRUPage][]byte{}
	for _, s := range pages {
		made[s] = make([]byte, pg.BlockSize)
		if err := ApplySLRU(s.Kind, s.Page, made[s], rec); err != nil {
			t.Error(err)
		}
	}
	if v := le.Uint32(made[want[0]][pg.BlockSize-4:]); v != first {
		t.Errorf("offset %d", v)
	}
	if v := le.Uint32(made[want[1]]); v != first+4 {
		t.Errorf("next offset %d", v)
	}
	m := made[want[3]] // the third member is the next page's first: flags, then xids
	if m[0] != 4 || m[1] != 5 || le.Uint32(m[4:]) != 103 || le.Uint32(m[8:]) != 104 {
		t.Errorf("members %x", m[:20])
	}
	for _, hostile := range []*walrec.Record{
		record(t, rmMultiXact, multiXactCreate, 0, uint32(1), uint32(1), uint32(1<<31)),
		record(t, rmMultiXact, multiXactCreate, 0, uint32(1), uint32(1), uint32(2), uint32(1), uint32(1)),
		record(t, rmMultiXact, multiXactCreate, 0),
	} {
		if _, err := SLRUPages(hostile); err == nil {
			t.Error("a short record is accepted")
		}
	}
	bad := record(t, rmMultiXact, multiXactCreate, 0, uint32(1), uint32(1), uint32(1), uint32(7), uint32(6))
	if err := ApplySLRU(pg.MultiXactMembers, 0, make([]byte, pg.BlockSize), bad); err == nil {
		t.Error("an unknown lock status is accepted")
	}
}

// TestMultiXactWrapsAround: neither multixact 0 nor a first member 0 is used.
func TestMultiXactWrapsAround(t *testing.T) {
	rec := record(t, rmMultiXact, multiXactCreate, 0, uint32(0xFFFFFFFF), uint32(0xFFFFFFFE), uint32(2), uint32(101), uint32(0), uint32(102), uint32(0))
	p := make([]byte, pg.BlockSize)
	if err := ApplySLRU(pg.MultiXactOffsets, 0, p, rec); err != nil || le.Uint32(p) != 0 || le.Uint32(p[4:]) != 1 {
		t.Errorf("the first offsets are %x: %v", p[:8], err)
	}
}

func TestZeroPage(t *testing.T) {
	rec := record(t, rmCLOG, slruZeroPage, 0, uint32(3))
	p := bytes.Repeat([]byte{1}, pg.BlockSize)
	if err := ApplySLRU(pg.CLog, 3, p, rec); err != nil || !bytes.Equal(p, make([]byte, pg.BlockSize)) {
		t.Error(err)
	}
	if err := ApplySLRU(pg.CLog, 4, p, rec); !errors.Is(err, ErrUntouched) {
		t.Error(err)
	}
	if err := ApplySLRU(pg.CLog, 3, p[:100], rec); err == nil {
		t.Error("a short page is accepted")
	}
}

func TestTruncateMaps(t *testing.T) {
	full := func() []byte {
		p := bytes.Repeat([]byte{0xFF}, pg.BlockSize)
		page(p).init(0)
		copy(p[headerSize:], bytes.Repeat([]byte{0xFF}, pg.BlockSize))
		return p
	}
	for _, c := range []struct {
		block, heap pg.BlockNumber
		at          int // the first byte that loses bits, in the map
		left        byte
	}{{0, 0, 0, 0}, {0, 5, 1, 0x03}, {0, 7, 1, 0x3F}, {1, vmHeapPerPage + 6, 1, 0x0F}, {1, 9, 0, 0}} {
		p := full()
		if err := TruncateVM(p, c.block, c.heap); err != nil {
			t.Fatal(err)
		}
		want := full()
		clear(want[headerSize+c.at:])
		want[headerSize+c.at] = c.left
		if !bytes.Equal(p, want) {
			t.Errorf("map block %d cut to %d heap blocks: %v", c.block, c.heap, difference(p, want))
		}
	}
	p := full()
	if err := TruncateVM(p, 0, vmHeapPerPage+1); err != nil || !bytes.Equal(p, full()) {
		t.Errorf("a map block before the cut changes: %v", err)
	}
}

func TestFreeSpaceMap(t *testing.T) {
	for _, c := range []struct {
		heap, block pg.BlockNumber
		slot        int
	}{{0, 2, 0}, {4068, 2, 4068}, {4069, 3, 0}, {4069 * 4069, 4069 + 1 + 1 + 1, 0}} {
		if b, s := FSMLocation(c.heap); b != c.block || s != c.slot {
			t.Errorf("heap block %d: map block %d slot %d, want %d %d", c.heap, b, s, c.block, c.slot)
		}
	}
	p := make([]byte, pg.BlockSize)
	set := func(slot, free int) {
		t.Helper()
		if err := SetFreeSpace(p, slot, free); err != nil {
			t.Fatal(err)
		}
	}
	root := func() byte { return p[fsmNodesAt] }
	set(0, 320)
	set(fsmSlots-1, 3200)
	if root() != 100 {
		t.Errorf("root %d, want 100", root())
	}
	set(fsmSlots-1, 0)
	if root() != 10 {
		t.Errorf("root %d, want 10", root())
	}
	set(7, pg.BlockSize)
	if root() != 255 {
		t.Errorf("root %d, want 255", root())
	}
	if err := TruncateFSM(p, 2, 5); err != nil || root() != 10 {
		t.Errorf("root %d, want 10: %v", root(), err)
	}
	if err := SetFreeSpace(p, fsmSlots, 1); err == nil {
		t.Error("a slot beyond the page is accepted")
	}
}

// TestUntouched: a record under a page that it does not change is an error, not silence.
func TestUntouched(t *testing.T) {
	rec := record(t, rmHeap, heapInsert, 9, uint32(1))
	tag := pg.RelTag{RelFileNode: pg.RelFileNode{Tablespace: 1663, Database: 5, Relation: 16384}}
	if err := ApplyBlock(tag, 1, make([]byte, pg.BlockSize), rec); !errors.Is(err, ErrUntouched) {
		t.Error(err)
	}
	var e *Error
	if err := ApplyBlock(tag, 1, nil, rec); !errors.As(err, &e) || e.Record != "Heap/INSERT" || e.LSN != rec.LSN {
		t.Error(err)
	}
}
