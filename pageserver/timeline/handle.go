package timeline

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"sync"
	"sync/atomic"
	"time"

	"github.com/holdfastdb/holdfast/internal/blob"
	"github.com/holdfastdb/holdfast/internal/keyring"
	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/internal/seal"
	"github.com/holdfastdb/holdfast/pageserver/keyspace"
	"github.com/holdfastdb/holdfast/pageserver/layer"
)

// handle is a layer of the manifest. Its file is opened when it is first read, from the
// local copy if there is one, else from the bucket.
type handle struct {
	id       uint64 // for the block cache
	desc     layerDesc
	refs     atomic.Int64 // views that have it
	obsolete atomic.Bool  // no longer in the manifest: to be deleted once no view has it
	lastUse  atomic.Int64
	wrapped  atomic.Pointer[[]byte] // the DEK as the manifest has it now; desc has it as it was first

	mu struct {
		sync.Mutex
		file    *openFile
		opening *opening
	}
}

// openFile is a layer with its index in memory. release what was gotten.
type openFile struct {
	*layer.Reader
	local *os.File     // nil: it reads from the bucket
	refs  atomic.Int64 // the handle's, and one for each user
}

type opening struct {
	done chan struct{}
	err  error
}

func (f *openFile) release() {
	if f.refs.Add(-1) == 0 && f.local != nil {
		f.local.Close()
	}
}

// covers tells false if the layer cannot have a version of key at or below lsn.
func (h *handle) covers(key keyspace.Key, lsn pg.LSN) bool {
	return pg.LSN(h.desc.MinLSN) <= lsn && key.Compare(h.desc.First.key()) >= 0 && key.Compare(h.desc.Last.key()) <= 0
}

// close drops the index and the open file; the next read opens them again.
func (h *handle) close(t *Timeline) {
	h.mu.Lock()
	f := h.mu.file
	h.mu.file = nil
	h.mu.Unlock()
	if f != nil {
		t.openFiles.Add(-1)
		f.release()
	}
}

// openFile gives the layer's index and file. Opening goes on in the background if ctx ends.
func (t *Timeline) openFile(ctx context.Context, h *handle) (*openFile, error) {
	for {
		h.mu.Lock()
		if f := h.mu.file; f != nil {
			f.refs.Add(1)
			h.mu.Unlock()
			h.lastUse.Store(t.uses.Add(1))
			return f, nil
		}
		o := h.mu.opening
		if o == nil {
			o = &opening{done: make(chan struct{})}
			h.mu.opening = o
			go t.finishOpening(h, o)
		}
		h.mu.Unlock()
		select {
		case <-o.done:
			if o.err != nil {
				return nil, o.err
			}
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

func (t *Timeline) finishOpening(h *handle, o *opening) {
	f, err := t.openLocalOrBucket(h)
	if errors.Is(err, keyring.ErrRevoked) {
		t.revoked(err)
	}
	h.mu.Lock()
	h.mu.opening = nil
	o.err = err
	if err == nil {
		h.mu.file = f
	}
	h.mu.Unlock()
	if err == nil {
		h.lastUse.Store(t.uses.Add(1))
		t.limitOpen(h, t.openFiles.Add(1))
	}
	if h.refs.Load() == 0 || t.ctx.Err() != nil { // nobody will close it later
		h.close(t)
	}
	close(o.done)
}

// limitOpen closes the file that was not used for longest, if too many are open.
func (t *Timeline) limitOpen(not *handle, open int64) {
	if open <= int64(t.cfg.OpenLayers) {
		return
	}
	t.mu.Lock()
	var oldest *handle
	for _, h := range t.mu.handles {
		h.mu.Lock()
		isOpen := h.mu.file != nil
		h.mu.Unlock()
		if isOpen && h != not && (oldest == nil || h.lastUse.Load() < oldest.lastUse.Load()) {
			oldest = h
		}
	}
	t.mu.Unlock()
	if oldest != nil {
		oldest.close(t)
	}
}

// openLocalOrBucket opens the layer. A local copy that is damaged is thrown away.
func (t *Timeline) openLocalOrBucket(h *handle) (*openFile, error) {
	name := path.Base(h.desc.Object)
	if local := t.disk.open(name, h.desc.Size); local != nil {
		f, err := t.openFrom(h, local)
		if err == nil {
			f.local = local
			return f, nil
		}
		local.Close()
		if !t.blamesFile(err) {
			return nil, err
		}
		t.dropCopy(h, err)
	}
	f, err := t.openFrom(h, &bucketFile{t, h.desc.Object})
	if err == nil {
		t.chores.add(func() { t.fetchCopy(h) })
	}
	return f, err
}

// openFrom opens the layer under the manifest's wrapped DEK.
func (t *Timeline) openFrom(h *handle, r io.ReaderAt) (*openFile, error) {
	ctx, cancel := context.WithTimeout(t.ctx, openTimeout)
	defer cancel()
	key := func(ctx context.Context, c seal.Context, _ []byte) (*seal.Key, error) {
		for {
			wrapped := h.wrapped.Load()
			k, err := t.cfg.Ring.Open(ctx, c, *wrapped)
			if err == nil || wrapped == h.wrapped.Load() {
				return k, err
			} // re-wrapped meanwhile, and perhaps the old version of the KEK is gone
		}
	}
	r2, err := layer.Open(ctx, r, h.desc.Size, t.cfg.sealContext(h.desc.Object), key)
	if err != nil {
		return nil, err
	}
	if err := h.desc.matches(r2.Properties()); err != nil {
		return nil, err
	}
	f := &openFile{Reader: r2}
	f.refs.Store(1)
	return f, nil
}

// blamesFile tells whether err can be due to the bytes of the file, not to its key.
func (t *Timeline) blamesFile(err error) bool {
	return t.ctx.Err() == nil && !errors.Is(err, seal.ErrWiped) && !errors.Is(err, keyring.ErrRevoked) &&
		!errors.Is(err, keyring.ErrUnreachable) && !errors.Is(err, context.DeadlineExceeded)
}

// dropCopy throws a local copy away that could not be read.
func (t *Timeline) dropCopy(h *handle, err error) {
	t.cfg.Log.Warn("a local copy of a layer is damaged or gone and is fetched again", "object", h.desc.Object, "error", err)
	h.close(t)
	t.disk.remove(path.Base(h.desc.Object))
}

// readBlock gives a block of the layer, from memory if it is there.
func (t *Timeline) readBlock(ctx context.Context, h *handle, i int) (*cachedBlock, error) {
	return t.blocks.get(ctx, blockID{h.id, i}, func() (*layer.Block, error) { return t.loadBlock(h, i) })
}

// loadBlock reads a block. If the local copy fails it reads the bucket; if the key was wiped, the
// ring says whether it may be had again.
func (t *Timeline) loadBlock(h *handle, i int) (*layer.Block, error) {
	wiped := false
	for {
		f, err := t.openFile(t.ctx, h)
		if err != nil {
			return nil, err
		}
		b, err := f.ReadBlock(i)
		isLocal := f.local != nil
		f.release()
		switch {
		case err == nil:
			if isLocal {
				t.disk.touch(path.Base(h.desc.Object))
			}
			return b, nil
		case errors.Is(err, seal.ErrWiped) && !wiped:
			wiped = true
			h.close(t)
		case isLocal && t.blamesFile(err):
			t.dropCopy(h, err)
		default:
			return nil, err
		}
	}
}

// Bounds of what a read of a layer may take.
const (
	openTimeout   = time.Minute
	bucketTimeout = 20 * time.Second
	bucketTries   = 5
)

// bucketFile reads an object. Failures are tried again a few times.
type bucketFile struct {
	t      *Timeline
	object string
}

func (b *bucketFile) ReadAt(p []byte, off int64) (n int, err error) {
	wait := b.t.cfg.backoff()
	for try := 1; ; try++ {
		ctx, cancel := context.WithTimeout(b.t.ctx, bucketTimeout)
		n, err = b.t.cfg.Store.GetRange(ctx, b.object, p, off)
		cancel()
		if err == nil || err == io.EOF {
			return n, err
		}
		err = fmt.Errorf("reading %s from the bucket: %w", b.object, err)
		if errors.Is(err, blob.ErrNotFound) {
			// A newer server may have merged the layer into others and deleted it.
			return n, b.t.superseded(err)
		}
		if try == bucketTries || !wait.sleep(b.t.ctx, err) {
			return n, err
		}
	}
}

// forget closes a layer whose local copy was evicted, so that the disk space is free.
func (t *Timeline) forget(name string) {
	t.mu.Lock()
	h := t.mu.handles[t.cfg.layerPrefix()+name]
	t.mu.Unlock()
	if h != nil {
		h.close(t)
	}
}

// closeFiles closes all files.
func (t *Timeline) closeFiles() {
	t.mu.Lock()
	handles := t.mu.handles
	t.mu.Unlock()
	for _, h := range handles {
		h.close(t)
	}
}
