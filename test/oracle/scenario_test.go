package oracle

import (
	"fmt"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/internal/walrec"
)

// A scenario is a short life of a server of its own, whose WAL is replayed and compared as
// that of the long workload is.
type scenario struct {
	from     *server           // stopped: whose directory the server's is a copy of
	settings map[string]string // besides the oracle's own
	prepare  func(s *server)   // changes the directory before the first start; nil: nothing
	work     func(s *server, c *session)
	seen     func(rec *walrec.Record)
	lsnFree  bool // the primary's heap pages may have other LSNs than recovery gives them
	quick    bool // no stock recovery beside it
}

func newCluster(t *testing.T, name string) *server {
	s := newServer(t, name)
	s.run("initdb", "-D", s.dir, "-A", "trust", "-U", "postgres", "-N", "--no-instructions", "--locale=C.UTF-8")
	s.configure(settings(s))
	return s
}

// copyOf is a server whose directory is a copy of a stopped one's.
func copyOf(t *testing.T, from *server, name string) *server {
	s := newServer(t, name)
	copyTree(t, from.dir, s.dir)
	s.own(s.dir)
	s.configure(map[string]string{"unix_socket_directories": filepath.Dir(s.dir)})
	return s
}

// run gives the counts by kind of record.
func (sc scenario) run(t *testing.T) map[string]*tally {
	t.Helper()
	began := time.Now()
	primary := copyOf(t, sc.from, "primary")
	primary.configure(sc.settings)
	if sc.prepare != nil {
		sc.prepare(primary)
		primary.start() // pg_resetwal left wal_level=minimal, which recovery refuses
		primary.connect("postgres").close()
		primary.stop(syscall.SIGINT)
	}
	base := copyOf(t, primary, "base")
	primary.start()
	c := primary.connect("postgres")
	sc.work(primary, c)
	c.close()
	c = primary.connect("postgres") // work may have crashed the server
	kinds := relationKinds(primary, c)
	c.close()
	primary.stop(syscall.SIGINT)
	if t.Failed() {
		t.Fatalf("the server's log:\n%s", primary.log())
	}

	end, r := load(t, primary.dir), newReplayer(t, load(t, base.dir))
	r.ingest, r.seen = newIngester(r), sc.seen
	r.replay(filepath.Join(primary.dir, "pg_wal"), end.control.CheckPoint)
	r.ingest.report()
	(&comparison{t: t, name: "against the primary", have: r.state, want: end, skipped: r.skipped, blanked: r.blanked, kinds: kinds, lsnFree: sc.lsnFree}).run().report()
	if !sc.quick {
		witness := recoverStock(t, base, primary, end.control.CheckPoint)
		(&comparison{t: t, name: "against stock recovery", have: r.state, want: witness, skipped: r.skipped}).run().report()
	}
	t.Logf("%d MB of WAL, %.1f s", r.bytes>>20, time.Since(began).Seconds())
	return r.tallies
}

// setCounters moves a stopped server's next xid, multixact and member to where given, with
// nothing older in use, and makes the pages of the status areas that the start reads.
func setCounters(t *testing.T, s *server, epoch, oldestXid, xid, multi, member uint32) {
	t.Helper()
	s.run("pg_resetwal", "-e", fmt.Sprint(epoch), "-u", fmt.Sprint(oldestXid), "-x", fmt.Sprint(xid),
		"-m", fmt.Sprintf("%d,%d", multi, multi), "-O", fmt.Sprint(member), s.dir)
	for kind, page := range map[pg.SLRUKind]uint32{pg.CLog: xid / 32768, pg.MultiXactOffsets: multi / 2048, pg.MultiXactMembers: member / 1636} {
		file, _ := pg.SLRUPath(kind, page)
		fill(t, filepath.Join(s.dir, file), pg.SLRUPagesPerSegment*pg.BlockSize)
	}
	s.own(s.dir)
}
