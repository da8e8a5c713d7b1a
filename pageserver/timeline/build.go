package timeline

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"path"

	"github.com/holdfastdb/holdfast/internal/blob"
	"github.com/holdfastdb/holdfast/internal/seal"
	"github.com/holdfastdb/holdfast/pageserver/layer"
)

// sealedBuffer holds a sealed layer until it is uploaded, in pieces that are not moved.
type sealedBuffer struct {
	pieces [][]byte
	size   int64
	sum    hash.Hash
}

const bufferPiece = 1 << 20

func (b *sealedBuffer) Write(p []byte) (int, error) {
	b.sum.Write(p)
	b.size += int64(len(p))
	n := len(p)
	for len(p) > 0 {
		last := len(b.pieces) - 1
		if last < 0 || len(b.pieces[last]) == cap(b.pieces[last]) {
			b.pieces = append(b.pieces, make([]byte, 0, bufferPiece))
			last++
		}
		piece := b.pieces[last]
		m := min(len(p), cap(piece)-len(piece))
		b.pieces[last] = append(piece, p[:m]...)
		p = p[m:]
	}
	return n, nil
}

func (b *sealedBuffer) writeTo(w io.Writer) error {
	for _, p := range b.pieces {
		if _, err := w.Write(p); err != nil {
			return err
		}
	}
	return nil
}

func (b *sealedBuffer) reader() io.Reader { return &bufferReader{rest: b.pieces} }

type bufferReader struct {
	piece []byte
	rest  [][]byte
}

func (r *bufferReader) Read(p []byte) (int, error) {
	for len(r.piece) == 0 {
		if len(r.rest) == 0 {
			return 0, io.EOF
		}
		r.piece, r.rest = r.rest[0], r.rest[1:]
	}
	n := copy(p, r.piece)
	r.piece = r.piece[n:]
	return n, nil
}

// builder writes a layer file into memory. It ends in upload or abort.
type builder struct {
	t    *Timeline
	desc layerDesc
	buf  sealedBuffer
	w    *layer.Writer
}

func (t *Timeline) newBuilder(level int) (*builder, error) {
	b := &builder{t: t, desc: layerDesc{Object: t.newName(level), Level: level}}
	b.buf.sum = sha256.New()
	c := t.cfg.sealContext(b.desc.Object)
	ctx, cancel := context.WithTimeout(t.ctx, openTimeout)
	defer cancel()
	t.making.set(b.desc.Object, 0)
	key, wrapped, err := t.cfg.Ring.Generate(ctx, c)
	if err != nil {
		t.making.drop(b.desc.Object)
		return nil, fmt.Errorf("making a key for layer %s: %w", b.desc.Object, err)
	}
	version, err := seal.KEKVersion(wrapped)
	if err != nil {
		version = 0
	}
	t.making.set(b.desc.Object, version)
	b.desc.Wrapped = wrapped
	b.w, err = layer.NewWriter(&b.buf, key, wrapped, c)
	return b, err
}

func (b *builder) add(e Entry) error {
	err := b.w.Add(layer.Entry{Key: e.Key, LSN: e.LSN, Kind: uint8(e.Kind), Data: e.Data})
	if err != nil {
		return fmt.Errorf("layer %s: %w", b.desc.Object, err)
	}
	return nil
}

func (b *builder) abort() {
	b.w.Abort()
	b.t.making.drop(b.desc.Object)
}

// upload ends the layer and puts it into the bucket, and a copy into the local folder. It
// tries until it works or cannot work.
func (b *builder) upload() error {
	p, size, err := b.w.Finish()
	if err != nil {
		b.t.making.drop(b.desc.Object)
		return fmt.Errorf("layer %s: %w", b.desc.Object, err)
	}
	d := &b.desc
	d.First, d.Last, d.MinLSN, d.MaxLSN = keyText(p.First), keyText(p.Last), lsnText(p.MinLSN), lsnText(p.MaxLSN)
	d.Entries, d.Size = p.Entries, size
	b.buf.sum.Sum(d.SHA256[:0])
	for wait := b.t.cfg.backoff(); ; {
		etag, err := b.create()
		if err == nil {
			d.ETag = string(etag)
			b.t.disk.put(path.Base(d.Object), size, b.buf.writeTo)
			return nil
		}
		if !temporary(err) || !wait.sleep(b.t.ctx, err) {
			b.t.making.drop(b.desc.Object)
			return err
		}
	}
}

// create uploads once. That the object exists means that an earlier try was done although
// it was reported as failed: no one else uses the name.
func (b *builder) create() (blob.ETag, error) {
	store, d := b.t.cfg.Store, &b.desc
	etag, err := store.Create(b.t.ctx, d.Object, b.buf.reader(), d.Size)
	if errors.Is(err, blob.ErrExists) {
		var info blob.Info
		info, err = store.Head(b.t.ctx, d.Object)
		if err == nil && info.Size != d.Size {
			return "", fmt.Errorf("uploading layer %s: %w, with %d bytes, not %d", d.Object, blob.ErrExists, info.Size, d.Size)
		}
		etag = info.ETag
	}
	if err != nil {
		return "", fmt.Errorf("uploading layer %s: %w", d.Object, err)
	}
	return etag, nil
}
