package timeline

import (
	"slices"

	"github.com/holdfastdb/holdfast/internal/pg"
)

// collector gathers a key's versions from the newest back to the first one that needs no
// older one. It copies the data, so that the caller of Get owns what it gets.
type collector struct {
	history History // Changes newest first
	// floor is an image that stands for all versions at or below its LSN, or nil. It counts
	// only once such a version is met: if there is none, a Tombstone above it was, and was
	// dropped by compaction together with all that it hid.
	floor *Value
	// above bounds the versions that count: what is at or below it belongs to a folder that
	// was at the same place before.
	above pg.LSN
	done  bool // no older version is needed
	whole bool // nothing shows through from below the versions: there is a base, or a Tombstone
	peek  bool // only whether there is a version counts, which met tells
	met   bool
	buf   []byte
}

// add takes the next older version and tells whether it was the last one needed.
func (c *collector) add(lsn pg.LSN, kind ValueKind, data []byte) bool {
	if lsn <= c.above {
		c.done = true
		return true
	}
	if c.peek {
		c.met, c.done = true, true
		return true
	}
	if c.floor != nil && lsn <= c.floor.LSN {
		c.history.Base, c.done, c.whole = c.floor, true, true
		return true
	}
	switch kind {
	case Delta:
		c.history.Changes = append(c.history.Changes, Value{LSN: lsn, Kind: kind, Data: c.copy(data)})
	case Tombstone:
		c.done, c.whole = true, true
	default:
		c.history.Base = &Value{LSN: lsn, Kind: kind, Data: c.copy(data)}
		c.done, c.whole = true, true
	}
	return c.done
}

// copy packs small values into common allocations.
func (c *collector) copy(data []byte) []byte {
	if len(data) >= 1024 {
		return slices.Clone(data)
	}
	if cap(c.buf)-len(c.buf) < len(data) {
		c.buf = make([]byte, 0, max(len(data), 2*cap(c.buf), 256))
	}
	n := len(c.buf)
	c.buf = append(c.buf, data...)
	return c.buf[n:len(c.buf):len(c.buf)]
}

// result puts the changes in the order of their LSNs.
func (c *collector) result() History {
	slices.Reverse(c.history.Changes)
	return c.history
}
