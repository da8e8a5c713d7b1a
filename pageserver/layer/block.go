package layer

import (
	"encoding/binary"
	"fmt"
	"sort"

	"github.com/klauspost/compress/s2"

	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/pageserver/keyspace"
)

// Block is a decompressed block: plaintext.
type Block struct {
	raw []byte
	n   int
}

// parseBlock checks the whole of raw, so that the accessors need not.
func parseBlock(raw []byte) (*Block, error) {
	fail := func(format string, args ...any) (*Block, error) {
		return nil, fmt.Errorf("%w: block of %d bytes: %s", ErrFormat, len(raw), fmt.Sprintf(format, args...))
	}
	if len(raw) < entryHeader+8 {
		return fail("shorter than any")
	}
	n := int64(binary.LittleEndian.Uint32(raw[len(raw)-4:]))
	if n == 0 || n*(entryHeader+4) > int64(len(raw)-4) {
		return fail("%d entries do not fit", n)
	}
	b := &Block{raw: raw, n: int(n)}
	if b.offset(0) != 0 {
		return fail("the first entry is at %d", b.offset(0))
	}
	for i := range b.n {
		// offset(n) is where the table of offsets begins
		if int64(b.offset(i+1))-int64(b.offset(i)) < entryHeader || b.offset(i+1) > b.offset(b.n) {
			return fail("entry %d of %d goes from %d to %d", i, n, b.offset(i), b.offset(i+1))
		}
		if raw[b.offset(i)+entryHeader-1] == 0 {
			return fail("entry %d has kind 0", i)
		}
	}
	for i := 1; i < b.n; i++ {
		if k, l := b.at(i); b.above(i-1, k, l) {
			return fail("entry %d is out of order", i)
		}
	}
	return b, nil
}

func (b *Block) offset(i int) int {
	table := len(b.raw) - 4 - 4*b.n
	if i == b.n {
		return table
	}
	return int(binary.LittleEndian.Uint32(b.raw[table+4*i:]))
}

// at gives an entry's key and LSN.
func (b *Block) at(i int) (keyspace.Key, pg.LSN) {
	e := b.raw[b.offset(i):]
	return keyspace.Key(e[:keyspace.Size]), pg.LSN(binary.LittleEndian.Uint64(e[keyspace.Size:]))
}

// above tells whether entry i is above (key, lsn).
func (b *Block) above(i int, key keyspace.Key, lsn pg.LSN) bool {
	k, l := b.at(i)
	return before(key, lsn, k, l)
}

// Len is the number of entries.
func (b *Block) Len() int { return b.n }

// Size is the size in memory, in bytes.
func (b *Block) Size() int64 { return int64(len(b.raw)) }

// Entry gives an entry; its Data belongs to the block.
func (b *Block) Entry(i int) Entry {
	e := b.raw[b.offset(i):b.offset(i+1):b.offset(i+1)]
	return Entry{
		Key:  keyspace.Key(e[:keyspace.Size]),
		LSN:  pg.LSN(binary.LittleEndian.Uint64(e[keyspace.Size:])),
		Kind: e[entryHeader-1],
		Data: e[entryHeader:],
	}
}

// After is the number of the first entry above (key, lsn), or Len.
func (b *Block) After(key keyspace.Key, lsn pg.LSN) int {
	return sort.Search(b.n, func(i int) bool { return b.above(i, key, lsn) })
}

// From is the number of the first entry whose key is key or greater, or Len.
func (b *Block) From(key keyspace.Key) int {
	return sort.Search(b.n, func(i int) bool {
		k, _ := b.at(i)
		return k.Compare(key) >= 0
	})
}

// Wipe clears the plaintext. The block must not be used any more.
func (b *Block) Wipe() { clear(b.raw) }

// compress appends the block's form in the file.
func compress(dst, raw []byte) []byte {
	start := len(dst)
	dst = append(dst, codecS2)
	if need := start + 1 + s2.MaxEncodedLen(len(raw)); cap(dst) < need {
		dst = append(make([]byte, 0, need), dst...)
	}
	enc := s2.Encode(dst[start+1:cap(dst)], raw)
	if len(enc) >= len(raw) {
		dst[start] = codecStored
		return append(dst[:start+1], raw...)
	}
	return dst[:start+1+len(enc)]
}

// decompress undoes compress; rawSize is what the index promises. The result is in room if that is
// large enough.
func decompress(room, b []byte, rawSize int) ([]byte, error) {
	if len(b) < 1 {
		return nil, fmt.Errorf("%w: empty block", ErrFormat)
	}
	switch b[0] {
	case codecStored:
		if len(b)-1 != rawSize {
			return nil, fmt.Errorf("%w: stored block of %d bytes, want %d", ErrFormat, len(b)-1, rawSize)
		}
		return append(room[:0], b[1:]...), nil
	case codecS2:
		if n, err := s2.DecodedLen(b[1:]); err != nil || n != rawSize {
			return nil, fmt.Errorf("%w: block decompresses to %d bytes, want %d: %w", ErrFormat, n, rawSize, err)
		}
		if cap(room) < rawSize {
			room = make([]byte, rawSize)
		}
		raw, err := s2.Decode(room[:rawSize], b[1:])
		if err != nil {
			clear(room[:rawSize])
			return nil, fmt.Errorf("%w: block does not decompress: %w", ErrFormat, err)
		}
		return raw, nil
	}
	return nil, fmt.Errorf("%w: block with codec %d", ErrFormat, b[0])
}
