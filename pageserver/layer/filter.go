package layer

import (
	"encoding/binary"
	"math/bits"

	"github.com/holdfastdb/holdfast/pageserver/keyspace"
)

const (
	filterBits   = 10 // for each key: about 1 % of absent keys pass
	filterProbes = 7
)

// hash is part of the file format. It mixes a key's bytes 0..7, 8..15 and 16..17 as numbers
// with multiplications by odd constants (those of splitmix64) and folds.
func hash(k keyspace.Key) uint64 {
	h := mix(binary.LittleEndian.Uint64(k[0:]) ^ 0x9E3779B97F4A7C15)
	h = mix(h ^ binary.LittleEndian.Uint64(k[8:]))
	return mix(h ^ uint64(binary.LittleEndian.Uint16(k[16:])))
}

func mix(v uint64) uint64 {
	v ^= v >> 30
	v *= 0xBF58476D1CE4E5B9
	v ^= v >> 27
	v *= 0x94D049BB133111EB
	return v ^ v>>31
}

// filter is a Bloom filter. Probe i of a hash h is bit number
// high64((h + i*(h rotated left by 32 | 1)) * bits), bits being the filter's size.
type filter []byte

func makeFilter(hashes []uint64) filter {
	f := make(filter, max((len(hashes)*filterBits+7)/8, 8))
	for _, h := range hashes {
		for i := range filterProbes {
			bit := f.probe(h, i)
			f[bit/8] |= 1 << (bit % 8)
		}
	}
	return f
}

func (f filter) probe(h uint64, i int) uint64 {
	v := h + uint64(i)*(bits.RotateLeft64(h, 32)|1)
	hi, _ := bits.Mul64(v, uint64(len(f))*8)
	return hi
}

func (f filter) mayContain(h uint64) bool {
	if len(f) == 0 {
		return true
	}
	for i := range filterProbes {
		bit := f.probe(h, i)
		if f[bit/8]&(1<<(bit%8)) == 0 {
			return false
		}
	}
	return true
}
