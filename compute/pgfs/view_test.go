package pgfs

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfastdb/holdfast/compute/scratch"
	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/internal/seal"
)

// smallStore is a scratch store on a disk of its own.
func smallStore(t *testing.T, options string) *scratch.Store {
	t.Helper()
	needMount(t)
	dir := openDir(t)
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, options); err != nil {
		t.Skip(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	store, err := scratch.Open(dir, seal.Endless())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = store.Wipe() })
	return store
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("only root mounts with delayed writes")
	}
}

// What is written outside pg_wal stays in the kernel until an fsync, or the close, and its
// size shows at once.
func TestWritesAreDelayedButForWAL(t *testing.T) {
	needRoot(t)
	wal := &fakeWAL{}
	fs, dir := walMount(t, wal)
	page := bytes.Repeat([]byte{7}, 8192)
	fd := openFile(t, filepath.Join(fs.cfg.Mountpoint, "table"))
	for i := range 4 {
		if _, err := unix.Pwrite(fd, page, int64(i)*8192); err != nil {
			t.Fatal(err)
		}
	}
	if end, err := unix.Seek(fd, 0, unix.SEEK_END); err != nil || end != 4*8192 {
		t.Errorf("the file ends at %d, %v", end, err)
	}
	if got, err := fs.ReadFile("table"); err != nil || len(got) != 0 {
		t.Errorf("the agent has %d bytes already, %v", len(got), err)
	}
	if err := unix.Fsync(fd); err != nil {
		t.Error(err)
	}
	if got, err := fs.ReadFile("table"); err != nil || !bytes.Equal(got, bytes.Repeat(page, 4)) {
		t.Errorf("after an fsync the agent has %d bytes, %v", len(got), err)
	}
	if _, err := unix.Pwrite(openFile(t, filepath.Join(dir, segment)), page, 0); err != nil {
		t.Fatal(err)
	}
	wal.mu.Lock()
	defer wal.mu.Unlock()
	if got, err := fs.ReadFile("pg_wal/" + segment); err != nil || !bytes.Equal(got, page) || len(wal.writes) != 1 {
		t.Errorf("of WAL the agent has %d bytes, %v; passed on: %v", len(got), err, wal.writes)
	}
}

// The directories with mounts of their own are used like any other.
func TestInnerMountsAreOrdinaryDirectories(t *testing.T) {
	needRoot(t)
	fs, dir := walMount(t, &fakeWAL{})
	for _, d := range []string{dir, filepath.Join(fs.cfg.Mountpoint, tempDir)} {
		for _, step := range []func() error{
			func() error { return os.Mkdir(filepath.Join(d, "sub"), 0o700) },
			func() error { return os.WriteFile(filepath.Join(d, "sub", "a"), []byte("x"), 0o600) },
			func() error { return os.Rename(filepath.Join(d, "sub", "a"), filepath.Join(d, "b")) },
			func() error { return os.Chmod(d, 0o750) },
			func() error { return os.Symlink("b", filepath.Join(d, "c")) },
			func() error { return os.Remove(filepath.Join(d, "sub")) },
		} {
			if err := step(); err != nil {
				t.Errorf("in %s: %v", d, err)
			}
		}
		entries, err := os.ReadDir(d)
		if err != nil || len(entries) != 2 || entries[0].Name() != "b" || entries[1].Name() != "c" {
			t.Errorf("%s holds %v, %v", d, entries, err)
		}
		if st, err := os.Stat(d); err != nil || st.Mode().Perm() != 0o750 {
			t.Errorf("%s: %v, %v", d, st, err)
		}
	}
}

// A write that Postgres believes to be done and that cannot be kept ends the file system.
func TestLosingADelayedWriteIsTheEnd(t *testing.T) {
	needRoot(t)
	failed := make(chan error, 1)
	fs := mounted(t, Config{Scratch: smallStore(t, "size=1m"), Fail: func(err error) { failed <- err }})
	fd := openFile(t, filepath.Join(fs.cfg.Mountpoint, "table"))
	for i := range 512 {
		page := bytes.Repeat([]byte{byte(i), 1}, 4096)
		if _, err := unix.Pwrite(fd, page, int64(i)*8192); err != nil {
			t.Fatalf("write %d: %v", i, err)
		}
	}
	if err := unix.Fsync(fd); err == nil {
		t.Error("the fsync succeeds")
	}
	select {
	case err := <-failed:
		if !errors.Is(err, scratch.ErrFull) {
			t.Errorf("it failed with %v, want a full disk", err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("nobody was told")
	}
	if _, err := fs.ReadFile("table"); err == nil {
		t.Error("the file can still be read")
	}
}

// Temporary files get an error at the write, before the last of the disk is gone.
func TestTemporaryFilesLeaveRoomToTables(t *testing.T) {
	needRoot(t)
	fs := mounted(t, Config{Scratch: smallStore(t, "size=16m"), WAL: &fakeWAL{}, Fail: func(err error) { t.Error(err) }})
	fd := openFile(t, filepath.Join(fs.cfg.Mountpoint, tempDir, "pgsql_tmp1.0"))
	var err error
	written := 0
	for ; err == nil && written < 4096; written++ {
		_, err = unix.Pwrite(fd, bytes.Repeat([]byte{byte(written), 1}, 4096), int64(written)*8192)
		if written%128 == 0 {
			time.Sleep(roomCheckedEvery)
		}
	}
	if err != unix.ENOSPC || written < 128 {
		t.Fatalf("after %d pages: %v, want ENOSPC", written, err)
	}
	table := openFile(t, filepath.Join(fs.cfg.Mountpoint, "table"))
	if _, err := unix.Pwrite(table, bytes.Repeat([]byte{3}, 8192), 0); err != nil {
		t.Error(err)
	}
	if err := unix.Fsync(table); err != nil {
		t.Errorf("a table has no room: %v", err)
	}
}

func TestDiscardedWritesAreNoFailure(t *testing.T) {
	needRoot(t)
	fs := mounted(t, Config{Fail: func(err error) { t.Error(err) }})
	fd := openFile(t, filepath.Join(fs.cfg.Mountpoint, "table"))
	if _, err := unix.Pwrite(fd, make([]byte, 8192), 0); err != nil {
		t.Fatal(err)
	}
	fs.Discard()
	if err := unix.Fsync(fd); err != nil {
		t.Error(err)
	}
	if got, err := fs.ReadFile("table"); err != nil || len(got) != 0 {
		t.Errorf("the agent has %d bytes, %v", len(got), err)
	}
}

// Copies of what the page server has give way before anybody is refused.
func TestCopiesMakeRoom(t *testing.T) {
	needRoot(t)
	remote := &onlyPages{blocks: 1500}
	fs := mounted(t, Config{Scratch: smallStore(t, "size=16m"), WAL: &fakeWAL{}, Remote: remote, StartLSN: startLSN, Fail: func(err error) { t.Error(err) }})
	if err := fs.MkdirAll("base/5"); err != nil {
		t.Fatal(err)
	}
	if _, err := os.ReadFile(filepath.Join(fs.cfg.Mountpoint, "base/5/100")); err != nil {
		t.Fatal(err)
	}
	eventually(t, "copies fill the disk", func() bool { return fs.Stats().CleanPages > 1000 })
	table := openFile(t, filepath.Join(fs.cfg.Mountpoint, "table"))
	for i := range 1024 {
		if _, err := unix.Pwrite(table, bytes.Repeat([]byte{byte(i), 1}, 4096), int64(i)*8192); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Fsync(table); err != nil {
		t.Error(err)
	}
}

// onlyPages has one relation.
type onlyPages struct{ blocks pg.BlockNumber }

func (o *onlyPages) Pages(_ context.Context, _ pg.RelTag, block pg.BlockNumber, count int, _ pg.LSN) ([]byte, error) {
	return bytes.Repeat([]byte{9}, int(min(pg.BlockNumber(count), o.blocks-block))*pg.BlockSize), nil
}

func (o *onlyPages) Relations(context.Context, pg.Oid, pg.Oid) ([]RelationSize, error) {
	rel := pg.RelTag{RelFileNode: pg.RelFileNode{Tablespace: pg.DefaultTablespaceOid, Database: 5, Relation: 100}}
	return []RelationSize{{Rel: rel, Blocks: o.blocks}}, nil
}

func (o *onlyPages) SLRUPages(context.Context, pg.SLRUKind) ([]uint32, error) { return nil, nil }

func (o *onlyPages) SLRU(context.Context, pg.SLRUKind, uint32, int) ([]byte, error) {
	return nil, errors.New("no SLRU here")
}
