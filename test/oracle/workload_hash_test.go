package oracle

// hashIndexes makes each kind of record of hash indexes. Not to be had in a quick test: a
// second bitmap page, which takes 32,768 overflow pages, and (as PostgreSQL only frees the
// last page of a chain) a freed page with a successor.
func hashIndexes(c *session) {
	hashKeys(c)
	hashChains(c)
	hashDead(c)
	hashBuilds(c)
}

// hashKeys splits buckets, from empty indexes on several types.
func hashKeys(c *session) {
	c.exec(
		"CREATE TABLE hash_keys (i int, t text, n numeric, d timestamptz, u uuid) WITH (autovacuum_enabled = off)",
		"CREATE INDEX hash_keys_i ON hash_keys USING hash (i) WITH (fillfactor = 10)",
		"CREATE INDEX hash_keys_t ON hash_keys USING hash (t) WITH (fillfactor = 30)",
		"CREATE INDEX hash_keys_n ON hash_keys USING hash (n)",
		"CREATE INDEX hash_keys_d ON hash_keys USING hash (d) WHERE i % 2 = 0",
		"CREATE INDEX hash_keys_u ON hash_keys USING hash (u) WITH (fillfactor = 100)",
		"INSERT INTO hash_keys SELECT i, 'key ' || i, i / 7.0, '2020-01-01'::timestamptz + i * '1 hour'::interval, md5(i::text)::uuid FROM generate_series(1, 1400) i",
		"UPDATE hash_keys SET t = t || '!', n = NULL WHERE i % 9 = 0",
		"DELETE FROM hash_keys WHERE i % 4 = 1",
		"VACUUM hash_keys",
		"BEGIN", "INSERT INTO hash_keys SELECT i, 'undone', i, now(), md5(i::text)::uuid FROM generate_series(3000, 3200) i", "ROLLBACK",
		"DELETE FROM hash_keys WHERE i < 1100",
		"VACUUM hash_keys",
		"INSERT INTO hash_keys SELECT i, 'key ' || i % 100, i, now(), md5(i::text)::uuid FROM generate_series(1, 300) i",
	)
}

// hashChains makes long chains of overflow pages, frees pages in them and takes those again.
func hashChains(c *session) {
	c.exec(
		"CREATE TABLE hash_dup (k int, v int) WITH (autovacuum_enabled = off)",
		"CREATE INDEX hash_dup_k ON hash_dup USING hash (k)",
		"INSERT INTO hash_dup SELECT i % 3, i FROM generate_series(1, 6000) i",
		"DELETE FROM hash_dup WHERE v % 5 < 2", // room in each page, for the tuples of the last ones
		"VACUUM (TRUNCATE OFF) hash_dup",
		"INSERT INTO hash_dup SELECT i % 4, i FROM generate_series(10001, 12000) i",
		"DELETE FROM hash_dup WHERE k = 1 AND v % 20 <> 0",
		"DELETE FROM hash_dup WHERE k = 2 AND v % 11 = 0",
		"DELETE FROM hash_dup WHERE v BETWEEN 2000 AND 4500", // whole pages in the midst
		"VACUUM (TRUNCATE OFF) hash_dup",
		"INSERT INTO hash_dup SELECT i, i FROM generate_series(20001, 20900) i", // splits move along chains
		"DELETE FROM hash_dup",
		"VACUUM (TRUNCATE OFF) hash_dup",
		"INSERT INTO hash_dup SELECT i % 2, i FROM generate_series(1, 1200) i",
	)
}

// hashDead has scans mark entries of dead rows, which inserts into their full pages delete.
// Each round may find that another snapshot keeps the rows.
func hashDead(c *session) {
	c.exec(
		"CREATE TABLE hash_dead (k int, v int) WITH (autovacuum_enabled = off)",
		"CREATE INDEX hash_dead_k ON hash_dead USING hash (k)",
		"INSERT INTO hash_dead SELECT 7, i FROM generate_series(1, 1000) i",
		"SET enable_seqscan = off", "SET enable_bitmapscan = off",
	)
	for range 4 {
		c.exec(
			"DELETE FROM hash_dead WHERE v % 3 = 0",
			"SELECT count(v) FROM hash_dead WHERE k = 7", "SELECT count(v) FROM hash_dead WHERE k = 7",
			"INSERT INTO hash_dead SELECT 7, i FROM generate_series(1, 300) i",
		)
	}
	c.exec(
		"DELETE FROM hash_dead WHERE v % 7 = 0", "SELECT count(v) FROM hash_dead WHERE k = 7", // marks that stay
		"RESET enable_seqscan", "RESET enable_bitmapscan",
		"DELETE FROM hash_dead WHERE v % 50 = 1", "VACUUM (TRUNCATE OFF) hash_dead", // and some that vacuum clears
		"SET enable_seqscan = off", "SET enable_bitmapscan = off",
		"DELETE FROM hash_dead WHERE v % 11 = 0", "SELECT count(v) FROM hash_dead WHERE k = 7",
		"RESET enable_seqscan", "RESET enable_bitmapscan",
	)
}

// hashBuilds makes indexes of rows that are there: of more than 512 buckets, sorted, again,
// and for tables that are unlogged.
func hashBuilds(c *session) {
	c.exec(
		"CREATE TABLE hash_big (k int) WITH (autovacuum_enabled = off)", "INSERT INTO hash_big SELECT generate_series(1, 600)", "ANALYZE hash_big",
		"UPDATE pg_class SET reltuples = 33000 WHERE relname = 'hash_big'", // the number of buckets follows what is expected
		"SET maintenance_work_mem = '1MB'",
		"CREATE INDEX hash_big_10 ON hash_big USING hash (k) WITH (fillfactor = 10)",
		"CREATE INDEX hash_big_14 ON hash_big USING hash (k) WITH (fillfactor = 14)",
		"CREATE INDEX hash_big_40 ON hash_big USING hash (k) WITH (fillfactor = 40)",
		"RESET maintenance_work_mem",
		"CREATE INDEX CONCURRENTLY hash_dup_v ON hash_dup USING hash (v)",
		"REINDEX INDEX hash_dup_k",
		"CREATE UNLOGGED TABLE hash_ul (k text)", "CREATE INDEX hash_ul_k ON hash_ul USING hash (k)",
		"INSERT INTO hash_ul SELECT 'u' || i FROM generate_series(1, 300) i",
		"CREATE UNLOGGED TABLE hash_ul2 (k text)", "CREATE INDEX hash_ul2_k ON hash_ul2 USING hash (k)",
		"INSERT INTO hash_ul2 SELECT 'u' || i FROM generate_series(1, 300) i", "ALTER TABLE hash_ul2 SET LOGGED",
	)
}
