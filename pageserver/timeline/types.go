package timeline

import (
	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/pageserver/keyspace"
)

// ValueKind says what a version's data is.
type ValueKind uint8

// The kinds of versions.
const (
	// Image is the whole value: a page, a size, a file.
	Image ValueKind = iota + 1
	// Init is a WAL record that makes the page from nothing: older versions are not needed.
	Init
	// Delta is a WAL record that changes the page that the older versions make.
	Delta
	// Tombstone says that the thing exists no longer; it has no data.
	Tombstone
)

// Value is one version of the thing that a key names.
type Value struct {
	LSN  pg.LSN // of the WAL record's end: it is visible to reads at this LSN and later
	Kind ValueKind
	Data []byte
}

// Entry is a Value under its key.
type Entry struct {
	Key keyspace.Key
	Value
}

// History is what a thing's value at an LSN is made of: an optional base, then changes in
// the order of their LSNs.
type History struct {
	Base    *Value  // an Image or Init; nil if there is none, or it is behind a Tombstone
	Changes []Value // Deltas above the base
	// Origin is the base in place of Base, if the page was made as a copy of another one and
	// has had no base of its own since.
	Origin *Origin
}

// Origin is the page that another one was copied from, as of then. Its records name it by its
// own key.
type Origin struct {
	Key keyspace.Key
	History
}

// Exists tells whether the thing has any version that counts.
func (h *History) Exists() bool { return h.hasBase() || len(h.Changes) > 0 }

func (h *History) hasBase() bool { return h.Base != nil || h.Origin != nil }
