package ingest

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"slices"

	"github.com/holdfastdb/holdfast/internal/auxfile"
	"github.com/holdfastdb/holdfast/internal/pg"
)

// State is what the counters and pg_control of a branch are at an LSN, advanced as
// PostgreSQL's recovery does (xlog_redo and its kin). It is stored under
// keyspace.Checkpoint.
//
//	version 3 | start of the last record 8 | offsets page made early 8 | epoch 8 | pg_control 292 |
//	number of origins 4 | of each: number 2, remote LSN 8 |
//	of the life: epoch 8, last message 8, length of the key 1, key, branch
//
// Version 2 has nothing of the life.
type State struct {
	PrevRecord pg.LSN // where the last record begins: xl_prev of the next
	Control    pg.ControlFile
	Origins    map[uint16]pg.LSN // progress of replication, by origin

	// EarlyOffsets is the multixact offsets page that a CREATE_ID record of an older minor
	// version made before its ZERO_OFF_PAGE record, which then must not zero it; or -1.
	EarlyOffsets int64

	// Epoch is the highest epoch of which WAL was ingested, or is about to be.
	Epoch uint64

	Life Life
}

const (
	stateVersion = 3
	oldVersion   = 2
	controlBytes = 292 // of pg_control: data and CRC
	stateFixed   = 1 + 8 + 8 + 8 + controlBytes + 4
	originBytes  = 10
	lifeFixed    = 8 + 8 + 1
)

func (s *State) checkPoint() *pg.CheckPoint { return &s.Control.CheckPointCopy }

// Marshal gives the stored form.
func (s *State) Marshal() []byte {
	b := make([]byte, 0, stateFixed+originBytes*len(s.Origins)+lifeFixed+len(s.Life.Key)+len(s.Life.Branch))
	b = append(b, stateVersion)
	b = binary.LittleEndian.AppendUint64(b, uint64(s.PrevRecord))
	b = binary.LittleEndian.AppendUint64(b, uint64(s.EarlyOffsets))
	b = binary.LittleEndian.AppendUint64(b, s.Epoch)
	b = append(b, s.Control.Marshal()[:controlBytes]...)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(s.Origins)))
	for _, n := range s.originNumbers() {
		b = binary.LittleEndian.AppendUint16(b, n)
		b = binary.LittleEndian.AppendUint64(b, uint64(s.Origins[n]))
	}
	b = binary.LittleEndian.AppendUint64(b, s.Life.Epoch)
	b = binary.LittleEndian.AppendUint64(b, s.Life.Last)
	b = append(b, byte(len(s.Life.Key))) // auxfile.KeySize, or none
	b = append(b, s.Life.Key...)
	return append(b, s.Life.Branch...)
}

// ParseState reads the stored form.
func ParseState(b []byte) (State, error) {
	if len(b) > 0 && b[0] != stateVersion && b[0] != oldVersion { // first: each version has a length of its own
		return State{}, fmt.Errorf("branch state of version %d, this program reads version %d", b[0], stateVersion)
	}
	if len(b) < stateFixed {
		return State{}, fmt.Errorf("branch state of %d bytes, want at least %d", len(b), stateFixed)
	}
	control, err := pg.ParseControlFile(b[25 : 25+controlBytes])
	if err != nil {
		return State{}, fmt.Errorf("branch state: %w", err)
	}
	n := binary.LittleEndian.Uint32(b[stateFixed-4:])
	rest := b[stateFixed:]
	origins := uint64(n) * originBytes
	if uint64(len(rest)) < origins || b[0] == oldVersion && uint64(len(rest)) != origins {
		return State{}, fmt.Errorf("branch state with %d bytes for %d replication origins", len(rest), n)
	}
	rest, last := rest[:origins], rest[origins:]
	s := State{PrevRecord: pg.LSN(binary.LittleEndian.Uint64(b[1:])),
		EarlyOffsets: int64(binary.LittleEndian.Uint64(b[9:])), Epoch: binary.LittleEndian.Uint64(b[17:]), Control: *control, Origins: make(map[uint16]pg.LSN, n)}
	for ; len(rest) > 0; rest = rest[originBytes:] {
		s.Origins[binary.LittleEndian.Uint16(rest)] = pg.LSN(binary.LittleEndian.Uint64(rest[2:]))
	}
	if b[0] == oldVersion {
		return s, nil
	}
	s.Life, err = parseLife(last)
	return s, err
}

func parseLife(b []byte) (l Life, err error) {
	if len(b) < lifeFixed || len(b) < lifeFixed+int(b[16]) || b[16] != 0 && b[16] != auxfile.KeySize {
		return l, fmt.Errorf("branch state with %d bytes of the compute's life", len(b))
	}
	l.Epoch, l.Last = binary.LittleEndian.Uint64(b), binary.LittleEndian.Uint64(b[8:])
	n := lifeFixed + int(b[16])
	l.Key, l.Branch = slices.Clone(b[lifeFixed:n]), string(b[n:])
	return l, nil
}

func (s *State) originNumbers() []uint16 {
	list := make([]uint16, 0, len(s.Origins))
	for n := range s.Origins {
		list = append(list, n)
	}
	slices.Sort(list)
	return list
}

func cloneOrigins(m map[uint16]pg.LSN) map[uint16]pg.LSN {
	out := make(map[uint16]pg.LSN, len(m))
	for k, v := range m {
		out[k] = v
	}
	return out
}

// OriginsFile is the content of pg_logical/replorigin_checkpoint (origin.c): magic, 16 bytes
// for each origin, CRC. It is nil if there are none.
func (s *State) OriginsFile() []byte {
	const magic = 0x1257DADE
	if len(s.Origins) == 0 {
		return nil
	}
	b := binary.LittleEndian.AppendUint32(nil, magic)
	for _, n := range s.originNumbers() {
		b = binary.LittleEndian.AppendUint64(b, uint64(n)) // 2 bytes and padding
		b = binary.LittleEndian.AppendUint64(b, uint64(s.Origins[n]))
	}
	return binary.LittleEndian.AppendUint32(b, crc32.Checksum(b, pg.Castagnoli))
}

// advanceOrigin is replorigin_advance.
func (s *State) advanceOrigin(origin uint16, remote pg.LSN, backward bool) {
	if origin == 0 {
		return
	}
	if have, ok := s.Origins[origin]; !ok || backward || have < remote {
		s.Origins[origin] = remote
	}
}

// precedes compares numbers that wrap around: xids, multixacts and their offsets.
func precedes(a, b uint32) bool { return int32(a-b) < 0 }

// xidPrecedes is TransactionIdPrecedes: xids below 3 are permanent and precede all others.
func xidPrecedes(a, b pg.TransactionID) bool {
	const firstNormal = 3
	if a < firstNormal || b < firstNormal {
		return a < b
	}
	return precedes(uint32(a), uint32(b))
}

// advanceMulti is MultiXactAdvanceNextMXact.
func (s *State) advanceMulti(multi pg.MultiXactID, offset uint32) {
	cp := s.checkPoint()
	if precedes(uint32(cp.NextMulti), uint32(multi)) {
		cp.NextMulti = multi
	}
	if precedes(cp.NextMultiOffset, offset) {
		cp.NextMultiOffset = offset
	}
}

// advanceOldestMulti is MultiXactAdvanceOldest.
func (s *State) advanceOldestMulti(multi pg.MultiXactID, db pg.Oid) {
	cp := s.checkPoint()
	if precedes(uint32(cp.OldestMulti), uint32(multi)) {
		cp.OldestMulti, cp.OldestMultiDB = multi, db
	}
}
