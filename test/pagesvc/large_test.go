package pagesvc

import (
	"encoding/binary"
	"testing"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/auxfile"
	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/internal/walrec"
)

// addPieces adds a record to the log's end as a compute sends a large one, in pieces.
func (w *world) addPieces(rmid, info uint8, data []byte) {
	w.t.Helper()
	w.wait(w.log.end)
	state, err := w.client.StartupState(w.t.Context(), &pb.StartupStateRequest{At: w.point(w.log.end, false)})
	if err != nil {
		w.t.Fatal(err)
	}
	control, err := pg.ParseControlFile(state.ControlFile)
	if err != nil {
		w.t.Fatal(err)
	}
	rec := walrec.Build(rmid, info, 0, pg.LSN(state.PrevRecordLsn), data)
	plain, end := walrec.PlaceRecord(w.log.end, rec, control.SystemID)
	for begin := w.log.end; begin < end; {
		n := min(end, (begin + 1<<20).PageStart())
		w.log.add(w.t, begin, n, plain[:n-begin])
		plain, begin = plain[n-begin:], n
	}
	w.log.mu.Lock()
	defer w.log.mu.Unlock()
	close(w.log.more)
	w.log.more = make(chan struct{})
}

// A record that comes in pieces is applied when it is whole, if it does anything; a message of
// any size is passed over.
func TestRecordsInPieces(t *testing.T) {
	w := imported(t)
	// A commit that names the same subtransaction nine million times.
	const subxid, count = 751, 9 << 20
	commit := make([]byte, 16+4*count)
	commit[8] = 2 // XACT_XINFO_HAS_SUBXACTS
	binary.LittleEndian.PutUint32(commit[12:], count)
	for at := 16; at < len(commit); at += 4 {
		binary.LittleEndian.PutUint32(commit[at:], subxid)
	}
	status := func() byte {
		r, err := w.client.GetPages(t.Context(), &pb.GetPagesRequest{At: w.point(w.log.end, false), Slru: uint32(pg.CLog), Count: 1})
		if err != nil {
			t.Fatal(err)
		}
		return r.Pages[subxid/4] >> (2 * (subxid % 4)) & 3
	}
	w.wait(w.log.end)
	if status() == 1 {
		t.Fatalf("transaction %d has committed already", subxid)
	}
	w.addPieces(1, 0x80, commit)
	w.addPieces(walrec.RmLogicalMsg, 0, make([]byte, 40<<20))
	w.say(auxfile.Change{Path: auxfile.Settings, Content: []byte("after")})
	if got := w.settings(); got != "after" || status() != 1 {
		t.Errorf("the settings are %q, the subtransaction's status is %d", got, status())
	}
	// Also where the page server begins anew behind them.
	w.end()
	w.begin()
	w.attach()
	w.addPieces(1, 0x80, commit)
	if got := w.settings(); got != "after" || status() != 1 {
		t.Errorf("after a restart: the settings are %q, the subtransaction's status is %d", got, status())
	}
}
