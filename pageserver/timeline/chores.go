package timeline

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"path"
	"sync"

	"github.com/holdfastdb/holdfast/internal/blob"
)

// chores are small jobs that nobody waits for, done one after the other.
type chores struct {
	mu    sync.Mutex
	queue []func()
	wake  chan struct{}
}

func newChores() *chores { return &chores{wake: make(chan struct{}, 1)} }

func (c *chores) add(job func()) {
	c.mu.Lock()
	c.queue = append(c.queue, job)
	c.mu.Unlock()
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

func (c *chores) run(ctx context.Context) {
	for {
		c.mu.Lock()
		queue := c.queue
		c.queue = nil
		c.mu.Unlock()
		for _, job := range queue {
			if ctx.Err() != nil {
				return
			}
			job()
		}
		select {
		case <-ctx.Done():
			return
		case <-c.wake:
		}
	}
}

// deleteLayer deletes a layer that is not in the manifest any more and that no read
// holds. If it cannot, the layer is an orphan for the next Open.
func (t *Timeline) deleteLayer(object string) {
	t.disk.remove(path.Base(object))
	wait := t.cfg.backoff()
	for try := 1; ; try++ {
		err := t.cfg.Store.Delete(t.ctx, object)
		if err == nil {
			return
		}
		if try == bucketTries || !wait.sleep(t.ctx, fmt.Errorf("deleting layer %s: %w", object, err)) {
			return
		}
	}
}

// sweepOrphans deletes layer files that an older generation wrote and that did not come into
// the manifest: after this generation's manifest was written, they cannot (P2). Files of
// this generation or a newer one are left alone. What was in the manifest that was opened is
// not an orphan even if it was merged since: a read may hold it (P3), and the last one's end
// deletes it.
func (t *Timeline) sweepOrphans(opened *manifest) {
	known := make(map[string]bool)
	for i := range opened.Layers {
		known[opened.Layers[i].Object] = true
	}
	var orphans []string
	err := t.cfg.Store.List(t.ctx, t.cfg.layerPrefix(), func(info blob.Info) error {
		g, ok := t.cfg.generationOf(info.Key)
		if ok && g < t.generation && !known[info.Key] {
			orphans = append(orphans, info.Key)
		}
		return nil
	})
	if err != nil && t.ctx.Err() == nil {
		t.cfg.Log.Warn("layers left over from a crash could not be listed; the next start tries again", "error", err)
	}
	for _, object := range orphans {
		t.deleteLayer(object)
	}
}

const fetchPiece = 1 << 20

// fetchCopy makes a local copy of a layer that is read from the bucket.
func (t *Timeline) fetchCopy(h *handle) {
	name := path.Base(h.desc.Object)
	if h.refs.Load() == 0 || !t.disk.fits(h.desc.Size) {
		return
	}
	src := &bucketFile{t, h.desc.Object}
	t.disk.put(name, h.desc.Size, func(w io.Writer) error {
		sum := sha256.New()
		n, err := io.CopyBuffer(io.MultiWriter(w, sum), io.NewSectionReader(src, 0, h.desc.Size), make([]byte, fetchPiece))
		if err != nil {
			return err
		}
		if n != h.desc.Size || hashText(sum.Sum(nil)) != h.desc.SHA256 {
			return errors.New("the object in the bucket is not the one that was uploaded")
		}
		return nil
	})
	h.close(t) // the next read opens the copy
}
