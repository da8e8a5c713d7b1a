package compute

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"hash/crc32"
	iofs "io/fs"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/auxfile"
	"github.com/holdfastdb/holdfast/internal/pg"
)

// aSlot is a replication slot's file.
var aSlot = func() []byte {
	b := make([]byte, 200)
	binary.LittleEndian.PutUint32(b, 0x1051CA1)
	binary.LittleEndian.PutUint32(b[8:], 2)
	binary.LittleEndian.PutUint32(b[12:], 184)
	binary.LittleEndian.PutUint32(b[4:], crc32.Checksum(b[8:], pg.Castagnoli))
	return b
}()

// files are some that the branch has.
func files(names ...string) (files []*pb.NamedFile) {
	for _, name := range names {
		files = append(files, &pb.NamedFile{Path: name, Data: []byte("x")})
	}
	return files
}

// recorder is a keeper whose messages name the files, with what is in them unless that is aSlot.
func recorder(sent *[]string, fail *error) *auxKeeper {
	return &auxKeeper{
		seal: func(_ context.Context, changes []auxfile.Change) ([]byte, error) {
			var b strings.Builder
			for _, c := range changes {
				if b.WriteString(" " + c.Path); c.Removed {
					b.WriteString("-")
				}
				if len(c.Content) > 0 && !bytes.Equal(c.Content, aSlot) {
					b.WriteString("=" + string(c.Content))
				}
			}
			return []byte(strings.TrimSpace(b.String())), nil
		},
		emit: func(_ context.Context, message []byte) error {
			if *fail == nil {
				*sent = append(*sent, string(message))
			}
			return *fail
		},
		show: func(string) ([]byte, error) { return nil, iofs.ErrNotExist },
	}
}

// What waits goes with the next message, in the order in which it happened; what must not be
// lost is refused when it cannot be kept.
func TestAuxFilesAreKept(t *testing.T) {
	var sent []string
	var fail error
	k := recorder(&sent, &fail)
	const snap, old, slot, made = "pg_logical/snapshots/0-1.snap", "pg_logical/snapshots/0-0.snap", "pg_replslot/s/state", "pg_replslot/t/state"
	k.begin(files(snap, old), []auxfile.Change{{Path: old, Removed: true}})
	keep := func(want error, changes ...auxfile.Change) {
		t.Helper()
		if err := k.keep(t.Context(), changes); !errors.Is(err, want) || (want == nil) != (err == nil) {
			t.Errorf("keeping %v: %v, want %v", changes, err, want)
		}
	}
	broken := errors.New("broken")
	keep(nil, auxfile.Change{Path: snap, Removed: true})                 // waits
	keep(nil, auxfile.Change{Path: slot, Removed: true})                 // the branch does not have it
	keep(nil, auxfile.Change{Path: auxfile.Stats, Content: []byte("x")}) // not now
	keep(nil, auxfile.Change{Path: slot, Content: aSlot})                // takes along what waited
	fail = errNotServing
	keep(errNotServing, auxfile.Change{Path: auxfile.Settings})
	keep(nil, auxfile.Change{Path: slot, Removed: true}) // waits for Postgres
	fail = broken
	keep(broken, auxfile.Change{Path: made, Content: aSlot})
	fail = nil
	if err := k.flush(t.Context()); err != nil {
		t.Error(err)
	}
	fail = errNotServing
	keep(nil, auxfile.Change{Path: slot, Content: aSlot})
	last, err := k.last(t.Context(), auxfile.Change{Path: auxfile.Stats})
	if err != nil {
		t.Error(err)
	}
	want := []string{old + "- " + snap + "- " + slot, slot + "- " + made + "- " + auxfile.Settings + "-", slot + " " + auxfile.Stats}
	if diff := cmp.Diff(want, append(sent, string(last))); diff != "" {
		t.Errorf("messages (-want +got):\n%s", diff)
	}
}

// A client can be faster than the agent with ALTER SYSTEM, which must not be undone.
func TestResetSettingsAreOlder(t *testing.T) {
	var sent []string
	var fail error
	k := recorder(&sent, &fail)
	const content = "work_mem = '7MB'"
	k.begin(nil, []auxfile.Change{{Path: auxfile.Settings}})
	if err := k.keep(t.Context(), []auxfile.Change{{Path: auxfile.Settings, Content: []byte(content)}}); err != nil {
		t.Error(err)
	}
	if err := k.flush(t.Context()); err != nil {
		t.Error(err)
	}
	if diff := cmp.Diff([]string{auxfile.Settings + "=" + content}, sent); diff != "" {
		t.Errorf("messages (-want +got):\n%s", diff)
	}
}

// The branch must not lose what the older state of a slot needs, as long as it has that.
func TestSnapshotsOfSlotsThatAreBehind(t *testing.T) {
	var sent []string
	var fail error
	k := recorder(&sent, &fail)
	k.show = func(string) ([]byte, error) { return []byte("older"), nil }
	const snap, slot, other = "pg_logical/snapshots/0-1.snap", "pg_replslot/s/state", "pg_replslot/t/state"
	k.begin(files(snap, slot), nil)
	do := func(want error, path string, removed bool) {
		t.Helper()
		if err := k.keep(t.Context(), []auxfile.Change{{Path: path, Content: aSlot, Removed: removed}}); !errors.Is(err, want) {
			t.Errorf("%s: %v, want %v", path, err, want)
		}
	}
	fail = errNotServing
	do(nil, slot, false) // waits: older than the one that is lost
	fail = errors.New("broken")
	do(fail, slot, false)
	fail = nil
	do(nil, snap, true)
	do(nil, other, false)
	if err := k.flush(t.Context()); err != nil {
		t.Error(err)
	}
	if last, err := k.last(t.Context()); last != nil || err != nil {
		t.Errorf("at the end: %s, %v", last, err)
	}
	do(nil, slot, false)
	if diff := cmp.Diff([]string{other + " " + slot + "=older", snap + "- " + slot}, sent); diff != "" {
		t.Errorf("messages (-want +got):\n%s", diff)
	}
}

// A message that failed may be in the log: what the data directory has is told after it.
func TestUnknownOutcomes(t *testing.T) {
	var sent []string
	var fail error
	k := recorder(&sent, &fail)
	const slot, gone, other = "pg_replslot/s/state", "pg_replslot/gone/state", "pg_replslot/t/state"
	k.show = func(name string) ([]byte, error) {
		if name == gone {
			return nil, iofs.ErrNotExist
		}
		return []byte("old"), nil
	}
	k.begin(files(slot), nil)
	do := func(want error, c auxfile.Change) {
		t.Helper()
		if err := k.keep(t.Context(), []auxfile.Change{c}); !errors.Is(err, want) {
			t.Errorf("%s: %v, want %v", c.Path, err, want)
		}
	}
	flush := func() {
		t.Helper()
		if err := k.flush(t.Context()); err != nil {
			t.Error(err)
		}
	}
	lost := errors.New("lost")
	fail = lost
	do(lost, auxfile.Change{Path: auxfile.Settings, Content: []byte("new")})
	do(lost, auxfile.Change{Path: slot, Removed: true})
	do(lost, auxfile.Change{Path: gone, Content: aSlot})
	do(lost, auxfile.Change{Path: other, Content: aSlot})
	if last, err := k.last(t.Context()); err != nil || string(last) != gone+"- "+slot+"=old "+other+"=old "+auxfile.Settings+"=old" {
		t.Errorf("at the end: %s, %v", last, err)
	}
	fail = nil
	do(nil, auxfile.Change{Path: other, Removed: true}) // it may be there
	flush()                                             // nothing is unknown any more
	do(nil, auxfile.Change{Path: slot, Removed: true})
	want := []string{other + "- " + gone + "- " + slot + "=old " + auxfile.Settings + "=old", slot + "-"}
	if diff := cmp.Diff(want, sent); diff != "" {
		t.Errorf("messages (-want +got):\n%s", diff)
	}
}

// The branch gets nothing with which it would not start.
func TestAuxFilesThatWouldKeepFromStarting(t *testing.T) {
	var sent []string
	var fail error
	k := recorder(&sent, &fail)
	const slot, snap = "pg_replslot/s/state", "pg_logical/snapshots/0-1.snap"
	k.begin([]*pb.NamedFile{{Path: "pg_xact/0000", Data: make([]byte, 1)}, {Path: auxfile.Stats, Data: make([]byte, 1)}, {Path: auxfile.Settings, Data: make([]byte, maxCarried-10)}}, nil)
	for _, c := range []struct {
		change auxfile.Change
		good   bool
	}{
		{auxfile.Change{Path: slot, Content: aSlot[:199]}, false},
		{auxfile.Change{Path: snap, Content: make([]byte, 11)}, false},
		{auxfile.Change{Path: snap, Content: []byte("ten bytes!")}, true},
		{auxfile.Change{Path: snap, Content: []byte("10 others!")}, true},
		{auxfile.Change{Path: slot, Content: aSlot}, true},
		{auxfile.Change{Path: auxfile.Settings, Content: []byte("less")}, true},
		{auxfile.Change{Path: "pg_logical/snapshots/0-2.snap", Content: []byte("and more")}, true},
	} {
		if err := k.keep(t.Context(), []auxfile.Change{c.change}); (err == nil) != c.good {
			t.Errorf("%s with %d bytes: %v", c.change.Path, len(c.change.Content), err)
		}
	}
	want := []string{snap + "=ten bytes!", snap + "=10 others!", slot, auxfile.Settings + "=less", "pg_logical/snapshots/0-2.snap=and more"}
	if diff := cmp.Diff(want, sent); diff != "" {
		t.Errorf("messages (-want +got):\n%s", diff)
	}
}

// What waits for Postgres goes into one message, with the statistics at the end.
func TestNotTooMuchWaits(t *testing.T) {
	var sent []string
	fail := errNotServing
	k := recorder(&sent, &fail)
	k.begin(nil, nil)
	for _, c := range []struct {
		name string
		size int
		want error
	}{
		{"pg_logical/snapshots/0-1.snap", maxWaiting - 1, nil},
		{"pg_logical/snapshots/0-2.snap", 2, errNotServing},
		{"pg_logical/snapshots/0-3.snap", 1, nil},
	} {
		err := k.keep(t.Context(), []auxfile.Change{{Path: c.name, Content: make([]byte, c.size)}})
		if !errors.Is(err, c.want) {
			t.Errorf("%s with %d bytes: %v, want %v", c.name, c.size, err, c.want)
		}
	}
}
