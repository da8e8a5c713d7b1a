package oracle

import (
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/internal/walrec"
)

func add(to, from map[string]*tally) {
	for name, c := range from {
		if to[name] == nil {
			to[name] = new(tally)
		}
		to[name].records += c.records
		to[name].applied += c.applied
		to[name].checked += c.checked
		to[name].unsupported += c.unsupported
	}
}

// hints has the server log hint bits, with page images and without.
func hints(t *testing.T, cluster *server) map[string]*tally {
	images, without := 0, 0
	tallies := scenario{
		from:     cluster,
		settings: map[string]string{"wal_log_hints": "on", "autovacuum": "off"},
		lsnFree:  true, // setting a page all-visible stamps it, and recovery with the setting off does not
		work: func(s *server, c *session) {
			c.exec("CREATE TABLE hinted (a int)", "INSERT INTO hinted SELECT generate_series(1, 3000)", "CHECKPOINT", "SELECT count(*) FROM hinted",
				"ALTER SYSTEM SET full_page_writes = on", "SELECT pg_reload_conf()", "CHECKPOINT",
				"UPDATE hinted SET a = -a WHERE a % 3 = 0", "CHECKPOINT", "SELECT count(*) FROM hinted", "VACUUM hinted")
		},
		seen: func(rec *walrec.Record) {
			if walrec.Name(rec.RmID, rec.Info) != "XLOG/FPI_FOR_HINT" {
				return
			}
			if rec.Blocks[0].HasImage {
				images++
			} else {
				without++
			}
		},
	}.run(t)
	if images == 0 || without == 0 {
		t.Errorf("%d records of hints with an image, %d without; want both", images, without)
	}
	return tallies
}

// tornRecord takes the end of a long record from a crashed server's WAL, so that recovery gives
// the record up and goes on over it.
func tornRecord(t *testing.T, cluster *server) map[string]*tally {
	return scenario{
		from:     cluster,
		settings: map[string]string{"autovacuum": "off", "bgwriter_lru_maxpages": "0"},
		work: func(s *server, c *session) {
			c.exec("CREATE TABLE before (a int)", "INSERT INTO before VALUES (1)", "CHECKPOINT")
			begin := c.rows("SELECT pg_current_wal_insert_lsn()")[0][0]
			// The row's commit has the message written, too.
			c.exec("SELECT pg_logical_emit_message(false, 'torn', repeat('x', 50000))", "INSERT INTO before VALUES (9)")
			c.close()
			s.stop(syscall.SIGQUIT)
			at, err := pg.ParseLSN(begin)
			if err != nil {
				t.Fatal(err)
			}
			name := filepath.Join(s.dir, "pg_wal", pg.WALFileName(at))
			wal, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			clear(wal[at.PageStart()-at.SegmentStart()+3*pg.WALPageSize:])
			write(t, name, wal)
			s.start()
			c2 := s.connect("postgres")
			defer c2.close()
			c2.exec("CREATE TABLE after AS SELECT generate_series(1, 300) a", "INSERT INTO before VALUES (2)")
		},
	}.run(t)
}
