package memscan

import (
	"encoding/binary"
	"fmt"
	"math/bits"
)

// roundKey is a part of a key's expansion.
type roundKey struct {
	form string
	key  [16]byte
}

const rounds = 14 // of AES-256

// roundKeys expands an AES-256 key as FIPS 197 section 5.2 says, for encryption, and section
// 5.3.5 for decryption by the equivalent inverse cipher, which is what processors' AES instructions use.
func roundKeys(key [32]byte) []roundKey {
	const nk, words = 8, 4 * (rounds + 1)
	var w [words]uint32
	for i := range nk {
		w[i] = binary.BigEndian.Uint32(key[4*i:])
	}
	rcon := byte(1)
	for i := nk; i < words; i++ {
		t := w[i-1]
		switch i % nk {
		case 0:
			t = subWord(bits.RotateLeft32(t, 8)) ^ uint32(rcon)<<24
			rcon = times2(rcon)
		case 4:
			t = subWord(t)
		}
		w[i] = w[i-nk] ^ t
	}
	var keys []roundKey
	for r := range rounds + 1 {
		k := roundKey{form: fmt.Sprintf("round key %d", r)}
		inverse := roundKey{form: fmt.Sprintf("inverse round key %d", r)}
		for i, word := range w[4*r : 4*r+4] {
			binary.BigEndian.PutUint32(k.key[4*i:], word)
			binary.BigEndian.PutUint32(inverse.key[4*i:], unmixColumn(word))
		}
		keys = append(keys, k)
		if 0 < r && r < rounds {
			keys = append(keys, inverse)
		}
	}
	return keys
}

// turnWords gives the words in the other byte order, as code without AES instructions holds them.
func turnWords(key [16]byte) []byte {
	var turned [16]byte
	for i := 0; i < len(key); i += 4 {
		binary.LittleEndian.PutUint32(turned[i:], binary.BigEndian.Uint32(key[i:]))
	}
	return turned[:]
}

func times2(b byte) byte {
	if b&0x80 != 0 {
		return b<<1 ^ 0x1b
	}
	return b << 1
}

// times multiplies in AES's field.
func times(a, b byte) (product byte) {
	for ; b > 0; b >>= 1 {
		if b&1 != 0 {
			product ^= a
		}
		a = times2(a)
	}
	return product
}

var sbox = makeSBox()

// makeSBox is FIPS 197 section 5.1.1: the inverse in the field, then an affine map.
func makeSBox() (box [256]byte) {
	for i := range 256 {
		var inverse byte
		for x := 1; x < 256; x++ {
			if times(byte(i), byte(x)) == 1 {
				inverse = byte(x)
				break
			}
		}
		box[i] = inverse ^ bits.RotateLeft8(inverse, 1) ^ bits.RotateLeft8(inverse, 2) ^ bits.RotateLeft8(inverse, 3) ^ bits.RotateLeft8(inverse, 4) ^ 0x63
	}
	return box
}

func subWord(w uint32) uint32 {
	return uint32(sbox[w>>24])<<24 | uint32(sbox[w>>16&0xff])<<16 | uint32(sbox[w>>8&0xff])<<8 | uint32(sbox[w&0xff])
}

// unmixColumn is InvMixColumns of one column, FIPS 197 section 5.3.3.
func unmixColumn(w uint32) uint32 {
	in := [4]byte{byte(w >> 24), byte(w >> 16), byte(w >> 8), byte(w)}
	var out uint32
	for i := range 4 {
		b := times(in[i], 0x0e) ^ times(in[(i+1)%4], 0x0b) ^ times(in[(i+2)%4], 0x0d) ^ times(in[(i+3)%4], 0x09)
		out = out<<8 | uint32(b)
	}
	return out
}
