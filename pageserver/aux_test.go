package pageserver

import (
	"context"
	"encoding/binary"
	"hash/crc32"
	"log/slog"
	"sync/atomic"
	"testing"

	"github.com/holdfastdb/holdfast/internal/auxfile"
	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/pageserver/keyspace"
	"github.com/holdfastdb/holdfast/pageserver/timeline"
)

// slotLog has one slot, or none, as of each LSN.
type slotLog struct {
	durable, last pg.LSN
	restarts      map[pg.LSN]pg.LSN // of the slot, by when that was told; 0: it was dropped
	scans         int
}

func (l *slotLog) DurableLSN() pg.LSN { return l.durable }
func (l *slotLog) LastLSN() pg.LSN    { return l.last }

func (l *slotLog) Scan(_ context.Context, _, _ keyspace.Key, lsn pg.LSN, fn func(keyspace.Key, timeline.Value) error) error {
	l.scans++
	var newest, restart pg.LSN
	for at, r := range l.restarts {
		if at <= lsn && at >= newest {
			newest, restart = at, r
		}
	}
	if restart == 0 {
		return nil
	}
	const name = auxfile.Slots + "/s/state"
	b := make([]byte, 200)
	binary.LittleEndian.PutUint32(b, 0x1051CA1)
	binary.LittleEndian.PutUint32(b[8:], 2)
	binary.LittleEndian.PutUint32(b[12:], 184)
	binary.LittleEndian.PutUint64(b[96:], uint64(restart))
	binary.LittleEndian.PutUint32(b[4:], crc32.Checksum(b[8:], pg.Castagnoli))
	return fn(keyspace.AuxFile(name), timeline.Value{LSN: newest, Kind: timeline.Image, Data: auxfile.Marshal(name, b)})
}

// Slots are read when one changed, and at no other time; and no change is overlooked, also one that
// was announced and is not there yet.
func TestSlotsAreReadWhenTheyChange(t *testing.T) {
	const seg = pg.WALSegmentSize
	l := &slotLog{restarts: map[pg.LSN]pg.LSN{}}
	h := &slotHold{log: slog.New(slog.DiscardHandler), told: map[string]bool{}}
	var changed atomic.Uint64
	for _, c := range []struct {
		what          string
		durable, last pg.LSN
		changed       pg.LSN
		restart       pg.LSN // told at last; 1: nothing is
		want          pg.LSN
		scans         int
	}{
		{"the first look", 5 * seg, 6 * seg, 0, 1, 5 * seg, 1},
		{"nothing new", 6 * seg, 7 * seg, 0, 1, 6 * seg, 0},
		{"a change is announced", 6 * seg, 7 * seg, 8 * seg, 1, 6 * seg, 1},
		{"it is there", 8 * seg, 8 * seg, 8 * seg, 3*seg + 8, 3 * seg, 1},
		{"nothing new with a slot", 9 * seg, 9 * seg, 8 * seg, 1, 3 * seg, 0},
		{"what is durable is less", 2 * seg, 9 * seg, 8 * seg, 1, 2 * seg, 0},
		{"the slot goes on", 9 * seg, 10 * seg, 10 * seg, 4*seg + 8, 4 * seg, 1},
		{"the slot is dropped", 10 * seg, 11 * seg, 11 * seg, 0, 10 * seg, 1},
		{"nothing new without a slot", 11 * seg, 11 * seg, 11 * seg, 1, 11 * seg, 0},
	} {
		l.durable, l.last, l.scans = c.durable, c.last, 0
		if c.restart != 1 {
			l.restarts[c.last] = c.restart
		}
		changed.Store(uint64(c.changed))
		got, err := h.needed(t.Context(), l, &changed)
		if err != nil || got != c.want || l.scans != c.scans {
			t.Errorf("%s: %v after %d scans, %v; want %v after %d", c.what, got, l.scans, err, c.want, c.scans)
		}
	}
}
