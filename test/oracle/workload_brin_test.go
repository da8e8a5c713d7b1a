package oracle

// brinIndexes makes each kind of record of BRIN indexes.
func brinIndexes(c *session) {
	brinMaps(c)
	brinGrowth(c)
	brinOpclasses(c)
}

// brinMaps has one row a page, and ranges of one page: the range map soon needs its second
// page, which is in use for tuples. The index on "char" has tuples so small
// that more than MaxHeapTuplesPerPage fit on a page.
func brinMaps(c *session) {
	c.exec(
		"CREATE TABLE brin_map (a int, b \"char\", pad text) WITH (fillfactor = 10, autovacuum_enabled = off)",
		"INSERT INTO brin_map SELECT i, 'r', repeat('x', 900) FROM generate_series(1, 1000) i",
		"CREATE INDEX brin_map_ab ON brin_map USING brin (a, b) WITH (pages_per_range = 1)",
		"CREATE INDEX brin_map_b ON brin_map USING brin (b) WITH (pages_per_range = 1)",
		"INSERT INTO brin_map SELECT i, NULL, repeat('y', 900) FROM generate_series(1001, 1700) i",
		"SELECT brin_summarize_range('brin_map_ab', 1600)",
		"VACUUM brin_map",
		"SELECT brin_desummarize_range('brin_map_ab', i) FROM generate_series(1, 1699, 7) i",
		"SELECT brin_desummarize_range('brin_map_ab', i) FROM generate_series(1699, 1600, -1) i",
		"SELECT brin_summarize_new_values('brin_map_ab')",
		"UPDATE brin_map SET a = a + 100000, b = 'q' WHERE a % 5 = 0",
		"DELETE FROM brin_map WHERE a < 300",
		"VACUUM brin_map",
		"INSERT INTO brin_map SELECT i, 'z', 'reuse' FROM generate_series(-500, 1) i",
	)
}

// brinGrowth makes tuples longer, which go to other pages then, and shorter by building
// them anew.
func brinGrowth(c *session) {
	c.exec(
		"CREATE TABLE brin_text (a int, t text) WITH (fillfactor = 10, autovacuum_enabled = off)",
		"CREATE INDEX brin_text_t ON brin_text USING brin (t) WITH (pages_per_range = 2)",
		"INSERT INTO brin_text SELECT i, 'k' || i || repeat('-', 100) FROM generate_series(1, 1200) i",
		"SELECT brin_summarize_new_values('brin_text_t')",
	)
	c.exec(repeated(0, 8, "UPDATE brin_text SET t = 'a' || repeat('$', 60 * $) || a WHERE a % 8 = $")...)
	c.exec(
		"SELECT brin_desummarize_range('brin_text_t', 2 * i) FROM generate_series(0, 40) i",
		"SELECT brin_summarize_new_values('brin_text_t')",
		"VACUUM brin_text",
		"INSERT INTO brin_text SELECT i, repeat('z', i % 400) FROM generate_series(1, 300) i",
		"VACUUM brin_text",
	)
}

func brinOpclasses(c *session) {
	c.exec(
		"CREATE TABLE brin_ops (i int, n numeric, ip inet, b box, r int4range, ts timestamptz, u uuid) WITH (fillfactor = 20)",
		`CREATE INDEX brin_ops_all ON brin_ops USING brin
			(i int4_bloom_ops (n_distinct_per_range = 50), n numeric_minmax_multi_ops, ip inet_inclusion_ops, b, r, ts, u uuid_minmax_ops)
			WITH (pages_per_range = 3, autosummarize = on)`,
		"CREATE INDEX brin_ops_bloom ON brin_ops USING brin (u uuid_bloom_ops, n numeric_bloom_ops) WITH (pages_per_range = 8)",
		"CREATE INDEX brin_ops_multi ON brin_ops USING brin (i int4_minmax_multi_ops (values_per_range = 16), ts timestamptz_minmax_multi_ops) WITH (pages_per_range = 4)",
	)
	const row = `INSERT INTO brin_ops SELECT i, CASE WHEN i % 10 > 0 THEN i / 3.0 END, CASE WHEN i % 2 = 0 THEN '10.0.0.0'::inet + i ELSE '::1'::inet + i END,
		box(point(i, i), point(i + 5, i % 7)), int4range(i, i + i % 9), '2020-01-01'::timestamptz + i * '1 hour'::interval, md5(i::text)::uuid FROM `
	c.exec(
		row+"generate_series(1, 1200) i",
		"VACUUM brin_ops",
		"UPDATE brin_ops SET i = -i, n = n * 2, ip = NULL WHERE i % 6 = 0",
		row+"generate_series(5000, 5400) i",
		"SELECT brin_summarize_new_values(i) FROM unnest(ARRAY['brin_ops_all', 'brin_ops_bloom', 'brin_ops_multi']) i",
		"SELECT brin_desummarize_range('brin_ops_all', 3)", "SELECT brin_desummarize_range('brin_ops_bloom', 0)",
		"DELETE FROM brin_ops WHERE i > 4000 OR i < 0",
		"VACUUM brin_ops",
		row+"generate_series(1, 200) i",
		"SELECT brin_summarize_range('brin_ops_all', 3)",
		"ALTER INDEX brin_ops_multi SET (pages_per_range = 2)", "REINDEX INDEX brin_ops_multi",
	)
}
