package pgfs

import (
	iofs "io/fs"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/holdfastdb/holdfast/internal/pg"
)

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
	s.run("pgbench", "-i", "-q", "-s", "2")
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
	over.run("pgbench", "-n", "-c", "4", "-T", "1")
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
