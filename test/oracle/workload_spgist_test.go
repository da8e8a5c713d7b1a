package oracle

import (
	"fmt"
	"strings"
)

// spgistIndexes makes all kinds of SP-GiST records.
func spgistIndexes(c *session) {
	spgistBuilds(c)
	spgistPrefixes(c)
	spgistVacuums(c)
}

// spgistBuilds has the operator classes, with rows before and after the indexes.
func spgistBuilds(c *session) {
	const rows = "INSERT INTO sp SELECT i, CASE WHEN i %% 13 > 0 THEN point((i * 7919) %% 613, (i * 104729) %% 811) END, " +
		"box(point(i %% 89, i %% 83), point(i %% 89 + i %% 5, i %% 83 + i %% 7)), int4range(i %% 700, i %% 700 + i %% 90), " +
		"('10.' || i %% 5 || '.' || i %% 91 || '.' || i %% 251)::inet, CASE WHEN i %% 17 > 0 THEN md5(i::text) END FROM generate_series(%d, %d) i"
	c.exec(
		"CREATE TABLE sp (id int, p point, b box, r int4range, a inet, t text)",
		"INSERT INTO sp SELECT i, point(i, -i), box(point(i, i), point(i + 1, i + 2)), int4range(i, i + 9), '192.168.0.1', 'before' FROM generate_series(1, 300) i",
		"CREATE INDEX sp_quad ON sp USING spgist (p)",
		"CREATE INDEX sp_kd ON sp USING spgist (p kd_point_ops) INCLUDE (id)",
		"CREATE INDEX sp_b ON sp USING spgist (b)",
		"CREATE INDEX sp_r ON sp USING spgist (r)",
		"CREATE INDEX sp_a ON sp USING spgist (a)",
		"CREATE INDEX sp_t ON sp USING spgist (t) INCLUDE (a)",
	)
	c.exec(fmt.Sprintf(rows, 1, 1800), "DELETE FROM sp WHERE id % 3 = 0 OR id BETWEEN 400 AND 900", "VACUUM sp", fmt.Sprintf(rows, 1500, 2400), "VACUUM sp",
		"CREATE INDEX CONCURRENTLY sp_again ON sp USING spgist (r)")
}

// spgistPrefixes has texts whose common prefixes fill pages with few inner tuples, so that
// new labels move a tuple to another page. A text that leaves a prefix early splits it.
func spgistPrefixes(c *session) {
	c.exec("CREATE TABLE st (id int, t text)", "CREATE INDEX st_t ON st USING spgist (t)",
		"INSERT INTO st SELECT i, repeat(md5((i % 23)::text), 40) || chr(65 + (i / 23) % 8) || md5(i::text) FROM generate_series(1, 700) i",
		"INSERT INTO st SELECT i, repeat(md5((i % 23)::text), 40) || chr(80 + (i / 23)) || 'x' FROM generate_series(1, 1000) i",
		"INSERT INTO st SELECT i, left(repeat(md5((i % 23)::text), 40), 1 + (i * 37) % 1279) || '!' || i FROM generate_series(1, 400) i",
		"INSERT INTO st SELECT i, 'the same' FROM generate_series(1, 600) i",
		"INSERT INTO st SELECT i, chr(200 + i) || chr(300 + i % 7) || repeat('long', i % 50) FROM generate_series(1, 1500) i",
		"INSERT INTO st SELECT i, chr(200 + i % 90) || chr(400 + i % 300) FROM generate_series(1, 1500) i",
		"DELETE FROM st WHERE id % 2 = 0", "VACUUM st")
}

// spgistVacuums empties chains and pages, keeps dead heads and replaces them, and takes
// redirections away. More than once, as a snapshot of autovacuum's may keep the rows.
func spgistVacuums(c *session) {
	c.exec("CREATE TABLE sv (id int, p point) WITH (autovacuum_enabled = off)", "CREATE INDEX sv_p ON sv USING spgist (p)",
		"CREATE TABLE sr (id int, p point) WITH (autovacuum_enabled = off)", "CREATE INDEX sr_p ON sr USING spgist (p)")
	// A row for a chain of which a dead head is left, on a page that others have filled since.
	c.exec("CREATE TABLE sw (id int, k int, t text) WITH (autovacuum_enabled = off)", "CREATE INDEX sw_t ON sw USING spgist (t)")
	const wide = "INSERT INTO sw SELECT i, i % 60, chr(200 + i % 60) || repeat(md5(i::text), 1 + i % 9) FROM generate_series(1, {n}) i WHERE "
	for _, k := range []int{1, 4, 7} {
		c.exec(strings.ReplaceAll(wide, "{n}", "400")+"true", fmt.Sprintf("DELETE FROM sw WHERE k %% 10 = %d", k), "VACUUM sw",
			strings.ReplaceAll(wide, "{n}", "600")+fmt.Sprintf("i %% 10 <> %d", k),
			fmt.Sprintf("INSERT INTO sw SELECT i, i %% 60, chr(200 + i %% 60) || repeat(md5(i::text), 30) FROM generate_series(1, 300) i WHERE i %% 10 = %d", k))
	}
	c.exec("INSERT INTO sv SELECT i, NULL FROM generate_series(1, 1200) i", "DELETE FROM sv WHERE id % 3 > 0")
	for range 3 {
		c.exec("INSERT INTO sr SELECT i, point(i, i) FROM generate_series(1, 60) i", "DELETE FROM sr WHERE id % 4 > 0", "VACUUM sr",
			"INSERT INTO sr SELECT i, NULL FROM generate_series(1, 30) i", "DELETE FROM sr", "VACUUM sr",
			"INSERT INTO sv SELECT i, point((i * 7919) % 613, (i * 104729) % 811) FROM generate_series(1, 1500) i", "DELETE FROM sv WHERE id % 10 < 7", "VACUUM sv",
			"INSERT INTO sv SELECT i, point((i * 7919) % 611, (i * 104729) % 813) FROM generate_series(1, 700) i", "VACUUM sv",
			"DELETE FROM sv WHERE id % 5 < 4", "VACUUM sv")
	}
}
