package timeline

import (
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/pageserver/keyspace"
)

const (
	arenaChunk = 1 << 20
	nodeChunk  = 1 << 12
	lentBytes  = 1 << 16
	// entryOverhead is about what a version costs in memory beside its data, in bytes.
	entryOverhead = 48
)

// memtable is a layer in memory. A key's versions are a chain from the newest to the
// oldest; chains, versions and data grow in chunks that never move, so that an insert
// allocates nothing most of the time. One goroutine inserts; any number read meanwhile.
type memtable struct {
	refs atomic.Int64 // views that have it; the last one wipes it
	// born is when the first version came; end is the LSN up to which all versions are in this
	// table or older ones, once it is frozen. Timeline.mu guards both.
	born time.Time
	end  pg.LSN

	mu struct {
		sync.RWMutex
		// slots are the keys, by kind (a scan reads one kind's), each with its place in heads,
		// which has its newest version: another version of a key needs one look, and no write, in a map.
		slots    [256]map[keyspace.Key]uint32
		heads    []uint32
		lastKey  keyspace.Key // the key of the last insert: often the next one's
		lastSlot uint32
		nodes    [][]node
		count    uint32
		arena    [][]byte
		bytes    int64
		wiped    bool
	}
}

// node is one version.
type node struct {
	lsn   pg.LSN
	chunk uint32
	off   uint32
	size  uint32
	older uint32 // number of the next older version of the key, plus one; 0: none
	kind  ValueKind
}

// errWiped means that the table's data is gone since the timeline failed.
var errWiped = errors.New("the layer in memory was wiped")

func (m *memtable) release() {
	if m.refs.Add(-1) == 0 {
		m.wipe()
	}
}

// wipe clears the data: nothing that was in the table stays in memory (K2). It tells how many
// versions that were.
func (m *memtable) wipe() (versions int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, c := range m.mu.arena {
		clear(c[:cap(c)])
	}
	versions = int(m.mu.count)
	m.mu.arena, m.mu.nodes, m.mu.count = nil, nil, 0
	m.mu.slots, m.mu.heads = [256]map[keyspace.Key]uint32{}, nil
	m.mu.wiped = true
	return versions
}

// insertBatch is how many entries are inserted under one lock, so that readers wait shortly.
const insertBatch = 128

// insert adds entries; it tells false if the table was wiped.
func (m *memtable) insert(entries []Entry) bool {
	for len(entries) > 0 {
		n := min(len(entries), insertBatch)
		if !m.insertSome(entries[:n]) {
			return false
		}
		entries = entries[n:]
	}
	return true
}

func (m *memtable) insertSome(entries []Entry) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.mu.wiped {
		return false
	}
	for i := range entries {
		e := &entries[i]
		number := m.mu.count
		if number%nodeChunk == 0 {
			m.mu.nodes = append(m.mu.nodes, make([]node, nodeChunk))
		}
		n := &m.mu.nodes[number/nodeChunk][number%nodeChunk]
		n.lsn, n.kind, n.size = e.LSN, e.Kind, uint32(len(e.Data))
		n.chunk, n.off = m.storeLocked(e.Data)
		head := m.headLocked(e.Key)
		n.older = *head
		*head = number + 1
		m.mu.count++
		m.mu.bytes += int64(len(e.Data)) + entryOverhead
	}
	return true
}

// headLocked is the number of the key's newest version, plus one; 0: it has none yet.
func (m *memtable) headLocked(key keyspace.Key) *uint32 {
	if key == m.mu.lastKey && len(m.mu.heads) > 0 {
		return &m.mu.heads[m.mu.lastSlot]
	}
	slots := m.mu.slots[key[0]]
	if slots == nil {
		slots = make(map[keyspace.Key]uint32)
		m.mu.slots[key[0]] = slots
	}
	slot, ok := slots[key]
	if !ok {
		slot = uint32(len(m.mu.heads))
		slots[key] = slot
		m.mu.heads = append(m.mu.heads, 0)
	}
	m.mu.lastKey, m.mu.lastSlot = key, slot
	return &m.mu.heads[slot]
}

// storeLocked copies data into the arena.
func (m *memtable) storeLocked(data []byte) (chunk, off uint32) {
	last := len(m.mu.arena) - 1
	if last < 0 || cap(m.mu.arena[last])-len(m.mu.arena[last]) < len(data) {
		m.mu.arena = append(m.mu.arena, make([]byte, 0, max(arenaChunk, len(data))))
		last++
	}
	c := m.mu.arena[last]
	m.mu.arena[last] = append(c, data...)
	return uint32(last), uint32(len(c))
}

func (m *memtable) nodeLocked(number uint32) *node {
	return &m.mu.nodes[number/nodeChunk][number%nodeChunk]
}

func (m *memtable) dataLocked(n *node) []byte {
	return m.mu.arena[n.chunk][n.off : n.off+n.size : n.off+n.size]
}

func (m *memtable) size() int64 {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return m.mu.bytes
}

// collect gives c the key's versions at or below lsn.
func (m *memtable) collect(key keyspace.Key, lsn pg.LSN, c *collector) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	slot, ok := m.mu.slots[key[0]][key]
	if !ok {
		return
	}
	for next := m.mu.heads[slot]; next != 0; {
		n := m.nodeLocked(next - 1)
		if n.lsn <= lsn && c.add(n.lsn, n.kind, m.dataLocked(n)) {
			return
		}
		next = n.older
	}
}

// keyHead is a key and the number of a version of it.
type keyHead struct {
	key  keyspace.Key
	head uint32
}

// between lists the keys of [from, to) in order, each with its newest version at or below lsn.
func (m *memtable) between(from, to keyspace.Key, lsn pg.LSN) []keyHead {
	m.mu.RLock()
	defer m.mu.RUnlock()
	var out []keyHead
	for kind := int(from[0]); kind <= int(to[0]); kind++ {
		for key, slot := range m.mu.slots[kind] {
			if key.Compare(from) < 0 || key.Compare(to) >= 0 {
				continue
			}
			for next := m.mu.heads[slot]; next != 0; {
				n := m.nodeLocked(next - 1)
				if n.lsn <= lsn {
					out = append(out, keyHead{key, next - 1})
					break
				}
				next = n.older
			}
		}
	}
	slices.SortFunc(out, func(a, b keyHead) int { return a.key.Compare(b.key) })
	return out
}

// value copies one version out.
func (m *memtable) value(number uint32) (Value, bool) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	if m.mu.wiped {
		return Value{}, false
	}
	n := m.nodeLocked(number)
	return Value{LSN: n.lsn, Kind: n.kind, Data: slices.Clone(m.dataLocked(n))}, true
}

// all calls fn for each version, in the order of keys, then of insertion, with how many the key
// has. The table is frozen; the data is only lent. The table is not locked while fn runs: fn
// may read it, which a wipe that waits for the lock would stop for ever.
func (m *memtable) all(fn func(e Entry, ofKey int) error) error {
	m.mu.RLock()
	var keys []keyHead
	for _, slots := range m.mu.slots {
		for key, slot := range slots {
			keys = append(keys, keyHead{key, m.mu.heads[slot] - 1})
		}
	}
	m.mu.RUnlock()
	slices.SortFunc(keys, func(a, b keyHead) int { return a.key.Compare(b.key) })
	var l lent
	defer func() { clear(l.data[:cap(l.data)]) }() // K2
	for _, k := range keys {
		if err := m.chain(k, &l); err != nil {
			return err
		}
		for ofKey := len(l.chain); len(l.chain) > 0; {
			if err := m.lend(k.key, &l); err != nil {
				return err
			}
			for _, e := range l.entries {
				if err := fn(e, ofKey); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// lent is what all copied out of the table.
type lent struct {
	chain   []uint32 // versions that are still to come, newest first
	entries []Entry
	data    []byte // of entries
}

// chain lists the versions of a key.
func (m *memtable) chain(k keyHead, l *lent) error {
	m.mu.RLock()
	defer m.mu.RUnlock()
	if m.mu.wiped {
		return errWiped
	}
	l.chain = l.chain[:0]
	for next := k.head + 1; next != 0; next = m.nodeLocked(next - 1).older {
		l.chain = append(l.chain, next-1)
	}
	return nil
}

// lend copies the next versions of a key, as many as fit into l.data but at least one.
func (m *memtable) lend(key keyspace.Key, l *lent) error {
	m.mu.RLock()
	defer m.mu.RUnlock()
	if m.mu.wiped {
		return errWiped
	}
	l.entries, l.data = l.entries[:0], l.data[:0]
	for i := len(l.chain) - 1; i >= 0; i-- {
		n := m.nodeLocked(l.chain[i])
		off, size := len(l.data), int(n.size)
		if cap(l.data)-off < size {
			if off > 0 {
				break
			}
			clear(l.data[:cap(l.data)])
			l.data = make([]byte, 0, max(size, lentBytes))
		}
		l.data = append(l.data, m.dataLocked(n)...)
		l.entries = append(l.entries, Entry{key, Value{LSN: n.lsn, Kind: n.kind, Data: l.data[off:len(l.data):len(l.data)]}})
		l.chain = l.chain[:i]
	}
	return nil
}
