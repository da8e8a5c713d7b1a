package pgfs

import (
	"bytes"
	"context"
	"errors"
	iofs "io/fs"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/holdfastdb/holdfast/internal/pg"
)

const startLSN = pg.LSN(0x10000000)

func tagOf(relation pg.Oid, fork pg.ForkNumber) pg.RelTag {
	return pg.RelTag{RelFileNode: pg.RelFileNode{Tablespace: pg.DefaultTablespaceOid, Database: 5, Relation: relation}, Fork: fork}
}

func fileAt(t testing.TB, fs *FS, path string) *file {
	t.Helper()
	n, err := fs.findFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return n.file
}

func block(t testing.TB, fs *FS, f *file, b pg.BlockNumber) []byte {
	t.Helper()
	p := make([]byte, pg.BlockSize)
	if n, err := fs.read(opContext{}, f, p, int64(b)*pg.BlockSize); err != nil || n != len(p) {
		t.Fatalf("reading block %d: %d bytes, %v", b, n, err)
	}
	return p
}

func putBlock(t testing.TB, fs *FS, f *file, b pg.BlockNumber, p []byte) {
	t.Helper()
	if _, err := fs.write(opContext{}, f, p, int64(b)*pg.BlockSize); err != nil {
		t.Fatal(err)
	}
}

// evictAll lets everything go that the rule allows.
func evictAll(fs *FS) {
	committed := fs.committed()
	e := &fs.cache
	e.mu.Lock()
	e.settleLocked(committed)
	safe, files := e.mu.safe, slices.Clone(e.mu.files)
	e.mu.Unlock()
	for range 2 { // a block that was read is spared once
		for _, f := range files {
			fs.evictFrom(f, 1<<40, safe, committed)
		}
	}
}

func running(names ...string) map[string]struct{} {
	set := map[string]struct{}{}
	for _, n := range names {
		set[n] = struct{}{}
	}
	return set
}

func relationFS(t testing.TB, h *history, wal *fakeWAL) *FS {
	t.Helper()
	cfg := Config{Remote: h, StartLSN: startLSN}
	if wal != nil {
		cfg.WAL = wal
	}
	fs := newFS(t, cfg)
	for _, dir := range []string{"base/5", "global", "pg_xact", "pg_wal", "pg_multixact/offsets"} {
		if err := fs.MkdirAll(dir); err != nil {
			t.Fatal(err)
		}
	}
	return fs
}

func TestRelationsShowAsFiles(t *testing.T) {
	h := newHistory()
	h.sizes = append(h.sizes, []RelationSize{
		{tagOf(100, pg.MainFork), 3}, {tagOf(100, pg.VMFork), 1}, {tagOf(101, pg.MainFork), 0},
		{tagOf(102, pg.MainFork), pg.RelSegmentBlocks + 7}, {tagOf(103, pg.MainFork), 9},
		// An unlogged relation: only its init fork counts.
		{tagOf(200, pg.MainFork), 50}, {tagOf(200, pg.FSMFork), 3}, {tagOf(200, pg.InitFork), 2},
	}...)
	fs := relationFS(t, h, nil)
	if err := fs.WriteFile("base/5/PG_VERSION", []byte("15\n")); err != nil {
		t.Fatal(err)
	}
	if err := fs.WriteFile("base/5/103", []byte("mine")); err != nil {
		t.Fatal(err)
	}
	if _, err := fs.find("base/5/100"); err != nil {
		t.Fatal(err)
	}
	got := map[string]int64{}
	if err := fs.Walk(func(path string, size int64) error { got[path] = size; return nil }); err != nil {
		t.Fatal(err)
	}
	want := map[string]int64{"base/5/PG_VERSION": 3, "base/5/100": 3 * 8192, "base/5/100_vm": 8192, "base/5/101": 0,
		"base/5/102": 1 << 30, "base/5/102.1": 7 * 8192, "base/5/200": 2 * 8192, "base/5/200_init": 2 * 8192, "base/5/103": 4}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("files (-want +got):\n%s", diff)
	}
	// The main fork of the unlogged relation is its init fork, and what is written stays here.
	for b := range pg.BlockNumber(2) {
		h.put(tagOf(200, pg.InitFork), b, startLSN, pageOf(startLSN, 7, uint64(b)))
		h.put(tagOf(200, pg.MainFork), b, startLSN, pageOf(startLSN, 8, uint64(b)))
	}
	f := fileAt(t, fs, "base/5/200")
	if p := block(t, fs, f, 1); word(p, 0) != 7 || word(p, 1) != 1 {
		t.Errorf("an unlogged relation shows %d, %d, want its init fork's 7, 1", word(p, 0), word(p, 1))
	}
	putBlock(t, fs, f, 0, pageOf(startLSN+100, 9))
	if init := fileAt(t, fs, "base/5/200_init"); word(block(t, fs, init, 0), 0) != 7 {
		t.Error("writing the main fork changed the init fork")
	}
	// The second segment's blocks are counted from the relation's start.
	h.put(tagOf(102, pg.MainFork), pg.RelSegmentBlocks+3, startLSN, pageOf(startLSN, 102))
	if got := word(block(t, fs, fileAt(t, fs, "base/5/102.1"), 3), 0); got != 102 {
		t.Errorf("block 3 of the second segment is %d, want 102", got)
	}
}

func TestSLRUSegments(t *testing.T) {
	h := newHistory()
	h.slru[pg.CLog] = map[uint32][]byte{}
	for _, n := range []uint32{0, 1, 31, 32, 70} {
		h.slru[pg.CLog][n] = bytes.Repeat([]byte{byte(n + 1)}, pg.BlockSize)
	}
	wal := &fakeWAL{committed: 1 << 60}
	fs := relationFS(t, h, wal)
	want := map[string]int64{"pg_xact/0000": 32 * 8192, "pg_xact/0001": 8192, "pg_xact/0002": 7 * 8192}
	if _, err := fs.find("pg_xact/0000"); err != nil {
		t.Fatal(err)
	}
	got := map[string]int64{}
	_ = fs.Walk(func(path string, size int64) error { got[path] = size; return nil })
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("files (-want +got):\n%s", diff)
	}
	for page, want := range map[uint32]byte{0: 1, 31: 32, 5: 0, 32: 33, 70: 71, 64: 0} {
		name, off := pg.SLRUPath(pg.CLog, page)
		p := make([]byte, pg.BlockSize)
		if _, err := fs.ReadAt(name, p, off); err != nil || p[100] != want {
			t.Errorf("page %d holds %d (%v), want %d", page, p[100], err, want)
		}
	}
	// A part of a page that was not here: the rest is the page server's.
	f := fileAt(t, fs, "pg_xact/0000")
	if _, err := fs.write(opContext{}, f, []byte{200}, 8192+50); err != nil {
		t.Fatal(err)
	}
	for range 4 {
		fs.Advance(running(), 1<<50)
	}
	evictAll(fs)
	if p := block(t, fs, f, 1); p[50] != 200 || p[49] != 2 || p[51] != 2 {
		t.Errorf("a changed page holds %v, want 2 200 2", p[49:52])
	}
}

func TestWhatIsCutOffNeverShowsAgain(t *testing.T) {
	h := newHistory()
	h.sizes = []RelationSize{{tagOf(1, pg.MainFork), 10}, {tagOf(2, pg.MainFork), 10}}
	for rel := pg.Oid(1); rel <= 2; rel++ {
		for b := range pg.BlockNumber(10) {
			h.put(tagOf(rel, pg.MainFork), b, startLSN, pageOf(startLSN, 5, uint64(b)))
		}
	}
	fs := relationFS(t, h, nil)
	f := fileAt(t, fs, "base/5/1")
	if got := word(block(t, fs, f, 9), 1); got != 9 {
		t.Fatalf("block 9 holds %d", got)
	}
	if err := fs.truncate(opContext{}, f, 4*8192+100); err != nil {
		t.Fatal(err)
	}
	putBlock(t, fs, f, 8, pageOf(startLSN, 77))
	evictAll(fs)
	if p := block(t, fs, f, 4); pg.PageLSN(p) != startLSN || word(p, 1) != 4 || p[8191] != 0 {
		t.Error("the block in which the file was cut has not its first bytes, or more than those")
	}
	for _, b := range []pg.BlockNumber{5, 7} {
		if !bytes.Equal(block(t, fs, f, b), zeros[:]) {
			t.Errorf("block %d shows what was cut off", b)
		}
	}
	if word(block(t, fs, f, 3), 1) != 3 || word(block(t, fs, f, 8), 0) != 77 {
		t.Error("blocks beside the cut are wrong")
	}
	// Removed, and made anew under the same name.
	parent, _ := fs.find("base/5")
	fs.tree.Lock()
	n := parent.dir.children["2"]
	fs.detachLocked(parent, "2", n)
	made, err := fs.newFileLocked(parent, "2", syscall.S_IFREG|0o600, 0, 0)
	fs.tree.Unlock()
	if err != nil {
		t.Fatal(err)
	}
	putBlock(t, fs, made.file, 1, pageOf(startLSN, 6))
	if !bytes.Equal(block(t, fs, made.file, 0), zeros[:]) {
		t.Error("a file that was made anew shows what the page server has under its name")
	}
}

// A page leaves only when all four conditions of the rule hold (invariant C1).
func TestEvictionRule(t *testing.T) {
	const lsn = startLSN + 0x1000
	cases := []struct {
		name string
		path string
		page []byte
		do   func(fs *FS, wal *fakeWAL)
		want bool
	}{
		{"all ended and durable", "base/5/1", pageOf(lsn, 1), func(fs *FS, wal *fakeWAL) {
			fs.Advance(running("3/1"), lsn) // may have begun before the write
			fs.Advance(running("3/1"), lsn)
			fs.Advance(running("4/9"), lsn+50)
			wal.commit(lsn + 50)
		}, true},
		{"a sequence, which WAL is ahead of", "base/5/1", sequencePage(lsn, 5), everyoneDone, false},
		{"a transaction of the time still runs", "base/5/1", pageOf(lsn, 1), func(fs *FS, wal *fakeWAL) {
			for range 5 {
				fs.Advance(running("3/1"), lsn)
			}
			wal.commit(lsn + 50)
		}, false},
		{"no poll after the write's generation", "base/5/1", pageOf(lsn, 1), func(fs *FS, wal *fakeWAL) {
			fs.Advance(running(), lsn)
			fs.Advance(running(), lsn)
			wal.commit(lsn + 50)
		}, false},
		{"what the transactions logged is not durable", "base/5/1", pageOf(lsn, 1), func(fs *FS, wal *fakeWAL) {
			for range 5 {
				fs.Advance(running(), lsn+100)
			}
			wal.commit(lsn + 50)
		}, false},
		{"the page's own WAL is not durable", "base/5/1", pageOf(lsn+200, 1), func(fs *FS, wal *fakeWAL) {
			for range 5 {
				fs.Advance(running(), lsn)
			}
			wal.commit(lsn + 50)
		}, false},
		{"a page without an LSN", "base/5/1", pageOf(0, 1), everyoneDone, false},
		{"an unlogged relation", "base/5/3", pageOf(lsn, 1), everyoneDone, false},
		{"a temporary relation", "base/5/t3_77", pageOf(lsn, 1), everyoneDone, false},
		{"an SLRU", "pg_xact/0000", pageOf(lsn, 1), everyoneDone, false},
		{"something else", "base/5/pg_filenode.map", pageOf(lsn, 1), everyoneDone, false},
		{"a shared relation", "global/1262", pageOf(lsn, 1), everyoneDone, true},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			wal := &fakeWAL{}
			h := newHistory()
			fs := relationFS(t, h, wal)
			if err := fs.WriteFile("base/5/3_init", nil); err != nil {
				t.Fatal(err)
			}
			if err := fs.WriteFile(c.path, nil); err != nil {
				t.Fatal(err)
			}
			f := fileAt(t, fs, c.path)
			putBlock(t, fs, f, 0, c.page)
			c.do(fs, wal)
			evictAll(fs)
			if got := fs.Stats().EvictedPages == 1; got != c.want {
				t.Errorf("the page left: %v, want %v", got, c.want)
			}
			if c.want { // it is asked for at the durable LSN
				h.put(f.src.rel, 0, wal.Committed(), pageOf(wal.Committed(), 42))
				if got := word(block(t, fs, f, 0), 0); got != 42 {
					t.Errorf("an evicted page came back as %d", got)
				}
			} else if got := block(t, fs, f, 0); !bytes.Equal(got, c.page) {
				t.Error("the page is not as it was written")
			}
		})
	}
}

func everyoneDone(fs *FS, wal *fakeWAL) {
	wal.commit(startLSN << 4)
	for range 5 {
		fs.Advance(running(), startLSN)
	}
}

// Making a relation unlogged after its main fork exists, as CREATE UNLOGGED TABLE does.
func TestInitForkComesLater(t *testing.T) {
	wal := &fakeWAL{}
	fs := relationFS(t, newHistory(), wal)
	for _, path := range []string{"base/5/7", "base/5/7_fsm", "base/5/7_init", "base/5/7.1"} {
		if err := fs.WriteFile(path, pageOf(startLSN, 1)); err != nil {
			t.Fatal(err)
		}
	}
	everyoneDone(fs, wal)
	evictAll(fs)
	if got := fs.Stats(); got.EvictedPages != 0 || got.DirtyPages != 4 {
		t.Errorf("%d pages left and %d stayed, want none and 4", got.EvictedPages, got.DirtyPages)
	}
}

func TestReadAheadAndSharing(t *testing.T) {
	h := newHistory()
	rel := tagOf(1, pg.MainFork)
	const blocks = 1000
	h.sizes = []RelationSize{{rel, blocks}}
	for b := range pg.BlockNumber(blocks) {
		h.put(rel, b, startLSN, pageOf(startLSN, uint64(b)))
	}
	fs := relationFS(t, h, nil)
	f := fileAt(t, fs, "base/5/1")
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			p := make([]byte, 16*pg.BlockSize)
			for b := 0; b < blocks; b += 16 {
				n, err := fs.read(opContext{}, f, p, int64(b)*pg.BlockSize)
				for i := 0; err == nil && i < n/pg.BlockSize; i++ {
					if word(p[i*pg.BlockSize:], 0) != uint64(b+i) {
						err = errors.New("another block")
					}
				}
				if err != nil {
					t.Errorf("block %d: %v", b, err)
				}
			}
		})
	}
	wg.Wait()
	s := fs.Stats()
	if s.FetchedPages != blocks {
		t.Errorf("%d pages were fetched for %d", s.FetchedPages, blocks)
	}
	if s.Fetches > blocks/8 {
		t.Errorf("%d calls for %d blocks in order", s.Fetches, blocks)
	}
	eventually(t, "every page is kept", func() bool { return fs.Stats().CleanPages == blocks })
}

// A write wins over an answer of the page server that comes after it.
func TestWriteDuringFetch(t *testing.T) {
	h := newHistory()
	rel := tagOf(1, pg.MainFork)
	h.sizes = []RelationSize{{rel, 2}}
	for b := range pg.BlockNumber(2) {
		h.put(rel, b, startLSN, pageOf(startLSN, 1))
	}
	fs := relationFS(t, h, nil)
	f := fileAt(t, fs, "base/5/1")
	h.hold = make(chan struct{})
	done := make(chan []byte)
	go func() {
		p := make([]byte, pg.BlockSize)
		_, _ = fs.read(opContext{}, f, p, 0)
		done <- p
	}()
	eventually(t, "the read waits", func() bool {
		f.remote.Lock()
		defer f.remote.Unlock()
		return f.remote.fetches[0] != nil
	})
	putBlock(t, fs, f, 0, pageOf(startLSN+8, 2))
	close(h.hold)
	if got := word(<-done, 0); got != 2 {
		t.Errorf("the waiting read got %d, want what was written meanwhile, 2", got)
	}
	eventually(t, "the answer is filed", func() bool {
		f.remote.Lock()
		defer f.remote.Unlock()
		return len(f.remote.fetches) == 0
	})
	if got := word(block(t, fs, f, 0), 0); got != 2 {
		t.Errorf("the page server's answer replaced what was written: %d", got)
	}
}

func TestPageServerErrors(t *testing.T) {
	h := newHistory()
	rel := tagOf(1, pg.MainFork)
	h.sizes = []RelationSize{{rel, 5}}
	h.put(rel, 0, startLSN, pageOf(startLSN, 1))
	fs := relationFS(t, h, nil)
	h.err = errors.New("no such record type")
	if _, err := fs.find("base/5/1"); err == nil {
		t.Error("a directory that cannot be listed was found empty")
	}
	if _, err := fs.find("base/5/nothing"); errors.Is(err, iofs.ErrNotExist) {
		t.Error("a name is said not to exist while the directory cannot be listed")
	}
	h.err = nil
	f := fileAt(t, fs, "base/5/1")
	p := make([]byte, pg.BlockSize)
	// A block that should be there and is not is an error, never zeros (P1).
	if _, err := fs.read(opContext{}, f, p, 3*pg.BlockSize); err == nil || !strings.Contains(err.Error(), "block 3") {
		t.Errorf("a missing block: %v", err)
	}
	h.err = errors.New("no such record type")
	if _, err := fs.read(opContext{}, f, p, 0); err == nil || errnoOf(err) != syscall.EIO {
		t.Errorf("a failing page server: %v", err)
	}
	h.err = nil
	if got := word(block(t, fs, f, 0), 0); got != 1 {
		t.Error("a failure stays after its cause is gone")
	}
}

// The wait for the page server ends with the mount.
func TestWipeEndsWaits(t *testing.T) {
	h := newHistory()
	rel := tagOf(1, pg.MainFork)
	h.sizes = []RelationSize{{rel, 1}}
	fs := relationFS(t, h, nil)
	f := fileAt(t, fs, "base/5/1")
	h.hold = make(chan struct{})
	failed := make(chan error)
	go func() {
		_, err := fs.read(opContext{}, f, make([]byte, pg.BlockSize), 0)
		failed <- err
	}()
	time.Sleep(10 * time.Millisecond)
	if err := fs.Wipe(); err != nil {
		t.Fatal(err)
	}
	if err := <-failed; err == nil || errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("the waiting read ended with %v", err)
	}
	if err := fs.WriteFile("x", []byte("y")); err == nil {
		t.Error("a wiped file system takes files")
	}
}
