// Package smoke uses PostgreSQL on Holdfast as people do, and looks whether what should
// outlive its compute does.
package smoke

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5"

	"github.com/holdfastdb/holdfast/test/cluster"
	"github.com/holdfastdb/holdfast/test/pgtools"
	"github.com/holdfastdb/holdfast/test/stock"
	"github.com/holdfastdb/holdfast/test/testenv"
)

func start(t *testing.T, ctx context.Context, settings map[string]string) *cluster.Cluster {
	t.Helper()
	testenv.NeedPostgres(t)
	testenv.NeedFUSE(t)
	if testing.Short() {
		t.Skip("runs a cluster")
	}
	c := cluster.ForTest(t, cluster.Options{Dir: testenv.TempDir(t), Settings: settings})
	if err := c.Start(ctx); err != nil {
		t.Fatal(err)
	}
	return c
}

func renew(t *testing.T, ctx context.Context, c *cluster.Cluster) {
	t.Helper()
	for _, do := range []string{"kill", "start"} {
		if _, err := c.CLI(ctx, "endpoint", do); err != nil {
			t.Fatal(err)
		}
	}
}

// ask returns a query's first column as lines, or its error.
func ask(ctx context.Context, target pgtools.Target, query string) string {
	conn, err := target.WaitConnect(ctx)
	if err != nil {
		return "error: " + err.Error()
	}
	defer conn.Close(ctx)
	rows, err := conn.Query(ctx, query, pgx.QueryExecModeSimpleProtocol)
	if err != nil {
		return "error: " + err.Error()
	}
	lines, err := pgx.CollectRows(rows, func(r pgx.CollectableRow) (string, error) {
		v, err := r.Values()
		return fmt.Sprint(v[0]), err
	})
	if err != nil {
		return "error: " + err.Error()
	}
	return strings.Join(lines, "\n")
}

// feature is something people do, and what must be seen then, and on a new compute.
type feature struct {
	name   string
	do     []string
	ask    string
	before string // on the compute on which it was done
	after  string // on a new one; as before if empty
}

var features = []feature{
	{"table and index", []string{"CREATE TABLE a (i int PRIMARY KEY, v text)", "INSERT INTO a SELECT i, md5(i::text) FROM generate_series(1, 20000) i",
		"DELETE FROM a WHERE i % 3 = 0", "UPDATE a SET v = 'x' WHERE i % 7 = 0", "VACUUM a"},
		"SELECT count(*) || ' ' || sum(i) || ' ' || count(*) FILTER (WHERE v = 'x') FROM a", "13334 133346667 1905", ""},
	{"sequence", []string{"CREATE SEQUENCE s", "SELECT nextval('s') FROM generate_series(1, 100)"}, "SELECT nextval('s') > 100", "true", ""},
	{"TOAST", []string{"CREATE TABLE toasted AS SELECT string_agg(md5(i::text), '') AS v FROM generate_series(1, 20000) i"},
		"SELECT length(v) || ' ' || md5(v) FROM toasted", "640000 " + toastMD5, ""},
	{"unlogged table", []string{"CREATE UNLOGGED TABLE u (i int PRIMARY KEY)", "INSERT INTO u SELECT generate_series(1, 1000)"}, "SELECT count(*) FROM u", "1000", "0"},
	{"unlogged sequence of rows again", []string{"CREATE UNLOGGED TABLE u2 (i serial PRIMARY KEY, v text)"}, "SELECT count(*) FROM u2", "0", ""},
	{"truncate", []string{"CREATE TABLE tr AS SELECT generate_series(1, 1000) i", "TRUNCATE tr", "INSERT INTO tr VALUES (1)"}, "SELECT count(*) FROM tr", "1", ""},
	{"VACUUM FULL and CLUSTER", []string{"CREATE TABLE vf (i int PRIMARY KEY)", "INSERT INTO vf SELECT generate_series(1, 5000)", "DELETE FROM vf WHERE i > 10",
		"VACUUM FULL vf", "CLUSTER vf USING vf_pkey", "REINDEX TABLE vf"}, "SELECT count(*) FROM vf", "10", ""},
	{"dropped table", []string{"CREATE TABLE dropped (i int)", "DROP TABLE dropped"}, "SELECT to_regclass('dropped') IS NULL", "true", ""},
	{"catalog vacuumed in full", []string{"VACUUM FULL pg_class"}, "SELECT count(*) > 300 FROM pg_class", "true", ""},
	{"role", []string{"CREATE ROLE someone LOGIN PASSWORD 'p'"}, "SELECT count(*) FROM pg_roles WHERE rolname = 'someone'", "1", ""},
	{"row locks and multixacts", []string{"CREATE TABLE parent (i int PRIMARY KEY)", "INSERT INTO parent VALUES (1)",
		"CREATE TABLE child (i int REFERENCES parent)", "INSERT INTO child VALUES (1)", "BEGIN; SELECT * FROM parent FOR SHARE; SAVEPOINT x; UPDATE parent SET i = 1; COMMIT"},
		"SELECT count(*) FROM parent JOIN child USING (i)", "1", ""},
	{"prepared transaction", []string{"CREATE TABLE prep (i int)", "BEGIN; INSERT INTO prep VALUES (1); PREPARE TRANSACTION 'later'"},
		"SELECT gid FROM pg_prepared_xacts", "later", ""},
	{"advisory: nothing of a rolled back transaction", []string{"BEGIN; CREATE TABLE ghost AS SELECT generate_series(1, 1000); ROLLBACK"}, "SELECT to_regclass('ghost') IS NULL", "true", ""},
	{"ALTER SYSTEM", []string{"ALTER SYSTEM SET work_mem = '5MB'", "SELECT pg_reload_conf()", "SELECT pg_sleep(0.5)"}, "SHOW work_mem", "5MB", ""},
	{"large object", []string{"SELECT lo_from_bytea(4711, repeat('x', 100000)::bytea)"}, "SELECT length(lo_get(4711))", "100000", ""},
	{"materialized view", []string{"CREATE MATERIALIZED VIEW mv AS SELECT count(*) AS n FROM a", "REFRESH MATERIALIZED VIEW mv"}, "SELECT n FROM mv", "13334", ""},
	{"switch of the WAL segment", []string{"SELECT pg_switch_wal()", "CREATE TABLE sw AS SELECT 1 AS i", "SELECT pg_switch_wal()", "INSERT INTO sw VALUES (2)"}, "SELECT sum(i) FROM sw", "3", ""},
}

// toastMD5 is md5 of the concatenated md5s of 1 to 20000.
const toastMD5 = "computed"

// tryFeatures does what people do, renews the server, and looks at what is there.
func tryFeatures(t *testing.T, ctx context.Context, target pgtools.Target, renew func()) {
	t.Helper()
	for _, f := range features {
		if err := target.Exec(ctx, f.do...); err != nil {
			t.Fatalf("%s: %v", f.name, err)
		}
	}
	toast := ask(ctx, target, "SELECT '640000 ' || md5(string_agg(md5(i::text), '')) FROM generate_series(1, 20000) i")
	check := func(when string, want func(feature) string) {
		for _, f := range features {
			w := strings.ReplaceAll(want(f), "640000 "+toastMD5, toast)
			if diff := gocmp.Diff(w, ask(ctx, target, f.ask)); diff != "" {
				t.Errorf("%s, %s (-want +got):\n%s", f.name, when, diff)
			}
		}
	}
	check("before", func(f feature) string { return f.before })
	renew()
	check("after", func(f feature) string { return cmp.Or(f.after, f.before) })
	if err := target.Exec(ctx, "COMMIT PREPARED 'later'", "INSERT INTO u VALUES (5)", "INSERT INTO u2 (v) VALUES ('x')"); err != nil {
		t.Errorf("after: %v", err)
	}
	if got := ask(ctx, target, "SELECT count(*) FROM prep"); got != "1" {
		t.Errorf("the prepared transaction was committed, but its row is not there: %s", got)
	}
	if err := target.Amcheck(ctx); err != nil {
		t.Error(err)
	}
}

var featureSettings = map[string]string{"max_prepared_transactions": "5", "shared_buffers": "16MB"}

func TestWhatPeopleDoOutlivesTheCompute(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	c := start(t, ctx, featureSettings)
	tryFeatures(t, ctx, c.Target(), func() { renew(t, ctx, c) })
}

// What is wanted above is what stock PostgreSQL does after kill -9.
func TestStockPostgresDoesTheSame(t *testing.T) {
	testenv.NeedPostgres(t)
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	s, err := stock.New(ctx, testenv.TempDir(t), "stock", featureSettings)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Start(ctx); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Kill(); err != nil {
			t.Error(err)
		}
	})
	tryFeatures(t, ctx, s.Target(), func() {
		if err := errors.Join(s.Kill(), s.Start(ctx)); err != nil {
			t.Fatal(err)
		}
	})
}

func TestDatabases(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	c := start(t, ctx, nil)
	for _, s := range []string{"CREATE DATABASE one", "CREATE DATABASE two TEMPLATE template0 STRATEGY file_copy", "CREATE DATABASE gone"} {
		if err := c.Target().Exec(ctx, s); err != nil {
			t.Fatal(err)
		}
	}
	for _, db := range []string{"one", "two"} {
		if err := c.Target().InDatabase(db).Exec(ctx, "CREATE TABLE mine (v text)", "INSERT INTO mine VALUES (current_database())"); err != nil {
			t.Fatalf("in database %s: %v", db, err)
		}
	}
	if err := c.Target().Exec(ctx, "CREATE DATABASE copied TEMPLATE one", "DROP DATABASE gone"); err != nil {
		t.Fatal(err)
	}
	renew(t, ctx, c)
	for db, want := range map[string]string{"one": "one", "two": "two", "copied": "one"} {
		if got := ask(ctx, c.Target().InDatabase(db), "SELECT v FROM mine"); got != want {
			t.Errorf("database %s holds %q, want %q", db, got, want)
		}
		if err := c.Target().InDatabase(db).Amcheck(ctx); err != nil {
			t.Error(err)
		}
	}
	if got := ask(ctx, c.Target(), "SELECT count(*) FROM pg_database WHERE datname = 'gone'"); got != "0" {
		t.Errorf("the dropped database: %s", got)
	}
}

// The password that the cluster was made with is asked for over TCP; there is no trust.
func TestNobodyComesInWithoutThePassword(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	c := start(t, ctx, nil)
	for _, password := range []string{"", "wrong"} {
		target := c.Target()
		target.Password = password
		if conn, err := target.Connect(ctx); err == nil {
			_ = conn.Close(ctx)
			t.Errorf("came in with password %q", password)
		}
	}
	if got := ask(ctx, c.Target(), "SELECT bool_and(rolpassword LIKE 'SCRAM-SHA-256$%') FROM pg_authid WHERE rolpassword IS NOT NULL"); got != "true" {
		t.Errorf("passwords are kept as SCRAM verifiers: %s", got)
	}
	if got := ask(ctx, c.Target(), "SELECT count(*) FROM pg_hba_file_rules WHERE auth_method = 'trust' AND type <> 'local'"); got != "0" {
		t.Errorf("pg_hba trusts %s addresses", got)
	}
}

// The customer's key may get a new version at any time.
func TestKeyRotationGoesUnnoticed(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	c := start(t, ctx, nil)
	if err := c.Target().Exec(ctx, "CREATE TABLE k AS SELECT generate_series(1, 1000) AS i"); err != nil {
		t.Fatal(err)
	}
	if _, err := c.CLI(ctx, "kms", "rotate"); err != nil {
		t.Fatal(err)
	}
	if err := c.Target().Exec(ctx, "INSERT INTO k SELECT generate_series(1001, 2000)"); err != nil {
		t.Fatal(err)
	}
	if err := c.Stop(); err != nil {
		t.Fatal(err)
	}
	if err := c.Start(ctx); err != nil {
		t.Fatal(err)
	}
	if got := ask(ctx, c.Target(), "SELECT count(*) FROM k"); got != "2000" {
		t.Errorf("after a rotation and a restart: %s rows, want 2000", got)
	}
}

// Disabled, the key stops everything by itself; enabled again, everything resumes by itself.
func TestDisabledKeyShutsAndEnabledKeyOpens(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
	defer cancel()
	c := start(t, ctx, nil)
	if err := c.Target().Exec(ctx, "CREATE TABLE held AS SELECT generate_series(1, 1000) AS i"); err != nil {
		t.Fatal(err)
	}
	if _, err := c.CLI(ctx, "kms", "disable"); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	for c.Target().Exec(ctx, "SELECT 1") == nil {
		select {
		case <-ctx.Done():
			t.Fatal("PostgreSQL still answers under a disabled key")
		case <-time.After(100 * time.Millisecond):
		}
	}
	t.Logf("SHOW: shut %.1fs after the key was disabled", time.Since(began).Seconds())
	if out, err := c.CLI(ctx, "status"); err != nil || !strings.Contains(out, "revoked") {
		t.Errorf("status under a disabled key: %q, %v; want revoked", out, err)
	}
	if _, err := c.CLI(ctx, "kms", "enable"); err != nil {
		t.Fatal(err)
	}
	began = time.Now()
	if err := c.WaitReady(ctx); err != nil {
		t.Fatal(err)
	}
	t.Logf("SHOW: open %.1fs after the key was enabled again", time.Since(began).Seconds())
	if got := ask(ctx, c.Target(), "SELECT count(*) FROM held"); got != "1000" {
		t.Errorf("the table holds %s rows, want 1000", got)
	}
}

// An endpoint outlives the history window: what it looks at for the first time late, when
// the page server no longer keeps the state that it started from, must still be there.
func TestAnEndpointOutlivesTheHistoryWindow(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	c := start(t, ctx, map[string]string{"max_wal_size": "4GB"})
	if err := c.Target().Exec(ctx, "CREATE DATABASE late", "CREATE TABLE w (v text)"); err != nil {
		t.Fatal(err)
	}
	if err := c.Target().InDatabase("late").Exec(ctx, "CREATE TABLE l AS SELECT generate_series(1, 1000) AS i"); err != nil {
		t.Fatal(err)
	}
	renew(t, ctx, c)
	for range 9 { // 500 MiB of WAL
		if err := c.Target().Exec(ctx, "INSERT INTO w SELECT repeat(md5(i::text), 60) FROM generate_series(1, 26000) i", "TRUNCATE w"); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.Target().Exec(ctx, "CHECKPOINT", "VACUUM FREEZE pg_class"); err != nil {
		t.Fatal(err)
	}
	if got := ask(ctx, c.Target().InDatabase("late"), "SELECT count(*) FROM l"); got != "1000" {
		t.Errorf("a table that was not looked at since the start: %s", got)
	}
}
