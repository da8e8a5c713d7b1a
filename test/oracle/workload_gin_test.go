package oracle

import (
	"fmt"
	"strings"
)

// ginIndexes makes each kind of record of GIN indexes. Not to be had in a quick test: the
// split of an inner page of a posting tree, which takes six million rows.
func ginIndexes(c *session) {
	ginEntries(c)
	ginPostingTrees(c)
	ginPending(c)
	ginOpclasses(c)
}

// ginEntries has keys of 480 bytes, of which few fit on a page of the entry tree, inserted
// in no order, and several times each: lists of TIDs grow in their tuples.
func ginEntries(c *session) {
	c.exec(
		"CREATE TABLE gin_keys (a int, k text[]) WITH (autovacuum_enabled = off)",
		"CREATE INDEX gin_keys_k ON gin_keys USING gin (k) WITH (fastupdate = off)",
		"INSERT INTO gin_keys SELECT i, ARRAY[repeat(md5((i * 7919 % 700)::text), 14), 'short ' || i % 40, NULL] FROM generate_series(1, 1200) i",
		"INSERT INTO gin_keys SELECT i, CASE i % 3 WHEN 0 THEN NULL WHEN 1 THEN '{}' ELSE ARRAY[i::text] END FROM generate_series(1, 300) i",
		"DELETE FROM gin_keys WHERE a % 3 = 0",
		"VACUUM gin_keys",
		"INSERT INTO gin_keys SELECT i, ARRAY[repeat(md5(i::text), 10), 'short ' || i % 30] FROM generate_series(500, 900) i",
		"DELETE FROM gin_keys",
		"VACUUM gin_keys",
		"INSERT INTO gin_keys SELECT i, ARRAY['again ' || i % 9] FROM generate_series(1, 200) i",
		"REINDEX INDEX gin_keys_k",
	)
}

// ginPostingTrees has a key that is in each row, and one that is in many. Its rows go and
// come back in the middle, so that segments are recompressed, split and merged, and pages
// of the posting tree are deleted and used again.
func ginPostingTrees(c *session) {
	c.exec("CREATE TABLE gin_tree (a int, k int[]) WITH (autovacuum_enabled = off)")
	c.copyIn("COPY gin_tree FROM STDIN", ginRows(0, 19000))
	c.exec(
		"CREATE INDEX gin_tree_k ON gin_tree USING gin (k) WITH (fastupdate = off)",
		"INSERT INTO gin_tree SELECT i, ARRAY[-1, i % 3 - 10, i % 1000] FROM generate_series(19001, 20000) i", // trees made of lists
		"ALTER INDEX gin_tree_k SET (fastupdate = on)",
	)
	c.copyIn("COPY gin_tree FROM STDIN", ginRows(30000, 34000))
	c.exec(
		"SELECT gin_clean_pending_list('gin_tree_k')",
		"DELETE FROM gin_tree WHERE a BETWEEN 4000 AND 17500 AND (a > 6500 OR a % 2 = 0)",
		"VACUUM gin_tree",
	)
	c.copyIn("COPY gin_tree FROM STDIN", ginRows(54000, 58000)) // to where the deleted rows were
	c.exec("SELECT gin_clean_pending_list('gin_tree_k')", "ALTER INDEX gin_tree_k SET (fastupdate = off)")
	c.exec(repeated(0, 12, "INSERT INTO gin_tree SELECT i, ARRAY[-1, i % 3 - 10] FROM generate_series(60000, 60060 + $ * 4) i; DELETE FROM gin_tree WHERE a % 12 = $ AND a % 64 < 8")...)
	c.exec(
		"VACUUM gin_tree",
		"INSERT INTO gin_tree SELECT i, ARRAY[-1] FROM generate_series(61000, 61500) i",
		"DELETE FROM gin_tree WHERE a BETWEEN 18000 AND 33000",
		"VACUUM gin_tree",
		"VACUUM gin_tree",
		"INSERT INTO gin_tree SELECT i, ARRAY[-1, -2, i % 50] FROM generate_series(70000, 70700) i",
	)
}

// ginRows are rows for COPY. Two keys begin late: one has a list of TIDs when the index is
// built, which grows to a tree afterwards, and one is new then and needs a tree at once.
func ginRows(from, to int) string {
	var b strings.Builder
	for i := from; i < to; i++ {
		fmt.Fprintf(&b, "%d\t{-1,%d,%d}\n", i, -20-i/18000, i%500)
	}
	return b.String()
}

// ginPending fills and empties pending lists, with rows whose entries take one page of it,
// or several.
func ginPending(c *session) {
	c.exec(
		"CREATE TABLE gin_pend (a int, k text[], j jsonb) WITH (autovacuum_enabled = off)",
		"CREATE INDEX gin_pend_k ON gin_pend USING gin (k) WITH (gin_pending_list_limit = 64)",
		"CREATE INDEX gin_pend_kj ON gin_pend USING gin (k, j) WITH (gin_pending_list_limit = 4096)",
		"INSERT INTO gin_pend SELECT i, ARRAY[(i % 20)::text, md5(i::text)], jsonb_build_object('a', i % 7, 'b', ARRAY[i, i + 1]) FROM generate_series(1, 600) i",
		"INSERT INTO gin_pend SELECT i, (SELECT array_agg(md5((i * j)::text)) FROM generate_series(1, 250 * i) j), '{}' FROM generate_series(1, 4) i",
		"INSERT INTO gin_pend SELECT i, ARRAY[(i % 20)::text], NULL FROM generate_series(1, 200) i",
		"SELECT gin_clean_pending_list('gin_pend_kj')",
		"INSERT INTO gin_pend SELECT i, ARRAY[(i % 20)::text], 'true' FROM generate_series(1, 200) i",
		"DELETE FROM gin_pend WHERE a % 2 = 0",
		"VACUUM gin_pend",
		"INSERT INTO gin_pend SELECT i, ARRAY['left pending ' || i % 9], '[1, 2]' FROM generate_series(1, 300) i",
	)
}

func ginOpclasses(c *session) {
	c.exec(
		"CREATE TABLE gin_ops (a int, v tsvector, j jsonb, d date[], n numeric[]) WITH (autovacuum_enabled = off)",
		"INSERT INTO gin_ops SELECT i, to_tsvector('simple', 'word' || i % 100 || ' common w' || i), jsonb_build_object('k' || i % 5, i, 'x', md5(i::text)), ARRAY['2020-01-01'::date + i % 90], ARRAY[i / 7.0] FROM generate_series(1, 800) i",
		"CREATE INDEX gin_ops_v ON gin_ops USING gin (v)",
		"CREATE INDEX gin_ops_j ON gin_ops USING gin (j)",
		"CREATE INDEX gin_ops_p ON gin_ops USING gin (j jsonb_path_ops) WITH (fastupdate = off)",
		"CREATE INDEX gin_ops_d ON gin_ops USING gin (d, n) WITH (fastupdate = off)",
		"UPDATE gin_ops SET v = v || to_tsvector('simple', 'more' || a % 10), d = d || NULL WHERE a % 4 = 0",
		"DELETE FROM gin_ops WHERE a % 5 = 0",
		"VACUUM gin_ops",
		"BEGIN", "INSERT INTO gin_ops SELECT i, to_tsvector('simple', 'undone' || i), NULL, NULL, '{}' FROM generate_series(1, 200) i", "ROLLBACK",
		"VACUUM gin_ops",
		"CREATE UNLOGGED TABLE gin_ul (k int[])", "CREATE INDEX gin_ul_k ON gin_ul USING gin (k)", "INSERT INTO gin_ul SELECT ARRAY[i, 1] FROM generate_series(1, 500) i",
		"ALTER TABLE gin_ul SET LOGGED", "INSERT INTO gin_ul SELECT ARRAY[i, 1] FROM generate_series(1, 500) i",
	)
}
