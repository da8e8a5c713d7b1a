package survive

import (
	"context"
	"testing"
)

// Work that a kill interrupts is as if it had not begun, but for what stock PostgreSQL
// leaves, too: an invalid index of CREATE INDEX CONCURRENTLY. It can be done again.
func TestWorkThatAKillInterrupts(t *testing.T) {
	w := newWorld(t, map[string]string{"shared_buffers": "32MB", "autovacuum": "off", "max_parallel_maintenance_workers": "0"})
	w.exec("CREATE EXTENSION btree_gist",
		"CREATE TABLE big AS SELECT i, md5(i::text) AS v, ARRAY[i % 1000, i % 77] AS a, point(i, i % 100) AS p FROM generate_series(1, 150000) i",
		"CREATE TABLE half AS SELECT i FROM generate_series(1, 150000) i", "CREATE TABLE full_ (i int PRIMARY KEY)", "INSERT INTO full_ SELECT generate_series(1, 50000)", "DELETE FROM full_ WHERE i % 2 = 0",
		"CREATE TABLE emptied AS SELECT generate_series(1, 50000) AS i", "CREATE DATABASE template_ STRATEGY file_copy",
		"DO $$ BEGIN FOR n IN 1..200 LOOP EXECUTE format('CREATE TABLE dropped_%s (i int PRIMARY KEY)', n); END LOOP; END $$")
	// Done, and not committed.
	for _, s := range []string{
		"CREATE INDEX open_btree ON big (v)", "CREATE INDEX open_gist ON big USING gist (p)", "CREATE INDEX open_gin ON big USING gin (a)",
		"CLUSTER full_ USING full__pkey", "TRUNCATE emptied",
		"DO $$ BEGIN FOR n IN 1..200 LOOP EXECUTE format('DROP TABLE dropped_%s', n); END LOOP; END $$",
	} {
		if _, err := w.conn().Exec(w.ctx, "BEGIN; "+s); err != nil {
			t.Fatalf("%s: %v", s, err)
		}
	}
	// Under way at the kill: the advisory lock is held by nobody who would let it go.
	holder := w.conn()
	if _, err := holder.Exec(w.ctx, "CREATE FUNCTION slowly(i int) RETURNS int IMMUTABLE LANGUAGE plpgsql AS $$ BEGIN IF i = 140000 THEN PERFORM pg_advisory_lock(1); END IF; RETURN i; END $$; SELECT pg_advisory_lock(1)"); err != nil {
		t.Fatal(err)
	}
	for _, s := range []string{"CREATE INDEX halfway ON half (slowly(i))", "CREATE INDEX CONCURRENTLY halfway_concurrently ON half (slowly(i))"} {
		conn := w.conn()
		go func() { _, _ = conn.Exec(context.WithoutCancel(w.ctx), s) }() // ends with its server
		w.eventually("1", "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'advisory' AND query = '"+s+"'")
		if s == "CREATE INDEX halfway ON half (slowly(i))" {
			w.exec("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE 'CREATE INDEX halfway %'")
		}
	}
	for _, s := range []string{"CREATE DATABASE logged TEMPLATE template_ STRATEGY wal_log", "CREATE DATABASE copied TEMPLATE template_ STRATEGY file_copy"} {
		conn := w.conn()
		go func() { _, _ = conn.Exec(context.WithoutCancel(w.ctx), s) }() // whether it came to its end is chance
	}
	w.renew("kill")

	w.want("indexes", "halfway_concurrently f", "SELECT c.relname, i.indisvalid FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid WHERE i.indrelid IN ('big'::regclass, 'half'::regclass)")
	w.want("rows", "25000 50000 200", "SELECT (SELECT count(*) FROM full_), (SELECT count(*) FROM emptied), (SELECT count(*) FROM pg_class WHERE relname ~ '^dropped_[0-9]*$')")
	if err := w.c.Target().Amcheck(w.ctx); err != nil {
		t.Error(err)
	}
	w.exec("REINDEX INDEX CONCURRENTLY halfway_concurrently", "CREATE INDEX ON big (v)", "CREATE INDEX ON big USING gist (p)", "CREATE INDEX ON big USING gin (a)",
		"CLUSTER full_ USING full__pkey", "VACUUM FULL full_", "TRUNCATE emptied",
		"DO $$ BEGIN FOR n IN 1..200 LOOP EXECUTE format('DROP TABLE dropped_%s', n); END LOOP; END $$")
	for _, s := range []string{"logged STRATEGY wal_log", "copied STRATEGY file_copy"} {
		w.exec("DROP DATABASE IF EXISTS "+s[:6], "CREATE DATABASE "+s[:6]+" TEMPLATE template_"+s[6:])
	}
	w.renew("kill")
	if err := w.c.Target().Amcheck(w.ctx); err != nil {
		t.Error(err)
	}
	for _, db := range []string{"logged", "copied"} {
		if err := w.c.Target().InDatabase(db).Amcheck(w.ctx); err != nil {
			t.Errorf("database %s: %v", db, err)
		}
	}
}
