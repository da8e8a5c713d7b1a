package keyspace

import (
	"encoding/hex"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/holdfastdb/holdfast/internal/pg"
)

var tag = pg.RelTag{RelFileNode: pg.RelFileNode{Tablespace: 1663, Database: 5, Relation: 16384}, Fork: pg.VMFork}

// Keys rest in layers and manifests: their bytes are a format.
func TestGoldenKeys(t *testing.T) {
	for _, c := range []struct {
		key  Key
		want string // kind, 4, 4, 4, 1, 4 bytes
		says Parsed
	}{
		{Checkpoint(), "01 00000000 00000000 00000000 00 00000000", Parsed{Kind: KindCheckpoint}},
		{Database(1663, 5), "02 0000067f 00000005 00000000 00 00000000",
			Parsed{Kind: KindDatabase, Rel: pg.RelTag{RelFileNode: pg.RelFileNode{Tablespace: 1663, Database: 5}}}},
		{RelMap(1664, 0), "03 00000680 00000000 00000000 00 00000000",
			Parsed{Kind: KindRelMap, Rel: pg.RelTag{RelFileNode: pg.RelFileNode{Tablespace: 1664}}}},
		{TwoPhase(0x01020304), "04 00000000 00000000 00000000 00 01020304", Parsed{Kind: KindTwoPhase, Xid: 0x01020304}},
		{AuxFile("postgresql.auto.conf"), "05 8330d216 ffda17ca 8487515e 38 58ba5bff", Parsed{Kind: KindAuxFile}},
		{RelSize(tag), "06 0000067f 00000005 00004000 02 00000000", Parsed{Kind: KindRelSize, Rel: tag}},
		{Dropped(tag), "07 0000067f 00000005 00004000 02 00000000", Parsed{Kind: KindDropped, Rel: tag}},
		{SLRUExtents(1), "08 00000001 00000000 00000000 00 00000000", Parsed{Kind: KindSLRUExtents, SLRU: 1}},
		{SLRUPage(1, 258), "09 00000001 00000000 00000000 00 00000102", Parsed{Kind: KindSLRUPage, SLRU: 1, Page: 258}},
		{RelPage(tag, 0xfffffffe), "0a 0000067f 00000005 00004000 02 fffffffe", Parsed{Kind: KindRelPage, Rel: tag, Block: 0xfffffffe}},
		{Copy(Dir{1663, 5}), "0b 0000067f 00000005 00000000 00 00000000",
			Parsed{Kind: KindCopy, Rel: pg.RelTag{RelFileNode: pg.RelFileNode{Tablespace: 1663, Database: 5}}}},
	} {
		k := hex.EncodeToString(c.key[:])
		got := k[:2] + " " + k[2:10] + " " + k[10:18] + " " + k[18:26] + " " + k[26:28] + " " + k[28:]
		if got != c.want {
			t.Errorf("%v: key %s, want %s", c.says.Kind, got, c.want)
		}
		says, err := Parse(c.key)
		if err != nil {
			t.Errorf("%s: %v", got, err)
		}
		if diff := cmp.Diff(c.says, says); diff != "" {
			t.Errorf("%s: %s", got, diff)
		}
	}
	for _, kind := range []byte{0, byte(kindEnd), 255} {
		if _, err := Parse(Key{kind}); err == nil {
			t.Errorf("a key of kind %d is parsed", kind)
		}
	}
}

func TestFoldersOfKeys(t *testing.T) {
	moved := tag
	moved.Tablespace, moved.Database = 1700, 9
	d := Dir{Tablespace: 1700, Database: 9}
	if k := RelPage(tag, 7).In(d); k != RelPage(moved, 7) {
		t.Errorf("the page in another folder has key %x, want %x", k, RelPage(moved, 7))
	}
	if got, ok := RelPage(moved, 7).PageDir(); !ok || got != d {
		t.Errorf("the page is in folder %v, %v; want %v", got, ok, d)
	}
	if got, ok := Copy(d).CopyDir(); !ok || got != d {
		t.Errorf("the Copy key is of folder %v, %v; want %v", got, ok, d)
	}
	for _, k := range []Key{RelSize(tag), SLRUPage(1, 2)} {
		_, page := k.PageDir()
		if _, ok := k.CopyDir(); ok || page {
			t.Errorf("key %x is taken for a page's or a copy's", k)
		}
	}
}

func TestRanges(t *testing.T) {
	in := func(k, from, to Key) bool { return k.Compare(from) >= 0 && k.Compare(to) < 0 }
	page := func(database, relation pg.Oid, fork pg.ForkNumber, block pg.BlockNumber) Key {
		return RelPage(pg.RelTag{RelFileNode: pg.RelFileNode{Tablespace: 1663, Database: database, Relation: relation}, Fork: fork}, block)
	}
	const most = 0xffffffff
	for _, database := range []pg.Oid{5, 255, 0xffff, most - 1, most} { // with and without a carry
		from, to := DatabaseRange(KindRelPage, 1663, database)
		if !in(page(database, 0, 0, 0), from, to) || !in(page(database, most, 255, most), from, to) {
			t.Errorf("database %d: its pages are not all in its range", database)
		}
		if in(page(database-1, most, 255, most), from, to) || database != most && in(page(database+1, 0, 0, 0), from, to) {
			t.Errorf("database %d: a neighbour's pages are in its range", database)
		}
	}
	from, to := KindRange(KindRelPage)
	if !in(page(0, 0, 0, 0), from, to) || !in(page(most, most, 255, most), from, to) || in(SLRUPage(0, most), from, to) {
		t.Error("the range of a kind does not hold what it should")
	}
}
