package pagesvc

import (
	"context"
	"fmt"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/holdfastdb/holdfast/internal/pagemask"
	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/test/stock"
)

var settings = map[string]string{
	"full_page_writes": "off", "wal_init_zero": "off", "wal_recycle": "off", "fsync": "off", "autovacuum": "off",
	"checkpoint_timeout": "1h", "max_wal_size": "4GB", "max_prepared_transactions": "10", "wal_keep_size": "4GB",
	"bgwriter_lru_maxpages": "0",
}

// firstHalf makes relations of all sorts and takes some apart again.
var firstHalf = []string{
	"CREATE TABLE t (id int PRIMARY KEY, k int, v text) WITH (fillfactor = 90)",
	"CREATE INDEX t_k ON t (k)",
	"INSERT INTO t SELECT i, i % 17, md5(i::text) FROM generate_series(1, 8000) i",
	"UPDATE t SET v = v || 'y' WHERE id % 5 = 0",
	"DELETE FROM t WHERE id % 13 = 0",
	"VACUUM t",
	"DELETE FROM t WHERE id > 4000",
	"VACUUM t", // truncates heap, visibility map and free space map
	"CREATE TABLE shrunk (a int, b text)",
	"INSERT INTO shrunk SELECT i, repeat('s', 500) FROM generate_series(1, 3000) i",
	"DELETE FROM shrunk WHERE ctid > '(10,0)'",
	"VACUUM shrunk",
	"CREATE SEQUENCE s", "SELECT nextval('s') FROM generate_series(1, 100)",
	"CREATE TABLE big (id serial PRIMARY KEY, a text)",
	"INSERT INTO big (a) SELECT string_agg(md5((i * j)::text), '') FROM generate_series(1, 20) i, generate_series(1, 300) j GROUP BY i",
	"CREATE UNLOGGED TABLE u (a int PRIMARY KEY)", "INSERT INTO u SELECT generate_series(1, 1000)",
	"CREATE TEMP TABLE x AS SELECT generate_series(1, 1000)",
	"CREATE TABLE gone (a int PRIMARY KEY, b text)", "INSERT INTO gone SELECT i, 'x' FROM generate_series(1, 2000) i", "DROP TABLE gone",
	"CREATE TABLE cut (a int)", "INSERT INTO cut SELECT generate_series(1, 5000)", "TRUNCATE cut", "INSERT INTO cut VALUES (1)",
	"BEGIN; SAVEPOINT a; INSERT INTO t VALUES (100001, 1, 'sub'); SAVEPOINT b; DELETE FROM t WHERE id = 7; ROLLBACK TO b; RELEASE a; COMMIT",
	"BEGIN; CREATE TABLE never (a int); INSERT INTO never VALUES (1); ROLLBACK",
	"BEGIN; INSERT INTO t VALUES (100002, 1, 'prepared'); PREPARE TRANSACTION 'done'", "COMMIT PREPARED 'done'",
	"BEGIN; INSERT INTO t VALUES (100003, 1, 'prepared'); DROP TABLE cut; PREPARE TRANSACTION 'undone'", "ROLLBACK PREPARED 'undone'",
	"BEGIN; INSERT INTO t VALUES (100004, 1, 'prepared'); SAVEPOINT q; INSERT INTO t VALUES (100005, 1, 'p'); PREPARE TRANSACTION 'left'",
	"VACUUM FULL pg_class", "REINDEX TABLE pg_class", "VACUUM FULL pg_database", // relation maps
	"CREATE DATABASE logged TEMPLATE template0", "CREATE DATABASE copied STRATEGY FILE_COPY",
	"SELECT pg_switch_wal()",
	"CREATE DATABASE dropped", "DROP DATABASE dropped",
	"SELECT txid_current() FROM generate_series(1, 3)",
	"DO $$ BEGIN FOR i IN 1..3000 LOOP BEGIN INSERT INTO shrunk VALUES (-i, 'sub'); EXCEPTION WHEN others THEN NULL; END; END LOOP; END $$",
}

var secondHalf = []string{
	"INSERT INTO shrunk SELECT i, repeat('r', 300) FROM generate_series(1, 4000) i", // grows over the cut pages again
	"INSERT INTO t SELECT i, i % 17, md5(i::text) FROM generate_series(200000, 206000) i",
	"UPDATE t SET k = k + 1 WHERE id % 3 = 0",
	"VACUUM (FREEZE) t", "VACUUM (FREEZE)",
	"SELECT * FROM t WHERE id % 100 = 4 FOR UPDATE",
	"TRUNCATE big", "INSERT INTO big (a) SELECT repeat('z', 100) FROM generate_series(1, 500)",
	"DROP SEQUENCE s",
	"DROP DATABASE copied", "CREATE DATABASE copied TEMPLATE logged STRATEGY FILE_COPY",
	"CREATE TABLE docs (id int, d tsvector)", "CREATE INDEX docs_d ON docs USING gin (d)",
	"INSERT INTO docs SELECT i, to_tsvector('word' || i || ' common') FROM generate_series(1, 2000) i",
	"CHECKPOINT",
	"UPDATE t SET v = 'after the checkpoint' WHERE id % 7 = 0",
	"SELECT pg_switch_wal()",
	"DELETE FROM shrunk WHERE a % 2 = 0", "VACUUM shrunk", "INSERT INTO shrunk SELECT i, 'again' FROM generate_series(1, 500) i",
}

// copyFirst makes a copy of a copy, and changes both. There is a database "copied".
func copyFirst(t testing.TB, s *stock.Server) {
	t.Helper()
	run(t, s, "copied", []string{
		"CREATE TABLE c (id int PRIMARY KEY, v text) WITH (fillfactor = 90)", "INSERT INTO c SELECT i, md5(i::text) FROM generate_series(1, 6000) i",
		"DELETE FROM c WHERE id > 5000", "VACUUM c", // truncates
		"CREATE TABLE old (a int)", "INSERT INTO old SELECT generate_series(1, 20000)", "DROP TABLE old"})
	run(t, s, "postgres", []string{"CREATE DATABASE chain TEMPLATE copied STRATEGY FILE_COPY"})
	run(t, s, "copied", []string{"UPDATE c SET v = 'source' WHERE id % 3 = 0", "VACUUM c", "INSERT INTO c SELECT i, 'source' FROM generate_series(6001, 9000) i"})
	run(t, s, "chain", []string{"UPDATE c SET v = 'copy' WHERE id % 50 = 0", "DELETE FROM c WHERE id % 7 = 0", "VACUUM FULL pg_class"})
}

// copyMore goes on after the source of "chain" was dropped, and makes a database twice under
// one number. There is a database "logged".
func copyMore(t testing.TB, s *stock.Server) {
	t.Helper()
	run(t, s, "chain", []string{"VACUUM (FREEZE) c", "UPDATE c SET v = v || '+' WHERE id % 20 = 0", "INSERT INTO c SELECT i, 'more' FROM generate_series(10000, 12000) i"})
	run(t, s, "postgres", []string{"CREATE DATABASE again OID = 70000 TEMPLATE chain STRATEGY FILE_COPY"})
	run(t, s, "chain", []string{"DELETE FROM c WHERE id > 3000", "VACUUM c"})
	run(t, s, "again", []string{"UPDATE c SET v = 'again' WHERE id % 40 = 0", "CREATE TABLE mine AS SELECT * FROM c"})
	run(t, s, "postgres", []string{"DROP DATABASE again", "CREATE DATABASE again OID = 70000 TEMPLATE logged STRATEGY FILE_COPY"})
	run(t, s, "again", []string{"CREATE TABLE c (id int PRIMARY KEY)", "INSERT INTO c SELECT generate_series(1, 3000)"})
	run(t, s, "postgres", []string{"CREATE DATABASE third TEMPLATE again STRATEGY FILE_COPY", "DROP DATABASE again",
		"CREATE DATABASE again OID = 70000 TEMPLATE chain STRATEGY FILE_COPY", "DROP DATABASE chain"})
	run(t, s, "again", []string{"UPDATE c SET v = 'last' WHERE id % 30 = 0"})
}

func run(t testing.TB, s *stock.Server, database string, statements []string) {
	t.Helper()
	conn, err := s.Target().InDatabase(database).Connect(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.WithoutCancel(t.Context()))
	for _, q := range statements {
		if _, err := conn.PgConn().Exec(t.Context(), q).ReadAll(); err != nil {
			t.Fatalf("%.100s: %v", q, err)
		}
	}
}

// lockRows makes multixacts.
func lockRows(t testing.TB, s *stock.Server) {
	t.Helper()
	var conns []*pgx.Conn
	for i := range 4 {
		conn, err := s.Target().Connect(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close(context.WithoutCancel(t.Context()))
		conns = append(conns, conn)
		q := fmt.Sprintf("BEGIN; SELECT * FROM t WHERE id %% 7 = %d OR id %% 11 = 1 FOR SHARE", i)
		if _, err := conn.PgConn().Exec(t.Context(), q).ReadAll(); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range conns {
		if _, err := c.Exec(t.Context(), "COMMIT"); err != nil {
			t.Fatal(err)
		}
	}
}

// relationKinds asks every database what kind of pages its relations have.
func relationKinds(t testing.TB, s *stock.Server) map[pg.RelFileNode]pagemask.Kind {
	t.Helper()
	kinds := map[pg.RelFileNode]pagemask.Kind{}
	var databases []string
	each := func(database, q string, fn func(pgx.Rows) error) {
		conn, err := s.Target().InDatabase(database).Connect(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close(context.WithoutCancel(t.Context()))
		rows, err := conn.Query(t.Context(), q)
		if err != nil {
			t.Fatal(err)
		}
		for rows.Next() {
			if err := fn(rows); err != nil {
				t.Fatal(err)
			}
		}
		if rows.Err() != nil {
			t.Fatal(rows.Err())
		}
	}
	run(t, s, "postgres", []string{"ALTER DATABASE template0 ALLOW_CONNECTIONS on"})
	each("postgres", "SELECT datname FROM pg_database", func(r pgx.Rows) error {
		databases = append(databases, "")
		return r.Scan(&databases[len(databases)-1])
	})
	const q = `SELECT CASE WHEN c.relisshared THEN 1664 ELSE 1663 END, CASE WHEN c.relisshared THEN 0 ELSE d.oid END::int8,
		pg_relation_filenode(c.oid)::int8, c.relkind::text, coalesce(a.amname, '')
		FROM pg_class c LEFT JOIN pg_am a ON a.oid = c.relam, pg_database d
		WHERE d.datname = current_database() AND pg_relation_filenode(c.oid) IS NOT NULL AND c.relpersistence <> 't'`
	for _, db := range databases {
		each(db, q, func(r pgx.Rows) error {
			var tablespace, database, node int64
			var relkind, am string
			if err := r.Scan(&tablespace, &database, &node, &relkind, &am); err != nil {
				return err
			}
			k := pagemask.Heap
			switch {
			case am == "btree":
				k = pagemask.Btree
			case relkind == "S":
				k = pagemask.Sequence
			case relkind == "i":
				k = pagemask.Other
			}
			kinds[pg.RelFileNode{Tablespace: pg.Oid(tablespace), Database: pg.Oid(database), Relation: pg.Oid(node)}] = k
			return nil
		})
	}
	return kinds
}
