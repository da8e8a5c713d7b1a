package pagesvc

import (
	"encoding/binary"
	"hash/crc32"
	"testing"
	"time"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/auxfile"
	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/internal/walrec"
	"github.com/holdfastdb/holdfast/pageserver/timeline"
)

// slotState is the state file of a persistent slot (slot.c).
func slotState(restart pg.LSN) []byte {
	b := make([]byte, 200)
	for at, v := range map[int]uint32{0: 0x1051CA1, 8: 2, 12: 184} {
		binary.LittleEndian.PutUint32(b[at:], v)
	}
	binary.LittleEndian.PutUint64(b[96:], uint64(restart))
	binary.LittleEndian.PutUint32(b[4:], crc32.Checksum(b[8:], pg.Castagnoli))
	return b
}

// say adds a message about aux files to the log's end.
func (w *world) say(changes ...auxfile.Change) {
	w.t.Helper()
	sealed, err := auxfile.Seal(w.t.Context(), w.log.ring, w.log.project, w.log.branch, changes)
	if err != nil {
		w.t.Fatal(err)
	}
	w.sayRaw(sealed)
}

// sayRaw adds a message with the prefix of those about aux files.
func (w *world) sayRaw(sealed []byte) {
	w.t.Helper()
	state, err := w.client.StartupState(w.t.Context(), &pb.StartupStateRequest{At: w.point(w.log.end, false)})
	if err != nil {
		w.t.Fatal(err)
	}
	control, err := pg.ParseControlFile(state.ControlFile)
	if err != nil {
		w.t.Fatal(err)
	}
	rec := walrec.Build(walrec.RmLogicalMsg, 0, 0, pg.LSN(state.PrevRecordLsn), auxfile.Record(sealed))
	plain, end := walrec.PlaceRecord(w.log.end, rec, control.SystemID)
	w.log.add(w.t, w.log.end, end, plain)
	w.log.mu.Lock()
	defer w.log.mu.Unlock()
	close(w.log.more)
	w.log.more = make(chan struct{})
}

// The safekeepers may forget what is in layers, but not what a slot's consumer will read.
func TestSlotsHoldWALBack(t *testing.T) {
	w := imported(t)
	w.end()
	w.withTimeline(timeline.Config{FlushAge: 20 * time.Millisecond})
	w.begin()
	w.attach()
	w.log.mu.Lock()
	w.log.deaf = true // until the slot is there
	w.log.mu.Unlock()
	w.log.feed(t, base.after, base.last)
	w.wait(w.log.end)
	for start := w.log.end.SegmentStart(); w.log.end.SegmentStart() == start; w.wait(w.log.end) { // else there is nothing that could be forgotten
		w.say(auxfile.Change{Path: auxfile.Settings, Content: make([]byte, 2<<20)})
	}
	w.say(auxfile.Change{Path: "pg_replslot/broken/state", Content: slotState(8)[:199]}) // holds nothing back
	w.wait(w.log.end)
	restart := w.log.end - 8
	w.say(auxfile.Change{Path: "pg_replslot/s/state", Content: slotState(restart)})
	w.wait(w.log.end)
	reported := func(want pg.LSN) {
		t.Helper()
		for ; ; time.Sleep(10 * time.Millisecond) { // the test's time limit bounds it
			w.log.mu.Lock()
			at := w.log.durable
			w.log.deaf = false
			w.log.mu.Unlock()
			if at > want {
				t.Fatalf("the safekeepers may forget WAL up to %v, want %v", at, want)
			}
			if at == want {
				return
			}
		}
	}
	reported(restart.SegmentStart())
	w.say(auxfile.Change{Path: "pg_replslot/s/state", Removed: true})
	w.wait(w.log.end)
	reported(w.log.end)
}
