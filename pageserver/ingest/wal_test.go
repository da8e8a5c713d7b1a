package ingest

import (
	"encoding/binary"

	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/internal/walrec"
)

// ref is a block reference of a record made by hand.
type ref struct {
	tag   pg.RelTag
	block pg.BlockNumber
	init  bool
	image []byte // a whole page, to be restored
	data  []byte
}

// build makes a record's bytes, CRC included (xlogrecord.h).
func build(rmid, info uint8, xid pg.TransactionID, prev pg.LSN, main []byte, refs ...ref) []byte {
	const hasImage, hasData, willInit, apply, longData = 0x10, 0x20, 0x40, 0x02, 254
	r := words(0, uint32(xid))
	r = binary.LittleEndian.AppendUint64(r, uint64(prev))
	r = append(r, info, rmid, 0, 0, 0, 0, 0, 0)
	for i, b := range refs {
		flags := uint8(b.tag.Fork)
		if b.init {
			flags |= willInit
		}
		if b.image != nil {
			flags |= hasImage
		}
		if len(b.data) > 0 {
			flags |= hasData
		}
		r = append(r, uint8(i), flags)
		r = binary.LittleEndian.AppendUint16(r, uint16(len(b.data)))
		if b.image != nil {
			r = binary.LittleEndian.AppendUint16(r, uint16(len(b.image)))
			r = append(r, 0, 0, apply)
		}
		r = append(r, words(uint32(b.tag.Tablespace), uint32(b.tag.Database), uint32(b.tag.Relation), uint32(b.block))...)
	}
	r = append(r, longData)
	r = append(r, words(uint32(len(main)))...)
	for _, b := range refs {
		r = append(append(r, b.image...), b.data...)
	}
	r = append(r, main...)
	le.PutUint32(r, uint32(len(r)))
	le.PutUint32(r[20:], walrec.CRC(r))
	return r
}

// wal ingests a record made by hand as the page server would: from the WAL's bytes.
func (b *bench) wal(rmid, info uint8, xid pg.TransactionID, main []byte, refs ...ref) (*walrec.Record, error) {
	b.t.Helper()
	begin := b.at.SkipPageHeader()
	placed, end := walrec.PlaceRecord(b.at, build(rmid, info, xid, begin-8, main, refs...), 1)
	sc := walrec.NewScanner(b.at)
	sc.Feed(placed)
	raw, ok, err := sc.Next()
	if err != nil || !ok || raw.End != end {
		b.t.Fatalf("the record is not read back: %v, up to %v, want %v", err, raw.End, end)
	}
	rec, err := walrec.Parse(raw.Data, raw.LSN, raw.End)
	if err != nil {
		b.t.Fatal(err)
	}
	return rec, b.ingest(rec)
}
