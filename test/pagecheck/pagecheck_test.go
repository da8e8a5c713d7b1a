// Package pagecheck runs a mixed workload on an endpoint that compares each page that it wrote
// with the pageserver's, before the page leaves its small local store and at its end.
package pagecheck

import (
	"context"
	"fmt"
	"strings"
	"testing"

	"github.com/holdfastdb/holdfast/test/cluster"
	"github.com/holdfastdb/holdfast/test/testenv"
)

// Far below what the workload makes: less means that pages are not compared, or do not leave.
const minCompared, minLeft = 3000, 1000

func TestPagesThatLeaveEqualThePageserver(t *testing.T) {
	testenv.NeedPostgres(t)
	testenv.NeedFUSE(t)
	if testing.Short() {
		t.Skip("runs a cluster")
	}
	ctx := t.Context()
	c := cluster.ForTest(t, cluster.Options{Dir: testenv.TempDir(t), Separate: true, VerifyPages: true, CacheBytes: 2 << 20, Settings: map[string]string{
		"shared_buffers": "2MB", "max_prepared_transactions": "10", "autovacuum_naptime": "1s", "bgwriter_delay": "10ms",
		"autovacuum_vacuum_threshold": "50", "autovacuum_vacuum_scale_factor": "0.05", "track_commit_timestamp": "on"}})
	if err := c.Start(ctx); err != nil {
		t.Fatal(err)
	}
	if err := c.Target().Exec(ctx, schema...); err != nil {
		t.Fatal(err)
	}
	held, err := c.Target().Connect(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := held.Exec(ctx, "BEGIN; INSERT INTO h VALUES (-1, 'held'); UPDATE h SET v = 'held twice' WHERE i = -1"); err != nil {
		t.Fatal(err)
	}
	for round := range 6 {
		if err := c.Target().Exec(ctx, work(round)...); err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		if round != 2 {
			continue
		}
		var v string
		if err := held.QueryRow(ctx, "SELECT v FROM h WHERE i = -1").Scan(&v); err != nil || v != "held twice" {
			t.Errorf("a transaction sees %q of what it wrote (%v), want %q", v, err, "held twice")
		}
		if _, err := held.Exec(ctx, "COMMIT"); err != nil {
			t.Error(err)
		}
	}
	var last int64
	if err := held.QueryRow(ctx, "SELECT last_value FROM s").Scan(&last); err != nil || last != 10 {
		t.Errorf("a sequence stands at %d (%v), want 10: nobody took its other values", last, err)
	}
	if err := held.Close(context.WithoutCancel(ctx)); err != nil {
		t.Error(err)
	}
	if _, err := c.CLI(ctx, "endpoint", "stop"); err != nil {
		t.Fatal(err)
	}
	checks := c.PageChecks()
	if len(checks) != 1 {
		t.Fatalf("the endpoint told %d times what it compared, want once", len(checks))
	}
	t.Log(checks[0].Line)
	if p := checks[0]; !p.Whole || p.Compared < minCompared || p.Left < minLeft || p.Mismatched != 0 {
		t.Errorf("want all compared, at least %d pages, of which at least %d left, and no difference", minCompared, minLeft)
	}
}

var schema = []string{
	"CREATE EXTENSION IF NOT EXISTS pg_trgm",
	"CREATE TABLE h (i int PRIMARY KEY, v text)",
	"CREATE TABLE g (i int, v text, a int[], p point, r int4range)",
	"CREATE INDEX ON g USING hash (v)", "CREATE INDEX ON g USING gin (a)", "CREATE INDEX ON g USING gist (p)",
	"CREATE INDEX ON g USING spgist (p)", "CREATE INDEX ON g USING brin (i) WITH (pages_per_range = 4)", "CREATE INDEX ON g USING gist (r)",
	"CREATE TABLE big (i int, v text)",
	"CREATE TABLE parent (i int PRIMARY KEY)", "CREATE TABLE child (i int REFERENCES parent)", "INSERT INTO parent SELECT generate_series(1, 100)",
	"CREATE UNLOGGED TABLE u (i int)",
	"CREATE SEQUENCE s",
	"SELECT nextval('s') FROM generate_series(1, 10)",
	"CREATE TABLE waiting (i int, v text)",
}

// work is one round: each statement by itself is a transaction, unless it has its own BEGIN.
func work(round int) []string {
	from, to := round*4000+1, round*4000+4000
	series := fmt.Sprintf("generate_series(%d, %d) i", from, to)
	many := []string{"BEGIN"} // commands and subtransactions in one transaction
	for n := range 20 {
		many = append(many, fmt.Sprintf("INSERT INTO h SELECT i, 'command %d' FROM generate_series(%d, %d) i", n, 1000000+round*2000+n*100, 1000000+round*2000+n*100+99),
			fmt.Sprintf("SAVEPOINT x%d; UPDATE h SET v = v || '.' WHERE i %% 50 = %d AND i >= 1000000; DELETE FROM h WHERE i = %d", n, n, 1000000+round*2000+n*100+7))
		if n%5 == 4 {
			many = append(many, fmt.Sprintf("ROLLBACK TO x%d", n))
		}
	}
	many = append(many, "COMMIT")
	return []string{
		"INSERT INTO h SELECT i, md5(i::text) FROM " + series,
		"INSERT INTO g SELECT i, md5(i::text), ARRAY[i % 100, i % 77, i], point(i % 321, i % 123), int4range(i, i + i % 50) FROM " + series,
		"CHECKPOINT",
		strings.Join(many, "; "),
		fmt.Sprintf("INSERT INTO big SELECT i, (SELECT string_agg(md5((i * 1000 + j)::text), '') FROM generate_series(1, 200) j) FROM generate_series(%d, %d) i", from, from+100),
		fmt.Sprintf("BEGIN; INSERT INTO waiting SELECT i, 'prepared' FROM %s; UPDATE waiting SET v = 'twice' WHERE i %% 3 = 0; PREPARE TRANSACTION 'p%d'", series, round),
		"INSERT INTO u SELECT i FROM " + series,
		"DELETE FROM g WHERE i % 4 = 1", "UPDATE g SET v = v || 'x' WHERE i % 7 = 2", "UPDATE h SET v = 'z' WHERE i % 5 = 3",
		"BEGIN; SELECT * FROM parent WHERE i % 3 = 0 FOR KEY SHARE; SAVEPOINT y; UPDATE parent SET i = i WHERE i % 9 = 0; INSERT INTO child SELECT i FROM parent WHERE i % 2 = 0; COMMIT",
		"INSERT INTO h SELECT i, 'again' FROM generate_series(1, 500) i ON CONFLICT (i) DO UPDATE SET v = excluded.v || h.v",
		"VACUUM h", "VACUUM (FREEZE) g", "VACUUM parent",
		fmt.Sprintf("CREATE TABLE t%d AS SELECT * FROM g; CREATE INDEX ON t%d USING gin (v gin_trgm_ops)", round, round),
		fmt.Sprintf("DROP TABLE IF EXISTS t%d", max(0, round-2)),
		fmt.Sprintf("DO $$ BEGIN IF %d %% 2 = 1 THEN TRUNCATE child; ALTER TABLE big SET (fillfactor = 90); END IF; END $$", round),
		fmt.Sprintf("SELECT pg_sleep(%d)", []int{5, 5, 5, 3, 3, 5}[round]), // pages are free to leave after two polls, and nothing tells when
		"SELECT count(*) FROM g, LATERAL (SELECT 1) x", "SELECT count(*) FROM h",
		"CHECKPOINT",
	}
}
