package walrec

import (
	"bytes"
	"math/rand/v2"
	"testing"

	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"

	"github.com/holdfastdb/holdfast/internal/pg"
)

// imageRecord is a record with one page image, made by hand.
func imageRecord(flags uint8, image []byte, holeOffset, holeLength uint16) []byte {
	r := make([]byte, headerSize)
	r = append(r, 0, hasImage, 0, 0)
	r = le.AppendUint16(r, uint16(len(image)))
	r = le.AppendUint16(r, holeOffset)
	r = append(r, flags)
	if flags&imageHole != 0 && flags&imageCompressed != 0 {
		r = le.AppendUint16(r, holeLength)
	}
	for _, v := range []uint32{1663, 5, 16384, 7} {
		r = le.AppendUint32(r, v)
	}
	r = append(r, image...)
	le.PutUint32(r, uint32(len(r)))
	return r
}

func TestRestoreImage(t *testing.T) {
	page := make([]byte, pg.BlockSize)
	for i := range page {
		page[i] = byte(i / 64)
	}
	const hole, holeSize = 1000, 5000
	holed := bytes.Clone(page)
	clear(holed[hole : hole+holeSize])
	stored := append(bytes.Clone(page[:hole]), page[hole+holeSize:]...)
	for _, c := range []struct {
		flags uint8
		hole  bool
	}{
		{0, false}, {0, true}, {imagePGLZ, false}, {imagePGLZ, true}, {imageLZ4, false}, {imageLZ4, true}, {imageZSTD, false}, {imageZSTD, true},
	} {
		flags, want, image, at, size := c.flags|imageUse, page, page, uint16(0), uint16(0)
		if c.hole {
			flags, want, image, at, size = flags|imageHole, holed, stored, hole, holeSize
		}
		raw := imageRecord(flags, compress(t, c.flags, image), at, size)
		rec, err := Parse(raw, 100, 200)
		if err != nil {
			t.Errorf("%+v: %v", c, err)
			continue
		}
		have := bytes.Repeat([]byte{0xEE}, pg.BlockSize)
		if err := rec.Blocks[0].RestoreImage(have); err != nil || !bytes.Equal(have, want) {
			t.Errorf("%+v: %v", c, err)
		}
		if b := rec.Blocks[0]; !b.ApplyImage || b.Block != 7 || b.Rel.Relation != 16384 {
			t.Errorf("%+v: %+v", c, b)
		}
		damaged(t, raw)
	}
}

// damaged parses and restores records with random changes: errors are fine, panics not.
func damaged(t *testing.T, raw []byte) {
	rng := rand.New(rand.NewPCG(1, uint64(len(raw))))
	var page [pg.BlockSize]byte
	for range 2000 {
		r := bytes.Clone(raw)
		for range 1 + rng.IntN(3) {
			r[headerSize+rng.IntN(min(len(r)-headerSize, 200))] = byte(rng.Uint32())
		}
		if rec, err := Parse(r, 100, 200); err == nil {
			for i := range rec.Blocks {
				_ = rec.Blocks[i].RestoreImage(page[:])
			}
		}
	}
}

func compress(t *testing.T, method uint8, b []byte) []byte {
	switch method {
	case imagePGLZ:
		return compressPGLZ(b)
	case imageLZ4:
		dst := make([]byte, lz4.CompressBlockBound(len(b)))
		n, err := lz4.CompressBlock(b, dst, nil)
		if err != nil || n == 0 {
			t.Fatal(n, err)
		}
		return dst[:n]
	case imageZSTD:
		w, err := zstd.NewWriter(nil)
		if err != nil {
			t.Fatal(err)
		}
		return w.EncodeAll(b, nil)
	}
	return b
}

// compressPGLZ finds runs of one byte only.
func compressPGLZ(b []byte) []byte {
	var out []byte
	control := 0
	for n, item := 0, 0; n < len(b); item++ {
		if item%8 == 0 {
			control, out = len(out), append(out, 0)
		}
		run := 0
		for n > 0 && n+run < len(b) && b[n+run] == b[n-1] && run < 18+255 {
			run++
		}
		if run < 3 {
			out, n = append(out, b[n]), n+1
			continue
		}
		out[control] |= 1 << (item % 8)
		out = append(out, byte(min(run, 18)-3), 1) // distance 1
		if run >= 18 {
			out = append(out, byte(run-18))
		}
		n += run
	}
	return out
}

func TestPGLZRefuses(t *testing.T) {
	dst := make([]byte, 10)
	for _, src := range [][]byte{
		{}, {0}, {0, 1, 2}, {1, 0, 1}, {2, 9, 0x00, 0}, {2, 9, 0x00}, {2, 9, 0x0F, 1}, {2, 9, 0x00, 2},
		append([]byte{0}, "12345678"...), {2, 9, 0x0F, 1, 0, 9, 9, 9, 9},
	} {
		if err := decompressPGLZ(dst, src); err == nil {
			t.Errorf("%x is accepted", src)
		}
	}
}
