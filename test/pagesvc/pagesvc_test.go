package pagesvc

import (
	"context"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/pageserver/timeline"
	"github.com/holdfastdb/holdfast/test/datadir"
	"github.com/holdfastdb/holdfast/test/stock"
	"github.com/holdfastdb/holdfast/test/testenv"
)

// small layers: a test of a few MB flushes and compacts, too.
var small = timeline.Config{FlushBytes: 2 << 20, LayerBytes: 1 << 20, CompactAfter: 3, HistoryBytes: 1 << 40}

// currentLSN is the end of the WAL of a server on which nothing runs.
func currentLSN(t testing.TB, s *stock.Server) pg.LSN {
	t.Helper()
	conn, err := s.Target().Connect(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.WithoutCancel(t.Context()))
	var text string
	if err := conn.QueryRow(t.Context(), "SELECT pg_current_wal_insert_lsn()::text").Scan(&text); err != nil {
		t.Fatal(err)
	}
	lsn, err := pg.ParseLSN(text)
	if err != nil {
		t.Fatal(err)
	}
	return lsn
}

func snapshot(t testing.TB, dir, to string) {
	t.Helper()
	if err := os.CopyFS(to, os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
}

func TestPagesEqualStockPostgres(t *testing.T) {
	testenv.NeedPostgres(t)
	dir := testenv.TempDir(t)
	s, err := stock.New(t.Context(), dir, "stock", settings)
	if err != nil {
		t.Fatal(err)
	}
	w := newWorld(t, filepath.Join(dir, "w"))
	w.end()
	w.withTimeline(small)
	w.begin()

	start, err := w.importDir(s.Dir)
	if err != nil {
		t.Fatal(err)
	}
	w.log.end = start
	initial := loadDirectory(t, s.Dir)
	w.attach()
	c := &comparison{t: t, w: w, at: w.point(start, false), want: initial}
	c.run()
	c.startup()
	if again, err := w.importDir(s.Dir); err != nil || again != start {
		t.Errorf("the second import gives %v, %v; want %v", again, err, start)
	}

	if err := s.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Kill() })
	run(t, s, "postgres", firstHalf)
	lockRows(t, s)
	copyFirst(t, s)
	middleKinds := relationKinds(t, s)
	run(t, s, "postgres", []string{"CHECKPOINT"})
	middle := currentLSN(t, s)
	snapshot(t, s.Dir, filepath.Join(dir, "middle"))
	run(t, s, "postgres", secondHalf)
	copyMore(t, s)
	lockRows(t, s)
	run(t, s, "postgres", []string{"ALTER SYSTEM SET track_commit_timestamp = on"})
	if err := s.Stop(); err != nil {
		t.Fatal(err)
	}
	if err := s.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	run(t, s, "postgres", []string{"UPDATE t SET k = 5 WHERE id % 9 = 0", "DELETE FROM shrunk", "VACUUM shrunk", "COMMIT PREPARED 'left'"})
	kinds := relationKinds(t, s)
	if err := s.Stop(); err != nil {
		t.Fatal(err)
	}

	final := loadDirectory(t, s.Dir)
	w.log.feed(t, s.Dir, final.Control.CheckPoint)
	for range 6 { // in the middle, with its local copies deleted
		w.wait(start + pg.LSN(rand.Uint64N(uint64(w.log.end-start))))
		w.restart()
	}
	w.wait(w.log.end)
	t.Logf("%d bytes of WAL in %d chunks", w.log.bytes, len(w.log.chunks))
	for _, at := range []string{"after ingest", "after a restart"} {
		t.Run(at, func(t *testing.T) {
			c := &comparison{t: t, w: w, at: w.point(w.log.end, false), want: final, kinds: kinds}
			c.run()
			c.startup()
			past := &comparison{t: t, w: w, at: w.point(middle, false), want: loadDirectory(t, filepath.Join(dir, "middle")), kinds: middleKinds}
			past.run()
			first := &comparison{t: t, w: w, at: w.point(start, false), want: initial}
			first.run()
		})
		w.restart()
		w.wait(w.log.end)
	}
}

// TestCopiesOutliveTheHistoryWindow keeps no history: what copies of databases share with
// their sources must stay readable all the same (P3).
func TestCopiesOutliveTheHistoryWindow(t *testing.T) {
	testenv.NeedPostgres(t)
	dir := testenv.TempDir(t)
	s, err := stock.New(t.Context(), dir, "stock", settings)
	if err != nil {
		t.Fatal(err)
	}
	w := newWorld(t, filepath.Join(dir, "w"))
	w.end()
	w.withTimeline(timeline.Config{FlushBytes: 256 << 10, LayerBytes: 1 << 20, CompactAfter: 2, MaxStack: 1, ImageAfter: 2, HistoryBytes: 1})
	w.begin()
	if w.log.end, err = w.importDir(s.Dir); err != nil {
		t.Fatal(err)
	}
	w.attach()
	if err := s.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Kill() })
	run(t, s, "postgres", []string{"CREATE DATABASE logged TEMPLATE template0", "CREATE DATABASE copied STRATEGY FILE_COPY"})
	copyFirst(t, s)
	run(t, s, "postgres", []string{"DROP DATABASE copied"})
	copyMore(t, s)
	kinds := relationKinds(t, s)
	if err := s.Stop(); err != nil {
		t.Fatal(err)
	}
	final := loadDirectory(t, s.Dir)
	w.log.feed(t, s.Dir, final.Control.CheckPoint)
	for range 2 {
		w.wait(w.log.end)
		c := &comparison{t: t, w: w, at: w.point(w.log.end, false), want: final, kinds: kinds}
		c.run()
		c.startup()
		w.restart()
	}
}

// TestComparisonFindsEachKindOfDifference shows that the comparison, on which several tests
// rest, can fail: one change of each kind is found, and only that.
func TestComparisonFindsEachKindOfDifference(t *testing.T) {
	w := imported(t)
	at := w.point(w.log.end, false)
	spoil := map[string]func(d *datadir.Directory){
		"differs from byte 8000 on": func(d *datadir.Directory) { d.Relations[pgClass][8000] ^= 1 },
		"want 1":                    func(d *datadir.Directory) { d.Relations[pgClass] = d.Relations[pgClass][:pg.BlockSize] },
		"exists only":               func(d *datadir.Directory) { delete(d.Relations, pgClass) },
		"is missing": func(d *datadir.Directory) {
			tag := pgClass
			tag.Relation = 4000000
			d.Relations[tag] = d.Relations[pgClass]
		},
		"page 0 of pg_xact differs": func(d *datadir.Directory) { d.SLRU[pg.CLog][0][0] ^= 1 },
		"base/5/pg_filenode.map":    func(d *datadir.Directory) { d.Files["base/5/pg_filenode.map"] += "x" },
		"base/77/PG_VERSION":        func(d *datadir.Directory) { d.Files["base/77/PG_VERSION"] = "15\n" },
	}
	for want, do := range spoil {
		d := loadDirectory(t, base.dir)
		do(d)
		c := &datadir.Comparison{Client: w.client, At: at, Want: d}
		problems, err := c.Run(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		_, files, err := c.Startup(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if problems = append(problems, files...); len(problems) != 1 || !strings.Contains(problems[0], want) {
			t.Errorf("want one problem with %q, have %q", want, problems)
		}
	}
}

// pgClass is a relation of the database postgres that each directory has, of several pages.
var pgClass = pg.RelTag{RelFileNode: pg.RelFileNode{Tablespace: pg.DefaultTablespaceOid, Database: 5, Relation: 1259}}

func TestVerifyRedoComparesEachRecord(t *testing.T) {
	testenv.NeedPostgres(t)
	dir := testenv.TempDir(t)
	s, err := stock.New(t.Context(), dir, "stock", map[string]string{"wal_consistency_checking": "all", "autovacuum": "off", "fsync": "off"})
	if err != nil {
		t.Fatal(err)
	}
	w := newWorld(t, filepath.Join(dir, "w"))
	w.end()
	w.config.VerifyRedo = true
	w.begin()
	if w.log.end, err = w.importDir(s.Dir); err != nil {
		t.Fatal(err)
	}
	w.attach()
	if err := s.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Kill() })
	run(t, s, "postgres", []string{
		"CREATE TABLE t (id int PRIMARY KEY, v text)", "INSERT INTO t SELECT i, 'v' FROM generate_series(1, 500) i",
		"UPDATE t SET v = 'w' WHERE id % 3 = 0", "DELETE FROM t WHERE id % 5 = 0", "VACUUM t",
	})
	if err := s.Stop(); err != nil {
		t.Fatal(err)
	}
	w.log.feed(t, s.Dir, loadDirectory(t, s.Dir).Control.CheckPoint)
	w.wait(w.log.end)
	counts := checkRedo(t, w)
	for _, name := range []string{"Heap/INSERT", "Heap/DELETE", "Btree/INSERT_LEAF"} {
		if counts[name] == 0 {
			t.Errorf("no %s was checked", name)
		}
	}
}

// checkRedo looks at what each record said of its own page (wal_consistency_checking).
func checkRedo(t *testing.T, w *world) map[string]uint64 {
	t.Helper()
	counts := map[string]uint64{}
	st, err := w.client.Status(t.Context(), &pb.PageServerStatusRequest{})
	if err != nil || len(st.Branches) != 1 {
		t.Fatalf("the status is %v, %v", st, err)
	}
	for _, c := range st.Branches[0].RedoChecks {
		counts[c.Record] = c.Checked
		t.Logf("%-28s %7d checked", c.Record, c.Checked)
		if c.Mismatches+c.Failed > 0 {
			t.Errorf("%s: %d of %d pages differ, the first: %s", c.Record, c.Mismatches+c.Failed, c.Checked, c.First)
		}
	}
	return counts
}

func TestFlushMakesWhatWasIngestedDurable(t *testing.T) {
	testenv.NeedPostgres(t)
	dir := testenv.TempDir(t)
	s, err := stock.New(t.Context(), dir, "stock", settings)
	if err != nil {
		t.Fatal(err)
	}
	w := newWorld(t, filepath.Join(dir, "w"))
	if w.log.end, err = w.importDir(s.Dir); err != nil {
		t.Fatal(err)
	}
	w.attach()
	if err := s.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Kill() })
	run(t, s, "postgres", []string{"CREATE TABLE t AS SELECT generate_series(1, 100)"})
	if err := s.Stop(); err != nil {
		t.Fatal(err)
	}
	w.log.feed(t, s.Dir, loadDirectory(t, s.Dir).Control.CheckPoint)
	w.wait(w.log.end)
	durable := func() pg.LSN {
		st, err := w.client.Status(t.Context(), &pb.PageServerStatusRequest{})
		if err != nil || len(st.Branches) != 1 {
			t.Fatalf("the status is %v, %v", st, err)
		}
		return pg.LSN(st.Branches[0].DurableLsn)
	}
	if lsn := durable(); lsn >= w.log.end {
		t.Fatalf("what reaches to %v is durable already, up to %v", w.log.end, lsn)
	}
	if err := w.server.Flush(t.Context(), project, branch); err != nil {
		t.Fatal(err)
	}
	if lsn := durable(); lsn != w.log.end {
		t.Errorf("after a flush all is durable up to %v, want %v", lsn, w.log.end)
	}
	if err := w.server.Flush(t.Context(), project, "none"); err == nil {
		t.Error("a branch that is not attached is flushed")
	}
}
