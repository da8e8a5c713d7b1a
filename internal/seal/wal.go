package seal

import (
	"encoding/binary"
	"fmt"
	"slices"

	"github.com/holdfastdb/holdfast/internal/pg"
)

const walAAD = "holdfast wal v1\n"

func (s *scratch) setWAL(c Context, begin, end pg.LSN, counter uint64) {
	s.setNonce(domainWAL, counter)
	s.aad = append(s.aad[:0], walAAD...)
	s.aad = c.AppendTo(s.aad)
	s.aad = binary.LittleEndian.AppendUint64(s.aad, uint64(begin))
	s.aad = binary.LittleEndian.AppendUint64(s.aad, uint64(end))
}

// SealWAL appends to dst one stretch [begin, end) of WAL, sealed: as many bytes as plain
// has and TagSize more. c is the WAL segment that the key is of. Under one key, counters
// must rise from call to call; what was sealed once is kept and never sealed again under
// the same counter.
//
// The nonce is {2, 0, 0, 0} and the counter (8 bytes, big-endian); the AAD is "holdfast wal v1\n",
// the context, begin and end (8 bytes each, little-endian).
func SealWAL(dst []byte, k *Key, c Context, begin, end pg.LSN, counter uint64, plain []byte) ([]byte, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	if err := k.claimWAL(counter); err != nil {
		return nil, fmt.Errorf("sealing WAL %s to %s, %s: %w", begin, end, c, err)
	}
	s := scratches.Get().(*scratch)
	defer scratches.Put(s)
	s.setWAL(c, begin, end, counter)
	sealed, err := k.seal(slices.Grow(dst, len(plain)+TagSize), s, plain)
	if err != nil {
		return nil, fmt.Errorf("sealing WAL %s to %s, %s: %w", begin, end, c, err)
	}
	return sealed, nil
}

// OpenWAL appends to dst the WAL that was sealed with the same arguments.
func OpenWAL(dst []byte, k *Key, c Context, begin, end pg.LSN, counter uint64, sealed []byte) ([]byte, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	s := scratches.Get().(*scratch)
	defer scratches.Put(s)
	s.setWAL(c, begin, end, counter)
	plain, err := k.open(slices.Grow(dst, max(len(sealed)-TagSize, 0)), s, sealed)
	if err != nil {
		return nil, fmt.Errorf("opening WAL %s to %s, %s: %w", begin, end, c, err)
	}
	return plain, nil
}
