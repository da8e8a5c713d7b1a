package walrec

import (
	"errors"
	"fmt"
	"sync"

	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"

	"github.com/holdfastdb/holdfast/internal/pg"
)

// RestoreImage writes the reference's page image to page, 8 KiB, hole included
// (RestoreBlockImage). The page's LSN is as it was when the image was made.
func (b *Block) RestoreImage(page []byte) error {
	switch {
	case !b.HasImage:
		return errors.New("the reference has no page image")
	case len(page) != pg.BlockSize:
		return fmt.Errorf("a page has %d bytes, not %d", pg.BlockSize, len(page))
	}
	image := b.image
	if b.bimgInfo&imageCompressed != 0 {
		var room [pg.BlockSize]byte
		image = room[:pg.BlockSize-int(b.holeLength)]
		if err := b.decompress(image); err != nil {
			return fmt.Errorf("page image of block %d of %v: %w", b.Block, b.Rel, err)
		}
	}
	hole, after := int(b.holeOffset), int(b.holeOffset)+int(b.holeLength)
	copy(page, image[:hole])
	clear(page[hole:after])
	copy(page[after:], image[hole:])
	return nil
}

// decompress fills dst.
func (b *Block) decompress(dst []byte) (err error) {
	n := 0
	switch b.bimgInfo & imageCompressed {
	case imagePGLZ:
		return decompressPGLZ(dst, b.image)
	case imageLZ4:
		n, err = lz4.UncompressBlock(b.image, dst)
	case imageZSTD:
		var d *zstd.Decoder
		if d, err = zstdDecoder(); err == nil {
			var out []byte
			out, err = d.DecodeAll(b.image, dst[:0])
			n = len(out)
			if n == len(dst) && &out[0] != &dst[0] {
				copy(dst, out)
			}
		}
	}
	if err == nil && n != len(dst) {
		err = fmt.Errorf("it decompresses to %d bytes, want %d", n, len(dst))
	}
	return err
}

// zstdDecoder is the one decoder of page images; DecodeAll may be called by many at once.
var zstdDecoder = sync.OnceValues(func() (*zstd.Decoder, error) {
	return zstd.NewReader(nil, zstd.WithDecoderMaxMemory(2*pg.BlockSize), zstd.WithDecoderConcurrency(0))
})

// errPGLZ says that compressed data cannot come from PostgreSQL's own compressor.
var errPGLZ = errors.New("corrupt pglz data")

// decompressPGLZ undoes PostgreSQL's own compression (pg_lzcompress.c) and fills dst. A
// control byte's bits, lowest first, tell of the eight items that follow it: a literal byte
// (0), or a match (1): length-3 in the low nibble of the first byte, the distance's upper
// four bits in the high one, its lower eight in the second byte; length 18 has a third byte
// that adds to it.
func decompressPGLZ(dst, src []byte) error {
	n := 0
	for len(src) > 0 && n < len(dst) {
		control := src[0]
		src = src[1:]
		for bit := 0; bit < 8 && len(src) > 0 && n < len(dst); bit++ {
			if control>>bit&1 == 0 {
				dst[n] = src[0]
				n, src = n+1, src[1:]
				continue
			}
			if len(src) < 2 {
				return errPGLZ
			}
			length, distance := int(src[0]&0x0F)+3, int(src[0]&0xF0)<<4|int(src[1])
			src = src[2:]
			if length == 18 {
				if len(src) == 0 {
					return errPGLZ
				}
				length += int(src[0])
				src = src[1:]
			}
			if distance == 0 || distance > n {
				return errPGLZ
			}
			for length = min(length, len(dst)-n); length > 0; length-- { // it may overlap itself
				dst[n] = dst[n-distance]
				n++
			}
		}
	}
	if n != len(dst) || len(src) != 0 {
		return errPGLZ
	}
	return nil
}
