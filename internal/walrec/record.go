// Package walrec reads PostgreSQL 15's write-ahead log: it splits the byte stream into
// CRC-valid records (Scanner) and decodes one record into its header, block references
// and data (Parse).
//
// WAL is hostile input: every length is checked against the bytes that are there before it
// is used, nothing panics, and an error names the LSN. Layouts are those of xlogrecord.h,
// xlog_internal.h and xlogreader.c.
package walrec

import "github.com/holdfastdb/holdfast/internal/pg"

// A Record is one decoded WAL record. Its slices point into the bytes it was parsed from.
type Record struct {
	LSN      pg.LSN // where it begins
	End      pg.LSN // where the next one could begin, before a page header is skipped (EndRecPtr); the LSN it stamps on pages
	Prev     pg.LSN // xl_prev
	Xid      pg.TransactionID
	RmID     uint8
	Info     uint8            // xl_info as it is, XLR_* bits included
	Origin   uint16           // replication origin, 0 if none
	TopXid   pg.TransactionID // XLR_BLOCK_ID_TOPLEVEL_XID, 0 if none
	MainData []byte
	Blocks   []Block // ascending by ID
	Raw      []byte  // the whole record, header included, page headers taken out
}

// Block is the record's reference with number id, or nil.
func (r *Record) Block(id uint8) *Block {
	for i := range r.Blocks {
		if r.Blocks[i].ID == id {
			return &r.Blocks[i]
		}
	}
	return nil
}

// A Block is a record's reference to one block of a relation.
type Block struct {
	ID         uint8
	Rel        pg.RelTag
	Block      pg.BlockNumber
	Data       []byte
	WillInit   bool // redo makes the page from nothing (BKPBLOCK_WILL_INIT)
	HasImage   bool
	ApplyImage bool // the image is to be restored, not only compared with (BKPIMAGE_APPLY)

	image       []byte // as stored
	dataLength  uint16
	imageLength uint16
	holeOffset  uint16
	holeLength  uint16
	bimgInfo    uint8
}
