package oracle

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/holdfastdb/holdfast/internal/pagemask"
	"github.com/holdfastdb/holdfast/internal/pg"
)

// workload runs the server through everything and shuts it down. It gives what kind of
// pages each relation has at the end.
func workload(s *server) map[pg.RelFileNode]pagemask.Kind {
	s.start()
	c := s.connect("postgres")
	c.exec("CREATE EXTENSION bloom", "CREATE EXTENSION amcheck")
	heapBasics(s, c)
	btreeTrees(c)
	sequences(c)
	c.exec("ALTER SYSTEM SET wal_compression = lz4", "SELECT pg_reload_conf()")
	rowLocks(s, c)
	speculation(s, c)
	transactions(s, c)
	otherIndexes(c)
	brinIndexes(c)
	ginIndexes(c)
	hashIndexes(c)
	gistIndexes(c)
	spgistIndexes(c)
	c.exec("ALTER SYSTEM SET wal_compression = zstd", "SELECT pg_reload_conf()")
	databases(s, c)
	ddl(s, c)
	server15(c)

	// A crash, and logical WAL with commit timestamps after it.
	c.exec("ALTER SYSTEM SET wal_level = logical", "ALTER SYSTEM SET track_commit_timestamp = on", "ALTER SYSTEM RESET wal_compression")
	c.close()
	s.stop(syscall.SIGQUIT)
	s.start()
	c = s.connect("postgres")
	logical(s, c)
	rareRecords(c)
	freezeAll(s, c)
	transactionsLeft(c)
	mixed(s)

	c.exec("CHECKPOINT")
	kinds := relationKinds(s, c)
	c.close()
	s.stop(syscall.SIGINT)
	return kinds
}

// repeated is a statement for each number in [from, to).
func repeated(from, to int, format string) []string {
	var list []string
	for i := from; i < to; i++ {
		list = append(list, strings.ReplaceAll(format, "$", strconv.Itoa(i)))
	}
	return list
}

func heapBasics(s *server, c *session) {
	c.exec(
		"CREATE TABLE t (id int PRIMARY KEY, k int, v text, pad text) WITH (fillfactor = 90)",
		"CREATE INDEX t_k ON t (k)",
		"CREATE INDEX t_v ON t (v)",
		"INSERT INTO t SELECT i, i % 17, md5(i::text), repeat('x', i % 300) FROM generate_series(1, 6000) i",
		"UPDATE t SET pad = pad || 'y' WHERE id % 5 = 0",
		"UPDATE t SET pad = 'hot' WHERE id % 7 = 0",
		"UPDATE t SET v = md5(v), k = k + 1 WHERE id % 11 = 0",
		"DELETE FROM t WHERE id % 13 = 0",
		"SELECT count(*) FROM t",
		"VACUUM t",
		"UPDATE t SET pad = pad || 'after vacuum' WHERE id % 100 = 1",
		"DELETE FROM t WHERE id % 100 = 2",
		"SELECT * FROM t WHERE id % 100 = 3 FOR UPDATE",
		"VACUUM (FREEZE) t",
		"SELECT * FROM t WHERE id % 100 = 4 FOR UPDATE", // clears all-frozen only
		"INSERT INTO t SELECT i, i % 17, md5(i::text), repeat('x', i % 30) FROM generate_series(6001, 9000) i",
		"DELETE FROM t WHERE id > 5000",
		"VACUUM t", // truncates heap, map of free space and map of visibility
		"ANALYZE t",
		"CREATE TABLE wide (id serial PRIMARY KEY, a text, b bytea)",
		"INSERT INTO wide (a) SELECT string_agg(md5((i * j)::text), '') FROM generate_series(1, 40) i, generate_series(1, 300) j GROUP BY i",
		"UPDATE wide SET a = a || 'tail' WHERE id % 3 = 0",
		"DELETE FROM wide WHERE id % 4 = 0",
		"VACUUM wide",
		"CREATE TABLE nulls (a int, b text, c int, d text)",
		"INSERT INTO nulls SELECT i, CASE WHEN i % 2 = 0 THEN 'x' END, CASE WHEN i % 3 = 0 THEN i END, CASE WHEN i % 5 = 0 THEN repeat('n', 50) END FROM generate_series(1, 2000) i",
		"UPDATE nulls SET c = a WHERE c IS NULL AND a % 4 = 0",
		"UPDATE nulls SET b = NULL WHERE a % 6 = 0",
		"ALTER TABLE nulls ADD COLUMN e int DEFAULT 7",
		"UPDATE nulls SET e = a WHERE a % 10 = 0",
		"CREATE TABLE parts (k int, v text) PARTITION BY LIST (k)",
		"CREATE TABLE parts1 PARTITION OF parts FOR VALUES IN (1)",
		"CREATE TABLE parts2 PARTITION OF parts FOR VALUES IN (2)",
		"INSERT INTO parts SELECT 1, 'v' || i FROM generate_series(1, 200) i",
		"UPDATE parts SET k = 2 WHERE v LIKE '%7'", // moves rows to another partition
		"CREATE TABLE small_then_wide (id int PRIMARY KEY, v text) WITH (fillfactor = 50)",
		"INSERT INTO small_then_wide SELECT i, 'aaaabbbb' FROM generate_series(1, 500) i",
		"UPDATE small_then_wide SET v = 'aaaa' || id || 'bbbb'", // prefix and suffix shared
		"UPDATE small_then_wide SET v = v || repeat('w', 1000) WHERE id % 3 = 0",
	)
	var rows strings.Builder
	for i := range 8000 {
		fmt.Fprintf(&rows, "%d\t%d\tcopied %d\t\\N\n", 100000+i, i%5, i)
	}
	c.copyIn("COPY t FROM STDIN", rows.String())
	c.exec("BEGIN", "CREATE TABLE frozen (a int, b text)")
	c.copyIn("COPY frozen FROM STDIN WITH (FREEZE)", strings.Repeat("1\tfrozen from the start\n", 2000))
	c.exec("COMMIT", "UPDATE frozen SET b = 'not any more' WHERE ctid < '(3,1)'", "VACUUM frozen")
	c.exec(repeated(0, 60, "UPDATE t SET pad = 'version $' WHERE id BETWEEN 10 AND 14")...) // pruned on the way
}

func btreeTrees(c *session) {
	c.exec(
		"CREATE TABLE dup (a int, b text)",
		"CREATE INDEX dup_a ON dup (a)",
		"CREATE INDEX dup_b ON dup (b)",
		"INSERT INTO dup SELECT (i * 7919) % 40, 'key ' || (i * 31) % 200 FROM generate_series(1, 9000) i", // dedup, posting splits
		"DELETE FROM dup WHERE ctid::text LIKE '(%,1%)'",
		"VACUUM dup",
		"INSERT INTO dup SELECT (i * 104729) % 40, 'key ' || (i * 37) % 200 FROM generate_series(1, 6000) i",
		"DELETE FROM dup WHERE a < 20",
		"VACUUM dup",
		"INSERT INTO dup SELECT (i * 7) % 40, 'new ' || i % 3 FROM generate_series(1, 3000) i",

		// Keys of 480 bytes make three levels of few tuples each.
		"CREATE TABLE tree (id int, k text)",
		"CREATE INDEX tree_k ON tree (k)",
		"INSERT INTO tree SELECT i, lpad(i::text, 8, '0') || repeat(md5(i::text), 14) FROM generate_series(1, 3000) i",
		"INSERT INTO tree SELECT i, lpad(((i * 7919) % 3000)::text, 8, '0') || repeat(md5((i * 3)::text), 14) FROM generate_series(1, 1500) i",
		"DELETE FROM tree WHERE k > '00000005'",
		"VACUUM (INDEX_CLEANUP ON) tree",
		"VACUUM (INDEX_CLEANUP ON) tree",
		"INSERT INTO tree SELECT i, lpad(i::text, 8, '0') || repeat(md5((i * 5)::text), 14) FROM generate_series(1, 1500) i",
		"DELETE FROM tree WHERE id BETWEEN 300 AND 900",
		"VACUUM (INDEX_CLEANUP ON) tree",
		"INSERT INTO tree SELECT i, lpad((i % 1500)::text, 8, '0') || repeat(md5((i * 11)::text), 14) FROM generate_series(1500, 2500) i",

		// Index entries of dead rows are deleted without vacuum.
		"CREATE TABLE churn (id int PRIMARY KEY, a int, b int) WITH (autovacuum_enabled = off)",
		"CREATE INDEX churn_a ON churn (a)",
		"CREATE INDEX churn_b ON churn (b)",
		"INSERT INTO churn SELECT i, i, i FROM generate_series(1, 400) i",
	)
	// An empty tree's levels go, down to a fast root; then it grows again. More than once,
	// as a snapshot of autovacuum's may keep the rows.
	for range 3 {
		c.exec("DELETE FROM tree", "VACUUM (INDEX_CLEANUP ON, TRUNCATE OFF) tree",
			"INSERT INTO tree SELECT i, lpad(i::text, 8, '0') || repeat(md5((i * 5)::text), 14) FROM generate_series(1, 1000) i")
	}
	c.exec(repeated(0, 25, "UPDATE churn SET b = b + 1000")...)
	c.exec(
		"DELETE FROM churn WHERE id % 2 = 0",
		"SET enable_seqscan = off", "SET enable_bitmapscan = off",
		"SELECT count(b) FROM churn WHERE a > 0", "SELECT count(a) FROM churn WHERE b > 0",
		"SELECT count(b) FROM churn WHERE id > 0",
		"INSERT INTO churn SELECT i, i % 400, i FROM generate_series(1001, 2000) i",
		"RESET enable_seqscan", "RESET enable_bitmapscan",
		"CREATE TABLE empty_index (a int PRIMARY KEY)", "INSERT INTO empty_index VALUES (1)",
		"CREATE UNIQUE INDEX CONCURRENTLY churn_u ON churn (id, b)",
		"REINDEX TABLE dup",
	)
}

func sequences(c *session) {
	c.exec(
		"CREATE SEQUENCE s", "SELECT nextval('s') FROM generate_series(1, 100)", "SELECT setval('s', 5000)",
		"ALTER SEQUENCE s RESTART WITH 7 INCREMENT BY 3", "SELECT nextval('s')",
		"CREATE SEQUENCE s2 CACHE 20", "SELECT nextval('s2')", "CREATE TEMP SEQUENCE s3", "SELECT nextval('s3')",
	)
}

// rowLocks makes multixacts: each round two for three sharers, and some with updaters.
func rowLocks(s *server, c *session) {
	c.exec("CREATE TABLE locked (id int PRIMARY KEY, v int)", "INSERT INTO locked SELECT i, 0 FROM generate_series(1, 200) i",
		"CREATE TABLE child (id int REFERENCES locked)")
	a, b := s.connect("postgres"), s.connect("postgres")
	defer a.close()
	defer b.close()
	for i := 1; i <= 110; i++ {
		for _, x := range []*session{a, b, c} {
			x.exec("BEGIN", fmt.Sprintf("SELECT * FROM locked WHERE id = %d FOR SHARE", i))
		}
		for _, x := range []*session{a, b, c} {
			x.exec("COMMIT")
		}
	}
	for i := 120; i < 150; i++ {
		row := fmt.Sprintf("WHERE id = %d", i)
		a.exec("BEGIN", "SELECT * FROM locked "+row+" FOR KEY SHARE")
		b.exec("BEGIN", "UPDATE locked SET v = v + 1 "+row) // beside the key sharer: a multixact with an updater
		c.exec("BEGIN", "SELECT * FROM locked "+row+" FOR KEY SHARE", fmt.Sprintf("INSERT INTO child VALUES (%d)", i))
		a.exec("COMMIT")
		if i%2 == 0 {
			b.exec("COMMIT")
		} else {
			b.exec("ROLLBACK")
		}
		c.exec("COMMIT", "UPDATE locked SET v = v + 1 "+row)
	}
	// A lock taken on an old version follows the chain to the new one.
	old := s.connect("postgres")
	defer old.close()
	for i := 160; i < 170; i++ {
		row := fmt.Sprintf("WHERE id = %d", i)
		old.exec("BEGIN ISOLATION LEVEL READ COMMITTED", "DECLARE cur CURSOR FOR SELECT * FROM locked "+row+" FOR KEY SHARE")
		b.exec("BEGIN", "UPDATE locked SET v = v + 1 "+row, "UPDATE locked SET v = v + 1 "+row)
		old.exec("FETCH cur")
		b.exec("COMMIT")
		old.exec("COMMIT")
	}
	c.exec("BEGIN", "SAVEPOINT x", "SELECT * FROM locked WHERE id = 180 FOR SHARE", "ROLLBACK TO x",
		"SELECT * FROM locked WHERE id = 180 FOR UPDATE", "UPDATE locked SET v = 9 WHERE id = 180", "COMMIT",
		"VACUUM (FREEZE) locked")
}

// speculation has sessions insert the same keys at once.
func speculation(s *server, c *session) {
	c.exec("CREATE TABLE up (k int PRIMARY KEY, n int, v text)", "CREATE UNIQUE INDEX up_v ON up (v)")
	concurrently(s, 4, func(n int, x *session) {
		for i := range 250 {
			x.try(fmt.Sprintf("INSERT INTO up VALUES (%d, 1, repeat('big value %d ', 300)) ON CONFLICT (k) DO UPDATE SET n = up.n + 1", i, i))
		}
	})
	c.exec("INSERT INTO up SELECT i, 1, 'v' || i FROM generate_series(200, 400) i ON CONFLICT DO NOTHING")
}

func concurrently(s *server, n int, fn func(n int, c *session)) {
	var wg sync.WaitGroup
	for i := range n {
		c := s.connect("postgres")
		wg.Go(func() {
			defer c.close()
			fn(i, c)
		})
	}
	wg.Wait()
}

func transactions(s *server, c *session) {
	c.exec("CREATE TABLE tx (a int)")
	c.exec("BEGIN")
	c.exec(repeated(0, 150, "SAVEPOINT s$; INSERT INTO tx VALUES ($)")...) // more subtransactions than fit in a proc: ASSIGNMENT
	c.exec("ROLLBACK TO s100", "COMMIT")
	c.exec("BEGIN", "INSERT INTO tx VALUES (-1)", "SAVEPOINT a", "INSERT INTO tx VALUES (-2)", "ROLLBACK")
	c.exec("BEGIN", "INSERT INTO tx VALUES (1)", "SAVEPOINT a", "INSERT INTO tx VALUES (2)", "PREPARE TRANSACTION 'committed'", "COMMIT PREPARED 'committed'")
	c.exec("BEGIN", "INSERT INTO tx VALUES (3)", "CREATE TABLE never (a int)", "PREPARE TRANSACTION 'rolled back'", "ROLLBACK PREPARED 'rolled back'")
	c.exec("CREATE TABLE doomed (a int PRIMARY KEY, b text)", "INSERT INTO doomed SELECT i, 'x' FROM generate_series(1, 100) i", "VACUUM doomed")
	c.exec("BEGIN", "DROP TABLE doomed", "PREPARE TRANSACTION 'drop'", "COMMIT PREPARED 'drop'")
	c.exec("BEGIN", "LOCK TABLE tx IN ACCESS EXCLUSIVE MODE", "COMMIT", "VACUUM ANALYZE tx", "NOTIFY x, 'y'")
	c.exec("SELECT pg_logical_emit_message(true, 'oracle', 'in a transaction')", "SELECT pg_logical_emit_message(false, 'oracle', repeat('long ', 20000))")
}

func otherIndexes(c *session) {
	c.exec(
		"CREATE TABLE bl (a int, b int, c text)", "INSERT INTO bl SELECT i, i % 100, md5(i::text) FROM generate_series(1, 3000) i",
		"CREATE INDEX bl_bloom ON bl USING bloom (a, b, c)",
		"INSERT INTO bl SELECT i, i % 100, md5(i::text) FROM generate_series(3001, 6000) i",
		"DELETE FROM bl WHERE a % 3 = 0", "VACUUM bl",
		"INSERT INTO bl SELECT i, i % 100, md5(i::text) FROM generate_series(1, 2000) i",
		"CREATE TABLE oth (a int, arr int[], p point, r int4range)",
		"CREATE INDEX oth_gin ON oth USING gin (arr)", "CREATE INDEX oth_gist ON oth USING gist (p)",
		"CREATE INDEX oth_spgist ON oth USING spgist (p)", "CREATE INDEX oth_hash ON oth USING hash (a)",
		"CREATE INDEX oth_brin ON oth USING brin (a)",
		"INSERT INTO oth SELECT i, ARRAY[i, i % 10, i % 7], point(i % 50, i / 50), int4range(i, i + 5) FROM generate_series(1, 1500) i",
		"DELETE FROM oth WHERE a % 3 = 0", "VACUUM oth",
	)
}

func databases(s *server, c *session) {
	c.exec("CREATE DATABASE by_wal STRATEGY wal_log", "CREATE DATABASE by_copy STRATEGY file_copy")
	for _, name := range []string{"by_wal", "by_copy"} {
		x := s.connect(name)
		x.exec("CREATE TABLE own (a int PRIMARY KEY, b text)", "INSERT INTO own SELECT i, 'row' FROM generate_series(1, 500) i", "VACUUM FULL pg_class")
		x.close()
	}
	c.exec("CREATE DATABASE copy_of_copy TEMPLATE by_copy STRATEGY file_copy", "CREATE DATABASE copy_by_wal TEMPLATE by_copy STRATEGY wal_log")
	x := s.connect("by_copy") // the source of copies changes
	x.exec("UPDATE own SET b = 'later' WHERE a % 3 = 0", "DELETE FROM own WHERE a > 400", "VACUUM own")
	x.close()
	x = s.connect("copy_of_copy")
	x.exec("UPDATE own SET b = 'copy' WHERE a % 50 = 0", "VACUUM own")
	x.close()
	c.exec("CREATE DATABASE twice OID = 70000 TEMPLATE copy_of_copy STRATEGY file_copy", "DROP DATABASE twice",
		"CREATE DATABASE twice OID = 70000 TEMPLATE copy_by_wal STRATEGY file_copy", "DROP DATABASE copy_by_wal")
	c.exec("DROP DATABASE by_wal", "ALTER DATABASE copy_of_copy RENAME TO renamed")
}

func ddl(s *server, c *session) {
	c.exec(
		"VACUUM FULL pg_class", "VACUUM FULL pg_attribute", "VACUUM FULL pg_authid", "REINDEX TABLE pg_class", "REINDEX TABLE pg_database",
		"CREATE TABLE tr (a int PRIMARY KEY, b text)", "INSERT INTO tr SELECT i, repeat('t', 100) FROM generate_series(1, 1000) i",
		"TRUNCATE tr", "INSERT INTO tr SELECT i, repeat('u', 50) FROM generate_series(1, 600) i", "CLUSTER tr USING tr_pkey",
		"VACUUM FULL tr", "ALTER TABLE tr ALTER a TYPE bigint",
		"BEGIN", "CREATE TABLE aborted (a int PRIMARY KEY)", "INSERT INTO aborted SELECT generate_series(1, 500)", "TRUNCATE tr", "ROLLBACK",
		"BEGIN", "CREATE TABLE own_trunc (a int PRIMARY KEY)", "INSERT INTO own_trunc SELECT generate_series(1, 500)", "TRUNCATE own_trunc", "INSERT INTO own_trunc VALUES (1)", "COMMIT",
		"CREATE UNLOGGED TABLE ul (a int PRIMARY KEY, s serial)", "INSERT INTO ul SELECT generate_series(1, 500)",
		"CREATE UNLOGGED TABLE ul2 (a int PRIMARY KEY)", "INSERT INTO ul2 SELECT generate_series(1, 500)", "ALTER TABLE ul2 SET LOGGED",
		"ALTER TABLE tr SET UNLOGGED", "ALTER TABLE tr SET LOGGED",
		"CREATE TEMP TABLE tmp (a int PRIMARY KEY)", "INSERT INTO tmp SELECT generate_series(1, 500)",
		"CREATE MATERIALIZED VIEW mv AS SELECT k, count(*) FROM t GROUP BY k", "REFRESH MATERIALIZED VIEW mv",
		"CREATE TABLE as_select AS SELECT * FROM t LIMIT 700", "DROP TABLE as_select",
		"SELECT lo_create(4711)", "SELECT lo_put(4711, 0, decode(repeat('ab', 5000), 'hex'))", "SELECT lo_unlink(4711)",
	)
	// Extended far by several at once: RelationAddExtraBlocks.
	c.exec("CREATE TABLE busy (a int, b text)")
	concurrently(s, 4, func(n int, x *session) {
		x.exec(repeated(0, 20, "INSERT INTO busy SELECT i, repeat('b', 200) FROM generate_series(1, 60) i")...)
	})
}

// server15 makes records that do not come from data.
func server15(c *session) {
	c.exec("CHECKPOINT", "SELECT pg_create_restore_point('oracle')", "SELECT pg_switch_wal()", "CREATE TABLE after_switch (a int)",
		"SELECT pg_switch_wal()", "SELECT pg_backup_start('oracle', true)", "SELECT pg_backup_stop(false)",
		"ALTER SYSTEM SET full_page_writes = on", "SELECT pg_reload_conf()", "CHECKPOINT",
		"UPDATE t SET pad = 'with images' WHERE id % 50 = 0", "INSERT INTO dup SELECT i % 40, 'image' FROM generate_series(1, 500) i", "VACUUM t",
		"ALTER SYSTEM RESET full_page_writes", "SELECT pg_reload_conf()", "CHECKPOINT", "UPDATE t SET pad = 'without' WHERE id % 50 = 0")
}

func logical(s *server, c *session) {
	c.exec(
		"CREATE TABLE lg (a int PRIMARY KEY, b text)", "ALTER TABLE lg REPLICA IDENTITY FULL",
		"INSERT INTO lg SELECT i, 'logical ' || i FROM generate_series(1, 1500) i",
		"UPDATE lg SET b = b || '!' WHERE a % 3 = 0", "DELETE FROM lg WHERE a % 5 = 0",
		"BEGIN", "SAVEPOINT x", "CREATE TABLE in_sub (a int)", "INSERT INTO in_sub VALUES (1)", "RELEASE x", "COMMIT",
		"CREATE TABLE lg2 (a int PRIMARY KEY)", "INSERT INTO lg2 SELECT generate_series(1, 300)", "TRUNCATE lg2",
		"SELECT pg_create_logical_replication_slot('oracle', 'test_decoding')",
		"VACUUM FULL pg_class", // with a slot: mappings are logged
		"UPDATE pg_class SET relpages = relpages WHERE relname = 'lg'",
		"BEGIN", "UPDATE pg_type SET typname = typname WHERE typname = 'lg'", "COMMIT", "VACUUM FULL pg_type",
		"SELECT pg_drop_replication_slot('oracle')",
		"SELECT pg_replication_origin_create('o')", "SELECT pg_replication_origin_session_setup('o')",
		"BEGIN", "SELECT pg_replication_origin_xact_setup('0/123456', '2024-02-03 04:05:06+00')", "INSERT INTO lg VALUES (-1, 'from origin')", "COMMIT",
		"SELECT pg_replication_origin_session_reset()", "SELECT pg_replication_origin_advance('o', '0/223456')",
		"SELECT pg_replication_origin_drop('o')",
		"SELECT pg_xact_commit_timestamp(xmin) FROM lg LIMIT 1",
	)
	c.exec(repeated(0, 900, "UPDATE locked SET v = $ WHERE id = 190")...) // xids for pages of pg_commit_ts
}

// freezeAll lets old segments of the transaction status areas go.
func freezeAll(s *server, c *session) {
	c.exec("ALTER DATABASE template0 ALLOW_CONNECTIONS true")
	for _, row := range c.rows("SELECT datname FROM pg_database") {
		x := s.connect(row[0])
		x.exec("VACUUM (FREEZE)")
		x.close()
	}
	c.exec("VACUUM (FREEZE)")
}

// transactionsLeft leaves a prepared transaction for after the shutdown.
func transactionsLeft(c *session) {
	c.exec("BEGIN", "INSERT INTO tx VALUES (100)", "SAVEPOINT a", "INSERT INTO tx VALUES (101)", "PREPARE TRANSACTION 'left open'")
}

// mixed is pgbench-like, several at once, with autovacuum beside it.
func mixed(s *server) {
	concurrently(s, 4, func(n int, x *session) {
		for i := range 300 {
			id := (i*37+n*11)%4000 + 1
			x.exec(fmt.Sprintf("UPDATE t SET k = k + 1 WHERE id = %d", id))
			x.exec(fmt.Sprintf("INSERT INTO dup VALUES (%d, 'mixed %d')", i%40, i%9))
			if i%10 == 0 {
				x.exec(fmt.Sprintf("DELETE FROM dup WHERE a = %d AND b LIKE 'mixed %%' AND ctid IN (SELECT ctid FROM dup WHERE a = %d LIMIT 20)", i%40, i%40))
			}
		}
	})
}

// relationKinds asks each database that can be asked what its relations are.
func relationKinds(s *server, c *session) map[pg.RelFileNode]pagemask.Kind {
	kinds := map[pg.RelFileNode]pagemask.Kind{}
	for _, db := range c.rows("SELECT datname, oid, dattablespace FROM pg_database WHERE datallowconn") {
		x := s.connect(db[0])
		for _, r := range x.rows(`SELECT CASE reltablespace WHEN 0 THEN ` + db[2] + ` ELSE reltablespace END, CASE WHEN relisshared THEN 0 ELSE ` + db[1] + ` END,
			pg_relation_filenode(c.oid), relkind, amname FROM pg_class c LEFT JOIN pg_am a ON a.oid = relam WHERE relkind IN ('r', 'm', 't', 'i', 'S')`) {
			kind := pagemask.Other
			switch {
			case r[4] == "heap":
				kind = pagemask.Heap
			case r[4] == "btree":
				kind = pagemask.Btree
			case r[4] == "hash":
				kind = pagemask.Hash
			case r[4] == "gin":
				kind = pagemask.GIN
			case r[4] == "brin":
				kind = pagemask.BRIN
			case r[4] == "gist":
				kind = pagemask.Gist
			case r[4] == "spgist":
				kind = pagemask.SPGist
			case r[3] == "S":
				kind = pagemask.Sequence
			}
			kinds[pg.RelFileNode{Tablespace: oid(s.t, r[0]), Database: oid(s.t, r[1]), Relation: oid(s.t, r[2])}] = kind
		}
		x.close()
	}
	return kinds
}

func oid(t *testing.T, text string) pg.Oid {
	n, err := strconv.ParseUint(text, 10, 32)
	if err != nil {
		t.Fatal(err)
	}
	return pg.Oid(n)
}

// fill makes a file exist with at least size bytes, zeros at its end.
func fill(t *testing.T, name string, size int64) {
	t.Helper()
	f, err := os.OpenFile(name, os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
}

func touch(t *testing.T, name string) { fill(t, name, 0) }
