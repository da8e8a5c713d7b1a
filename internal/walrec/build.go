package walrec

import "github.com/holdfastdb/holdfast/internal/pg"

// RmLogicalMsg is the resource manager of logical messages (rmgrlist.h).
const RmLogicalMsg = 21

// Build makes a record that has main data only, CRC included. Data of more than 255 bytes
// gets the long form of header.
func Build(rmid, info uint8, xid pg.TransactionID, prev pg.LSN, data []byte) []byte {
	return BuildWithOrigin(rmid, info, xid, prev, 0, data)
}

// BuildWithOrigin is Build for a record of a replication origin, if that is not 0.
func BuildWithOrigin(rmid, info uint8, xid pg.TransactionID, prev pg.LSN, origin uint16, data []byte) []byte {
	r := make([]byte, headerSize, headerSize+8+len(data))
	if origin != 0 {
		r = le.AppendUint16(append(r, idOrigin), origin)
	}
	if len(data) > 255 {
		r = append(r, idDataLong)
		r = le.AppendUint32(r, uint32(len(data)))
	} else if len(data) > 0 {
		r = append(r, idDataShort, byte(len(data)))
	}
	r = append(r, data...)
	le.PutUint32(r, uint32(len(r)))
	le.PutUint32(r[atXid:], uint32(xid))
	le.PutUint64(r[atPrev:], uint64(prev))
	r[atInfo], r[atRmID] = info, rmid
	le.PutUint32(r[atCRC:], CRC(r))
	return r
}

// BuildCheckpointRecord makes a CHECKPOINT_SHUTDOWN record that begins at lsn: a place
// where a record can begin, so past the page header (pg.LSN.SkipPageHeader). Its redo
// pointer is lsn itself. prev is where the last record before it begins.
func BuildCheckpointRecord(lsn, prev pg.LSN, cp pg.CheckPoint) []byte {
	cp.Redo = lsn
	return Build(0, 0, 0, prev, cp.Marshal())
}

// PlaceRecord lays a record into the stream from at on, which is the end of the record
// before it. It adds page headers where the stream needs them: before the record if at is
// the start of a page (then the record begins at at.SkipPageHeader()), and wherever it
// crosses into the next page. The bytes include the padding to the record's end.
func PlaceRecord(at pg.LSN, rec []byte, sysid uint64) (bytes []byte, end pg.LSN) {
	pos := at
	for begun := false; len(rec) > 0; begun = true {
		if pos%pg.WALPageSize == 0 {
			remaining := uint32(0)
			if begun {
				remaining = uint32(len(rec))
			}
			bytes = pg.NewWALPageHeader(pos, remaining, sysid).Append(bytes)
			pos = pos.SkipPageHeader()
		}
		n := min(len(rec), int(pg.WALPageSize-pos%pg.WALPageSize))
		bytes = append(bytes, rec[:n]...)
		rec, pos = rec[n:], pos+pg.LSN(n)
	}
	end = pos.Align()
	return append(bytes, zeros[:end-pos]...), end
}
