package oracle

import (
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"
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
	primary := newServer(t, "primary")
	primary.run("initdb", "-D", primary.dir, "-A", "trust", "-U", "postgres", "-N", "--no-instructions", "--locale=C.UTF-8")
	nearSegmentEnds(t, primary)
	primary.configure(settings(primary))
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
	report(t, r.tallies)
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

// required lists the kinds of records that the workload must have made.
var required = strings.Fields(`
	XLOG/CHECKPOINT_SHUTDOWN XLOG/CHECKPOINT_ONLINE XLOG/NEXTOID XLOG/SWITCH XLOG/BACKUP_END XLOG/PARAMETER_CHANGE
	XLOG/RESTORE_POINT XLOG/FPW_CHANGE XLOG/FPI
	Transaction/COMMIT Transaction/PREPARE Transaction/ABORT Transaction/COMMIT_PREPARED Transaction/ABORT_PREPARED
	Transaction/ASSIGNMENT Transaction/INVALIDATION
	Storage/CREATE Storage/TRUNCATE CLOG/ZEROPAGE CLOG/TRUNCATE
	Database/CREATE_FILE_COPY Database/CREATE_WAL_LOG Database/DROP
	MultiXact/ZERO_OFF_PAGE MultiXact/ZERO_MEM_PAGE MultiXact/CREATE_ID MultiXact/TRUNCATE_ID
	RelMap/UPDATE Standby/LOCK Standby/RUNNING_XACTS Standby/INVALIDATIONS
	Heap2/PRUNE Heap2/VACUUM Heap2/FREEZE_PAGE Heap2/VISIBLE Heap2/MULTI_INSERT Heap2/MULTI_INSERT+INIT Heap2/LOCK_UPDATED
	Heap2/NEW_CID Heap2/REWRITE
	Heap/INSERT Heap/INSERT+INIT Heap/DELETE Heap/UPDATE Heap/UPDATE+INIT Heap/HOT_UPDATE Heap/TRUNCATE Heap/HEAP_CONFIRM
	Heap/LOCK Heap/INPLACE
	Btree/INSERT_LEAF Btree/INSERT_UPPER Btree/INSERT_META Btree/SPLIT_L Btree/SPLIT_R Btree/INSERT_POST Btree/DEDUP
	Btree/VACUUM Btree/DELETE Btree/MARK_PAGE_HALFDEAD Btree/UNLINK_PAGE Btree/UNLINK_PAGE_META Btree/NEWROOT
	Btree/REUSE_PAGE Btree/META_CLEANUP
	Hash/INIT_META_PAGE Hash/INIT_BITMAP_PAGE Hash/INSERT Hash/ADD_OVFL_PAGE Hash/SPLIT_ALLOCATE_PAGE Hash/SPLIT_PAGE
	Hash/SPLIT_COMPLETE Hash/MOVE_PAGE_CONTENTS Hash/SQUEEZE_PAGE Hash/DELETE Hash/SPLIT_CLEANUP Hash/UPDATE_META_PAGE
	Hash/VACUUM_ONE_PAGE
	Gin/CREATE_PTREE Gin/INSERT Gin/SPLIT Gin/VACUUM_PAGE Gin/VACUUM_DATA_LEAF_PAGE Gin/DELETE_PAGE Gin/UPDATE_META_PAGE
	Gin/INSERT_LISTPAGE Gin/DELETE_LISTPAGE
	BRIN/CREATE_INDEX BRIN/INSERT BRIN/INSERT+INIT BRIN/UPDATE BRIN/UPDATE+INIT BRIN/SAMEPAGE_UPDATE BRIN/REVMAP_EXTEND
	BRIN/DESUMMARIZE
	SPGist/ADD_LEAF SPGist/MOVE_LEAFS SPGist/ADD_NODE SPGist/SPLIT_TUPLE SPGist/PICKSPLIT SPGist/VACUUM_LEAF SPGist/VACUUM_ROOT
	SPGist/VACUUM_REDIRECT
	Gist/PAGE_UPDATE Gist/DELETE Gist/PAGE_REUSE Gist/PAGE_SPLIT Gist/PAGE_DELETE
	Sequence/LOG CommitTs/ZEROPAGE CommitTs/TRUNCATE ReplicationOrigin/SET ReplicationOrigin/DROP
	Tablespace/CREATE Tablespace/DROP Generic LogicalMessage`)

func report(t *testing.T, tallies map[string]*tally) {
	var b strings.Builder
	fmt.Fprintf(&b, "%-32s %9s %9s %9s %9s\n", "record", "records", "applied", "checked", "no redo")
	var sum tally
	for _, name := range slices.Sorted(maps.Keys(tallies)) {
		c := tallies[name]
		fmt.Fprintf(&b, "%-32s %9d %9d %9d %9d\n", name, c.records, c.applied, c.checked, c.unsupported)
		sum.records += c.records
		sum.applied += c.applied
		sum.checked += c.checked
		sum.unsupported += c.unsupported
	}
	fmt.Fprintf(&b, "%-32s %9d %9d %9d %9d\n", "all", sum.records, sum.applied, sum.checked, sum.unsupported)
	t.Log("pages by kind of record:\n" + b.String())
	for _, name := range required {
		if tallies[name] == nil {
			t.Errorf("the workload made no %s record", name)
		} else if c := tallies[name]; c.applied > 0 && c.checked == 0 && checkable(name) {
			t.Errorf("no %s record was checked against its image", name)
		}
	}
}

// checkable tells the kinds whose records carry images under wal_consistency_checking
// that are not there to be applied.
func checkable(name string) bool {
	manager, _, _ := strings.Cut(name, "/")
	return slices.Contains([]string{"Heap", "Heap2", "Btree", "Hash", "Gin", "Gist", "SPGist", "BRIN", "Sequence", "Generic"}, manager) &&
		name != "Hash/SPLIT_PAGE" && name != "Gin/VACUUM_PAGE" && name != "Gist/DELETE" // see gistDeadItems
}
