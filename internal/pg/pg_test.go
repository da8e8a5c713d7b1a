package pg

import (
	"hash/crc32"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func someControl() *ControlFile {
	c := &ControlFile{
		SystemID: 7123456789012345678, State: DBShutdowned, Time: 1700000001, CheckPoint: 0x12345678,
		CheckPointCopy: CheckPoint{Redo: 0x12345678, TimelineID: 1, PrevTimelineID: 1, FullPageWrites: true,
			NextXid: 5<<32 | 777, NextOid: 24576, NextMulti: 9, NextMultiOffset: 33, OldestXid: 717, OldestXidDB: 1,
			OldestMulti: 1, OldestMultiDB: 5, Time: 1700000000, OldestCommitTsXid: 3, NewestCommitTsXid: 4, OldestActiveXid: 6},
		UnloggedLSN: 1000, MinRecoveryPoint: 11, MinRecoveryTLI: 12, BackupStart: 13, BackupEnd: 14, BackupEndRequired: true,
		WALLevel: 1, WALLogHints: true, MaxConnections: 100, MaxWorkerProcesses: 8, MaxWALSenders: 10, MaxPreparedXacts: 2,
		MaxLocksPerXact: 64, TrackCommitTS: true, ChecksumVersion: 1,
	}
	copy(c.MockAuthNonce[:], "a nonce of thirty-two bytes: 123")
	return c
}

func TestControlFile(t *testing.T) {
	want := someControl()
	b := want.Marshal()
	if len(b) != ControlFileSize {
		t.Fatalf("%d bytes", len(b))
	}
	have, err := ParseControlFile(b)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want, have); d != "" {
		t.Error(d)
	}
	for _, c := range []struct {
		change func(b []byte)
		fixCRC bool
		want   string
	}{
		{func(b []byte) { b[100]++ }, false, "CRC"},
		{func(b []byte) { b[8]++ }, true, "version 1301"},
		{func(b []byte) { b[12]++ }, true, "catalog version"},
		{func(b []byte) { b[217] = 16 }, true, "block size"},
		{func(b []byte) { b[231] = 4 }, true, "WAL segment size"},
		{func(b []byte) { b[208]++ }, true, "floating-point"},
		{func(b []byte) { b[16] = 99 }, true, "state 99"},
	} {
		b := want.Marshal()
		c.change(b)
		if c.fixCRC {
			le.PutUint32(b[controlCRCAt:], crc32.Checksum(b[:controlCRCAt], Castagnoli))
		}
		if _, err := ParseControlFile(b); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("want an error about %q, have %v", c.want, err)
		}
	}
	if _, err := ParseControlFile(b[:200]); err == nil {
		t.Error("a short file is accepted")
	}
}

func TestAdvanceXid(t *testing.T) {
	for _, c := range []struct {
		next uint64
		xid  TransactionID
		want uint64
	}{
		{100, 0, 100}, {100, 2, 100}, {100, 99, 100}, {100, 100, 101}, {100, 500, 501},
		{1<<32 - 1, 1<<32 - 1, 1<<32 + 3}, // the permanent xids are skipped
		{1<<32 - 10, 5, 1<<32 + 6},        // wrapped around
		{1<<32 + 5, 1<<32 - 10, 1<<32 + 5},
		{2<<31 + 1<<31, 0, 2<<31 + 1<<31}, // beyond two billion, 0 is still no xid
	} {
		cp := CheckPoint{NextXid: c.next}
		changed := cp.AdvanceXid(c.xid)
		if cp.NextXid != c.want || changed != (c.want != c.next) {
			t.Errorf("next %d, xid %d: now %d (changed %v), want %d", c.next, c.xid, cp.NextXid, changed, c.want)
		}
	}
}

func TestRelPath(t *testing.T) {
	base := RelFileNode{DefaultTablespaceOid, 5, 1259}
	for _, c := range []struct {
		path    string
		tag     RelTag
		segment int
	}{
		{"base/5/1259", RelTag{base, MainFork}, 0},
		{"base/5/1259_vm.1", RelTag{base, VMFork}, 1},
		{"base/5/1259_fsm", RelTag{base, FSMFork}, 0},
		{"base/5/1259_init.12", RelTag{base, InitFork}, 12},
		{"global/1262", RelTag{RelFileNode{GlobalTablespaceOid, 0, 1262}, MainFork}, 0},
		{"base/4294967295/4294967295", RelTag{RelFileNode{DefaultTablespaceOid, 1<<32 - 1, 1<<32 - 1}, MainFork}, 0},
	} {
		tag, segment, ok := ParseRelPath(c.path)
		if !ok || tag != c.tag || segment != c.segment {
			t.Errorf("%s: %v segment %d %v", c.path, tag, segment, ok)
		}
		if p := RelPath(c.tag, c.segment); p != c.path {
			t.Errorf("%v segment %d: %s, want %s", c.tag, c.segment, p, c.path)
		}
	}
	elsewhere := RelTag{RelFileNode{16384, 5, 1259}, VMFork}
	if have, want := RelPath(elsewhere, 1), "pg_tblspc/16384/PG_15_202209061/5/1259_vm.1"; have != want {
		t.Errorf("in a tablespace: %s, want %s", have, want)
	}
	for _, p := range []string{
		"", "base/5", "base/5/", "base/5/PG_VERSION", "base/5/pg_filenode.map", "base/5/t3_16384", "base/05/1259", "base/5/01259",
		"base/5/1259_", "base/5/1259_main", "base/5/1259_vm.", "base/5/1259.0", "base/5/1259.01", "base/5/1259.x", "base/5/-1", "base/5/+1",
		"base/5/4294967296", "base/x/1", "base/1/2/3", "base//1", "global/pg_control", "1259", "/base/5/1", "pg_tblspc/1/PG_15/5/1", "base/5/1259_vm_fsm",
		"base/5/1259.99999",
	} {
		if tag, seg, ok := ParseRelPath(p); ok {
			t.Errorf("%q is taken for %v segment %d", p, tag, seg)
		}
	}
}

func TestSLRUPath(t *testing.T) {
	for _, c := range []struct {
		kind SLRUKind
		page uint32
		file string
		off  int64
	}{
		{CLog, 0, "pg_xact/0000", 0}, {CLog, 33, "pg_xact/0001", BlockSize},
		{MultiXactOffsets, 31, "pg_multixact/offsets/0000", 31 * BlockSize},
		{MultiXactMembers, 0x14078 * 32, "pg_multixact/members/14078", 0}, {CommitTS, 0xABCD * 32, "pg_commit_ts/ABCD", 0},
	} {
		file, off := SLRUPath(c.kind, c.page)
		if file != c.file || off != c.off {
			t.Errorf("%v page %d: %s %d", c.kind, c.page, file, off)
		}
		kind, first, ok := ParseSLRUPath(file)
		if !ok || kind != c.kind || first != c.page/32*32 {
			t.Errorf("%s: %v %d %v", file, kind, first, ok)
		}
	}
	for _, p := range []string{"pg_xact/", "pg_xact/00", "pg_xact/00001", "pg_xact/000g", "pg_xact/abcd", "pg_subtrans/0000", "pg_xact/FFFFFFFFFF", "pg_xact/0000/1", "pg_multixact/0000"} {
		if k, n, ok := ParseSLRUPath(p); ok {
			t.Errorf("%q is taken for %v page %d", p, k, n)
		}
	}
}

func TestWALFileName(t *testing.T) {
	for _, l := range []LSN{0, 0x1000000, 0xFFFFFFFF, 0x100000000, 0x12345678_9ABCDEF0} {
		name := WALFileName(l)
		start, ok := ParseWALFileName(name)
		if !ok || start != l.SegmentStart() {
			t.Errorf("%v: %s, %v %v", l, name, start, ok)
		}
	}
	if n := WALFileName(0x1_02345678); n != "000000010000000100000002" {
		t.Error(n)
	}
	for _, n := range []string{"", "000000020000000000000001", "000000010000000000000100", "00000001000000000000001", "0000000100000000000000ab", "00000001.history"} {
		if l, ok := ParseWALFileName(n); ok {
			t.Errorf("%q is taken for %v", n, l)
		}
	}
}

func TestWALPageHeader(t *testing.T) {
	for _, page := range []LSN{0x1000000, 0x1002000, 0x7_FF000000} {
		for _, remaining := range []uint32{0, 17, 1 << 29} {
			h := NewWALPageHeader(page, remaining, 42)
			b := h.Append(nil)
			if len(b) != WALPageHeaderSize(page) {
				t.Fatalf("%v: %d bytes", page, len(b))
			}
			got, err := ParseWALPageHeader(b, page)
			if err != nil || got != h {
				t.Errorf("%v: %+v, want %+v: %v", page, got, h, err)
			}
			for i := range b {
				flipped := append([]byte(nil), b...)
				flipped[i] ^= 0x40
				if _, err := ParseWALPageHeader(flipped, page); err == nil && i < 4 {
					t.Errorf("%v: byte %d may be anything", page, i)
				}
				ParseWALPageHeader(b[:i], page)
			}
		}
	}
	if _, err := ParseWALPageHeader(NewWALPageHeader(0x1002000, 0, 0).Append(nil), 0x1004000); err == nil {
		t.Error("a page at another place is accepted")
	}
}
