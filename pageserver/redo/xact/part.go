package xact

import (
	"encoding/binary"

	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/internal/walrec"
)

// Part makes a record that ends the transaction as rec does, and of its subtransactions only
// some: what is filed under a page of transaction status when the whole is too large for that.
// Of what the record says beside it keeps what such pages need: times and the origin.
func (e *End) Part(rec *walrec.Record, some []pg.TransactionID) []byte {
	info, op := uint32(hasSubxacts), byte(OpAbort)
	if e.Committed {
		op = OpCommit
	}
	if e.HasOrigin {
		info |= hasOrigin
	}
	b := make([]byte, 0, 32+xidSize*len(some))
	b = binary.LittleEndian.AppendUint64(b, uint64(e.Time))
	b = binary.LittleEndian.AppendUint32(b, info)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(some)))
	for _, x := range some {
		b = binary.LittleEndian.AppendUint32(b, uint32(x))
	}
	if e.HasOrigin {
		b = binary.LittleEndian.AppendUint64(b, uint64(e.OriginLSN))
		b = binary.LittleEndian.AppendUint64(b, uint64(e.OriginTime))
	}
	return walrec.BuildWithOrigin(RmID, op|hasInfo, e.Xid, rec.Prev, rec.Origin, b)
}
