package pg

import (
	"fmt"
	"hash/crc32"
	"math"
)

// Versions that ParseControlFile accepts: those of PostgreSQL 15.
const (
	ControlVersion = 1300      // PG_CONTROL_VERSION
	CatalogVersion = 202209061 // CATALOG_VERSION_NO
)

// Sizes of pg_control: the file, and what its CRC covers (pg_control.h).
const (
	ControlFileSize = 8192
	controlCRCAt    = 288
	controlDataSize = 292
	CheckPointSize  = 88
)

// Castagnoli is the polynomial of all of PostgreSQL's CRCs.
var Castagnoli = crc32.MakeTable(crc32.Castagnoli)

// DBState is the state of a cluster in pg_control.
type DBState uint32

// The states.
const (
	DBStartup DBState = iota
	DBShutdowned
	DBShutdownedInRecovery
	DBShutdowning
	DBInCrashRecovery
	DBInArchiveRecovery
	DBInProduction
)

// CheckPoint is the data of a checkpoint record, and a branch's counters. Times are in
// seconds since 1970.
type CheckPoint struct {
	Redo              LSN
	TimelineID        uint32
	PrevTimelineID    uint32
	FullPageWrites    bool
	NextXid           uint64 // a FullTransactionId: epoch and xid
	NextOid           Oid
	NextMulti         MultiXactID
	NextMultiOffset   uint32
	OldestXid         TransactionID
	OldestXidDB       Oid
	OldestMulti       MultiXactID
	OldestMultiDB     Oid
	Time              int64
	OldestCommitTsXid TransactionID
	NewestCommitTsXid TransactionID
	OldestActiveXid   TransactionID
}

// ParseCheckPoint reads a checkpoint's data: CheckPointSize bytes.
func ParseCheckPoint(b []byte) (CheckPoint, error) {
	if len(b) != CheckPointSize {
		return CheckPoint{}, fmt.Errorf("checkpoint data of %d bytes, want %d", len(b), CheckPointSize)
	}
	u32 := func(at int) uint32 { return le.Uint32(b[at:]) }
	return CheckPoint{
		Redo: LSN(le.Uint64(b)), TimelineID: u32(8), PrevTimelineID: u32(12), FullPageWrites: b[16] != 0,
		NextXid: le.Uint64(b[24:]), NextOid: Oid(u32(32)), NextMulti: MultiXactID(u32(36)), NextMultiOffset: u32(40),
		OldestXid: TransactionID(u32(44)), OldestXidDB: Oid(u32(48)),
		OldestMulti: MultiXactID(u32(52)), OldestMultiDB: Oid(u32(56)), Time: int64(le.Uint64(b[64:])),
		OldestCommitTsXid: TransactionID(u32(72)), NewestCommitTsXid: TransactionID(u32(76)),
		OldestActiveXid: TransactionID(u32(80)),
	}, nil
}

// Marshal gives the CheckPointSize bytes that ParseCheckPoint reads.
func (c *CheckPoint) Marshal() []byte {
	b := make([]byte, CheckPointSize)
	u32 := func(at int, v uint32) { le.PutUint32(b[at:], v) }
	le.PutUint64(b, uint64(c.Redo))
	u32(8, c.TimelineID)
	u32(12, c.PrevTimelineID)
	b[16] = boolByte(c.FullPageWrites)
	le.PutUint64(b[24:], c.NextXid)
	u32(32, uint32(c.NextOid))
	u32(36, uint32(c.NextMulti))
	u32(40, c.NextMultiOffset)
	u32(44, uint32(c.OldestXid))
	u32(48, uint32(c.OldestXidDB))
	u32(52, uint32(c.OldestMulti))
	u32(56, uint32(c.OldestMultiDB))
	le.PutUint64(b[64:], uint64(c.Time))
	u32(72, uint32(c.OldestCommitTsXid))
	u32(76, uint32(c.NewestCommitTsXid))
	u32(80, uint32(c.OldestActiveXid))
	return b
}

// AdvanceXid makes NextXid follow xid, which WAL just mentioned. Zero is no xid and changes
// nothing; an xid behind NextXid (modulo 2^32) neither (AdvanceNextFullTransactionIdPastXid).
func (c *CheckPoint) AdvanceXid(xid TransactionID) (changed bool) {
	const firstNormal = 3
	next := TransactionID(c.NextXid)
	if xid < firstNormal || int32(xid-next) < 0 {
		return false
	}
	epoch := c.NextXid >> 32
	if xid < next { // it wrapped around
		epoch++
	}
	c.NextXid = epoch<<32 | uint64(xid)
	c.NextXid++
	if TransactionID(c.NextXid) < firstNormal {
		c.NextXid += uint64(firstNormal - TransactionID(c.NextXid))
	}
	return true
}

// ControlFile is pg_control. What the build fixes (block sizes, alignment, …) is no part of
// it: ParseControlFile checks it and Marshal writes it.
type ControlFile struct {
	SystemID           uint64
	State              DBState
	Time               int64 // of the last update, seconds since 1970
	CheckPoint         LSN   // of the last checkpoint record
	CheckPointCopy     CheckPoint
	UnloggedLSN        LSN
	MinRecoveryPoint   LSN
	MinRecoveryTLI     uint32
	BackupStart        LSN
	BackupEnd          LSN
	BackupEndRequired  bool
	WALLevel           uint32 // 0 minimal, 1 replica, 2 logical
	WALLogHints        bool
	MaxConnections     uint32
	MaxWorkerProcesses uint32
	MaxWALSenders      uint32
	MaxPreparedXacts   uint32
	MaxLocksPerXact    uint32
	TrackCommitTS      bool
	ChecksumVersion    uint32 // 0: data pages have no checksums
	MockAuthNonce      [32]byte
}

// controlBuild lists what the build fixes: offset in pg_control and value.
var controlBuild = [...]struct {
	name string
	at   int
	want uint32
}{
	{"pg_control version", 8, ControlVersion},
	{"catalog version", 12, CatalogVersion},
	{"maximum alignment", 204, 8},
	{"block size", 216, BlockSize},
	{"blocks per relation segment", 220, RelSegmentBlocks},
	{"WAL page size", 224, WALPageSize},
	{"WAL segment size", 228, WALSegmentSize},
	{"NAMEDATALEN", 232, 64},
	{"INDEX_MAX_KEYS", 236, 32},
	{"TOAST chunk size", 240, 1996},
	{"large object chunk size", 244, 2048},
	{"float8 by value", 248, 1},
}

const controlFloat = 1234567.0 // FLOATFORMAT_VALUE

// ParseControlFile reads pg_control and refuses what is not of PostgreSQL 15 in a
// little-endian 64-bit build with default sizes.
func ParseControlFile(b []byte) (*ControlFile, error) {
	if len(b) < controlDataSize {
		return nil, fmt.Errorf("pg_control: %d bytes, want at least %d", len(b), controlDataSize)
	}
	if v := le.Uint32(b[8:]); v != ControlVersion {
		return nil, fmt.Errorf("pg_control: version %d, want %d (PostgreSQL 15)", v, ControlVersion)
	}
	if have, want := crc32.Checksum(b[:controlCRCAt], Castagnoli), le.Uint32(b[controlCRCAt:]); have != want {
		return nil, fmt.Errorf("pg_control: CRC is %#08x, the file says %#08x", have, want)
	}
	for _, f := range controlBuild {
		v := le.Uint32(b[f.at:])
		if f.at == 248 { // a bool with padding
			v = uint32(b[f.at])
		}
		if v != f.want {
			return nil, fmt.Errorf("pg_control: %s is %d, only %d is supported", f.name, v, f.want)
		}
	}
	if v := math.Float64frombits(le.Uint64(b[208:])); v != controlFloat {
		return nil, fmt.Errorf("pg_control: floating-point format: %v, want %v", v, controlFloat)
	}
	cp, err := ParseCheckPoint(b[40 : 40+CheckPointSize])
	if err != nil {
		return nil, fmt.Errorf("pg_control: %w", err)
	}
	c := &ControlFile{
		SystemID: le.Uint64(b), State: DBState(le.Uint32(b[16:])), Time: int64(le.Uint64(b[24:])),
		CheckPoint: LSN(le.Uint64(b[32:])), CheckPointCopy: cp, UnloggedLSN: LSN(le.Uint64(b[128:])),
		MinRecoveryPoint: LSN(le.Uint64(b[136:])), MinRecoveryTLI: le.Uint32(b[144:]),
		BackupStart: LSN(le.Uint64(b[152:])), BackupEnd: LSN(le.Uint64(b[160:])), BackupEndRequired: b[168] != 0,
		WALLevel: le.Uint32(b[172:]), WALLogHints: b[176] != 0, MaxConnections: le.Uint32(b[180:]),
		MaxWorkerProcesses: le.Uint32(b[184:]), MaxWALSenders: le.Uint32(b[188:]),
		MaxPreparedXacts: le.Uint32(b[192:]), MaxLocksPerXact: le.Uint32(b[196:]),
		TrackCommitTS: b[200] != 0, ChecksumVersion: le.Uint32(b[252:]),
	}
	copy(c.MockAuthNonce[:], b[256:])
	if c.State > DBInProduction {
		return nil, fmt.Errorf("pg_control: state %d is not known", c.State)
	}
	return c, nil
}

// Marshal gives the content of the file, ControlFileSize bytes.
func (c *ControlFile) Marshal() []byte {
	b := make([]byte, ControlFileSize)
	u32 := func(at int, v uint32) { le.PutUint32(b[at:], v) }
	u64 := func(at int, v uint64) { le.PutUint64(b[at:], v) }
	for _, f := range controlBuild {
		u32(f.at, f.want)
	}
	u64(208, math.Float64bits(controlFloat))
	u64(0, c.SystemID)
	u32(16, uint32(c.State))
	u64(24, uint64(c.Time))
	u64(32, uint64(c.CheckPoint))
	copy(b[40:], c.CheckPointCopy.Marshal())
	u64(128, uint64(c.UnloggedLSN))
	u64(136, uint64(c.MinRecoveryPoint))
	u32(144, c.MinRecoveryTLI)
	u64(152, uint64(c.BackupStart))
	u64(160, uint64(c.BackupEnd))
	b[168] = boolByte(c.BackupEndRequired)
	u32(172, c.WALLevel)
	b[176] = boolByte(c.WALLogHints)
	u32(180, c.MaxConnections)
	u32(184, c.MaxWorkerProcesses)
	u32(188, c.MaxWALSenders)
	u32(192, c.MaxPreparedXacts)
	u32(196, c.MaxLocksPerXact)
	b[200] = boolByte(c.TrackCommitTS)
	u32(252, c.ChecksumVersion)
	copy(b[256:], c.MockAuthNonce[:])
	u32(controlCRCAt, crc32.Checksum(b[:controlCRCAt], Castagnoli))
	return b
}

func boolByte(v bool) byte {
	if v {
		return 1
	}
	return 0
}
