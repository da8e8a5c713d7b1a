package timeline

import (
	"testing"

	"github.com/holdfastdb/holdfast/internal/pg"
)

// A note counts as long as its key has no newer version, wherever the versions are.
func TestNotes(t *testing.T) {
	r := filled(t, func(c *Config) { c.BlockCacheBytes = 1 << 20 })
	key := pageKey(100)
	at := r.m.last
	put := func(k int, kind ValueKind) pg.LSN {
		t.Helper()
		at += 8
		v := Value{LSN: at, Kind: kind, Data: []byte("x")}
		if kind == Tombstone {
			v.Data = nil
		}
		mustPut(t, r.tl, r.m, []Entry{{pageKey(k), v}}, at)
		return at
	}
	want := func(what string, lsn pg.LSN, value int) {
		t.Helper()
		got, ok := r.tl.Noted(t.Context(), key, lsn)
		if ok != (value >= 0) || ok && got != value {
			t.Errorf("%s: %d, %v; want %d", what, got, ok, value)
		}
	}
	put(100, Image)
	want("nothing is noted", at, -1)
	first := at
	r.tl.Note(key, at, 7)
	want("noted", at, 7)
	put(101, Image)
	want("another key changed", at, 7)
	want("before the note", first-8, -1)
	put(100, Delta)
	want("the key changed", at, -1)
	want("not yet there", at-8, 7)
	r.tl.Note(key, at, 9)
	r.tl.Note(key, first, 8)
	want("noted anew, and then something older", at, 9)
	for what, do := range map[string]func() error{
		"flushed":   func() error { return r.tl.Flush(t.Context()) },
		"compacted": func() error { return r.tl.Compact(t.Context()) },
	} {
		put(101, Delta)
		if err := do(); err != nil {
			t.Fatal(err)
		}
		want(what, at, 9)
	}
	put(100, Delta)
	if err := r.tl.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	put(101, Delta)
	want("changed, and flushed", at, -1)
	want("not yet there", at-16, 9)

	r.tl.Note(key, at, 10)
	put(101, Tombstone)
	want("something was cut: it is not known what compaction drops", at, -1)
	r.tl.Note(key, at-8, 10)
	want("noted from before", at, -1)
	put(101, Image)
	r.tl.Note(key, at, 11)
	want("noted since", at, 11)
	r.tl.notes.drop()
	r.tl.Note(key, at, 11)
	want("dropped", at, -1)
}
