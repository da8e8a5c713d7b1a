package ingest

import (
	"bytes"
	"encoding/binary"
	"testing"

	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/internal/walrec"
	"github.com/holdfastdb/holdfast/pageserver/keyspace"
	"github.com/holdfastdb/holdfast/pageserver/redo"
)

// endOf is the data of a commit or abort with subtransactions and an origin.
func endOf(subxids []uint32) []byte {
	data := binary.LittleEndian.AppendUint64(nil, 12345) // time
	data = append(data, words(1<<1|1<<5, uint32(len(subxids)))...)
	data = append(data, words(subxids...)...)
	data = binary.LittleEndian.AppendUint64(data, 0x777)
	return binary.LittleEndian.AppendUint64(data, 54321) // the origin's time, which counts
}

// A transaction's end that is too large to be kept under each page that it changes makes the
// same pages, and takes no more room than its numbers do.
func TestBigEndsOfTransactions(t *testing.T) {
	for name, info := range map[string]uint8{"commit": 0x80, "abort": 0x80 | 0x20} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			b.core.state.Control.TrackCommitTS = true
			const xid = 1000
			subxids := []uint32{}
			for i := range uint32(bigXact) { // more than one page of either kind, with gaps
				subxids = append(subxids, xid+1+i*3/2)
			}
			raw := walrec.BuildWithOrigin(rmXact, info, xid, b.at-64, 7, endOf(subxids))
			rec, err := walrec.Parse(raw, b.at, b.at+pg.LSN(len(raw)+8).Align())
			if err != nil {
				t.Fatal(err)
			}
			if len(rec.MainData) <= bigXact || rec.Origin != 7 {
				t.Fatalf("%d bytes, origin %d", len(rec.MainData), rec.Origin)
			}
			if err := b.ingest(rec); err != nil {
				t.Fatal(err)
			}
			want, err := redo.SLRUPages(rec)
			if err != nil {
				t.Fatal(err)
			}
			stored := 0
			for _, p := range want {
				key := keyspace.SLRUPage(p.Kind, p.Page)
				have, whole := make([]byte, pg.BlockSize), make([]byte, pg.BlockSize)
				if err := b.Page(t.Context(), key, b.at, have); err != nil {
					t.Fatal(err)
				}
				if err := redo.ApplySLRU(p.Kind, p.Page, whole, rec); err != nil {
					t.Fatal(err)
				}
				if !bytes.Equal(have, whole) || bytes.Equal(whole, make([]byte, pg.BlockSize)) {
					t.Errorf("page %d of %s differs from what the whole record makes", p.Page, p.Kind.Dir())
				}
				for _, c := range b.history(key).Changes {
					stored += len(c.Data)
				}
			}
			if wantPages := map[string]int{"commit": 4 + 121, "abort": 4}[name]; len(want) < wantPages-2 {
				t.Errorf("%d pages change, want about %d", len(want), wantPages)
			}
			if stored > 3*len(raw) {
				t.Errorf("%d bytes are kept of a record of %d", stored, len(raw))
			}
			if next := pg.TransactionID(b.core.state.checkPoint().NextXid); next != pg.TransactionID(subxids[len(subxids)-1]+1) {
				t.Errorf("the next xid is %d", next)
			}
		})
	}
}
