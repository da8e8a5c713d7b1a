// Package pagemask compares two copies of a PostgreSQL page: one that a server wrote and one
// that redo made. They may differ in bytes that belong to nothing, in hints, and in the little
// that WAL lacks. Mask blanks what may differ; the rest has to be equal, the LSN included.
//
// It is about whole pages at one LSN. What the image in a single record may differ in under
// wal_consistency_checking is another set, PostgreSQL's own: package pageserver/redo has that.
package pagemask

import (
	"bytes"
	"encoding/binary"
	"fmt"

	"github.com/holdfastdb/holdfast/internal/pg"
)

var le = binary.LittleEndian

// Kind says how a page is laid out.
type Kind int

// The kinds. Of a page of kind Other only bytes that belong to nothing are blanked.
const (
	Other Kind = iota
	Heap
	Btree
	Hash
	GIN
	Gist
	SPGist
	BRIN
	Sequence
)

func (k Kind) String() string {
	return [...]string{"other", "heap", "btree", "hash", "GIN", "GiST", "SP-GiST", "BRIN", "sequence"}[k]
}

// Allow is a set of things in which two copies may differ.
type Allow uint8

// What may be allowed.
const (
	// Hints are bits that PostgreSQL sets without WAL: of rows, line pointers and headers.
	Hints Allow = 1 << iota
	// AllVisible is PD_ALL_VISIBLE of a heap page, which moves without the page's LSN.
	AllVisible
	// Unlogged is what WAL lacks and somebody may still need: command ids and tokens of
	// speculative insertions in heap rows, the vacuum cycle of a btree page.
	Unlogged
	// Ahead lets WAL be ahead of a sequence by the values that it logs in advance.
	Ahead
)

// Place says what a page is.
type Place struct {
	Fork  pg.ForkNumber
	Block pg.BlockNumber // in the fork
	Kind  Kind
}

// Layout of the page header, a line pointer and a heap row (bufpage.h, itemid.h, htup_details.h).
const (
	offFlags   = 10
	offLower   = 12
	offUpper   = 14
	offSpecial = 16
	offPrune   = 20
	headerSize = 24

	pdHints      = 1 | 2 // PD_HAS_FREE_LINES, PD_PAGE_FULL
	pdAllVisible = 4

	lpNormal, lpDead = 1, 3

	rowXmin      = 0
	rowXmax      = 4
	rowCid       = 8
	rowCtid      = 12
	rowInfomask2 = 18
	rowInfomask  = 20
	rowHeader    = 23

	comboCid      = 0x0020
	xmaxLockOnly  = 0x0080
	xminBits      = 0x0300 // both: frozen, which is no hint
	xmaxCommitted = 0x0400
	xmaxInvalid   = 0x0800
	xmaxIsMulti   = 0x1000
	heapMoved     = 0xC000 // rowCid is no command id (before 9.0)
	speculative   = 0xFFFE // offset number in rowCtid: a token is in its block number
	firstNormal   = 3      // lesser transaction ids are those of ended, permanent transactions
)

// Ends of special areas, and flags there (hash.h, gist.h, spgist_private.h, brin_page.h,
// ginblock.h, nbtree.h, sequence.c).
const (
	specialSmall = pg.BlockSize - 8
	specialLarge = pg.BlockSize - 16

	idHash     = 0xFF80
	idGist     = 0xFF81
	idSPGist   = 0xFF82
	idBrinMeta = 0xF091
	idBrinMap  = 0xF092
	idBrinRows = 0xF093
	maxCycle   = 0xFF7F // of a btree page
	maxGIN     = 0x00FF // all of GIN's flags
	sequenceID = 0x1717

	ginDeleted   = 1 << 2
	hashRows     = 1<<0 | 1<<1 // overflow and bucket pages
	hashHasDead  = 1 << 7
	gistDeleted  = 1 << 2 // F_TUPLES_DELETED: recovery sets it in more cases
	gistGarbage  = 1 << 4
	spgistMeta   = 1 << 0
	brinEvacuate = 1 << 0
	btreeMeta    = 1 << 3
	btreeEnd     = 1 << 5 // BTP_SPLIT_END, which goes with the vacuum cycle
	btreeGarbage = 1 << 6

	sequenceRow = 41 // bytes: last_value, log_cnt and is_called after a row's header
)

// special is where the special area begins.
func special(p []byte) int { return int(le.Uint16(p[offSpecial:])) }

// KindOf tells from its special area what a page of a main fork is.
func KindOf(p []byte) Kind {
	id := le.Uint16(p[len(p)-2:])
	switch special(p) {
	case len(p):
		if !pg.IsNewPage(p) {
			return Heap
		}
	case specialLarge:
		switch {
		case id == idHash:
			return Hash
		case id == idGist:
			return Gist
		case id <= maxCycle:
			return Btree
		}
	case specialSmall:
		switch {
		case id == idSPGist:
			return SPGist
		case id == idBrinMeta || id == idBrinMap || id == idBrinRows:
			return BRIN
		case isSequence(p):
			return Sequence
		case id <= maxGIN:
			return GIN
		}
	}
	return Other
}

// isSequence tells a sequence's only page: its magic number, and one row of the right size. A
// page of GIN can have a right neighbour of that number, but no row of that size.
func isSequence(p []byte) bool {
	return le.Uint64(p[specialSmall:]) == sequenceID && le.Uint16(p[offLower:]) == headerSize+4 &&
		le.Uint32(p[headerSize:])>>17 == sequenceRow
}

// Empty tells a page that holds nothing and that no record has touched: zeros, or a header
// only, as when a relation is made longer before anything is logged.
func Empty(p []byte) bool {
	return pg.PageLSN(p) == pg.InvalidLSN && bytes.Count(p[headerSize:], []byte{0}) == len(p)-headerSize
}

// Mask blanks in p, which is as long as a page, what two copies of it may differ in.
func Mask(p []byte, at Place, allow Allow) error {
	switch {
	case at.Fork == pg.FSMFork:
		clear(p[headerSize : headerSize+4]) // where the next search begins
		return nil
	case at.Fork == pg.VMFork, Empty(p):
		clear(p[8:headerSize]) // where the map was made longer, a page has a header already
		return nil
	case pg.IsNewPage(p):
		return nil
	case at.Fork == pg.InitFork && allow != 0:
		clear(p[:8]) // it is written before it is logged
	}
	lower, upper, special := int(le.Uint16(p[offLower:])), int(le.Uint16(p[offUpper:])), special(p)
	if lower < headerSize || lower > upper || upper > special || special > len(p) {
		return fmt.Errorf("corrupt page header: lower %d, upper %d, special %d", lower, upper, special)
	}
	m := masking{p: p, at: at, allow: allow, lower: lower, upper: upper, special: special}
	m.hole()
	if allow != 0 && m.ownRules() {
		return nil
	}
	m.items()
	return nil
}

// masking is one page under work.
type masking struct {
	p                     []byte
	at                    Place
	allow                 Allow
	lower, upper, special int
}

func (m *masking) clear16(at int, bits uint16) {
	le.PutUint16(m.p[at:], le.Uint16(m.p[at:])&^bits)
}

func (m *masking) hole() {
	if m.special == specialSmall && le.Uint16(m.p[len(m.p)-2:]) == idBrinMap {
		return // all of it is row addresses
	}
	clear(m.p[m.lower:m.upper])
}

// ownRules blanks what is peculiar to a kind, outside rows. It tells whether nothing is left
// to be done.
func (m *masking) ownRules() (done bool) {
	p, hints := m.p, m.allow&Hints != 0
	switch m.at.Kind {
	case Heap, Btree:
		if hints {
			m.clear16(offFlags, pdHints)
			clear(p[offPrune:headerSize])
		}
		if m.at.Kind == Heap && m.allow&AllVisible != 0 {
			m.clear16(offFlags, pdAllVisible)
		}
		if m.at.Kind == Btree && m.special == specialLarge {
			return m.btree()
		}
	case GIN:
		if hints && m.special == specialSmall && le.Uint16(p[len(p)-2:]) == ginDeleted {
			clear(p[8 : len(p)-2]) // was in the pending list: the primary leaves it as it is
			return true
		}
	case BRIN:
		if hints && m.special == specialSmall {
			m.clear16(len(p)-4, brinEvacuate)
		}
	case Hash:
		if hints && m.special == specialLarge {
			m.clear16(m.special+12, hashHasDead)
		}
	case SPGist:
		if hints && m.special == specialSmall && p[m.special]&spgistMeta != 0 {
			clear(p[headerSize:m.lower]) // which pages were used last
		}
	case Gist:
		if hints && m.special == specialLarge {
			m.clear16(m.special+12, gistDeleted|gistGarbage)
		}
	}
	return false
}

func (m *masking) btree() (done bool) {
	if m.allow&Hints != 0 {
		m.clear16(m.special+12, btreeGarbage)
	}
	if m.allow&Unlogged != 0 {
		m.clear16(m.special+12, btreeEnd)
		clear(m.p[m.special+14:])
	}
	return le.Uint16(m.p[m.special+12:])&btreeMeta != 0 // it has no line pointers
}

// deadIsHint tells whether a line pointer may be dead on one side only.
func (m *masking) deadIsHint() bool {
	switch m.at.Kind {
	case Btree, Gist:
		return true
	case Hash:
		return m.special == specialLarge && m.p[m.special+12]&hashRows != 0
	}
	return false
}

// items goes through the rows, and blanks what is between them.
func (m *masking) items() {
	var used [pg.BlockSize]bool
	dead := m.allow&Hints != 0 && m.deadIsHint()
	for n, at := 1, headerSize; at+4 <= m.lower; n, at = n+1, at+4 {
		off, flags, size := item(m.p, at)
		if size == 0 || off+size > len(m.p) {
			continue
		}
		for i := off; i < off+size; i++ {
			used[i] = true
		}
		row := m.p[off : off+size]
		switch {
		case dead && flags == lpDead:
			le.PutUint32(m.p[at:], le.Uint32(m.p[at:])&^(3<<15)|lpNormal<<15)
		case m.at.Kind == Heap && flags == lpNormal && size >= rowHeader:
			m.row(row, n)
		case m.at.Kind == Sequence && size == sequenceRow && m.allow&Ahead != 0:
			clear(row[headerSize:])
		}
	}
	for i := m.upper; i < m.special; i++ {
		if !used[i] {
			m.p[i] = 0
		}
	}
}

// item reads the line pointer at a position of the page.
func item(p []byte, at int) (off, flags, size int) {
	v := le.Uint32(p[at:])
	return int(v & 0x7FFF), int(v >> 15 & 3), int(v >> 17)
}

// row blanks a heap row's header.
func (m *masking) row(t []byte, n int) {
	info := le.Uint16(t[rowInfomask:])
	if m.allow&Hints != 0 {
		info &^= xmaxCommitted | xmaxInvalid
		if info&xminBits != xminBits {
			info &^= xminBits
		}
	}
	if m.allow&Unlogged != 0 && info&heapMoved == 0 {
		info &^= comboCid
		clear(t[rowCid:rowCtid])
		if le.Uint16(t[rowCtid+4:]) == speculative {
			le.PutUint16(t[rowCtid:], uint16(m.at.Block>>16))
			le.PutUint16(t[rowCtid+2:], uint16(m.at.Block))
			le.PutUint16(t[rowCtid+4:], uint16(n))
		}
	}
	le.PutUint16(t[rowInfomask:], info)
}

// Difference is the first byte in which two masked copies differ, or -1.
func Difference(a, b []byte) int {
	if bytes.Equal(a, b) {
		return -1
	}
	for i := range a {
		if a[i] != b[i] {
			return i
		}
	}
	return len(a)
}
