package pg

import (
	"fmt"
	"hash/crc32"
)

// A ReplicationSlot is what pg_replslot/<name>/state says (ReplicationSlotOnDisk, slot.c):
//
//	0   magic 4 | CRC 4 | version 4 | length of what follows 4
//	16  name 64 | database 4 | persistency 4 | xmin 4 | catalog xmin 4
//	96  restart LSN 8 | LSN at which it was invalidated 8 | confirmed LSN 8 | two-phase LSN 8
//	128 two-phase 1 | plugin 64 | padding
//
// The CRC is of all behind it.
type ReplicationSlot struct {
	Name        string
	Database    Oid // 0: a physical slot
	Persistency uint32
	Restart     LSN // the oldest WAL that it needs; 0: it needs none
}

// What becomes of a slot: SlotPersistent survives; SlotEphemeral is one that is being made,
// SlotTemporary ends with its connection.
const (
	SlotPersistent = iota
	SlotEphemeral
	SlotTemporary
)

const (
	slotMagic   = 0x1051CA1
	slotVersion = 2
	slotSize    = 200
	slotHeader  = 16
	slotCRCFrom = 8
	slotName    = 64
)

// ParseReplicationSlot reads a slot's state file.
func ParseReplicationSlot(b []byte) (ReplicationSlot, error) {
	switch {
	case len(b) != slotSize:
		return ReplicationSlot{}, fmt.Errorf("replication slot: %d bytes, want %d", len(b), slotSize)
	case le.Uint32(b) != slotMagic || le.Uint32(b[8:]) != slotVersion || le.Uint32(b[12:]) != slotSize-slotHeader:
		return ReplicationSlot{}, fmt.Errorf("replication slot: magic %#x, version %d, length %d; want %#x, %d, %d (PostgreSQL 15)",
			le.Uint32(b), le.Uint32(b[8:]), le.Uint32(b[12:]), slotMagic, slotVersion, slotSize-slotHeader)
	case le.Uint32(b[4:]) != crc32.Checksum(b[slotCRCFrom:], Castagnoli):
		return ReplicationSlot{}, fmt.Errorf("replication slot: its checksum is wrong")
	}
	s := ReplicationSlot{Database: Oid(le.Uint32(b[80:])), Persistency: le.Uint32(b[84:]), Restart: LSN(le.Uint64(b[96:]))}
	name := b[slotHeader : slotHeader+slotName]
	for i, c := range name {
		if c == 0 {
			s.Name = string(name[:i])
			break
		}
	}
	return s, nil
}
