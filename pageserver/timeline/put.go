package timeline

import (
	"context"
	"fmt"
	"time"

	"github.com/holdfastdb/holdfast/internal/pg"
)

// Put adds versions, in the order of their LSNs, and advances LastLSN to upTo. All of a
// record's versions, and nothing of a later record, come before upTo reaches its end: so
// entries are at or below upTo, and above the upTo of the call before (at it only while a
// branch is imported). The data is copied.
//
// It waits while too many frozen layers are not durable yet, and slows down before that. It
// puts all or nothing.
func (t *Timeline) Put(ctx context.Context, entries []Entry, upTo pg.LSN) error {
	if err := acquire(ctx, t.putting); err != nil {
		return err
	}
	defer func() { <-t.putting }()
	if err := t.checkPut(entries, upTo); err != nil {
		return fmt.Errorf("putting into branch %s: %w", t.cfg.Branch, err)
	}
	err := t.waitChange(ctx, func() bool { return len(t.mu.view.frozen) < t.cfg.MaxFrozen })
	if err != nil {
		return err
	}
	t.mu.Lock()
	open := t.mu.view.open
	t.mu.Unlock()
	t.notes.noteCut(entries) // before it shows
	if !open.insert(entries) {
		return t.Err()
	}
	waiting := t.inserted(open, entries, upTo)
	if waiting >= 2 {
		t.slowDown(ctx, entries)
	}
	return nil
}

func (t *Timeline) checkPut(entries []Entry, upTo pg.LSN) error {
	last := t.LastLSN()
	if upTo < last {
		return fmt.Errorf("up to %s, but %s was put already", upTo, last)
	}
	for i := range entries {
		e := &entries[i]
		switch {
		case e.LSN < last || e.LSN > upTo:
			return fmt.Errorf("entry %d of key %x has LSN %s, want %s to %s, in order", i, e.Key[:], e.LSN, last, upTo)
		case e.Kind < Image || e.Kind > Tombstone:
			return fmt.Errorf("entry %d of key %x has kind %d", i, e.Key[:], e.Kind)
		case len(e.Data) > MaxValue:
			return fmt.Errorf("entry %d of key %x has %d bytes, want at most %d", i, e.Key[:], len(e.Data), MaxValue)
		}
		if _, _, err := copyNoteOf(e); err != nil {
			return fmt.Errorf("entry %d of key %x: %w", i, e.Key[:], err)
		}
		last = e.LSN
	}
	return nil
}

// inserted makes the entries visible and freezes the table when it is full. It gives the
// number of frozen ones.
func (t *Timeline) inserted(open *memtable, entries []Entry, upTo pg.LSN) int {
	size := open.size()
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.mu.err != nil {
		return 0
	}
	if open.born.IsZero() && (size > 0 || upTo > t.mu.last) {
		open.born = time.Now()
	}
	t.noteCopiesLocked(entries)
	t.advanceLocked(upTo)
	if size >= t.cfg.FlushBytes {
		t.freezeLocked()
	}
	return len(t.mu.view.frozen)
}

// slowDown makes Put take about as long as flushing the same bytes does.
func (t *Timeline) slowDown(ctx context.Context, entries []Entry) {
	rate := t.flushRate.Load()
	if rate <= 0 {
		return
	}
	var bytes int64
	for i := range entries {
		bytes += int64(len(entries[i].Data)) + entryOverhead
	}
	d := time.Duration(float64(bytes) / float64(rate) * float64(time.Second))
	if d > 100*time.Microsecond {
		pause(ctx, min(d, time.Second))
	}
}

// freezeLocked makes the open table a frozen one that ends at LastLSN.
func (t *Timeline) freezeLocked() {
	old := t.mu.view
	old.open.end = t.mu.last
	frozen := append([]*memtable{old.open}, old.frozen...)
	t.setViewLocked(old.with(&memtable{}, frozen))
}

// Flush makes everything that was put durable.
func (t *Timeline) Flush(ctx context.Context) error {
	if err := acquire(ctx, t.putting); err != nil {
		return err
	}
	t.mu.Lock()
	target := t.mu.last
	if t.mu.err == nil && t.dirtyLocked() {
		t.freezeLocked()
	}
	t.mu.Unlock()
	<-t.putting
	return t.waitChange(ctx, func() bool {
		return len(t.mu.view.frozen) == 0 || pg.LSN(t.mu.view.frozen[len(t.mu.view.frozen)-1].end) > target
	})
}

// dirtyLocked tells whether the open table has anything that the frozen ones and the
// manifest have not.
func (t *Timeline) dirtyLocked() bool { return !t.mu.view.open.born.IsZero() }
