package oracle

import "fmt"

// gistIndexes makes all kinds of GiST records but ASSIGN_LSN, which needs
// wal_level=minimal.
func gistIndexes(c *session) {
	gistBuilds(c)
	gistSplits(c)
	gistPagesDeleted(c)
	gistDeadItems(c)
	gistImages(c)
}

// gistBuilds has the three ways to build an index, and inserts into what they made.
func gistBuilds(c *session) {
	c.exec(
		"CREATE TABLE gi (id int, p point, b box, r int4range, n numrange)",
		"INSERT INTO gi SELECT i, point(i % 97, i / 97), box(point(i % 89, i % 83), point(i % 89 + i % 5, i % 83 + i % 7)), "+
			"CASE WHEN i % 11 > 0 THEN int4range(i % 1000, i % 1000 + i % 40) END, numrange(i, i + i % 9 + 0.5) FROM generate_series(1, 3000) i",
		"CREATE INDEX gi_sorted ON gi USING gist (p)",
		"CREATE INDEX gi_buffered ON gi USING gist (b) WITH (buffering = on, fillfactor = 60)",
		"CREATE INDEX gi_plain ON gi USING gist (r, b) INCLUDE (id) WITH (buffering = off)",
		"CREATE TABLE gi_empty (during tsrange, EXCLUDE USING gist (during WITH &&))",
		"INSERT INTO gi_empty SELECT tsrange(t, t + '1 hour') FROM generate_series('2024-01-01'::timestamp, '2024-03-01', '2 hours') t",
		"INSERT INTO gi SELECT i, point(i % 101, i % 61), box(point(i % 89, i % 83), point(i % 89 + i % 5, i % 83 + i % 7)), "+
			"int4range(i % 900, i % 900 + 7) FROM generate_series(1, 1000) i",
		"CREATE INDEX CONCURRENTLY gi_n ON gi USING gist (n)",
		"UPDATE gi SET p = point(id, -id), n = numrange(id, NULL) WHERE id % 9 = 0",
	)
}

// gistSplits grows a tree of several levels: a key takes a third of a page at most.
func gistSplits(c *session) {
	c.exec(
		"CREATE TABLE gt (id int, v tsvector)",
		"CREATE INDEX gt_wide ON gt USING gist (v tsvector_ops(siglen = 1900))",
		"CREATE INDEX gt_v ON gt USING gist (v)",
	)
	const words = "(SELECT to_tsvector('simple', string_agg(md5((i * j %% %d)::text), ' ')) FROM generate_series(1, 40) j)"
	c.exec("INSERT INTO gt SELECT i, "+fmt.Sprintf(words, 911)+" FROM generate_series(1, 250) i",
		"DELETE FROM gt WHERE id % 3 = 0", "VACUUM gt",
		"INSERT INTO gt SELECT i, "+fmt.Sprintf(words, 677)+" FROM generate_series(1, 100) i")
}

// gistPagesDeleted empties pages and lets them be used again. More than once, as a
// snapshot of autovacuum's may keep the rows.
func gistPagesDeleted(c *session) {
	c.exec("CREATE TABLE gd (id int, p point) WITH (autovacuum_enabled = off)", "CREATE INDEX gd_p ON gd USING gist (p)")
	for range 3 {
		c.exec("INSERT INTO gd SELECT i, point(i, i % 10) FROM generate_series(1, 1600) i",
			"DELETE FROM gd WHERE id BETWEEN 300 AND 1400", "VACUUM (INDEX_CLEANUP ON, TRUNCATE OFF) gd",
			"DELETE FROM gd", "VACUUM (INDEX_CLEANUP ON, TRUNCATE OFF) gd", "VACUUM (INDEX_CLEANUP ON, TRUNCATE OFF) gd")
	}
}

// gistDeadItems has scans find dead rows, whose entries then make room for new ones. The
// records have no images: recovery sets F_TUPLES_DELETED for DELETE and the primary does
// not, so that PostgreSQL finds its own pages inconsistent.
func gistDeadItems(c *session) {
	c.exec(
		"SET wal_consistency_checking = 'heap, heap2, btree'",
		"CREATE TABLE gk (id int, p point) WITH (autovacuum_enabled = off)", "CREATE INDEX gk_p ON gk USING gist (p)",
		"INSERT INTO gk SELECT i, point(i % 40, i / 40) FROM generate_series(1, 1500) i",
		"SET enable_seqscan = off", "SET enable_bitmapscan = off",
	)
	for i := range 3 {
		c.exec(fmt.Sprintf("DELETE FROM gk WHERE id %% 4 = %d", i),
			"SELECT count(*) FROM gk WHERE p <@ box '((-1,-1),(2000,2000))'", "SELECT count(*) FROM gk WHERE p <@ box '((-1,-1),(2000,2000))'",
			"INSERT INTO gk SELECT i * 4 + 3, point(i % 40, i / 40) FROM generate_series(1, 700) i")
	}
	c.exec("SELECT count(*) FROM (SELECT id FROM gk ORDER BY p <-> point(3, 3)) q",
		"DELETE FROM gk WHERE id % 100 = 3", "VACUUM gk",
		"RESET wal_consistency_checking", "RESET enable_seqscan", "RESET enable_bitmapscan")
}

// gistImages splits pages right after a checkpoint: the record that completes a split
// has an image of its left half, and changes that page beyond it.
func gistImages(c *session) {
	c.exec("ALTER SYSTEM SET full_page_writes = on", "SELECT pg_reload_conf()", "CHECKPOINT",
		"INSERT INTO gt SELECT id, v FROM gt WHERE id % 20 = 0", "INSERT INTO gd SELECT i, point(i, i % 10) FROM generate_series(1, 800) i")
	for range 4 {
		c.exec("CHECKPOINT", "INSERT INTO gt SELECT id, v FROM gt WHERE id % 31 = 0")
	}
	c.exec("ALTER SYSTEM RESET full_page_writes", "SELECT pg_reload_conf()", "CHECKPOINT")
}
