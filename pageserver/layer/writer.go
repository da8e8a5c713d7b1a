package layer

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/holdfastdb/holdfast/internal/seal"
)

// Writer writes a layer. It is used by one goroutine and ends in exactly one of Finish and
// Abort.
type Writer struct {
	seal *seal.Writer
	body bodyWriter
}

// NewWriter starts a layer, sealed under k for the object that c names, with k's wrapped form in
// the file's header.
func NewWriter(w io.Writer, k *seal.Key, wrapped []byte, c seal.Context) (*Writer, error) {
	s, err := seal.NewWriter(w, k, wrapped, c)
	if err != nil {
		return nil, fmt.Errorf("writing layer: %w", err)
	}
	return &Writer{seal: s, body: bodyWriter{w: s}}, nil
}

// Add adds a version. Keys ascend; under one key LSNs do not descend. Data is only lent.
func (w *Writer) Add(e Entry) error { return w.body.add(e) }

// Size is about how many bytes the layer has so far.
func (w *Writer) Size() int64 { return w.body.off + int64(len(w.body.block))/2 }

// Finish ends the layer and gives its properties and its size in the bucket. It does not
// sync or close what is below.
func (w *Writer) Finish() (Properties, int64, error) {
	if err := w.body.finish(); err != nil {
		w.Abort()
		return Properties{}, 0, fmt.Errorf("writing layer: %w", err)
	}
	size, err := w.seal.Finish()
	w.body.wipe()
	if err != nil {
		return Properties{}, 0, fmt.Errorf("writing layer: %w", err)
	}
	return w.body.props, size, nil
}

// Abort gives the layer up; what was written of it opens for nobody.
func (w *Writer) Abort() {
	w.seal.Abort()
	w.body.wipe()
}

// bodyWriter writes a layer's plaintext.
type bodyWriter struct {
	w       io.Writer
	off     int64
	props   Properties
	last    Entry // without its data
	block   []byte
	offsets []uint32
	first   Entry // of the block
	out     []byte
	index   []byte
	hashes  []uint64
	err     error // sticky
}

var errOrder = errors.New("entries out of order")

func (b *bodyWriter) add(e Entry) error {
	if b.err != nil {
		return b.err
	}
	if len(e.Data) > MaxData || e.Kind == 0 {
		return fmt.Errorf("entry with key %x at %s: %d bytes of kind %d: want at most %d, and a kind", e.Key[:], e.LSN, len(e.Data), e.Kind, MaxData)
	}
	if b.props.Entries > 0 && before(e.Key, e.LSN, b.last.Key, b.last.LSN) {
		return fmt.Errorf("%w: key %x at %s after key %x at %s", errOrder, e.Key[:], e.LSN, b.last.Key[:], b.last.LSN)
	}
	b.describe(e)
	if len(b.offsets) == 0 {
		b.first = b.last
	}
	b.offsets = append(b.offsets, uint32(len(b.block)))
	b.block = append(b.block, e.Key[:]...)
	b.block = binary.LittleEndian.AppendUint64(b.block, uint64(e.LSN))
	b.block = append(b.block, e.Kind)
	b.block = append(b.block, e.Data...)
	if len(b.block) >= blockTarget {
		b.flush()
	}
	return b.err
}

func (b *bodyWriter) describe(e Entry) {
	p := &b.props
	if p.Entries == 0 {
		p.First, p.MinLSN = e.Key, e.LSN
		b.write(appendHeader(nil))
	}
	if p.Entries == 0 || e.Key != b.last.Key {
		p.Keys++
		b.hashes = append(b.hashes, hash(e.Key))
	}
	p.Last = e.Key
	p.MinLSN, p.MaxLSN = min(p.MinLSN, e.LSN), max(p.MaxLSN, e.LSN)
	p.Entries++
	p.DataBytes += uint64(len(e.Data))
	b.last = Entry{Key: e.Key, LSN: e.LSN}
}

func (b *bodyWriter) write(p []byte) {
	if b.err != nil {
		return
	}
	n, err := b.w.Write(p)
	b.off += int64(n)
	b.err = err
}

// flush ends the block.
func (b *bodyWriter) flush() {
	for _, off := range b.offsets {
		b.block = binary.LittleEndian.AppendUint32(b.block, off)
	}
	b.block = binary.LittleEndian.AppendUint32(b.block, uint32(len(b.offsets)))
	b.out = compress(b.out[:0], b.block)

	b.index = append(b.index, b.first.Key[:]...)
	b.index = binary.LittleEndian.AppendUint64(b.index, uint64(b.first.LSN))
	b.index = binary.LittleEndian.AppendUint64(b.index, uint64(b.off))
	b.index = binary.LittleEndian.AppendUint32(b.index, uint32(len(b.out)))
	b.index = binary.LittleEndian.AppendUint32(b.index, uint32(len(b.block)))
	b.write(b.out)
	b.block, b.offsets = b.block[:0], b.offsets[:0]
}

func (b *bodyWriter) finish() error {
	if b.props.Entries == 0 {
		return errors.New("a layer has at least one entry")
	}
	if len(b.offsets) > 0 {
		b.flush()
	}
	f := makeFilter(b.hashes)
	t := trailer{indexOff: b.off, blocks: len(b.index) / indexEntry, filter: len(f)}
	b.write(b.index)
	b.write(f)
	b.write(t.appendTo(b.props.appendTo(nil)))
	return b.err
}

// wipe clears the plaintext that is left (K2).
func (b *bodyWriter) wipe() {
	clear(b.block[:cap(b.block)])
	clear(b.out[:cap(b.out)])
	b.err = errEnded
}

var errEnded = errors.New("the layer was ended")
