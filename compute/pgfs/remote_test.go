package pgfs

import (
	"bytes"
	"context"
	"errors"
	iofs "io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
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
	for _, s := range []RelationSize{
		{tagOf(100, pg.MainFork), 3}, {tagOf(100, pg.VMFork), 1}, {tagOf(101, pg.MainFork), 0},
		{tagOf(102, pg.MainFork), pg.RelSegmentBlocks + 7}, {tagOf(103, pg.MainFork), 9},
		// An unlogged relation: only its init fork counts.
		{tagOf(200, pg.MainFork), 50}, {tagOf(200, pg.FSMFork), 3}, {tagOf(200, pg.InitFork), 2},
	} {
		h.sizes = append(h.sizes, s)
	}
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

// world is a model of a Postgres that writes pages, transactions that need what WAL does
// not carry, and a page server that has only what WAL carries.
type world struct {
	t    *testing.T
	rng  *rand.Rand
	fs   *FS
	h    *history
	wal  *fakeWAL
	now  pg.LSN
	xact int
	live map[string]struct{}
	rels []*modelRel
}

type modelRel struct {
	tag   pg.RelTag
	file  *file
	pages []modelPage // by block
}

type modelPage struct {
	logged   uint64
	volatile uint64              // what WAL lacks
	needs    map[string]struct{} // transactions that ran when it was written
	blank    bool
}

func (w *world) write(r *modelRel, b int) {
	w.now += 8 * pg.LSN(1+w.rng.IntN(100))
	for b >= len(r.pages) {
		r.pages = append(r.pages, modelPage{blank: true})
	}
	m := modelPage{logged: w.rng.Uint64(), volatile: w.rng.Uint64() | 1, needs: map[string]struct{}{}}
	for x := range w.live {
		m.needs[x] = struct{}{}
	}
	r.pages[b] = m
	w.h.put(r.tag, pg.BlockNumber(b), w.now, pageOf(w.now, m.logged, 0))
	w.wal.commit(w.now) // WAL before data
	putBlock(w.t, w.fs, r.file, pg.BlockNumber(b), pageOf(w.now, m.logged, m.volatile))
}

func (w *world) check(r *modelRel, b int) {
	w.t.Helper()
	m := r.pages[b]
	p := block(w.t, w.fs, r.file, pg.BlockNumber(b))
	if m.blank {
		if !bytes.Equal(p, zeros[:]) {
			w.t.Fatalf("%s block %d was never written and is not zero", r.tag, b)
		}
		return
	}
	if word(p, 0) != m.logged {
		w.t.Fatalf("%s block %d: an old or another page", r.tag, b)
	}
	if word(p, 1) != m.volatile && !disjoint(m.needs, w.live) {
		w.t.Fatalf("%s block %d lost what WAL lacks while a transaction of the time still runs (C1)", r.tag, b)
	}
}

func (w *world) step() {
	r := w.rels[w.rng.IntN(len(w.rels))]
	switch w.rng.IntN(20) {
	case 0:
		w.xact++
		w.live["3/"+strconv.Itoa(w.xact)] = struct{}{}
	case 1:
		for x := range w.live {
			delete(w.live, x)
			break
		}
	case 2:
		seen := running()
		for x := range w.live {
			seen[x] = struct{}{}
		}
		w.now += 8
		w.fs.Advance(seen, w.now)
		if w.rng.IntN(2) == 0 {
			w.wal.commit(w.now)
		}
	case 3:
		evictAll(w.fs)
	case 4:
		if cut := w.rng.IntN(len(r.pages) + 1); w.rng.IntN(4) == 0 {
			r.pages = r.pages[:cut]
			if err := w.fs.truncate(opContext{}, r.file, int64(cut)*pg.BlockSize); err != nil {
				w.t.Fatal(err)
			}
		}
	case 5, 6, 7, 8, 9, 10:
		w.write(r, w.rng.IntN(len(r.pages)+3))
	default:
		if len(r.pages) > 0 {
			w.check(r, w.rng.IntN(len(r.pages)))
		}
	}
}

func TestEvictionModel(t *testing.T) {
	w := &world{t: t, rng: seed(t), h: newHistory(), wal: &fakeWAL{}, now: startLSN, live: running()}
	w.h.newest = w.wal.Committed
	w.wal.commit(startLSN)
	for rel := range pg.Oid(4) {
		r := &modelRel{tag: tagOf(rel+1, pg.MainFork)}
		for b := range pg.BlockNumber(20) {
			m := modelPage{logged: w.rng.Uint64()}
			w.h.put(r.tag, b, startLSN, pageOf(startLSN, m.logged, 0))
			r.pages = append(r.pages, m)
		}
		w.h.sizes = append(w.h.sizes, RelationSize{r.tag, 20})
		w.rels = append(w.rels, r)
	}
	w.fs = relationFS(t, w.h, w.wal)
	for _, r := range w.rels {
		r.file = fileAt(t, w.fs, pg.RelPath(r.tag, 0))
	}
	for range *stepsFlag * 2 {
		w.step()
	}
	if s := w.fs.Stats(); s.EvictedPages == 0 || s.FetchedPages == 0 {
		t.Errorf("the model exercised nothing: %+v", s)
	}
}

// A stock Postgres whose relations and SLRUs come from a page server, with a cache far
// smaller than the database.
func TestPostgresOverRemote(t *testing.T) {
	cred := needPostgres(t)
	stock := filepath.Join(openDir(t), "data")
	if err := os.Mkdir(stock, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(stock, int(cred.Uid), int(cred.Gid)); err != nil {
		t.Fatal(err)
	}
	s := newServer(t, cred, stock)
	s.start()
	s.run("pgbench", "-i", "-q", "-s", "3")
	s.sql("create unlogged table u as select g from generate_series(1, 1000) g; create index on u(g)")
	s.sql("create database other")
	want := s.sql("select sum(aid::bigint * abalance), count(*) from pgbench_accounts")
	s.stop(syscall.SIGINT)

	fs := mounted(t, Config{Remote: dataDir(stock), StartLSN: startLSN, UID: cred.Uid, GID: cred.Gid, CacheBytes: 4 << 20})
	copyStartFiles(t, fs, stock)
	over := *s
	over.dir = fs.cfg.Mountpoint
	over.start()
	if got := over.sql("select sum(aid::bigint * abalance), count(*) from pgbench_accounts"); got != want {
		t.Errorf("the accounts are %s, want %s", got, want)
	}
	if got := over.sql("select count(*) from u"); got != "0" {
		t.Errorf("the unlogged table has %s rows, want 0", got)
	}
	over.sql("insert into u select g from generate_series(1, 500) g")
	over.run("pgbench", "-n", "-c", "4", "-T", "2")
	over.sql("vacuum full pgbench_accounts")
	if got := over.sql("set enable_seqscan = off; select count(*) from u where g > 250"); got != "250" {
		t.Errorf("the unlogged table's index finds %s rows, want 250", got)
	}
	over.run("pg_amcheck", "--all", "--install-missing", "--heapallindexed")
	stats := fs.Stats()
	if stats.FetchedPages == 0 || stats.CleanPages > fs.cache.limit*9/8+maxFetch {
		t.Errorf("fetched or kept too much or too little: %+v", stats)
	}
	over.stop(syscall.SIGINT)
}

// copyStartFiles puts everything that is not a relation or an SLRU on a mount.
func copyStartFiles(t *testing.T, fs *FS, stock string) {
	t.Helper()
	err := filepath.WalkDir(stock, func(path string, e iofs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(stock, path)
		if e.IsDir() {
			return fs.MkdirAll(rel)
		}
		_, _, isRel := pg.ParseRelPath(rel)
		_, _, isSLRU := pg.ParseSLRUPath(rel)
		if isRel || isSLRU {
			return nil
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		return fs.WriteFile(rel, data)
	})
	if err != nil {
		t.Fatal(err)
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
