package walrec

import "fmt"

// names has each resource manager's name and those of its kinds of records, by the high
// four bits of xl_info, as pg_waldump prints them (rmgrlist.h, rmgrdesc).
var names = [...]struct {
	manager string
	kinds   [16]string
}{
	{"XLOG", [16]string{
		0:  "CHECKPOINT_SHUTDOWN",
		1:  "CHECKPOINT_ONLINE",
		2:  "NOOP",
		3:  "NEXTOID",
		4:  "SWITCH",
		5:  "BACKUP_END",
		6:  "PARAMETER_CHANGE",
		7:  "RESTORE_POINT",
		8:  "FPW_CHANGE",
		9:  "END_OF_RECOVERY",
		10: "FPI_FOR_HINT",
		11: "FPI",
		13: "OVERWRITE_CONTRECORD",
	}},
	{"Transaction", [16]string{
		0: "COMMIT",
		1: "PREPARE",
		2: "ABORT",
		3: "COMMIT_PREPARED",
		4: "ABORT_PREPARED",
		5: "ASSIGNMENT",
		6: "INVALIDATION",
	}},
	{"Storage", [16]string{
		1: "CREATE",
		2: "TRUNCATE",
	}},
	{"CLOG", [16]string{
		0: "ZEROPAGE",
		1: "TRUNCATE",
	}},
	{"Database", [16]string{
		0: "CREATE_FILE_COPY",
		1: "CREATE_WAL_LOG",
		2: "DROP",
	}},
	{"Tablespace", [16]string{
		0: "CREATE",
		1: "DROP",
	}},
	{"MultiXact", [16]string{
		0: "ZERO_OFF_PAGE",
		1: "ZERO_MEM_PAGE",
		2: "CREATE_ID",
		3: "TRUNCATE_ID",
	}},
	{"RelMap", [16]string{
		0: "UPDATE",
	}},
	{"Standby", [16]string{
		0: "LOCK",
		1: "RUNNING_XACTS",
		2: "INVALIDATIONS",
	}},
	{"Heap2", [16]string{
		0:  "REWRITE",
		1:  "PRUNE",
		2:  "VACUUM",
		3:  "FREEZE_PAGE",
		4:  "VISIBLE",
		5:  "MULTI_INSERT",
		6:  "LOCK_UPDATED",
		7:  "NEW_CID",
		13: "MULTI_INSERT+INIT",
	}},
	{"Heap", [16]string{
		0:  "INSERT",
		1:  "DELETE",
		2:  "UPDATE",
		3:  "TRUNCATE",
		4:  "HOT_UPDATE",
		5:  "HEAP_CONFIRM",
		6:  "LOCK",
		7:  "INPLACE",
		8:  "INSERT+INIT",
		10: "UPDATE+INIT",
		12: "HOT_UPDATE+INIT",
	}},
	{"Btree", [16]string{
		0:  "INSERT_LEAF",
		1:  "INSERT_UPPER",
		2:  "INSERT_META",
		3:  "SPLIT_L",
		4:  "SPLIT_R",
		5:  "INSERT_POST",
		6:  "DEDUP",
		7:  "DELETE",
		8:  "UNLINK_PAGE",
		9:  "UNLINK_PAGE_META",
		10: "NEWROOT",
		11: "MARK_PAGE_HALFDEAD",
		12: "VACUUM",
		13: "REUSE_PAGE",
		14: "META_CLEANUP",
	}},
	{"Hash", [16]string{
		0:  "INIT_META_PAGE",
		1:  "INIT_BITMAP_PAGE",
		2:  "INSERT",
		3:  "ADD_OVFL_PAGE",
		4:  "SPLIT_ALLOCATE_PAGE",
		5:  "SPLIT_PAGE",
		6:  "SPLIT_COMPLETE",
		7:  "MOVE_PAGE_CONTENTS",
		8:  "SQUEEZE_PAGE",
		9:  "DELETE",
		10: "SPLIT_CLEANUP",
		11: "UPDATE_META_PAGE",
		12: "VACUUM_ONE_PAGE",
	}},
	{"Gin", [16]string{
		1: "CREATE_PTREE",
		2: "INSERT",
		3: "SPLIT",
		4: "VACUUM_PAGE",
		5: "DELETE_PAGE",
		6: "UPDATE_META_PAGE",
		7: "INSERT_LISTPAGE",
		8: "DELETE_LISTPAGE",
		9: "VACUUM_DATA_LEAF_PAGE",
	}},
	{"Gist", [16]string{
		0: "PAGE_UPDATE",
		1: "DELETE",
		2: "PAGE_REUSE",
		3: "PAGE_SPLIT",
		6: "PAGE_DELETE",
		7: "ASSIGN_LSN",
	}},
	{"Sequence", [16]string{
		0: "LOG",
	}},
	{"SPGist", [16]string{
		1: "ADD_LEAF",
		2: "MOVE_LEAFS",
		3: "ADD_NODE",
		4: "SPLIT_TUPLE",
		5: "PICKSPLIT",
		6: "VACUUM_LEAF",
		7: "VACUUM_ROOT",
		8: "VACUUM_REDIRECT",
	}},
	{"BRIN", [16]string{
		0:  "CREATE_INDEX",
		1:  "INSERT",
		2:  "UPDATE",
		3:  "SAMEPAGE_UPDATE",
		4:  "REVMAP_EXTEND",
		5:  "DESUMMARIZE",
		9:  "INSERT+INIT",
		10: "UPDATE+INIT",
	}},
	{"CommitTs", [16]string{
		0: "ZEROPAGE",
		1: "TRUNCATE",
	}},
	{"ReplicationOrigin", [16]string{
		0: "SET",
		1: "DROP",
	}},
	{manager: "Generic"},
	{manager: "LogicalMessage"},
}

const (
	rmXact    = 1
	xactKinds = 0x70 // the part of a transaction record's info that tells its kind (XLOG_XACT_OPMASK)
	rmGeneric = 20   // it and the next one, logical messages, have no kinds
)

// Name is a record's kind for people: "Heap/INSERT".
func Name(rmid, info uint8) string {
	manager, kind, known := lookUp(rmid, info)
	switch {
	case manager == "":
		return fmt.Sprintf("rmgr %d/%#02x", rmid, info&infoMask)
	case !known:
		return fmt.Sprintf("%s/%#02x", manager, info&infoMask)
	case kind == "":
		return manager
	}
	return manager + "/" + kind
}

// Known tells whether PostgreSQL 15 itself has such records: not those of an extension's
// resource manager, nor what a later version may have added.
func Known(rmid, info uint8) bool {
	_, _, known := lookUp(rmid, info)
	return known
}

// IsExtension tells an extension's resource manager.
func IsExtension(rmid uint8) bool { return rmid >= minCustom }

func lookUp(rmid, info uint8) (manager, kind string, known bool) {
	if int(rmid) >= len(names) {
		return "", "", false
	}
	if rmid == rmXact {
		info &= xactKinds
	}
	m := &names[rmid]
	kind = m.kinds[info>>4]
	return m.manager, kind, kind != "" || rmid >= rmGeneric
}
