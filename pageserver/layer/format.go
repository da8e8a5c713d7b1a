package layer

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/pageserver/keyspace"
)

// ErrFormat means that the plaintext is no layer: since the seal was right, whoever wrote it
// was wrong, or is newer.
var ErrFormat = errors.New("not a layer of a known format")

const (
	magic       = "HFLAYER\n"
	version     = 1
	headerSize  = 16
	trailerSize = 32
	propsSize   = 2*keyspace.Size + 5*8
	indexEntry  = keyspace.Size + 24
	entryHeader = keyspace.Size + 9

	// blockTarget is the size at which a block ends, before compression.
	blockTarget = 32 << 10
	// MaxData bounds the data of one entry, in bytes.
	MaxData  = 64 << 20
	maxBlock = MaxData + blockTarget + 1024

	codecStored = 0
	codecS2     = 1
)

// Entry is one version. Kind is the caller's; it is not zero.
type Entry struct {
	Key  keyspace.Key
	LSN  pg.LSN
	Kind uint8
	Data []byte
}

// before orders entries.
func before(k keyspace.Key, l pg.LSN, k2 keyspace.Key, l2 pg.LSN) bool {
	if c := k.Compare(k2); c != 0 {
		return c < 0
	}
	return l < l2
}

// Properties describe a layer.
type Properties struct {
	First, Last    keyspace.Key
	MinLSN, MaxLSN pg.LSN
	Entries, Keys  uint64
	DataBytes      uint64
}

func (p *Properties) appendTo(b []byte) []byte {
	b = append(b, p.First[:]...)
	b = append(b, p.Last[:]...)
	for _, v := range [...]uint64{uint64(p.MinLSN), uint64(p.MaxLSN), p.Entries, p.Keys, p.DataBytes} {
		b = binary.LittleEndian.AppendUint64(b, v)
	}
	return b
}

func parseProperties(b []byte) (p Properties, err error) {
	copy(p.First[:], b)
	copy(p.Last[:], b[keyspace.Size:])
	b = b[2*keyspace.Size:]
	num := func(i int) uint64 { return binary.LittleEndian.Uint64(b[8*i:]) }
	p.MinLSN, p.MaxLSN = pg.LSN(num(0)), pg.LSN(num(1))
	p.Entries, p.Keys, p.DataBytes = num(2), num(3), num(4)
	if p.Last.Compare(p.First) < 0 || p.MaxLSN < p.MinLSN || p.Keys == 0 || p.Entries < p.Keys {
		return p, fmt.Errorf("%w: its properties contradict one another", ErrFormat)
	}
	return p, nil
}

func appendHeader(b []byte) []byte {
	b = append(b, magic...)
	b = binary.LittleEndian.AppendUint16(b, version)
	return append(b, 0, 0, 0, 0, 0, 0)
}

// checkVersion reads a magic and version, in either place.
func checkVersion(m, v []byte) error {
	if string(m) != magic {
		return fmt.Errorf("%w: magic is %q, want %q", ErrFormat, m, magic)
	}
	if n := binary.LittleEndian.Uint64(v) & (1<<48 - 1); n != version {
		return fmt.Errorf("%w: version is %d, this program reads %d", ErrFormat, n, version)
	}
	return nil
}

// trailer says where the parts are.
type trailer struct {
	indexOff int64
	blocks   int
	filter   int
}

func (t trailer) appendTo(b []byte) []byte {
	b = binary.LittleEndian.AppendUint64(b, uint64(t.indexOff))
	b = binary.LittleEndian.AppendUint32(b, uint32(t.blocks))
	b = binary.LittleEndian.AppendUint32(b, uint32(t.filter))
	b = binary.LittleEndian.AppendUint16(b, version)
	b = append(b, 0, 0, 0, 0, 0, 0)
	return append(b, magic...)
}

// tail is the size of what follows the blocks.
func (t trailer) tail() int64 {
	return int64(t.blocks)*indexEntry + int64(t.filter) + propsSize + trailerSize
}

func parseTrailer(b []byte, size int64) (t trailer, err error) {
	var v [8]byte
	copy(v[:], b[16:22])
	if err := checkVersion(b[24:32], v[:]); err != nil {
		return t, err
	}
	off := binary.LittleEndian.Uint64(b)
	t.blocks = int(binary.LittleEndian.Uint32(b[8:]))
	t.filter = int(binary.LittleEndian.Uint32(b[12:]))
	if off > uint64(size) || t.blocks == 0 || int64(off)+t.tail() != size {
		return t, fmt.Errorf("%w: %d bytes, with an index of %d blocks at %d and a filter of %d", ErrFormat, size, t.blocks, off, t.filter)
	}
	t.indexOff = int64(off)
	return t, nil
}
