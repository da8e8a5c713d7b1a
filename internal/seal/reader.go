package seal

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
)

// Reader opens a sealed file at any place. It is safe for concurrent use, keeps no
// plaintext, and gives no byte that was not authenticated. Once the key is wiped, reads
// give ErrWiped; a new Reader is needed when the key may be had again.
type Reader struct {
	r      io.ReaderAt
	k      *Key
	c      Context
	prefix []byte
	start  int64 // of chunk 0
	chunk  int64 // plaintext in a chunk
	chunks int64
	size   int64 // of the plaintext
}

// NewReader opens the sealed file of object c that has exactly size bytes. It asks open for
// the key, and opens the last chunk, which proves that nothing was cut off or added.
func NewReader(ctx context.Context, r io.ReaderAt, size int64, c Context, open OpenFunc) (*Reader, error) {
	fail := func(err error) (*Reader, error) {
		return nil, fmt.Errorf("opening sealed %s: %w", c, err)
	}
	if err := c.Validate(); err != nil {
		return fail(err)
	}
	h, err := readHeader(r, size)
	if err != nil {
		return fail(err)
	}
	f := &Reader{r: r, c: c, prefix: fileAADPrefix(c, h.chunkSize), start: h.size(), chunk: int64(h.chunkSize)}
	if err := f.layOut(size - f.start); err != nil {
		return fail(err)
	}
	if f.k, err = open(ctx, c, h.wrapped); err != nil {
		return fail(err)
	}
	if err := f.check(f.chunks - 1); err != nil {
		return fail(err)
	}
	return f, nil
}

// layOut finds the number of chunks in body bytes; there is only one possible number.
func (f *Reader) layOut(body int64) error {
	f.chunks = (body + f.chunk + TagSize - 1) / (f.chunk + TagSize)
	last := body - (f.chunks-1)*(f.chunk+TagSize)
	if f.chunks < 1 || f.chunks > maxChunks || last < TagSize || last == TagSize && f.chunks > 1 {
		return fmt.Errorf("%w: %d bytes after the header are no whole number of chunks of %d", ErrDamaged, body, f.chunk)
	}
	f.size = body - f.chunks*TagSize
	return nil
}

// Size is the size of the plaintext.
func (f *Reader) Size() int64 { return f.size }

// runChunks is how many chunks one read of the sealed file takes at most.
const runChunks = 8

var runBuffers = sync.Pool{New: func() any { b := make([]byte, 0, runChunks*(ChunkSize+TagSize)); return &b }}

// ReadAt reads plaintext with io.ReaderAt's rules.
func (f *Reader) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, errors.New("negative offset")
	}
	want := p
	if off >= f.size {
		want = nil
	} else if int64(len(p)) > f.size-off {
		want = p[:f.size-off]
	}
	n := 0
	for n < len(want) {
		m, err := f.readRun(want[n:], off+int64(n))
		n += m
		if err != nil {
			return n, err
		}
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// readRun reads from a run of neighbouring chunks; p lies within the file and is not empty.
func (f *Reader) readRun(p []byte, off int64) (int, error) {
	first := off / f.chunk
	end := min((off+int64(len(p))-1)/f.chunk+1, first+runChunks)
	from, to := f.sealedAt(first), f.sealedAt(end)

	pooled := runBuffers.Get().(*[]byte)
	defer runBuffers.Put(pooled)
	if int64(cap(*pooled)) < to-from {
		*pooled = make([]byte, 0, to-from)
	}
	buf := (*pooled)[:to-from]
	if err := readFull(f.r, buf, from); err != nil {
		return 0, fmt.Errorf("chunks %d to %d of %s: %w", first, end-1, f.c, err)
	}
	n := 0
	for i := first; i < end; i++ {
		sealed := buf[f.sealedAt(i)-from : f.sealedAt(i+1)-from]
		m, err := f.openPart(p[n:], sealed, i, off+int64(n)-i*f.chunk)
		n += m
		if err != nil {
			return n, err
		}
	}
	return n, nil
}

// sealedAt is where chunk i begins in the sealed file; for i = chunks, where the file ends.
func (f *Reader) sealedAt(i int64) int64 {
	if i == f.chunks {
		return f.start + f.size + f.chunks*TagSize
	}
	return f.start + i*(f.chunk+TagSize)
}

// openPart opens chunk i and copies from its byte skip on.
func (f *Reader) openPart(p, sealed []byte, i, skip int64) (int, error) {
	s := scratches.Get().(*scratch)
	defer scratches.Put(s)
	s.setChunk(f.prefix, uint64(i), i == f.chunks-1)
	plainSize := len(sealed) - TagSize
	if skip == 0 && len(p) >= plainSize {
		if _, err := f.k.open(p[:0:plainSize], s, sealed); err != nil {
			return 0, fmt.Errorf("chunk %d of %s: %w", i, f.c, err)
		}
		return plainSize, nil
	}
	plain, err := f.k.open(sealed[:0], s, sealed)
	if err != nil {
		return 0, fmt.Errorf("chunk %d of %s: %w", i, f.c, err)
	}
	n := copy(p, plain[skip:])
	clear(plain) // the buffer is pooled and outlives the key
	return n, nil
}

// check opens chunk i and drops it.
func (f *Reader) check(i int64) error {
	buf := make([]byte, f.sealedAt(i+1)-f.sealedAt(i))
	if err := readFull(f.r, buf, f.sealedAt(i)); err != nil {
		return err
	}
	_, err := f.openPart(nil, buf, i, 0)
	return err
}
