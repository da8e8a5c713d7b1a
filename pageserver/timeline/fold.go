package timeline

import (
	"fmt"
	"slices"

	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/pageserver/keyspace"
)

// folder rewrites histories, one key after the other: it drops what no read at or above
// cutoff needs, and adds images so that reads need few changes. It is pure but for its two
// callbacks, takes versions in the order of (key, LSN, age) and gives them in that order. It
// keeps at most one base and about periodic changes in memory.
//
// Versions at or below the cutoff are pending: held back until a newer base replaces them, or
// they end in an image at the LSN of the last one. Versions above the cutoff are given as
// they come.
type folder struct {
	cutoff pg.LSN // reads below it are refused; 0: everything stays
	// lowest: no layer below has versions of these keys.
	lowest     bool
	imageAfter int // changes after which a key ends in an image
	// materialize may be nil. An error leaves the changes as they are.
	materialize func(keyspace.Key, History) ([]byte, error)
	// below gives what the layers below have of a key; used if lowest is false.
	below func(keyspace.Key) (History, error)
	emit  func(Entry) error

	started bool
	key     keyspace.Key
	last    pg.LSN // of the version before
	base    *Value // what the running history begins with: may be a Tombstone
	changes []Value
	buf     []byte // data of changes
	pending bool
	stuck   bool // no image can be made until the next base
	failed  int  // keys that got stuck
}

// periodic is how many changes follow one another at most without an image, as a multiple
// of imageAfter.
const periodic = 32

func (f *folder) add(e Entry) error {
	if !f.started || e.Key != f.key {
		if err := f.end(); err != nil {
			return err
		}
		f.started, f.key, f.base, f.pending, f.stuck = true, e.Key, nil, true, false
		f.clearChanges()
	}
	if f.pending && e.LSN > f.cutoff {
		if err := f.settle(); err != nil {
			return err
		}
	}
	// An image stands for all versions at its LSN, so it waits for the last of them.
	if e.LSN != f.last && len(f.changes) >= periodic*f.imageAfter {
		if err := f.foldPeriodically(); err != nil {
			return err
		}
	}
	f.last = e.LSN
	f.track(e)
	if f.pending {
		return nil
	}
	return f.emit(e)
}

// track keeps the running history.
func (f *folder) track(e Entry) {
	if e.Kind != Delta {
		f.base = &Value{LSN: e.LSN, Kind: e.Kind, Data: slices.Clone(e.Data)}
		f.clearChanges()
		f.stuck = false
		return
	}
	if f.stuck && !f.pending {
		return
	}
	n := len(f.buf)
	f.buf = append(f.buf, e.Data...)
	f.changes = append(f.changes, Value{LSN: e.LSN, Kind: Delta, Data: f.buf[n:len(f.buf):len(f.buf)]})
}

func (f *folder) clearChanges() {
	f.changes, f.buf = f.changes[:0], f.buf[:0]
}

func (f *folder) foldPeriodically() error {
	if !f.stuck {
		if err := f.fold(); err != nil {
			return err
		}
	}
	if f.stuck && f.pending { // held back they would grow without bound
		return f.give()
	}
	return nil
}

// settle ends the pending part of a key.
func (f *folder) settle() error {
	wholeHistory := f.base != nil || f.lowest
	if len(f.changes) > 0 && (wholeHistory || len(f.changes) >= f.imageAfter) {
		if err := f.fold(); err != nil {
			return err
		}
	}
	return f.give()
}

// give emits what is pending. At the lowest level a Tombstone at or below the cutoff has
// nothing left to hide.
func (f *folder) give() error {
	f.pending = false
	if f.base != nil && !(f.base.Kind == Tombstone && f.lowest) {
		if err := f.emit(Entry{f.key, *f.base}); err != nil {
			return err
		}
	}
	for _, v := range f.changes {
		if err := f.emit(Entry{f.key, v}); err != nil {
			return err
		}
	}
	if f.stuck {
		f.clearChanges()
	}
	return nil
}

// end ends the last key.
func (f *folder) end() error {
	if !f.started {
		return nil
	}
	f.started = false
	if f.pending {
		return f.settle()
	}
	if len(f.changes) >= f.imageAfter && !f.stuck {
		return f.fold()
	}
	return nil
}

// fold makes an image of the running history, which then begins with it.
func (f *folder) fold() error {
	h, err := f.history()
	if err != nil {
		return err
	}
	var data []byte
	if h.Base == nil || f.materialize == nil {
		err = errNoBase
	} else {
		data, err = f.materialize(f.key, h)
	}
	if err != nil {
		f.stuck = true
		f.failed++
		if !f.pending {
			f.clearChanges()
		}
		return nil
	}
	f.base = &Value{LSN: f.last, Kind: Image, Data: data}
	f.clearChanges()
	if f.pending {
		return nil
	}
	return f.emit(Entry{f.key, *f.base})
}

var errNoBase = fmt.Errorf("no base to begin from")

// history is the running history with what is below it.
func (f *folder) history() (History, error) {
	h := History{Base: f.base, Changes: f.changes}
	switch {
	case f.base != nil && f.base.Kind == Tombstone:
		h.Base = nil
	case f.base == nil && !f.lowest && f.materialize != nil:
		low, err := f.below(f.key)
		if err != nil {
			return h, err
		}
		h.Base = low.Base
		h.Changes = slices.Concat(low.Changes, f.changes)
	}
	return h, nil
}
