package oracle

import (
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"

	"github.com/holdfastdb/holdfast/internal/walrec"
)

// TestEdges runs servers where numbers wrap around and records are huge.
func TestEdges(t *testing.T) {
	if testing.Short() {
		t.Skip("it takes a minute")
	}
	cluster := newCluster(t, "cluster")
	t.Run("huge transactions", func(t *testing.T) { hugeTransactions(t, cluster) })
	for _, method := range []struct {
		name string
		flag uint8 // BKPIMAGE_COMPRESS_*
	}{{"pglz", 0x04}, {"lz4", 0x08}, {"zstd", 0x10}} {
		t.Run("images "+method.name, func(t *testing.T) { pageImages(t, cluster, method.name, method.flag) })
	}
	t.Run("positions", func(t *testing.T) { recordPositions(t, cluster) })
	aged := copyOf(t, cluster, "aged")
	aged.configure(map[string]string{"autovacuum_freeze_max_age": "2000000000", "autovacuum_multixact_freeze_max_age": "2000000000"})
	age(t, aged, 3, 1_000_000_000)
	t.Run("numbers cross 2^31", func(t *testing.T) { wrapAround(t, aged, 0, 1_000_000_000, 1<<31, 150) })
	age(t, aged, 1_000_000_000, 2_900_000_000)
	t.Run("numbers wrap around", func(t *testing.T) { wrapAround(t, aged, 5, 2_900_000_000, 1<<32, 1000) })
}

// age brings a stopped server's numbers on and freezes what is older.
func age(t *testing.T, s *server, oldest, to uint32) {
	setCounters(t, s, 0, oldest, to, to, to)
	s.start()
	c := s.connect("postgres")
	freezeAll(s, c)
	c.close()
	s.stop(syscall.SIGINT)
}

// wrapAround has transactions with a hundred subtransactions each, some of them aborted, while
// xids pass a number, and multixacts and their members pass it too; then all before is frozen and
// the segments of the status areas that hold it go.
func wrapAround(t *testing.T, from *server, epoch, oldest uint32, at uint64, transactions int) {
	tallies := scenario{
		from:     from,
		settings: map[string]string{"track_commit_timestamp": "on", "autovacuum": "off", "wal_consistency_checking": ""},
		prepare: func(s *server) {
			setCounters(t, s, epoch, oldest, uint32(at-uint64(transactions)*50), uint32(at-100), uint32(at-333)) // one multixact has members on both sides
		},
		work: func(s *server, c *session) {
			rowLocks(s, c)
			subtransactions(c, transactions)
			c.exec("BEGIN", "SELECT many_subtransactions(-1, 100)", "PREPARE TRANSACTION 'many'", "COMMIT PREPARED 'many'",
				"BEGIN", "SELECT many_subtransactions(-2, 100)", "PREPARE TRANSACTION 'many'", "ROLLBACK PREPARED 'many'")
			freezeAll(s, c)
			c.exec("CREATE TABLE after AS SELECT * FROM subs LIMIT 100", "DROP TABLE locked, child")
			rowLocks(s, c)
			c.exec("BEGIN", "SELECT many_subtransactions(-3, 100)", "PREPARE TRANSACTION 'left open'")
			passed := c.rows(fmt.Sprintf("SELECT pg_current_xact_id() > '%d'::xid8", uint64(epoch)<<32+at))
			if passed[0][0] != "t" {
				t.Errorf("the xids did not pass %d", at)
			}
		},
	}.run(t)
	for _, name := range []string{"CLOG/TRUNCATE", "MultiXact/TRUNCATE_ID", "MultiXact/ZERO_OFF_PAGE", "MultiXact/ZERO_MEM_PAGE", "Transaction/ASSIGNMENT"} {
		if tallies[name] == nil {
			t.Errorf("there was no %s record", name)
		}
	}
}

// subtransactions commits, and each tenth time rolls back, transactions of a hundred
// subtransactions; a seventh of those are aborted.
func subtransactions(c *session, n int) {
	c.exec("CREATE TABLE subs (a int, b int)",
		`CREATE FUNCTION many_subtransactions(tx int, n int) RETURNS void LANGUAGE plpgsql AS $$ BEGIN
			FOR i IN 1..n LOOP
				BEGIN
					INSERT INTO subs VALUES (tx, i);
					IF i % 7 = 0 THEN RAISE division_by_zero; END IF;
				EXCEPTION WHEN division_by_zero THEN NULL;
				END;
			END LOOP;
		END $$`,
		`CREATE PROCEDURE subtransactions(n int) LANGUAGE plpgsql AS $$ BEGIN
			FOR tx IN 1..n LOOP
				PERFORM many_subtransactions(tx, 100);
				IF tx % 10 = 0 THEN ROLLBACK; ELSE COMMIT; END IF;
			END LOOP;
		END $$`,
		fmt.Sprintf("CALL subtransactions(%d)", n))
	if rows, want := c.rows("SELECT count(*) FROM subs")[0][0], fmt.Sprint((n-n/10)*86); rows != want {
		c.t.Errorf("%s rows are left of the subtransactions, want %s", rows, want)
	}
}

// hugeTransactions ends transactions that drop very many tables: in a commit, an abort, and
// prepared ones.
func hugeTransactions(t *testing.T, cluster *server) {
	const tables = 10_000
	prepared := tables / 10
	if os.Getenv("HOLDFAST_SOAK") != "" {
		prepared = tables
	}
	many := func(do string, n int) string {
		return fmt.Sprintf("DO $$ BEGIN FOR i IN 1..%d LOOP EXECUTE '%s m' || i || '%s'; END LOOP; END $$",
			n, do, map[bool]string{true: " (a int)"}[strings.HasPrefix(do, "CREATE")])
	}
	longest := map[string]int{}
	scenario{
		from:     cluster,
		settings: map[string]string{"max_locks_per_transaction": "400", "autovacuum": "off", "wal_consistency_checking": ""},
		work: func(s *server, c *session) {
			c.exec(
				many("CREATE TABLE", tables), "BEGIN", many("DROP TABLE", tables), "COMMIT",
				"BEGIN", many("CREATE TABLE", prepared), "PREPARE TRANSACTION 'huge'", "ROLLBACK PREPARED 'huge'",
				many("CREATE TABLE", prepared), "BEGIN", many("DROP TABLE", prepared), "PREPARE TRANSACTION 'drop'", "COMMIT PREPARED 'drop'",
				"BEGIN", many("CREATE TABLE", prepared), "ROLLBACK")
		},
		seen: func(rec *walrec.Record) {
			name := walrec.Name(rec.RmID, rec.Info)
			longest[name] = max(longest[name], len(rec.Raw))
		},
	}.run(t)
	for name, n := range map[string]int{"Transaction/COMMIT": tables, "Transaction/PREPARE": prepared, "Transaction/ABORT_PREPARED": prepared,
		"Transaction/COMMIT_PREPARED": prepared, "Transaction/ABORT": prepared} {
		if longest[name] < n*12 {
			t.Errorf("the longest %s record has %d bytes: it cannot drop %d tables", name, longest[name], n)
		}
	}
}

// pageImages changes every kind of index right after checkpoints, so that records carry images
// of their pages, compressed by one method.
func pageImages(t *testing.T, cluster *server, method string, flag uint8) {
	images, compressed := 0, 0
	scenario{
		from:     cluster,
		settings: map[string]string{"full_page_writes": "on", "wal_compression": method, "autovacuum": "off", "wal_consistency_checking": ""},
		work: func(s *server, c *session) {
			c.exec("CREATE TABLE img (a int, t text, k int[], p point, r int4range) WITH (fillfactor = 80)")
			for _, index := range []string{"btree (t)", "hash (a)", "gin (k)", "gist (p)", "spgist (p)", "brin (a)", "gist (r)"} {
				c.exec("CREATE INDEX ON img USING " + index)
			}
			const rows = "INSERT INTO img SELECT i, md5(i::text), ARRAY[i %% 9, i], point(i %% 50, i / 50), int4range(i, i + i %% 9) FROM generate_series(%d, %d) i"
			for i := range 3 {
				c.exec(fmt.Sprintf(rows, i*600, i*600+599))
				c.exec("CHECKPOINT", "UPDATE img SET t = t || 'x', p = point(a, -a) WHERE a % 5 = 0", "DELETE FROM img WHERE a % 9 = 0", "CHECKPOINT", "VACUUM img", "CHECKPOINT")
			}
		},
		seen: func(rec *walrec.Record) {
			if len(rec.Blocks) > 0 && rec.Blocks[0].ApplyImage {
				images++
				if rec.Raw[24+4+4]&(0x04|0x08|0x10) == flag { // bimg_info of the first reference
					compressed++
				}
			}
		},
	}.run(t)
	if images < 200 || compressed < images*3/4 {
		t.Errorf("%d images to apply, %d of them compressed with %s", images, compressed, method)
	}
}
