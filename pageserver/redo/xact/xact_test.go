package xact

import (
	"encoding/binary"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/internal/walrec"
)

func rec(t *testing.T, info uint8, xid pg.TransactionID, data []byte) *walrec.Record {
	t.Helper()
	r, err := walrec.Parse(walrec.Build(RmID, info, xid, 8, data), 0x1000028, 0x1000100)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func u32(b []byte, vs ...uint32) []byte {
	for _, v := range vs {
		b = binary.LittleEndian.AppendUint32(b, v)
	}
	return b
}

func u64(b []byte, v uint64) []byte { return binary.LittleEndian.AppendUint64(b, v) }

// fullCommit is a COMMIT PREPARED with every part that one can have.
func fullCommit() []byte {
	b := u64(nil, 1234)
	b = u32(b, hasDBInfo|hasSubxacts|hasRelations|hasInvals|hasTwoPhase|hasOrigin|hasGID|hasDroppedStats)
	b = u32(b, 5, 1663)
	b = u32(b, 2, 701, 702)
	b = u32(b, 1, 1663, 5, 16384)
	b = append(u32(b, 1), make([]byte, statsSize)...)
	b = append(u32(b, 2), make([]byte, 2*invalSize)...)
	b = append(u32(b, 700), "gid\x00"...)
	return u64(u64(b, 0xABC), 999)
}

func TestParseCommit(t *testing.T) {
	data := fullCommit()
	have, err := ParseEnd(rec(t, OpCommitPrepared|hasInfo, 9, data))
	if err != nil {
		t.Fatal(err)
	}
	want := &End{Xid: 700, Committed: true, Prepared: true, Time: 1234, Info: have.Info, Database: 5, Tablespace: 1663,
		Subxacts: []pg.TransactionID{701, 702}, Relations: []pg.RelFileNode{{Tablespace: 1663, Database: 5, Relation: 16384}},
		GID: "gid", HasOrigin: true, OriginLSN: 0xABC, OriginTime: 999}
	if d := cmp.Diff(want, have); d != "" {
		t.Error(d)
	}
	if all := slices.Collect(have.All()); !slices.Equal(all, []pg.TransactionID{700, 701, 702}) {
		t.Error(all)
	}
	for n := range data {
		if _, err := ParseEnd(rec(t, OpCommitPrepared|hasInfo, 9, data[:n])); err == nil {
			t.Errorf("%d of %d bytes are accepted", n, len(data))
		}
	}
	for i := range data {
		for _, v := range []byte{0, 0x7F, 0x80, 0xFF} {
			damaged := slices.Clone(data)
			damaged[i] = v
			_, _ = ParseEnd(rec(t, OpCommitPrepared|hasInfo, 9, damaged))
		}
	}
}

func TestOtherEnds(t *testing.T) {
	plain, err := ParseEnd(rec(t, OpCommit, 33, u64(nil, 5)))
	if err != nil || plain.Xid != 33 || !plain.Committed || plain.Time != 5 {
		t.Error(plain, err)
	}
	abort, err := ParseEnd(rec(t, OpAbort|hasInfo, 34, u32(u64(nil, 5), hasSubxacts, 1, 35)))
	if err != nil || abort.Committed || len(abort.Subxacts) != 1 {
		t.Error(abort, err)
	}
	if e, err := ParseEnd(rec(t, OpAssignment, 0, nil)); e != nil || err != nil {
		t.Error(e, err)
	}
	if _, err := ParseEnd(rec(t, OpCommitPrepared, 33, u64(nil, 5))); err == nil {
		t.Error("a prepared transaction's end without its xid is accepted")
	}
}

func TestParsePrepare(t *testing.T) {
	b := u32(nil, twoPhaseMagic, 0, 700, 5)
	b = u32(u64(b, 1234), 10)
	b = u32(b, 1, 2, 1, 0, 0, 1) // subtransactions, drops on commit, on abort, stats, invalidations
	b = append(b, 1, 0, 4, 0)
	b = u64(u64(b, 0xABC), 999)
	b = append(b, "gid\x00\x00\x00\x00\x00"...)
	b = u32(b, 701, 0)
	b = u32(b, 1663, 5, 100, 1663, 5, 101)
	b = u32(b, 1663, 5, 102, 0)
	b = append(b, make([]byte, invalSize)...)
	have, err := ParsePrepare(rec(t, OpPrepare, 700, b))
	if err != nil {
		t.Fatal(err)
	}
	rel := func(n pg.Oid) pg.RelFileNode { return pg.RelFileNode{Tablespace: 1663, Database: 5, Relation: n} }
	want := &Prepare{Xid: 700, Database: 5, Owner: 10, Time: 1234, GID: "gid", Subxacts: []pg.TransactionID{701},
		CommitDrops: []pg.RelFileNode{rel(100), rel(101)}, AbortDrops: []pg.RelFileNode{rel(102)},
		RelcacheInitFileStale: true, OriginLSN: 0xABC, OriginTime: 999}
	if d := cmp.Diff(want, have); d != "" {
		t.Error(d)
	}
	for n := range b {
		if _, err := ParsePrepare(rec(t, OpPrepare, 700, b[:n])); err == nil {
			t.Errorf("%d of %d bytes are accepted", n, len(b))
		}
	}
	for i := range b {
		for _, v := range []byte{0, 0x7F, 0x80, 0xFF} {
			damaged := slices.Clone(b)
			damaged[i] = v
			_, _ = ParsePrepare(rec(t, OpPrepare, 700, damaged))
		}
	}
}
