package layer

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"sort"
	"sync"

	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/internal/seal"
	"github.com/holdfastdb/holdfast/pageserver/keyspace"
)

// Reader reads a layer at any place. It holds the index and the filter; blocks are the
// caller's to keep or drop. It is safe for concurrent use.
type Reader struct {
	r      io.ReaderAt
	name   string
	props  Properties
	index  []byte
	blocks int
	filter filter
}

// Open opens the sealed layer of exactly size bytes that is the object c; open gives its key.
// Errors name the object.
func Open(ctx context.Context, r io.ReaderAt, size int64, c seal.Context, open seal.OpenFunc) (*Reader, error) {
	s, err := seal.NewReader(ctx, r, size, c, open)
	if err != nil {
		return nil, fmt.Errorf("layer %s: %w", c.Object, err)
	}
	l, err := openBody(s, s.Size(), c.Object)
	if err != nil {
		return nil, fmt.Errorf("layer %s: %w", c.Object, err)
	}
	return l, nil
}

func readFull(r io.ReaderAt, p []byte, off int64) error {
	if n, err := r.ReadAt(p, off); n < len(p) {
		return fmt.Errorf("reading %d bytes at %d: %w", len(p), off, err)
	}
	return nil
}

func openBody(r io.ReaderAt, size int64, name string) (*Reader, error) {
	if size < headerSize+trailerSize {
		return nil, fmt.Errorf("%w: %d bytes", ErrFormat, size)
	}
	var fixed [trailerSize]byte
	if err := readFull(r, fixed[:headerSize], 0); err != nil {
		return nil, err
	}
	if err := checkVersion(fixed[:8], fixed[8:16]); err != nil {
		return nil, err
	}
	if err := readFull(r, fixed[:], size-trailerSize); err != nil {
		return nil, err
	}
	t, err := parseTrailer(fixed[:], size)
	if err != nil {
		return nil, err
	}
	tail := make([]byte, t.tail()-trailerSize)
	if err := readFull(r, tail, t.indexOff); err != nil {
		return nil, err
	}
	n := t.blocks * indexEntry
	l := &Reader{r: r, name: name, index: tail[:n], blocks: t.blocks, filter: filter(tail[n : n+t.filter])}
	if l.props, err = parseProperties(tail[n+t.filter:]); err != nil {
		return nil, err
	}
	return l, l.checkIndex(t.indexOff)
}

// checkIndex sees that blocks are in order and lie one after the other up to end.
func (l *Reader) checkIndex(end int64) error {
	off := int64(headerSize)
	for i := range l.blocks {
		at, size, raw := l.place(i)
		if at != off || size < 2 || raw < entryHeader+8 || raw > maxBlock {
			return fmt.Errorf("%w: block %d has %d bytes, %d decompressed, at %d, want it at %d", ErrFormat, i, size, raw, at, off)
		}
		if i > 0 && l.above(i-1, keyspace.Key(l.entry(i)), l.lsn(i)) {
			return fmt.Errorf("%w: block %d is out of order", ErrFormat, i)
		}
		off += int64(size)
	}
	if off != end {
		return fmt.Errorf("%w: blocks end at %d, the index begins at %d", ErrFormat, off, end)
	}
	return nil
}

func (l *Reader) entry(i int) []byte { return l.index[i*indexEntry:][:keyspace.Size] }

func (l *Reader) lsn(i int) pg.LSN {
	return pg.LSN(binary.LittleEndian.Uint64(l.index[i*indexEntry+keyspace.Size:]))
}

func (l *Reader) place(i int) (off int64, size, raw uint32) {
	e := l.index[i*indexEntry+keyspace.Size+8:]
	return int64(binary.LittleEndian.Uint64(e)), binary.LittleEndian.Uint32(e[8:]), binary.LittleEndian.Uint32(e[12:])
}

// above tells whether block i begins above (key, lsn).
func (l *Reader) above(i int, key keyspace.Key, lsn pg.LSN) bool {
	return before(key, lsn, keyspace.Key(l.entry(i)), l.lsn(i))
}

// Properties describes the layer.
func (l *Reader) Properties() Properties { return l.props }

// Blocks is the number of blocks.
func (l *Reader) Blocks() int { return l.blocks }

// MayContain tells false only if no version of key is in the layer.
func (l *Reader) MayContain(key keyspace.Key) bool {
	return key.Compare(l.props.First) >= 0 && key.Compare(l.props.Last) <= 0 && l.filter.mayContain(hash(key))
}

// BlockOf is the number of the last block that can hold a version of key at or below lsn; -1 if
// none can. Older versions may be in the blocks before it.
func (l *Reader) BlockOf(key keyspace.Key, lsn pg.LSN) int {
	return sort.Search(l.blocks, func(i int) bool { return l.above(i, key, lsn) }) - 1
}

// BlockFrom is the number of the first block that can hold key or a greater one.
func (l *Reader) BlockFrom(key keyspace.Key) int {
	i := sort.Search(l.blocks, func(i int) bool {
		return keyspace.Key(l.entry(i)).Compare(key) >= 0
	})
	return max(i-1, 0)
}

// buffers hold blocks as they are in the file, for the time of a ReadBlock.
var buffers = sync.Pool{New: func() any { b := make([]byte, 0, blockTarget+1024); return &b }}

// ReadBlock reads and checks block i. The caller owns it.
func (l *Reader) ReadBlock(i int) (*Block, error) { return l.readInto(nil, i) }

// readInto is ReadBlock into memory that is used again if it is large enough.
func (l *Reader) readInto(room []byte, i int) (*Block, error) {
	if i < 0 || i >= l.blocks {
		return nil, fmt.Errorf("layer %s has no block %d", l.name, i)
	}
	off, size, raw := l.place(i)
	pooled := buffers.Get().(*[]byte)
	defer buffers.Put(pooled)
	if cap(*pooled) < int(size) {
		*pooled = make([]byte, 0, size)
	}
	buf := (*pooled)[:size]
	defer clear(buf) // the pool outlives the key
	b, err := l.readBlock(room, buf, off, int(raw))
	if err != nil {
		return nil, fmt.Errorf("layer %s, block %d: %w", l.name, i, err)
	}
	if k, lsn := b.at(0); k != keyspace.Key(l.entry(i)) || lsn != l.lsn(i) {
		return nil, fmt.Errorf("layer %s, block %d: %w: it is not the one of the index", l.name, i, ErrFormat)
	}
	return b, nil
}

func (l *Reader) readBlock(room, buf []byte, off int64, rawSize int) (*Block, error) {
	if err := readFull(l.r, buf, off); err != nil {
		return nil, err
	}
	raw, err := decompress(room, buf, rawSize)
	if err != nil {
		return nil, err
	}
	b, err := parseBlock(raw)
	if err != nil {
		clear(raw)
	}
	return b, err
}

// Iterator walks a layer's entries in order, without keeping blocks.
type Iterator struct {
	l     *Reader
	next  int // block
	block *Block
	i     int
	raw   []byte // memory for blocks, wiped
}

// Iterate starts at the first entry whose key is from or greater.
func (l *Reader) Iterate(from keyspace.Key) (*Iterator, error) {
	it := &Iterator{l: l, next: l.BlockFrom(from)}
	if err := it.load(); err != nil {
		return nil, err
	}
	it.i = it.block.From(from)
	return it, nil
}

func (it *Iterator) load() (err error) {
	it.Close()
	it.block, err = it.l.readInto(it.raw, it.next)
	if err == nil {
		it.raw = it.block.raw
	}
	it.next++
	it.i = 0
	return err
}

// Next gives the next entry, or false at the end. Its Data is lent until the next call.
func (it *Iterator) Next() (Entry, bool, error) {
	for it.block == nil || it.i == it.block.Len() {
		if it.next == it.l.blocks {
			return Entry{}, false, nil
		}
		if err := it.load(); err != nil {
			return Entry{}, false, err
		}
	}
	it.i++
	return it.block.Entry(it.i - 1), true, nil
}

// Close wipes the block that is held.
func (it *Iterator) Close() {
	if it.block != nil {
		it.block.Wipe()
		it.block = nil
	}
}
