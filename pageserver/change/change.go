// Package change is the form of what the page server files under a page: the data of a
// timeline's Init and Delta values.
//
// Most changes are WAL records, kept whole. Two kinds of change that a record only implies
// are kept by themselves, since the record may be large and the change is a few bytes: the
// clearing of visibility map bits, and that a slot of the free space map follows a heap block
// from now on.
//
//	byte 0   then                                            length
//	1        End - LSN of the record (4 bytes), the record   5 + record
//	2        heap block (4), bits (1)                        6
//	3        heap block or child map page (4)                5
//	4                                                        1
//	5        name of a kind of record                        1 + name
//
// Numbers are little-endian.
package change

import (
	"encoding/binary"
	"fmt"

	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/internal/walrec"
)

// Kind says what a change is.
type Kind uint8

// The kinds.
const (
	Record  Kind = 1 + iota // a WAL record, to be applied by redo
	ClearVM                 // bits of a heap block in a visibility map page are cleared
	Follow                  // a slot of a free space map page follows what it stands for
	Zero                    // the page is zeros: the relation was extended by it
	Missing                 // the page is a copy of one that could not be made for want of redo
)

// RecordHeader is how much longer a record's change is than the record.
const RecordHeader = 5

// ClearVMSize and FollowSize are the lengths of the small changes.
const (
	ClearVMSize = 6
	FollowSize  = 5
)

// PutRecord fills dst, RecordHeader + len(rec.Raw) bytes long.
func PutRecord(dst []byte, rec *walrec.Record) {
	dst[0] = byte(Record)
	binary.LittleEndian.PutUint32(dst[1:], uint32(rec.End-rec.LSN))
	copy(dst[RecordHeader:], rec.Raw)
}

// PutClearVM fills dst, ClearVMSize bytes long.
func PutClearVM(dst []byte, heap pg.BlockNumber, bits uint8) {
	dst[0] = byte(ClearVM)
	binary.LittleEndian.PutUint32(dst[1:], uint32(heap))
	dst[5] = bits
}

// PutFollow fills dst, FollowSize bytes long.
func PutFollow(dst []byte, block pg.BlockNumber) {
	dst[0] = byte(Follow)
	binary.LittleEndian.PutUint32(dst[1:], uint32(block))
}

// ZeroPage is the data of a Zero change. It must not be changed.
var ZeroPage = []byte{byte(Zero)}

// A Change is a decoded change; which fields count depends on its Kind.
type Change struct {
	Kind  Kind
	LSN   pg.LSN // Record: where it begins
	Raw   []byte // Record
	Block pg.BlockNumber
	Bits  uint8
	Name  string // Missing: of the record that redo cannot apply
}

// Decode reads the data of a value whose LSN is end.
func Decode(data []byte, end pg.LSN) (c Change, err error) {
	if len(data) == 0 {
		return c, fmt.Errorf("an empty change at %v", end)
	}
	c.Kind = Kind(data[0])
	switch {
	case c.Kind == Record && len(data) > RecordHeader:
		c.LSN = end - pg.LSN(binary.LittleEndian.Uint32(data[1:]))
		c.Raw = data[RecordHeader:]
	case c.Kind == ClearVM && len(data) == ClearVMSize:
		c.Block, c.Bits = pg.BlockNumber(binary.LittleEndian.Uint32(data[1:])), data[5]
	case c.Kind == Zero && len(data) == 1:
	case c.Kind == Missing:
		c.Name = string(data[1:])
	case c.Kind == Follow && len(data) == FollowSize:
		c.Block = pg.BlockNumber(binary.LittleEndian.Uint32(data[1:]))
	default:
		return c, fmt.Errorf("a change at %v of kind %d with %d bytes", end, data[0], len(data))
	}
	return c, nil
}
