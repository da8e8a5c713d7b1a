package pageserver

import (
	"context"
	"errors"
	"log/slog"
	"math"
	"strings"
	"sync/atomic"

	"github.com/holdfastdb/holdfast/internal/auxfile"
	"github.com/holdfastdb/holdfast/internal/keyring"
	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/internal/seal"
	"github.com/holdfastdb/holdfast/pageserver/keyspace"
	"github.com/holdfastdb/holdfast/pageserver/timeline"
)

// openAux gives what a logical message of the old form says about aux files. Any user may write such
// a message: one that certainly does not open under the project's key is not the compute's, and is
// passed over. One that opens and cannot be read is damage. After any other error nothing is known
// of the message, and ingest waits: passed over, the compute's would be lost for good.
func (f *follower) openAux(ctx context.Context, sealed []byte) ([]auxfile.Change, error) {
	changes, err := auxfile.Open(ctx, f.b.srv.cfg.Ring.Open, f.b.name.project, f.b.name.branch, sealed)
	return judgeAux(f, sealed, changes, err)
}

// openAuxKey gives the key of a life's messages, with which they are opened without a call.
func (f *follower) openAuxKey(ctx context.Context, epoch uint64, sealed []byte) ([]byte, error) {
	key, err := auxfile.OpenKey(ctx, f.b.srv.cfg.Ring.Open, f.b.name.project, f.b.name.branch, epoch, sealed)
	return judgeAux(f, sealed, key, err)
}

func judgeAux[T any](f *follower, sealed []byte, opened []T, err error) ([]T, error) {
	switch {
	case err == nil:
		f.b.messages.note(f.rec.LSN, f.tl.DurableLSN(), sealed) // of a key, too, until the state that holds it is in a layer
		return opened, nil
	case errors.Is(err, auxfile.ErrUnreadable):
		return nil, err
	case !errors.Is(err, seal.ErrDamaged) && !errors.Is(err, keyring.ErrRetired): // a version is retired only when no message needs it
		return nil, asLookup(err)
	}
	f.tellForged()
	return nil, nil
}

// tellForged logs it once, or users could fill the log; without an error, which may quote what
// they wrote (K1).
func (f *follower) tellForged() {
	if !f.auxRefused {
		f.auxRefused = true
		f.b.log.Warn("a logical message claims to carry a file, and is not the compute's, or was written before; this and more of them are passed over")
	}
}

func isSlot(file string) bool { return strings.HasPrefix(file, auxfile.Slots+"/") }

// slotHold tells what WAL the replication slots hold back.
type slotHold struct {
	log  *slog.Logger
	told map[string]bool // slots' files of which the log tells that they cannot be read

	at     pg.LSN // oldest is as of here; 0: it is not known
	oldest pg.LSN // the start of the oldest segment that a slot needs
}

// slotSource is the part of a timeline that slots are read from.
type slotSource interface {
	DurableLSN() pg.LSN
	LastLSN() pg.LSN
	Scan(ctx context.Context, from, to keyspace.Key, lsn pg.LSN, fn func(keyspace.Key, timeline.Value) error) error
}

// needed is up to where the safekeepers may forget WAL that is in layers: to decode the past, a
// new compute reads it as it was, from the oldest replication slot on. A slot that cannot be read
// holds nothing back: at the next start it counts as dropped. The slots are read anew only
// if they changed since: changed is up to where they may have.
func (h *slotHold) needed(ctx context.Context, tl slotSource, changed *atomic.Uint64) (pg.LSN, error) {
	// In this order: of a change up to here, changed tells already.
	durable := tl.DurableLSN()
	if h.at == pg.InvalidLSN || pg.LSN(changed.Load()) > h.at {
		at := tl.LastLSN()
		oldest, err := h.scan(ctx, tl, at)
		if err != nil {
			return pg.InvalidLSN, err
		}
		h.at, h.oldest = at, oldest
	}
	return min(durable, h.oldest), nil
}

func (h *slotHold) scan(ctx context.Context, tl slotSource, at pg.LSN) (pg.LSN, error) {
	oldest := pg.LSN(math.MaxUint64) // no slot, nothing held back
	from, to := keyspace.KindRange(keyspace.KindAuxFile)
	err := tl.Scan(ctx, from, to, at, func(_ keyspace.Key, v timeline.Value) error {
		name, data, err := auxfile.Parse(v.Data)
		if err != nil || !isSlot(name) {
			return err
		}
		slot, err := pg.ParseReplicationSlot(data)
		if err != nil {
			h.tell(name, err)
			return nil
		}
		// Who streams asks for whole segments.
		if slot.Restart != pg.InvalidLSN {
			oldest = min(oldest, slot.Restart.SegmentStart())
		}
		return nil
	})
	return oldest, err
}

func (h *slotHold) tell(file string, err error) {
	if !h.told[file] {
		h.told[file] = true
		h.log.Error("a replication slot cannot be read: no WAL is held back for it, and the next start drops it", "file", file, "err", err)
	}
}
