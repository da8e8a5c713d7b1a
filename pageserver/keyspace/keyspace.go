// Package keyspace orders all that a branch's history describes: pages of relations and of
// SLRU areas, sizes, small files, counters. Each thing that has versions has one Key.
//
// Keys are 18 bytes, compared as bytes (big-endian numbers):
//
//	byte 0    1..4        5..8      9..12     13    14..17
//	kind      tablespace  database  relation  fork  block        relation page
//	kind      tablespace  database  relation  fork  0            relation size, grave of a dropped fork
//	kind      SLRU kind   0         0         0     page         SLRU page, list of an area's pages
//	kind      tablespace  database  0         0     0            a database's folder
//	kind      tablespace  database  0         0     0            a relation map (pg_filenode.map)
//	kind      tablespace  database  0         0     0            what a database's folder is a copy of
//	kind      0           0         0         0     xid          a two-phase state file
//	kind      first 17 bytes of SHA-256 of the path              a file that WAL does not know
//	kind      0           0         0         0     0            the branch's counters (checkpoint)
package keyspace

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"

	"github.com/holdfastdb/holdfast/internal/pg"
)

// Size is the length of a Key in bytes.
const Size = 18

// Key names one versioned thing of a branch.
type Key [Size]byte

// Compare orders keys.
func (k Key) Compare(o Key) int { return bytes.Compare(k[:], o[:]) }

// Kind is the kind of thing that a Key names. Its order is the order of keys.
type Kind uint8

// The kinds.
const (
	KindCheckpoint  Kind = 1 + iota // the branch's counters
	KindDatabase                    // value: the content of the folder's PG_VERSION
	KindRelMap                      // value: pg_filenode.map
	KindTwoPhase                    // value: the state file
	KindAuxFile                     // value: see Aux
	KindRelSize                     // value: number of blocks, 4 bytes little-endian
	KindDropped                     // value: number of blocks that a dropped fork had, as RelSize
	KindSLRUExtents                 // value: the pages that exist, as pairs (first, last) of 4 bytes little-endian
	KindSLRUPage                    // value: a page
	KindRelPage                     // value: a page
	KindCopy                        // value: where a copied folder's pages are (timeline.MarshalSources)
	kindEnd
)

// Parsed is what a Key says.
type Parsed struct {
	Kind  Kind
	Rel   pg.RelTag // RelPage, RelSize; its Tablespace and Database also for Database, RelMap and Copy
	Block pg.BlockNumber
	SLRU  pg.SLRUKind
	Page  uint32 // of the SLRU
	Xid   pg.TransactionID
}

// Parse reads a Key.
func Parse(k Key) (Parsed, error) {
	p := Parsed{Kind: Kind(k[0])}
	last := binary.BigEndian.Uint32(k[14:])
	switch p.Kind {
	case KindRelPage, KindRelSize, KindDropped, KindDatabase, KindRelMap, KindCopy:
		p.Rel = pg.RelTag{RelFileNode: pg.RelFileNode{Tablespace: pg.Oid(binary.BigEndian.Uint32(k[1:])),
			Database: pg.Oid(binary.BigEndian.Uint32(k[5:])), Relation: pg.Oid(binary.BigEndian.Uint32(k[9:]))},
			Fork: pg.ForkNumber(k[13])}
		p.Block = pg.BlockNumber(last)
	case KindSLRUPage, KindSLRUExtents:
		p.SLRU, p.Page = pg.SLRUKind(k[4]), last
	case KindTwoPhase:
		p.Xid = pg.TransactionID(last)
	case KindCheckpoint, KindAuxFile:
	default:
		return Parsed{}, fmt.Errorf("key %x: kind %d is not known", k[:], k[0])
	}
	return p, nil
}

func relKey(kind Kind, tag pg.RelTag, block uint32) Key {
	var k Key
	k[0] = byte(kind)
	binary.BigEndian.PutUint32(k[1:], uint32(tag.Tablespace))
	binary.BigEndian.PutUint32(k[5:], uint32(tag.Database))
	binary.BigEndian.PutUint32(k[9:], uint32(tag.Relation))
	k[13] = byte(tag.Fork)
	binary.BigEndian.PutUint32(k[14:], block)
	return k
}

// RelPage is the key of a block of a relation.
func RelPage(tag pg.RelTag, block pg.BlockNumber) Key { return relKey(KindRelPage, tag, uint32(block)) }

// RelSize is the key of the number of blocks in a fork of a relation.
func RelSize(tag pg.RelTag) Key { return relKey(KindRelSize, tag, 0) }

// Dropped is the key of what is remembered of a fork after it was dropped: how many pages of
// old life have to be hidden should its number come back.
func Dropped(tag pg.RelTag) Key { return relKey(KindDropped, tag, 0) }

// A Dir is a database's folder in a tablespace.
type Dir struct{ Tablespace, Database pg.Oid }

// Copy is the key of what a folder is a copy of.
func Copy(d Dir) Key {
	return relKey(KindCopy, pg.RelTag{RelFileNode: pg.RelFileNode{Tablespace: d.Tablespace, Database: d.Database}}, 0)
}

// PageDir is the folder that a relation's page is in; ok is false for other keys.
func (k Key) PageDir() (d Dir, ok bool) {
	return k.dir(), Kind(k[0]) == KindRelPage
}

// CopyDir is the folder that a Copy key is of; ok is false for other keys.
func (k Key) CopyDir() (d Dir, ok bool) {
	return k.dir(), Kind(k[0]) == KindCopy
}

func (k Key) dir() Dir {
	return Dir{pg.Oid(binary.BigEndian.Uint32(k[1:])), pg.Oid(binary.BigEndian.Uint32(k[5:]))}
}

// In is the key of the same thing in another folder.
func (k Key) In(d Dir) Key {
	binary.BigEndian.PutUint32(k[1:], uint32(d.Tablespace))
	binary.BigEndian.PutUint32(k[5:], uint32(d.Database))
	return k
}

// Database is the key of a database's folder.
func Database(tablespace, database pg.Oid) Key {
	return relKey(KindDatabase, pg.RelTag{RelFileNode: pg.RelFileNode{Tablespace: tablespace, Database: database}}, 0)
}

// RelMap is the key of a relation map; database is zero for the shared one.
func RelMap(tablespace, database pg.Oid) Key {
	return relKey(KindRelMap, pg.RelTag{RelFileNode: pg.RelFileNode{Tablespace: tablespace, Database: database}}, 0)
}

// SLRUPage is the key of a page of an SLRU area.
func SLRUPage(kind pg.SLRUKind, page uint32) Key {
	var k Key
	k[0], k[4] = byte(KindSLRUPage), byte(kind)
	binary.BigEndian.PutUint32(k[14:], page)
	return k
}

// SLRUExtents is the key of the list of an SLRU area's pages.
func SLRUExtents(kind pg.SLRUKind) Key {
	k := SLRUPage(kind, 0)
	k[0] = byte(KindSLRUExtents)
	return k
}

// TwoPhase is the key of a prepared transaction's state file.
func TwoPhase(xid pg.TransactionID) Key {
	var k Key
	k[0] = byte(KindTwoPhase)
	binary.BigEndian.PutUint32(k[14:], uint32(xid))
	return k
}

// AuxFile is the key of a file that WAL does not describe; its path is part of its value.
func AuxFile(path string) Key {
	var k Key
	k[0] = byte(KindAuxFile)
	sum := sha256.Sum256([]byte(path))
	copy(k[1:], sum[:])
	return k
}

// Checkpoint is the key of the branch's counters.
func Checkpoint() Key { return Key{byte(KindCheckpoint)} }

// KindRange is the half-open range of all keys of a kind.
func KindRange(kind Kind) (from, to Key) { return Key{byte(kind)}, Key{byte(kind) + 1} }

// DatabaseRange is the half-open range of the keys of a kind (RelPage or RelSize) in one
// database.
func DatabaseRange(kind Kind, tablespace, database pg.Oid) (from, to Key) {
	from = relKey(kind, pg.RelTag{RelFileNode: pg.RelFileNode{Tablespace: tablespace, Database: database}}, 0)
	return from, successor(from, 9)
}

// successor is the least key greater than all keys that share k's first n bytes.
func successor(k Key, n int) Key {
	clear(k[n:])
	for i := n - 1; i >= 0; i-- {
		k[i]++
		if k[i] != 0 {
			break
		}
	}
	return k
}
