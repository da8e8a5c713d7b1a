package oracle

import (
	"fmt"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/holdfastdb/holdfast/internal/pg"
)

// settings are those of a compute, as far as they decide what WAL says, and the oracle's.
func settings(s *server) map[string]string {
	return map[string]string{
		"wal_consistency_checking":  "all",
		"wal_level":                 "replica",
		"full_page_writes":          "off",
		"wal_compression":           "pglz",
		"wal_keep_size":             "16GB",
		"max_wal_size":              "4GB",
		"fsync":                     "off",
		"autovacuum_naptime":        "1s",
		"max_prepared_transactions": "10",
		"listen_addresses":          "",
		"unix_socket_directories":   filepath.Dir(s.dir),
		"shared_buffers":            "32MB",
		"lc_messages":               "C",
	}
}

// TestOracle is described in the package comment.
func TestOracle(t *testing.T) {
	if testing.Short() {
		t.Skip("it takes a minute")
	}
	began := time.Now()
	cluster := newCluster(t, "cluster")
	primary := copyOf(t, cluster, "primary")
	nearSegmentEnds(t, primary)
	primary.own(primary.dir)
	primary.start() // pg_resetwal left wal_level=minimal, which recovery refuses
	primary.connect("postgres").close()
	primary.stop(syscall.SIGINT)
	base := newServer(t, "base")
	copyTree(t, primary.dir, base.dir)
	base.own(base.dir)

	kinds := workload(primary)
	end := load(t, primary.dir)
	if end.control.State != pg.DBShutdowned {
		t.Fatalf("the primary's state is %d after shutdown", end.control.State)
	}
	t.Logf("workload: %.1f s, WAL up to %v", time.Since(began).Seconds(), end.control.CheckPoint)

	r := newReplayer(t, load(t, base.dir))
	if *rewrite {
		r.corpus = &corpus{seen: map[[3]uint8]int{}}
	}
	r.ingest = newIngester(r)
	replaying := time.Now()
	r.replay(filepath.Join(primary.dir, "pg_wal"), end.control.CheckPoint)
	t.Logf("replay: %d MB of WAL in %.1f s", r.bytes>>20, time.Since(replaying).Seconds())
	r.ingest.report()
	if *rewrite {
		writeCompressed(t, "../../pageserver/redo/testdata/pages.zst", r.corpus.file)
		writeCompressed(t, "../../internal/walrec/testdata/wal.zst", walStretch(t, filepath.Join(primary.dir, "pg_wal"), r.switches))
	}
	(&comparison{t: t, name: "against the primary", have: r.state, want: end, skipped: r.skipped, blanked: r.blanked, kinds: kinds}).run().report()

	witness := recoverStock(t, base, primary, end.control.CheckPoint)
	c := comparison{t: t, name: "against stock recovery", have: r.state, want: witness, skipped: r.skipped}
	c.run().report()
	findsFlippedBits(t, c)

	for name, run := range map[string]func(*testing.T, *server) map[string]*tally{"hints": hints, "torn record": tornRecord} {
		t.Run(name, func(t *testing.T) { add(r.tallies, run(t, cluster)) })
	}
	report(t, r.tallies)
}

// findsFlippedBits shows that the comparison would see a wrong bit in any page.
func findsFlippedBits(t *testing.T, c comparison) {
	flipped := 0
	for tag, pages := range c.have.rels {
		if len(pages) == 0 || tag.Fork != pg.MainFork || c.skipped[tag] || c.want.unlogged(tag.RelFileNode) {
			continue
		}
		p, at := pages[len(pages)-1], 0 // the LSN
		if off := int(le.Uint32(p[24:]) & 0x7FFF); off >= int(le.Uint16(p[14:])) && off < len(p) {
			at = off // the first tuple
		}
		p[at] ^= 0x10
		defer func() { p[at] ^= 0x10 }()
		if flipped++; flipped == 10 {
			break
		}
	}
	c.problems = nil
	if c.run(); len(c.problems) != flipped {
		t.Errorf("%d pages have a flipped bit, the comparison found %d", flipped, len(c.problems))
	}
}

// nearSegmentEnds moves the cluster's counters to where the workload crosses into the next
// segments of pg_xact and pg_multixact, so that they can be truncated.
func nearSegmentEnds(t *testing.T, s *server) {
	s.run("pg_resetwal", "-x", "1048300", "-m", "65400,1", "-O", "52000", s.dir)
	for _, dir := range []string{"pg_xact", "pg_multixact/offsets", "pg_multixact/members"} {
		fill(t, filepath.Join(s.dir, dir, "0000"), pg.SLRUPagesPerSegment*pg.BlockSize)
	}
}

// recoverStock lets a stock server recover base with the primary's WAL up to a record.
func recoverStock(t *testing.T, base, primary *server, last pg.LSN) *state {
	t.Helper()
	began := time.Now()
	base.configure(map[string]string{
		"restore_command":         fmt.Sprintf("cp %s/pg_wal/%%f %%p", primary.dir),
		"recovery_target_lsn":     last.String(),
		"recovery_target_action":  "shutdown",
		"unix_socket_directories": filepath.Dir(base.dir),
		"hot_standby":             "off",
		"wal_log_hints":           "off", // as on a compute: it decides which pages recovery stamps
	})
	touch(t, filepath.Join(base.dir, "recovery.signal"))
	base.own(base.dir)
	base.start()
	base.wait()
	s := load(t, base.dir)
	if s.control.CheckPoint != last {
		t.Fatalf("stock recovery ended at the checkpoint %v, not at %v:\n%s", s.control.CheckPoint, last, base.log())
	}
	t.Logf("stock recovery: %.1f s", time.Since(began).Seconds())
	return s
}
