package seal

import (
	"encoding/binary"
	"fmt"
	"io"
)

const (
	// ChunkSize is the plaintext in one chunk of a file, in bytes. Small, so that a random
	// read of a block of 16 to 32 KiB opens little more than it needs; at this size a
	// chunk's fixed cost is a few percent of its AES time, and tags add 0.1 % of space.
	ChunkSize = 16 << 10
	// MaxWrapped bounds a wrapped DEK, in bytes.
	MaxWrapped = 4096

	fileMagic    = "HFSEALED"
	fileVersion  = 1
	fixedHeader  = 16
	minChunkSize = 1 << 10
	maxChunkSize = 1 << 20
	// maxChunks keeps offsets within an int64.
	maxChunks = 1 << 42

	fileAAD = "holdfast file v1\n"
)

// SealedSize is the size of the file that seals plain bytes under a wrapped DEK of the
// given size.
func SealedSize(plain int64, wrapped int) int64 {
	chunks := max((plain+ChunkSize-1)/ChunkSize, 1)
	return int64(fixedHeader+wrapped) + plain + chunks*TagSize
}

// header is a file's beginning, parsed.
type header struct {
	chunkSize int
	wrapped   []byte
}

func (h *header) size() int64 { return int64(fixedHeader + len(h.wrapped)) }

func (h *header) marshal() []byte {
	b := make([]byte, 0, h.size())
	b = append(b, fileMagic...)
	b = binary.LittleEndian.AppendUint16(b, fileVersion)
	b = binary.LittleEndian.AppendUint16(b, uint16(len(h.wrapped)))
	b = binary.LittleEndian.AppendUint32(b, uint32(h.chunkSize))
	return append(b, h.wrapped...)
}

// readHeader takes most headers in one read.
func readHeader(r io.ReaderAt, size int64) (*header, error) {
	if size < fixedHeader {
		return nil, fmt.Errorf("%w: %d bytes, a header alone has %d", ErrDamaged, size, fixedHeader)
	}
	buf := make([]byte, min(size, 256))
	if err := readFull(r, buf, 0); err != nil {
		return nil, err
	}
	if string(buf[:8]) != fileMagic {
		return nil, fmt.Errorf("%w: no sealed file: magic is %q, want %q", ErrDamaged, buf[:8], fileMagic)
	}
	if v := binary.LittleEndian.Uint16(buf[8:]); v != fileVersion {
		// ErrDamaged, since users can put bytes of their own where a sealed file is looked for (auxfile).
		return nil, fmt.Errorf("%w: sealed file has format version %d, this program reads version %d", ErrDamaged, v, fileVersion)
	}
	wrapped := int(binary.LittleEndian.Uint16(buf[10:]))
	chunk := binary.LittleEndian.Uint32(buf[12:])
	if wrapped == 0 || wrapped > MaxWrapped || int64(fixedHeader+wrapped) > size {
		return nil, fmt.Errorf("%w: wrapped DEK of %d bytes in a file of %d, want 1..%d", ErrDamaged, wrapped, size, MaxWrapped)
	}
	if chunk < minChunkSize || chunk > maxChunkSize {
		return nil, fmt.Errorf("%w: chunk size %d, want %d..%d", ErrDamaged, chunk, minChunkSize, maxChunkSize)
	}
	h := &header{chunkSize: int(chunk), wrapped: make([]byte, wrapped)}
	if n := copy(h.wrapped, buf[fixedHeader:]); n < wrapped {
		if err := readFull(r, h.wrapped[n:], int64(fixedHeader+n)); err != nil {
			return nil, err
		}
	}
	return h, nil
}

// readFull fills p; unlike io.ReaderAt it takes an io.EOF beside the last byte for success.
func readFull(r io.ReaderAt, p []byte, off int64) error {
	n, err := r.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if err == nil || err == io.EOF {
		return fmt.Errorf("%w: it ends at byte %d, want %d", ErrDamaged, off+int64(n), off+int64(len(p)))
	}
	return fmt.Errorf("reading %d bytes at %d: %w", len(p), off, err)
}

// fileAADPrefix is the part of the AAD that all chunks of a file share.
func fileAADPrefix(c Context, chunkSize int) []byte {
	b := append(make([]byte, 0, 256), fileAAD...)
	b = binary.LittleEndian.AppendUint32(b, uint32(chunkSize))
	return c.AppendTo(b)
}

// setChunk makes s's nonce and AAD those of a chunk of a file.
func (s *scratch) setChunk(prefix []byte, number uint64, last bool) {
	s.setNonce(domainFile, number)
	s.aad = append(s.aad[:0], prefix...)
	s.aad = binary.LittleEndian.AppendUint64(s.aad, number)
	if last {
		s.aad = append(s.aad, 1)
	} else {
		s.aad = append(s.aad, 0)
	}
}
