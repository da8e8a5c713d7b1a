package oracle

import (
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/internal/walrec"
)

// TestFabricatedStart shows that stock PostgreSQL starts from a log that holds nothing but
// a checkpoint record of ours, wherever in the log that is, goes on writing there, and
// recovers from it after a crash.
func TestFabricatedStart(t *testing.T) {
	if testing.Short() {
		t.Skip("it starts servers")
	}
	s := newServer(t, "fabricated")
	s.run("initdb", "-D", s.dir, "-A", "trust", "-U", "postgres", "-N", "--no-instructions", "--locale=C.UTF-8")
	s.configure(settings(s))
	c := func() *session { return s.connect("postgres") }
	for i, at := range []pg.LSN{
		0x5_02000000,        // a segment's start
		0x5_03000000 + 8192, // a page's start
		0x5_04000000 + 5*8192 + 320,
		0x5_05000000 + 6*8192 - 8,   // the record's length is all that fits on the page
		0x5_06000000 + 7*8192 - 114, // rounded down below
		0x5_08000000 - 64,           // it crosses into the next segment
	} {
		at &^= 7
		name := fmt.Sprintf("start %d at %v", i, at)
		fabricate(t, s, at)
		s.start()
		x := c()
		x.exec(fmt.Sprintf("CREATE TABLE t%d AS SELECT generate_series(1, 1000) a", i))
		x.close()
		s.stop(syscall.SIGQUIT)
		s.start()
		x = c()
		for j := range i + 1 {
			if rows := x.rows(fmt.Sprintf("SELECT count(*) FROM t%d", j)); rows[0][0] != "1000" {
				t.Errorf("%s: t%d has %s rows after recovery", name, j, rows[0][0])
			}
		}
		x.close()
		s.stop(syscall.SIGINT)
		if t.Failed() {
			t.Fatalf("%s:\n%s", name, s.log())
		}
	}
}

// fabricate replaces a cleanly stopped server's WAL by one record at a place.
func fabricate(t *testing.T, s *server, at pg.LSN) {
	t.Helper()
	control := load(t, s.dir).control
	if control.State != pg.DBShutdowned || control.CheckPoint >= at {
		t.Fatalf("the server is in state %d at %v, cannot go on at %v", control.State, control.CheckPoint, at)
	}
	lsn := at.SkipPageHeader()
	control.CheckPointCopy.Redo, control.CheckPoint = lsn, lsn
	wal := fillUp(at, control.SystemID)
	record, _ := walrec.PlaceRecord(at, walrec.BuildCheckpointRecord(lsn, control.CheckPoint-8, control.CheckPointCopy), control.SystemID)
	wal = append(wal, record...)

	dir := filepath.Join(s.dir, "pg_wal")
	old, err := filepath.Glob(filepath.Join(dir, "0*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range old {
		if err := os.Remove(f); err != nil {
			t.Fatal(err)
		}
	}
	for start := at.SegmentStart(); len(wal) > 0; start += pg.WALSegmentSize {
		n := min(len(wal), pg.WALSegmentSize)
		file := append(wal[:n:n], make([]byte, pg.WALSegmentSize-n)...)
		write(t, filepath.Join(dir, pg.WALFileName(start)), file)
		wal = wal[n:]
	}
	write(t, filepath.Join(s.dir, "global/pg_control"), control.Marshal())
	s.own(s.dir)
}

// fillUp is what comes before at in its segment: the first page's header and that of at's
// own page, and nothing else.
func fillUp(at pg.LSN, sysid uint64) []byte {
	b := make([]byte, at-at.SegmentStart())
	for _, page := range []pg.LSN{at.SegmentStart(), at.PageStart()} {
		if page < at {
			copy(b[page-at.SegmentStart():], pg.NewWALPageHeader(page, 0, sysid).Append(nil))
		}
	}
	return b
}

func write(t *testing.T, name string, b []byte) {
	t.Helper()
	if err := os.WriteFile(name, b, 0o600); err != nil {
		t.Fatal(err)
	}
}
