package oracle

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/holdfastdb/holdfast/internal/walrec"
)

// provoked and excused are together all kinds of records that PostgreSQL 15 has (rmgrlist.h and
// the rm_identify functions), by the names of pg_waldump. Those provoked must be made.
var provoked = strings.Fields(`
	XLOG/CHECKPOINT_SHUTDOWN XLOG/CHECKPOINT_ONLINE XLOG/NEXTOID XLOG/SWITCH XLOG/BACKUP_END XLOG/PARAMETER_CHANGE
	XLOG/RESTORE_POINT XLOG/FPW_CHANGE XLOG/FPI_FOR_HINT XLOG/FPI XLOG/OVERWRITE_CONTRECORD
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

// excused has the others, and why they are not made. Variants of records that a quick run cannot
// make: GIN's split of an inner page of a posting tree (millions of rows), SP-GiST's split of
// tuples of an index under construction (such pages are logged whole).
var excused = map[string]string{
	"XLOG/NOOP":            "PostgreSQL 15 writes none",
	"XLOG/END_OF_RECOVERY": "a promotion begins another PostgreSQL timeline, and a branch has only the first",
	"Heap/HOT_UPDATE+INIT": "the page of a HOT update holds the old version, so it is not made anew",
	"Gist/ASSIGN_LSN":      "only with wal_level=minimal, which a compute never has",
}

// TestKinds: each kind that a record can say it is has its place in one of the lists, once.
func TestKinds(t *testing.T) {
	listed := map[string]int{}
	for _, name := range provoked {
		listed[name]++
	}
	for name := range excused {
		listed[name]++
	}
	all := map[string]bool{}
	for rmid := range 256 {
		for info := 0; info < 256; info += 16 {
			if walrec.Known(uint8(rmid), uint8(info)) {
				all[walrec.Name(uint8(rmid), uint8(info))] = true
			}
		}
	}
	for name := range all {
		if listed[name] != 1 {
			t.Errorf("%s is listed %d times, want once", name, listed[name])
		}
		delete(listed, name)
	}
	for name := range listed {
		t.Errorf("%s is listed, and no record is called so", name)
	}
	if len(all) < 123 {
		t.Errorf("only %d kinds are known", len(all))
	}
}

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
	for name, why := range excused {
		if tallies[name] != nil {
			t.Errorf("%s records were made after all: %s is no excuse", name, why)
		}
		t.Logf("not made: %-28s %s", name, why)
	}
	for _, name := range provoked {
		if tallies[name] == nil {
			t.Errorf("no %s record was made", name)
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
