// Package pg is the vocabulary of PostgreSQL 15's on-disk world: LSNs, relation
// and block numbers, page headers, WAL page headers, pg_control. Other packages
// name PostgreSQL's things with these types and with no bare integers.
//
// Layouts are those of a little-endian 64-bit build with 8 KiB blocks and 16 MiB
// WAL segments, PostgreSQL's (and Debian's) defaults; anything else is refused
// where it is first seen (ParseControlFile).
package pg

import "fmt"

// Sizes fixed by the build (pg_config.h, xlog_internal.h).
const (
	BlockSize           = 8192
	WALPageSize         = 8192
	WALSegmentSize      = 16 << 20
	ShortPageHeaderSize = 24     // SizeOfXLogShortPHD
	LongPageHeaderSize  = 40     // SizeOfXLogLongPHD
	RelSegmentBlocks    = 131072 // RELSEG_SIZE: blocks in one file of a relation
	SLRUPagesPerSegment = 32     // SLRU_PAGES_PER_SEGMENT
)

// Oid is an object identifier; zero is invalid.
type Oid uint32

// Well-known object ids.
const (
	DefaultTablespaceOid Oid = 1663 // pg_default
	GlobalTablespaceOid  Oid = 1664 // pg_global
)

// TransactionID is a 32-bit xid.
type TransactionID uint32

// MultiXactID names a set of transactions that lock one tuple.
type MultiXactID uint32

// BlockNumber counts 8 KiB blocks in a fork of a relation.
type BlockNumber uint32

// ForkNumber is a fork of a relation (relpath.h).
type ForkNumber uint8

// The forks.
const (
	MainFork ForkNumber = iota
	FSMFork
	VMFork
	InitFork
)

// String is the fork's suffix in file names, or "main".
func (f ForkNumber) String() string {
	switch f {
	case MainFork:
		return "main"
	case FSMFork:
		return "fsm"
	case VMFork:
		return "vm"
	case InitFork:
		return "init"
	}
	return fmt.Sprintf("fork(%d)", uint8(f))
}

// RelFileNode names a relation's storage. Database is zero for shared relations.
type RelFileNode struct {
	Tablespace, Database, Relation Oid
}

func (r RelFileNode) String() string {
	return fmt.Sprintf("%d/%d/%d", r.Tablespace, r.Database, r.Relation)
}

// RelTag names one fork of a relation.
type RelTag struct {
	RelFileNode
	Fork ForkNumber
}

func (t RelTag) String() string { return t.RelFileNode.String() + "." + t.Fork.String() }

// SLRUKind is one of the simple LRU areas that WAL describes.
type SLRUKind uint8

// The SLRU areas that are part of a branch's durable state. pg_subtrans, pg_notify
// and pg_serial are scratch and never leave a compute.
const (
	CLog SLRUKind = iota + 1
	MultiXactOffsets
	MultiXactMembers
	CommitTS
)

// Dir is the area's folder in a data directory.
func (k SLRUKind) Dir() string {
	switch k {
	case CLog:
		return "pg_xact"
	case MultiXactOffsets:
		return "pg_multixact/offsets"
	case MultiXactMembers:
		return "pg_multixact/members"
	case CommitTS:
		return "pg_commit_ts"
	}
	return fmt.Sprintf("slru(%d)", uint8(k))
}
