// Package walstore is one Raft group's log on disk. The log is also the WAL store: an entry's
// data, ciphertext included, is written once, and what reads WAL reads it from here.
//
// A directory holds log files of fixed size, allocated ahead so that a write changes no
// metadata, the newest snapshot, and the replica's identity. A batch of records is one write
// and one fdatasync. Integers are little-endian:
//
//	<16 hex digits of the sequence number>.log
//	+---------------------------------------------------------------+
//	| header, 64 bytes                                              |
//	|   0 magic "HFRAFTLG"   8 version u32   12 zero u32            |
//	|  16 sequence u64      24 salt u64      32 zero ...            |
//	|  60 crc u32 of bytes 0-59                                     |
//	+---------------------------------------------------------------+
//	| record, 8-aligned                                             |
//	|   0 crc u32 of bytes 4 to the payload's end                   |
//	|   4 length of the payload u32          8 salt u64, the file's |
//	|  16 index u64   24 term u64   32 durable u32   36 kind u32    |
//	|  40 payload, zeros to the next multiple of 8                  |
//	+---------------------------------------------------------------+
//	| more records; an end record when the next file goes on        |
//	+---------------------------------------------------------------+
//	| what the file held before it was taken again, or zeros        |
//	+---------------------------------------------------------------+
//
// A salt is random, new whenever a file is taken into use, so nothing old in a file
// passes for a record of now. "durable" is the file offset below which all was on the disk before
// the record's batch was written. It tells a torn tail, which a crash makes, from damage:
// bytes that do not form a record at offset o, with a later record that says durable > o,
// were on the disk once and have changed. Damage is an error that names file and offset, and
// the replica must not start: it may have acknowledged what it can no longer read. A mark
// record proves the last batch the same way; it is written where the next batch will
// overwrite it.
package walstore

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
)

const (
	fileMagic    = "HFRAFTLG"
	fileVersion  = 1
	fileHeader   = 64
	recordHeader = 40
	// maxFile bounds a log file, so that "durable" fits.
	maxFile = 1 << 30
)

type recordKind uint32

const (
	kindEntry     recordKind = iota + 1 // payload: the entry's data
	kindHardState                       // index: commit; payload: vote u64
	kindReset                           // a snapshot at index, term replaced the log before it
	kindEnd                             // the next file goes on
	kindMark                            // only "durable" counts
)

var (
	le         = binary.LittleEndian
	castagnoli = crc32.MakeTable(crc32.Castagnoli)
)

// ErrDamaged means that what was once on the disk has changed.
var ErrDamaged = errors.New("replica's log is damaged")

type record struct {
	kind        recordKind
	index, term uint64
	durable     uint32
	payload     []byte
}

func align(n int) int { return (n + 7) &^ 7 }

func recordSize(payload int) int { return align(recordHeader + payload) }

func appendRecord(dst []byte, salt uint64, r record) []byte {
	at := len(dst)
	dst = le.AppendUint32(dst, 0)
	dst = le.AppendUint32(dst, uint32(len(r.payload)))
	dst = le.AppendUint64(dst, salt)
	dst = le.AppendUint64(dst, r.index)
	dst = le.AppendUint64(dst, r.term)
	dst = le.AppendUint32(dst, r.durable)
	dst = le.AppendUint32(dst, uint32(r.kind))
	dst = append(dst, r.payload...)
	le.PutUint32(dst[at:], crc32.Checksum(dst[at+4:], castagnoli))
	for len(dst)%8 != at%8 {
		dst = append(dst, 0)
	}
	return dst
}

// parseRecord reads the record at the start of b; false if there is none with this salt.
func parseRecord(b []byte, salt uint64) (record, bool) {
	if len(b) < recordHeader || le.Uint64(b[8:]) != salt {
		return record{}, false
	}
	n := uint64(le.Uint32(b[4:]))
	if n > uint64(len(b)-recordHeader) {
		return record{}, false
	}
	end := recordHeader + int(n)
	if crc32.Checksum(b[4:end], castagnoli) != le.Uint32(b) {
		return record{}, false
	}
	return record{kind: recordKind(le.Uint32(b[36:])), index: le.Uint64(b[16:]), term: le.Uint64(b[24:]),
		durable: le.Uint32(b[32:]), payload: b[recordHeader:end:end]}, true
}

func marshalFileHeader(seq, salt uint64) []byte {
	h := make([]byte, fileHeader)
	copy(h, fileMagic)
	le.PutUint32(h[8:], fileVersion)
	le.PutUint64(h[16:], seq)
	le.PutUint64(h[24:], salt)
	le.PutUint32(h[60:], crc32.Checksum(h[:60], castagnoli))
	return h
}

func parseFileHeader(h []byte, seq uint64) (salt uint64, err error) {
	switch {
	case len(h) < fileHeader || string(h[:8]) != fileMagic || crc32.Checksum(h[:60], castagnoli) != le.Uint32(h[60:]):
		return 0, fmt.Errorf("%w: no valid header at offset 0", ErrDamaged)
	case le.Uint32(h[8:]) != fileVersion:
		return 0, fmt.Errorf("format version %d, this program reads %d", le.Uint32(h[8:]), fileVersion)
	case le.Uint64(h[16:]) != seq:
		return 0, fmt.Errorf("%w: the header says that this is file %d", ErrDamaged, le.Uint64(h[16:]))
	}
	return le.Uint64(h[24:]), nil
}
