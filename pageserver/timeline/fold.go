package timeline

import (
	"fmt"
	"slices"

	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/pageserver/keyspace"
)

// folder rewrites histories, one key after the other: it drops what no read needs, and adds
// images so that reads need few changes. It is pure but for its two callbacks, takes versions
// in the order of (key, LSN, age) and gives them in that order. It keeps at most one base and
// about periodic changes in memory.
//
// Needed are reads at or above the cutoff and, for pages that copies share, at some points
// below it. Versions up to the next point, of which the cutoff is the last, are pending: held
// back until a newer base replaces them, or they end in an image at the LSN of the last one.
// Versions above the cutoff are given as they come.
type folder struct {
	cutoff pg.LSN // reads below it are refused; 0: everything stays
	// dirs has the folders whose pages are copies, or shared with copies.
	dirs map[keyspace.Dir]dirPlan
	// lowest: no layer below has versions of these keys.
	lowest     bool
	imageAfter int // changes after which a key ends in an image
	// materialize may be nil. An error leaves the changes as they are.
	materialize func(keyspace.Key, History) ([]byte, error)
	// below gives what the layers below have of a key in a life, and what that stands on. It
	// is used if lowest is false or there is a life; without one the key is no copy's.
	below func(keyspace.Key, *life) (History, error)
	emit  func(Entry) error

	started bool
	key     keyspace.Key
	points  []pg.LSN // that are still to come; none: nothing is pending
	lives   []life   // that are still to come
	life    *life    // under way, or nil
	last    pg.LSN   // of the version before
	base    *Value   // what the running history begins with: may be a Tombstone
	changes []Value
	buf     []byte // data of changes
	// Of the running history, what was given for a point that was passed.
	baseGiven bool
	given     int  // changes
	shown     bool // a version of the key was given
	stuck     bool // no image can be made until the next base
	failed    int  // keys that got stuck
}

// periodic is how many changes follow one another at most without an image, as a multiple
// of imageAfter.
const periodic = 32

func (f *folder) add(e Entry) error {
	if !f.started || e.Key != f.key {
		if err := f.end(); err != nil {
			return err
		}
		f.begin(e.Key)
	}
	if err := f.advance(e.LSN); err != nil {
		return err
	}
	// An image stands for all versions at its LSN, so it waits for the last of them.
	if e.LSN != f.last && len(f.changes) >= periodic*f.imageAfter {
		if err := f.foldPeriodically(); err != nil {
			return err
		}
	}
	f.last = e.LSN
	f.track(e)
	if f.pending() {
		return nil
	}
	return f.emit(e)
}

func (f *folder) begin(key keyspace.Key) {
	f.started, f.key, f.base, f.life, f.shown, f.stuck = true, key, nil, nil, false, false
	f.clearChanges()
	f.points, f.lives = []pg.LSN{f.cutoff}, nil
	if dir, ok := key.PageDir(); ok {
		if p, ok := f.dirs[dir]; ok {
			f.points, f.lives = p.points, p.lives
		}
	}
}

func (f *folder) pending() bool { return len(f.points) > 0 }

// advance passes the points, and the begins and ends of lives, that are below to.
func (f *folder) advance(to pg.LSN) error {
	for {
		turn, point := f.nextTurn(), maxLSN
		if f.pending() {
			point = f.points[0]
		}
		switch {
		case turn >= to && point >= to:
			return nil
		case turn < point || turn == point && f.life == nil: // at the LSN where it begins, a copy is one
			f.turn()
			continue
		}
		if err := f.settle(); err != nil {
			return err
		}
		// Nothing comes between the points up to there: one settlement is all of theirs.
		f.points = f.points[1:]
		n, _ := slices.BinarySearch(f.points, min(turn, to))
		f.points = f.points[n:]
	}
}

// nextTurn is where the life ends, or the next one begins.
func (f *folder) nextTurn() pg.LSN {
	switch {
	case f.life != nil:
		return f.life.end
	case len(f.lives) > 0:
		return f.lives[0].above
	}
	return maxLSN
}

// turn ends the life, or begins the next one. What was there before a begin is seen only by
// reads below it.
func (f *folder) turn() {
	if f.life != nil {
		f.life = nil
		f.stuck = f.stuck || f.base == nil && len(f.changes) > 0
		return
	}
	f.life, f.lives = &f.lives[0], f.lives[1:]
	f.base, f.stuck = nil, false
	f.clearChanges()
}

// track keeps the running history.
func (f *folder) track(e Entry) {
	if e.Kind != Delta {
		f.base, f.baseGiven = &Value{LSN: e.LSN, Kind: e.Kind, Data: slices.Clone(e.Data)}, false
		f.clearChanges()
		f.stuck = false
		return
	}
	if f.stuck && !f.pending() {
		return
	}
	n := len(f.buf)
	f.buf = append(f.buf, e.Data...)
	f.changes = append(f.changes, Value{LSN: e.LSN, Kind: Delta, Data: f.buf[n:len(f.buf):len(f.buf)]})
}

func (f *folder) clearChanges() {
	f.changes, f.buf, f.given = f.changes[:0], f.buf[:0], 0
}

func (f *folder) foldPeriodically() error {
	if !f.stuck {
		if err := f.fold(); err != nil {
			return err
		}
	}
	if f.stuck && f.pending() { // held back they would grow without bound
		return f.give()
	}
	return nil
}

// settle gives what is pending, for a read at the point.
func (f *folder) settle() error {
	wholeHistory := f.base != nil || f.lowest
	if len(f.changes) > 0 && !f.stuck && (wholeHistory || len(f.changes) >= f.imageAfter) {
		if err := f.fold(); err != nil {
			return err
		}
	}
	return f.give()
}

// give emits what is pending and was not given yet. At the lowest level a Tombstone hides only
// what was given, or what the key's folder is a copy of.
func (f *folder) give() error {
	if f.base != nil && !f.baseGiven && !(f.base.Kind == Tombstone && f.lowest && !f.shown && f.life == nil) {
		if err := f.emit(Entry{f.key, *f.base}); err != nil {
			return err
		}
		f.shown = true
	}
	f.baseGiven = true
	for _, v := range f.changes[f.given:] {
		if err := f.emit(Entry{f.key, v}); err != nil {
			return err
		}
		f.shown = true
	}
	f.given = len(f.changes)
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
	if err := f.advance(maxLSN); err != nil {
		return err
	}
	f.started = false
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
	if !h.hasBase() || f.materialize == nil {
		err = errNoBase
	} else {
		data, err = f.materialize(f.key, h)
	}
	if err != nil {
		f.stuck = true
		f.failed++
		if !f.pending() {
			f.clearChanges()
		}
		return nil
	}
	f.base, f.baseGiven = &Value{LSN: f.last, Kind: Image, Data: data}, false
	f.clearChanges()
	if f.pending() {
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
	case f.base == nil && (!f.lowest || f.life != nil) && f.materialize != nil:
		low, err := f.below(f.key, f.life)
		if err != nil {
			return h, err
		}
		h = low
		h.Changes = slices.Concat(low.Changes, f.changes)
	}
	return h, nil
}
