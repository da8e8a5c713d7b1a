package timeline

import (
	"cmp"
	"context"
	"encoding/binary"
	"fmt"
	"maps"
	"slices"
	"sort"

	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/pageserver/keyspace"
)

// CREATE DATABASE may be one record that says "this folder is a copy of that one". It is
// filed as one version of the new folder's Copy key, a note of where the copy's pages are until
// they are changed: docs/decisions/0011. A page of the copy is looked for under its own key,
// above the note's LSN; if that finds no base, then under the source's key as of the note; and
// so on, for a source that is a copy itself. A Tombstone of the Copy key ends the note.
//
// For compaction each source of a note that any read can meet is a further LSN at which the
// source's pages must stay readable, however old (P3).

// Source is a folder that another one was copied from. Of its pages the versions above Above,
// where the folder began if it was a copy itself, up to UpTo count.
type Source struct {
	Dir         keyspace.Dir
	Above, UpTo pg.LSN
}

const sourceBytes = 4 + 4 + 8 + 8

// MarshalSources gives the value of a Copy key: the copy's source, then the source's own, and
// so on. For each, little-endian: tablespace 4, database 4, Above 8, UpTo 8.
func MarshalSources(list []Source) []byte {
	b := make([]byte, 0, len(list)*sourceBytes)
	for _, s := range list {
		b = binary.LittleEndian.AppendUint32(b, uint32(s.Dir.Tablespace))
		b = binary.LittleEndian.AppendUint32(b, uint32(s.Dir.Database))
		b = binary.LittleEndian.AppendUint64(b, uint64(s.Above))
		b = binary.LittleEndian.AppendUint64(b, uint64(s.UpTo))
	}
	return b
}

// ParseSources reads the value of a Copy key.
func ParseSources(b []byte) ([]Source, error) {
	if len(b) == 0 || len(b)%sourceBytes != 0 {
		return nil, fmt.Errorf("the sources of a copy in %d bytes, want a multiple of %d", len(b), sourceBytes)
	}
	list := make([]Source, 0, len(b)/sourceBytes)
	for ; len(b) > 0; b = b[sourceBytes:] {
		s := Source{keyspace.Dir{Tablespace: pg.Oid(binary.LittleEndian.Uint32(b)), Database: pg.Oid(binary.LittleEndian.Uint32(b[4:]))},
			pg.LSN(binary.LittleEndian.Uint64(b[8:])), pg.LSN(binary.LittleEndian.Uint64(b[16:]))}
		if s.Above >= s.UpTo {
			return nil, fmt.Errorf("a copy of database %d above %s up to %s", s.Dir.Database, s.Above, s.UpTo)
		}
		list = append(list, s)
	}
	return list, nil
}

// copyNote is a version of a Copy key.
type copyNote struct {
	dir     keyspace.Dir
	lsn     pg.LSN
	sources []Source // nil: from here on the folder is no copy
}

// copyNoteOf reads e if it is a version of a Copy key; ok tells that.
func copyNoteOf(e *Entry) (n copyNote, ok bool, err error) {
	if n.dir, ok = e.Key.CopyDir(); !ok {
		return n, false, nil
	}
	n.lsn = e.LSN
	switch e.Kind {
	case Tombstone:
	case Image:
		n.sources, err = ParseSources(e.Data)
	default:
		err = fmt.Errorf("the sources of a copy as a value of kind %d", e.Kind)
	}
	return n, true, err
}

// copies is what the Copy keys say: each folder's notes in the order of their LSNs, as far as
// reads at or above the horizon need them. It does not change.
type copies map[keyspace.Dir][]copyNote

// at tells which versions of a key count at lsn, and on what they stand.
func (c copies) at(key keyspace.Key, lsn pg.LSN) (above pg.LSN, sources []Source) {
	if len(c) == 0 {
		return 0, nil
	}
	dir, ok := key.PageDir()
	if !ok {
		return 0, nil
	}
	notes := c[dir]
	i := sort.Search(len(notes), func(i int) bool { return notes[i].lsn > lsn })
	if i == 0 || notes[i-1].sources == nil {
		return 0, nil
	}
	return notes[i-1].lsn, notes[i-1].sources
}

// with is c and more notes, without what reads at or above horizon do not need.
func (c copies) with(notes []copyNote, horizon pg.LSN) copies {
	all := make(copies, len(c)+len(notes))
	maps.Copy(all, c)
	for _, n := range notes {
		all[n.dir] = append(slices.Clip(all[n.dir]), n)
	}
	for dir, list := range all {
		for len(list) > 0 && (list[0].sources == nil || len(list) > 1 && list[1].lsn <= horizon) {
			list = list[1:]
		}
		if all[dir] = list; len(list) == 0 {
			delete(all, dir)
		}
	}
	return all
}

// noteCopiesLocked takes the Copy keys of entries into the view.
func (t *Timeline) noteCopiesLocked(entries []Entry) {
	var notes []copyNote
	for i := range entries {
		// An error is impossible: who calls has read the entries.
		if n, ok, _ := copyNoteOf(&entries[i]); ok {
			notes = append(notes, n)
		}
	}
	if len(notes) > 0 {
		v := t.mu.view.with(t.mu.view.open, t.mu.view.frozen)
		v.copies = v.copies.with(notes, v.horizon)
		t.setViewLocked(v)
	}
}

// loadCopies reads the Copy keys from the layers, before anything is put.
func (t *Timeline) loadCopies(ctx context.Context) error {
	t.mu.Lock()
	v := t.holdLocked()
	t.mu.Unlock()
	defer t.release(v)
	var layers []*handle // oldest first
	for i := range v.parts {
		if base := v.parts[i].base; base != nil {
			layers = append(layers, base)
		}
		layers = appendBackward(layers, v.parts[i].stack)
	}
	layers = appendBackward(layers, v.flushed)
	from, to := keyspace.KindRange(keyspace.KindCopy)
	m, err := t.newMerger(ctx, layers, from, to, false)
	if err != nil {
		return err
	}
	defer m.close()
	var found []Entry
	for {
		e, more, err := m.next()
		if err != nil {
			return err
		}
		if !more {
			break
		}
		if _, _, err := copyNoteOf(&e); err != nil {
			return fmt.Errorf("key %x: %w", e.Key[:], err)
		}
		e.Data = slices.Clone(e.Data)
		found = append(found, e)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.noteCopiesLocked(found)
	return t.mu.err
}

func appendBackward(to, list []*handle) []*handle {
	for _, h := range slices.Backward(list) {
		to = append(to, h)
	}
	return to
}

// dirPlan says what a folder needs of those who rewrite the histories of its pages.
type dirPlan struct {
	points []pg.LSN // LSNs below the cutoff that must stay readable, and the cutoff; ascending
	lives  []life   // in order; they do not overlap
}

// A life is a time in which a folder is a copy. The versions in (above, end] stand on sources.
type life struct {
	above, end pg.LSN
	sources    []Source
}

// plan gives what is to be kept for reads at or above cutoff, by folder.
func (c copies) plan(cutoff pg.LSN) map[keyspace.Dir]dirPlan {
	plans := make(map[keyspace.Dir]dirPlan)
	for dir, notes := range c {
		for i, n := range notes {
			end := maxLSN
			if i+1 < len(notes) {
				end = notes[i+1].lsn
			}
			if n.sources == nil {
				continue
			}
			addLife(plans, dir, life{n.lsn, end, n.sources})
			if end > cutoff {
				addSources(plans, n.sources, cutoff)
			}
		}
	}
	for dir, p := range plans {
		slices.Sort(p.points)
		p.points = append(slices.Compact(p.points), cutoff)
		slices.SortFunc(p.lives, func(a, b life) int { return cmp.Compare(a.above, b.above) })
		plans[dir] = p
	}
	return plans
}

// addSources adds what the sources of a note need.
func addSources(plans map[keyspace.Dir]dirPlan, sources []Source, cutoff pg.LSN) {
	for i, s := range sources {
		if s.UpTo < cutoff {
			p := plans[s.Dir]
			p.points = append(p.points, s.UpTo)
			plans[s.Dir] = p
		}
		if rest := sources[i+1:]; len(rest) > 0 {
			addLife(plans, s.Dir, life{s.Above, s.UpTo, rest})
		}
	}
}

// addLife adds a life, which may be known in part already.
func addLife(plans map[keyspace.Dir]dirPlan, dir keyspace.Dir, l life) {
	p := plans[dir]
	if i := slices.IndexFunc(p.lives, func(o life) bool { return o.above == l.above }); i >= 0 {
		p.lives[i].end = max(p.lives[i].end, l.end)
	} else {
		p.lives = append(p.lives, l)
	}
	plans[dir] = p
}
