package survive

import (
	"fmt"
	"strings"
)

const progress = "SELECT pg_replication_origin_progress('from elsewhere', true), pg_replication_origin_progress('advanced', true)"

var origins = chapter{"replication origins",
	func(w *world) {
		w.exec("CREATE TABLE replicated (i int)", "SELECT pg_replication_origin_create('from elsewhere')", "SELECT pg_replication_origin_create('advanced')",
			"SELECT pg_replication_origin_advance('advanced', '0/ABCDEF0')")
		conn := w.conn()
		for i, lsn := range []string{"0/1000", "0/2000"} {
			askOver(w, conn, "SELECT pg_replication_origin_session_setup('from elsewhere') WHERE "+fmt.Sprint(i == 0))
			if _, err := conn.Exec(w.ctx, fmt.Sprintf("BEGIN; SELECT pg_replication_origin_xact_setup('%s', now()); INSERT INTO replicated VALUES (%d); COMMIT", lsn, i)); err != nil {
				w.Fatal(err)
			}
		}
		w.want("progress", "0/2000 0/ABCDEF0", progress)
	},
	func(w *world) {
		w.want("progress", "0/2000 0/ABCDEF0", progress)
		w.want("rows", "0\n1", "SELECT i FROM replicated ORDER BY i")
		w.exec("SELECT pg_replication_origin_advance('advanced', '0/BCDEF00')")
	},
	func(w *world) { w.want("progress", "0/2000 0/BCDEF00", progress) },
}

var settings = chapter{"ALTER SYSTEM",
	func(w *world) {
		w.exec("ALTER SYSTEM SET work_mem = '7MB'", "ALTER SYSTEM SET geqo_seed = 0.5", "ALTER DATABASE postgres SET temp_buffers = '9MB'")
	},
	func(w *world) {
		w.want("settings", "7MB 0.5 9MB", "SELECT current_setting('work_mem'), current_setting('geqo_seed'), current_setting('temp_buffers')")
		w.exec("ALTER SYSTEM RESET geqo_seed", "ALTER SYSTEM SET work_mem = '8MB'")
	},
	func(w *world) {
		w.want("settings", "8MB 0", "SELECT current_setting('work_mem'), current_setting('geqo_seed')")
	},
}

const statsQuery = "SELECT coalesce(sum(n_tup_ins), 0) FROM pg_stat_user_tables WHERE relname = 'counted'"

var statistics = chapter{"statistics",
	func(w *world) {
		w.exec("CREATE TABLE counted AS SELECT generate_series(1, 10) AS i", "INSERT INTO counted SELECT generate_series(1, 5)")
		w.eventually("15", statsQuery)
	},
	func(w *world) {
		w.want("statistics after a kill", "0", statsQuery)
		w.exec("INSERT INTO counted SELECT generate_series(1, 7)")
		w.eventually("7", statsQuery)
	},
	func(w *world) { w.want("statistics after a stop", "7", statsQuery) },
}

const subtransactions = 200

var prepared = chapter{"prepared transactions",
	func(w *world) {
		w.exec("CREATE TABLE prep (v text)", "CREATE TABLE locked (i int PRIMARY KEY)", "INSERT INTO locked VALUES (1), (2)", "CREATE TABLE prep_old ()")
		many := func(gid string) string {
			var b strings.Builder
			b.WriteString("BEGIN; SELECT * FROM locked WHERE i = 1 FOR SHARE;")
			for i := range subtransactions {
				fmt.Fprintf(&b, "SAVEPOINT s%d; INSERT INTO prep VALUES ('%s'); ", i, gid)
			}
			return b.String() + "PREPARE TRANSACTION '" + gid + "'"
		}
		w.exec(many("before a checkpoint"), "CHECKPOINT", many("after it"), many("rolled back"),
			"BEGIN; CREATE TABLE made_by_2pc AS SELECT 1 AS i; DROP TABLE prep_old; PREPARE TRANSACTION 'makes and drops'")
	},
	func(w *world) {
		w.want("prepared transactions", "after it\nbefore a checkpoint\nmakes and drops\nrolled back", "SELECT gid FROM pg_prepared_xacts WHERE gid <> 'open over the kill' ORDER BY gid")
		w.want("rows that are not committed", "0", "SELECT count(*) FROM prep")
		w.want("locks", "t", "SELECT count(*) >= 4 FROM pg_locks WHERE pid IS NULL AND locktype = 'relation'")
		if err := w.c.Target().Exec(w.ctx, "SET lock_timeout = '50ms'; UPDATE locked SET i = 3 WHERE i = 1"); err == nil || !strings.Contains(err.Error(), "55P03") {
			w.Errorf("a row that prepared transactions have locked: %v; want it to be locked", err)
		}
		w.exec("COMMIT PREPARED 'before a checkpoint'", "ROLLBACK PREPARED 'rolled back'", "COMMIT PREPARED 'makes and drops'")
		w.want("rows", fmt.Sprintf("before a checkpoint %d", subtransactions), "SELECT v, count(*) FROM prep GROUP BY v")
	},
	func(w *world) {
		w.exec("COMMIT PREPARED 'after it'", "UPDATE locked SET i = 3 WHERE i = 1")
		w.want("rows", fmt.Sprintf("after it %d\nbefore a checkpoint %d", subtransactions, subtransactions), "SELECT v, count(*) FROM prep GROUP BY v ORDER BY v")
		w.want("what one of them made and dropped", "1 ", "SELECT i, to_regclass('prep_old') FROM made_by_2pc")
		w.want("prepared transactions", "0", "SELECT count(*) FROM pg_prepared_xacts")
	},
}

const things = `SELECT 'large object', length(lo_get(4711))::text UNION ALL
	SELECT 'comment', obj_description('commented'::regclass) UNION ALL
	SELECT 'password', left(rolpassword, 13) FROM pg_authid WHERE rolname = 'someone' UNION ALL
	SELECT 'member', count(*)::text FROM pg_auth_members m JOIN pg_roles r ON r.oid = m.member WHERE r.rolname = 'someone' UNION ALL
	SELECT 'extension', extversion FROM pg_extension WHERE extname = 'pg_trgm' UNION ALL
	SELECT 'collation', (collversion = pg_collation_actual_version(oid))::text FROM pg_collation WHERE collname = 'german' UNION ALL
	SELECT 'sorted', string_agg(v, '' ORDER BY v COLLATE german) FROM (VALUES ('z'), ('ä'), ('a')) x (v) UNION ALL
	SELECT 'temporary', count(*)::text FROM pg_class WHERE relpersistence = 't' UNION ALL
	SELECT 'notifications', pg_notification_queue_usage()::text`

// objects is what else a database holds.
var objects = chapter{"objects",
	func(w *world) {
		w.exec("SELECT lo_from_bytea(4711, repeat('x', 100000)::bytea)", "CREATE TABLE commented ()", "COMMENT ON TABLE commented IS 'said'",
			"CREATE ROLE people", "CREATE ROLE someone LOGIN PASSWORD 'p' IN ROLE people", "CREATE EXTENSION pg_trgm", "CREATE COLLATION german (provider = icu, locale = 'de')",
			"CREATE SEQUENCE counter", "SELECT nextval('counter') FROM generate_series(1, 40)",
			"CREATE UNLOGGED TABLE unlogged (i int PRIMARY KEY)", "INSERT INTO unlogged SELECT generate_series(1, 100)")
		conn := w.conn()
		for _, s := range []string{"CREATE TEMP TABLE temporary AS SELECT 1 AS i", "LISTEN channel", "NOTIFY channel, 'lost'"} {
			if _, err := conn.Exec(w.ctx, s); err != nil {
				w.Fatal(err)
			}
		}
	},
	func(w *world) {
		w.objectsAre()
		w.want("unlogged rows after a kill", "0", "SELECT count(*) FROM unlogged")
		w.want("a sequence", "t", "SELECT nextval('counter') BETWEEN 41 AND 73")
		w.exec("INSERT INTO unlogged VALUES (1)")
	},
	func(w *world) {
		w.objectsAre()
		// Stock PostgreSQL keeps them at a shutdown. Here they are local, and the local store is gone.
		w.want("unlogged rows after a stop", "0", "SELECT count(*) FROM unlogged")
		w.exec("INSERT INTO unlogged VALUES (1)")
	},
}

func (w *world) objectsAre() {
	w.Helper()
	w.want("objects", strings.Join([]string{"large object 100000", "comment said", "password SCRAM-SHA-256", "member 1", "extension 1.6", "collation true", "sorted aäz",
		"temporary 0", "notifications 0"}, "\n"), things)
}
