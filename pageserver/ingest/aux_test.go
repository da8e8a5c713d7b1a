package ingest

import (
	"bytes"
	"context"
	"encoding/binary"
	"testing"

	"github.com/holdfastdb/holdfast/internal/auxfile"
	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/pageserver/keyspace"
)

func (b *bench) auxFile(name string) (content []byte, there bool) {
	b.t.Helper()
	h := b.history(keyspace.AuxFile(name))
	if h.Base == nil {
		return nil, false
	}
	got, content, err := auxfile.Parse(h.Base.Data)
	if err != nil || got != name {
		b.t.Errorf("file %s: the value is of %q, %v", name, got, err)
	}
	return content, true
}

// rewriteRecord is an XLOG_HEAP2_REWRITE with one mapping.
func rewriteRecord(offset uint64, fill byte) []byte {
	d := words(700, 5, 0x4eb, 0)
	d = binary.LittleEndian.AppendUint64(d, offset)
	d = append(d, words(1, 0)...)
	d = binary.LittleEndian.AppendUint64(d, 0x1_0000_0028)
	return append(d, bytes.Repeat([]byte{fill}, rewriteMapping)...)
}

func TestAuxFilesComeAndGo(t *testing.T) {
	b := newBench(t)
	var says []auxfile.Change
	say := func(changes ...auxfile.Change) {
		t.Helper()
		says = changes
		b.core.Aux = func(context.Context, []byte) ([]auxfile.Change, error) { return says, nil }
		b.apply(rmLogicalMsg, 0, 0, auxfile.Record(nil))
	}
	const slot = "pg_replslot/s/state"
	say(auxfile.Change{Path: slot, Content: []byte("a")}, auxfile.Change{Path: auxfile.Settings, Content: []byte("b")})
	if got, _ := b.auxFile(slot); string(got) != "a" {
		t.Errorf("slot: %q", got)
	}
	say(auxfile.Change{Path: slot, Removed: true})
	if _, there := b.auxFile(slot); there {
		t.Error("a slot that was dropped is there")
	}
	if got, _ := b.auxFile(auxfile.Settings); string(got) != "b" {
		t.Errorf("settings: %q", got)
	}
}

func TestRewritesAreKeptInParts(t *testing.T) {
	b := newBench(t)
	const other = auxfile.Mappings + "/map-5-4eb-1_28-2bc-2b"
	const file = other + "d"
	for i, offset := range []uint64{0, rewriteMapping} {
		b.apply(rmHeap2, 0, 0x2bd, rewriteRecord(offset, byte('a'+i)))
		got, _ := b.auxFile(auxfile.PartName(file, offset))
		if want := bytes.Repeat([]byte{byte('a' + i)}, rewriteMapping); !bytes.Equal(got, want) {
			t.Errorf("part at %d: %q", offset, got)
		}
	}
	for _, xid := range []pg.TransactionID{0x2be, 0x2bf} { // other transactions'
		b.apply(rmHeap2, 0, xid, rewriteRecord(0, 'z'))
	}
	if err := b.try(rmHeap2, 0, 0x2bd, rewriteRecord(0, 'a')[:rewriteHeader+rewriteMapping-1]); err == nil {
		t.Error("a record that is cut was taken")
	}
	b.restart()
	b.core.Aux = func(context.Context, []byte) ([]auxfile.Change, error) {
		return []auxfile.Change{{Path: file, Removed: true}, {Path: other + "f", Removed: true}}, nil
	}
	b.scans = 0
	b.apply(rmLogicalMsg, 0, 0, auxfile.Record(nil))
	if b.scans != 1 {
		t.Errorf("two files were removed in %d scans, want 1", b.scans)
	}
	for _, part := range []string{auxfile.PartName(file, 0), auxfile.PartName(file, rewriteMapping), auxfile.PartName(other+"f", 0)} {
		if _, there := b.auxFile(part); there {
			t.Errorf("part %s of a file that was removed is there", part)
		}
	}
	if _, there := b.auxFile(auxfile.PartName(other+"e", 0)); !there {
		t.Error("another file is gone")
	}
}
