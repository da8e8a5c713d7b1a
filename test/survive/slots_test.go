package survive

import (
	"fmt"
	"strings"
)

// take consumes a slot's changes, and gives those of a table; most is NULL, or after how many
// to stop at a commit. Nothing may show of what Holdfast writes into the log.
func (w *world) take(slot, table, most string) string {
	w.Helper()
	var own []string
	for line := range strings.Lines(w.ask(fmt.Sprintf("SELECT data FROM pg_logical_slot_get_changes('%s', NULL, %s, 'include-xids', '0')", slot, most))) {
		if strings.Contains(line, "holdfast") {
			w.Errorf("slot %s shows %q", slot, line)
		}
		own = append(own, ofTable(table, line)...)
	}
	return strings.Join(own, "\n")
}

func ofTable(table, line string) []string {
	if rest, ok := strings.CutPrefix(strings.TrimSpace(line), "table public."+table+": "); ok {
		return []string{rest}
	}
	return nil
}

// inserted is how test_decoding shows rows of (i int).
func inserted(rows ...int) string {
	var lines []string
	for _, i := range rows {
		lines = append(lines, fmt.Sprintf("INSERT: i[integer]:%d", i))
	}
	return strings.Join(lines, "\n")
}

func (w *world) insert(table string, rows ...int) {
	w.Helper()
	var all []string
	for _, i := range rows {
		all = append(all, fmt.Sprintf("INSERT INTO %s VALUES (%d)", table, i))
	}
	w.exec(all...)
}

func (w *world) wantChanges(slot, table, want string) {
	w.Helper()
	if got := w.take(slot, table, "NULL"); got != want {
		w.Errorf("slot %s gives:\n%s\nwant:\n%s", slot, got, want)
	}
}

const slotPosition = `SELECT slot_name, plugin, database, restart_lsn, confirmed_flush_lsn, catalog_xmin, wal_status FROM pg_replication_slots WHERE slot_name = 'l'`

// slots: a logical slot, half of whose changes were consumed, over more than one segment.
var slots = chapter{"logical slot",
	func(w *world) {
		w.exec("CREATE TABLE cdc (i int)", "SELECT pg_create_logical_replication_slot('l', 'test_decoding')")
		w.insert("cdc", 1, 2)
		w.exec("SELECT pg_switch_wal()")
		w.insert("cdc", 3)
		if got, want := w.take("l", "cdc", "4"), inserted(1, 2); got != want {
			w.Errorf("half of the changes:\n%s\nwant:\n%s", got, want)
		}
		w.exec("CHECKPOINT") // by which stock PostgreSQL, too, keeps where the slot stands
		w.note(slotPosition)
		w.exec("SELECT pg_switch_wal()", "ALTER TABLE cdc ADD COLUMN v text")
		w.insert("cdc", 4)
	},
	func(w *world) {
		w.same("where the slot stands", slotPosition)
		w.wantChanges("l", "cdc", inserted(3)+"\nINSERT: i[integer]:4 v[text]:null")
		w.exec("ALTER TABLE cdc DROP COLUMN v")
		w.insert("cdc", 5)
		w.note(slotPosition)
	},
	func(w *world) {
		w.same("where the slot stands", slotPosition)
		w.wantChanges("l", "cdc", inserted(5))
		w.insert("cdc", 6)
		w.wantChanges("l", "cdc", inserted(6))
		w.exec("SELECT pg_drop_replication_slot('l')")
	},
}

// transactionOverTheKill: what is decoded began before the point to which the slot's
// consumer has come, and ends after a kill: a prepared transaction.
var transactionOverTheKill = chapter{"slot with a transaction that is open",
	func(w *world) {
		w.exec("CREATE TABLE long (i int)", "SELECT pg_create_logical_replication_slot('o', 'test_decoding')",
			"BEGIN; INSERT INTO long VALUES (100); PREPARE TRANSACTION 'open over the kill'")
		w.insert("long", 1)
		w.wantChanges("o", "long", inserted(1))
		w.exec("CHECKPOINT")
		w.insert("long", 2)
	},
	func(w *world) {
		w.exec("COMMIT PREPARED 'open over the kill'")
		w.wantChanges("o", "long", inserted(2, 100))
	},
	func(w *world) {
		w.wantChanges("o", "long", "")
		w.exec("SELECT pg_drop_replication_slot('o')")
	},
}

// stream: a consumer of the streaming protocol, from a slot that pg_recvlogical made.
var stream = chapter{"slot that is streamed from",
	func(w *world) {
		w.exec("CREATE TABLE streamed (i int)")
		if _, err := w.c.Target().Run(w.ctx, "pg_recvlogical", "--dbname", "postgres", "--create-slot", "--slot", "s", "--plugin", "test_decoding"); err != nil {
			w.Fatal(err)
		}
		w.insert("streamed", 1)
		w.exec("SELECT pg_switch_wal()")
		w.insert("streamed", 2)
	},
	func(w *world) { w.wantStream(1, 2); w.insert("streamed", 3) },
	func(w *world) { w.wantStream(3); w.exec("SELECT pg_drop_replication_slot('s')") },
}

func (w *world) wantStream(rows ...int) {
	w.Helper()
	end := w.ask("SELECT pg_current_wal_flush_lsn()")
	got, err := w.c.Target().Run(w.ctx, "pg_recvlogical", "--dbname", "postgres", "--start", "--slot", "s", "--endpos", end, "--no-loop", "--file", "-",
		"--option", "include-xids=0", "--option", "skip-empty-xacts=1")
	if err != nil {
		w.Fatal(err)
	}
	var own []string
	for line := range strings.Lines(got) {
		own = append(own, ofTable("streamed", line)...)
	}
	if got, want := strings.Join(own, "\n"), inserted(rows...); got != want {
		w.Errorf("the stream holds:\n%s\nwant:\n%s", got, want)
	}
}

// rewritten: decoding finds rows of the catalog that VACUUM FULL has moved since.
var rewritten = chapter{"slot and a catalog that was rewritten",
	func(w *world) {
		w.exec("SELECT pg_create_logical_replication_slot('m', 'test_decoding')")
		conn := w.conn()
		if _, err := conn.Exec(w.ctx, "BEGIN; CREATE TABLE moved (i int); INSERT INTO moved VALUES (1)"); err != nil {
			w.Fatal(err)
		}
		w.exec("SET lock_timeout = '20s'", "VACUUM FULL pg_class", "VACUUM FULL pg_attribute")
		if _, err := conn.Exec(w.ctx, "ALTER TABLE moved ADD COLUMN v text; INSERT INTO moved VALUES (2, 'x'); COMMIT"); err != nil {
			w.Fatal(err)
		}
		w.want("files of the rewrite", "t", "SELECT count(*) > 0 FROM pg_ls_dir('pg_logical/mappings')")
		w.note("SELECT n || ' ' || md5(pg_read_binary_file('pg_logical/mappings/' || n)) FROM pg_ls_dir('pg_logical/mappings') n ORDER BY n")
	},
	func(w *world) {
		w.same("files of the rewrite", "SELECT n || ' ' || md5(pg_read_binary_file('pg_logical/mappings/' || n)) FROM pg_ls_dir('pg_logical/mappings') n ORDER BY n")
		w.wantChanges("m", "moved", "INSERT: i[integer]:1\nINSERT: i[integer]:2 v[text]:'x'")
		w.exec("SELECT pg_drop_replication_slot('m')")
	},
	func(w *world) {
		w.want("a slot that was dropped", "0", "SELECT count(*) FROM pg_replication_slots WHERE slot_name = 'm'")
	},
}

const physicalPosition = "SELECT slot_name, slot_type, restart_lsn, wal_status FROM pg_replication_slots WHERE slot_name = 'p'"

var physicalSlot = chapter{"physical slot",
	func(w *world) {
		w.exec("SELECT pg_create_physical_replication_slot('p', true)")
		w.note(physicalPosition)
	},
	func(w *world) {
		w.same("where the slot stands", physicalPosition)
		w.want("its segment", "1", `SELECT count(*) FROM pg_ls_waldir() d, pg_replication_slots s WHERE s.slot_name = 'p' AND d.name = pg_walfile_name(s.restart_lsn)`)
		w.exec("SELECT pg_replication_slot_advance('p', pg_current_wal_lsn())")
		w.note(physicalPosition)
	},
	func(w *world) {
		w.same("where the slot stands", physicalPosition)
		w.exec("SELECT pg_drop_replication_slot('p')")
	},
}
