package pgfs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	iofs "io/fs"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/holdfastdb/holdfast/internal/auxfile"
	"github.com/holdfastdb/holdfast/internal/pg"
)

// Slots are made and removed by renames of their folder, snapshots by those of a file.
func TestAuxFilesAreToldOf(t *testing.T) {
	var told []string
	var fail error
	fs := newFS(t, Config{Aux: func(_ context.Context, changes []auxfile.Change) error {
		for _, c := range changes {
			told = append(told, fmt.Sprintf("%s %q %v", c.Path, c.Content, c.Removed))
		}
		return fail
	}})
	for _, dir := range []string{"pg_replslot/s.tmp", "pg_logical/snapshots"} {
		if err := fs.MkdirAll(dir); err != nil {
			t.Fatal(err)
		}
	}
	for _, file := range []string{"pg_replslot/s.tmp/state", "pg_logical/snapshots/0-1.snap.7.tmp", "postgresql.auto.conf.tmp"} {
		if err := fs.WriteFile(file, []byte("x")); err != nil {
			t.Fatal(err)
		}
	}
	rename := func(dir, from, to string) error {
		n, err := fs.find(dir)
		if err == nil {
			err = fs.move(opContext{}, n, from, n, to, false)
		}
		return err
	}
	for _, r := range [][3]string{{"pg_replslot", "s.tmp", "s"}, {"pg_logical/snapshots", "0-1.snap.7.tmp", "0-1.snap"}, {"pg_replslot", "s", "s.tmp"}} {
		if err := rename(r[0], r[1], r[2]); err != nil {
			t.Errorf("%v: %v", r, err)
		}
	}
	dir, err := fs.find("pg_logical/snapshots")
	if err != nil {
		t.Fatal(err)
	}
	// What cannot be is not told.
	if err := fs.move(opContext{}, dir, "0-1.snap", dir, "0-1.snap", true); !errors.Is(err, iofs.ErrExist) {
		t.Errorf("a rename that must not replace: %v", err)
	}
	if err := fs.move(opContext{}, dir, "0-1.snap", dir, strings.Repeat("x", maxName+1), false); err != errNameTooLong {
		t.Errorf("a rename to too long a name: %v", err)
	}
	if err := fs.move(opContext{}, dir, "0-1.snap", dir, "0-1.snap", false); err != nil {
		t.Errorf("a rename that changes nothing: %v", err)
	}
	if err := fs.remove(opContext{}, dir, "0-1.snap", true); err != errNotDirectory {
		t.Errorf("rmdir of a file: %v", err)
	}
	if err := fs.remove(opContext{}, dir, "0-1.snap", false); err != nil {
		t.Error(err)
	}
	fail = errors.New("no quorum")
	if err := rename("", "postgresql.auto.conf.tmp", "postgresql.auto.conf"); !errors.Is(err, fail) {
		t.Errorf("a rename whose file could not be kept: %v", err)
	}
	want := []string{`pg_replslot/s/state "x" false`, `pg_logical/snapshots/0-1.snap "x" false`, `pg_replslot/s/state "" true`,
		`pg_logical/snapshots/0-1.snap "" true`, `postgresql.auto.conf "x" false`}
	if diff := cmp.Diff(want, told); diff != "" {
		t.Errorf("told (-want +got):\n%s", diff)
	}
}

// Whole segments of before the start, and the part of the last one before its last page.
func TestHistoryIsShown(t *testing.T) {
	const from, to = pg.LSN(0x1004028), pg.LSN(0x2004000)
	page := func(lsn pg.LSN) []byte { return bytes.Repeat([]byte{byte(lsn >> 13), byte(lsn >> 24)}, pg.BlockSize/2) }
	fs := newFS(t, Config{Remote: newHistory(), StartLSN: to, History: func(_ context.Context, lsn pg.LSN, count int) (data []byte, err error) {
		for i := range count {
			data = append(data, page(lsn+pg.LSN(i)*pg.BlockSize)...)
		}
		return data, nil
	}})
	if err := fs.MkdirAll(walDir); err != nil {
		t.Fatal(err)
	}
	last := walDir + "/" + pg.WALFileName(to)
	mine := bytes.Repeat([]byte{0xEE}, pg.BlockSize)
	if err := fs.WriteFile(last, append(bytes.Repeat([]byte{0xDD}, int(to-to.SegmentStart())), mine...)); err != nil {
		t.Fatal(err)
	}
	if err := fs.AddHistory(from, to); err != nil {
		t.Fatal(err)
	}
	for lsn := from.SegmentStart(); lsn <= to; lsn += 0x2000 * 97 {
		got := make([]byte, pg.BlockSize)
		if _, err := fs.ReadAt(walDir+"/"+pg.WALFileName(lsn), got, int64(lsn-lsn.SegmentStart())); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, page(lsn)) {
			t.Errorf("page %v is not the history's", lsn)
		}
	}
	got, err := fs.ReadFile(last)
	if err != nil {
		t.Fatal(err)
	}
	if want := append(append(page(0x2000000), page(0x2002000)...), mine...); !bytes.Equal(got, want) {
		t.Error("the last segment is not the history and what was there")
	}
}
