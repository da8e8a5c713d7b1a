package seal

import (
	"errors"
	"fmt"
	"io"
)

// Writer seals one file, front to back. It is used by one goroutine and ends in Finish, or
// in Abort.
type Writer struct {
	w       io.Writer
	k       *Key
	c       Context
	prefix  []byte
	header  []byte // until it is written
	plain   []byte // begun chunk; its capacity is the chunk size
	sealed  []byte
	number  uint64 // of the next chunk
	written int64
	err     error // sticky
	done    bool
}

// NewWriter starts a sealed file of object c under k, the only one that k will seal, with
// k's wrapped form in its header. It writes to w a chunk at a time, and nothing before the
// first chunk is full.
func NewWriter(w io.Writer, k *Key, wrapped []byte, c Context) (*Writer, error) {
	return newWriter(w, k, wrapped, c, ChunkSize)
}

func newWriter(w io.Writer, k *Key, wrapped []byte, c Context, chunkSize int) (*Writer, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	if len(wrapped) == 0 || len(wrapped) > MaxWrapped {
		return nil, fmt.Errorf("sealing %s: wrapped DEK has %d bytes, want 1..%d", c, len(wrapped), MaxWrapped)
	}
	if err := k.claimWriter(); err != nil {
		return nil, fmt.Errorf("sealing %s: %w", c, err)
	}
	h := header{chunkSize: chunkSize, wrapped: wrapped}
	return &Writer{
		w: w, k: k, c: c,
		prefix: fileAADPrefix(c, chunkSize),
		header: h.marshal(),
		plain:  make([]byte, 0, chunkSize),
		sealed: make([]byte, 0, chunkSize+TagSize),
	}, nil
}

var errEnded = errors.New("the file was ended")

// Write adds plaintext. An error is final.
func (w *Writer) Write(p []byte) (int, error) {
	if w.done {
		return 0, errEnded
	}
	total := len(p)
	for len(p) > 0 {
		// A full chunk is sealed only when more follows: the last one is marked as such.
		if len(w.plain) == cap(w.plain) {
			if err := w.chunk(w.plain, false); err != nil {
				return total - len(p), err
			}
			w.plain = w.plain[:0]
		}
		if len(w.plain) == 0 && len(p) > cap(w.plain) {
			if err := w.chunk(p[:cap(w.plain)], false); err != nil {
				return total - len(p), err
			}
			p = p[cap(w.plain):]
			continue
		}
		n := copy(w.plain[len(w.plain):cap(w.plain)], p)
		w.plain, p = w.plain[:len(w.plain)+n], p[n:]
	}
	return total, w.err
}

// Finish seals the last chunk and gives the file's size. It does not sync or close what is
// below.
func (w *Writer) Finish() (size int64, err error) {
	if w.done {
		return 0, errEnded
	}
	err = w.chunk(w.plain, true)
	w.Abort()
	if err != nil {
		return 0, err
	}
	return w.written, nil
}

// Abort drops the buffered plaintext. What was written stays, and opens for nobody as a
// whole file.
func (w *Writer) Abort() {
	w.done = true
	clear(w.plain[:cap(w.plain)])
}

func (w *Writer) chunk(plain []byte, last bool) error {
	if w.err != nil {
		return w.err
	}
	w.err = w.writeChunk(plain, last)
	if w.err != nil {
		w.err = fmt.Errorf("sealing chunk %d of %s: %w", w.number, w.c, w.err)
	}
	w.number++
	return w.err
}

func (w *Writer) writeChunk(plain []byte, last bool) error {
	if w.header != nil {
		n, err := w.w.Write(w.header)
		w.written += int64(n)
		if err != nil {
			return err
		}
		w.header = nil
	}
	s := scratches.Get().(*scratch)
	defer scratches.Put(s)
	s.setChunk(w.prefix, w.number, last)
	sealed, err := w.k.seal(w.sealed[:0], s, plain)
	if err != nil {
		return err
	}
	n, err := w.w.Write(sealed)
	w.written += int64(n)
	return err
}
