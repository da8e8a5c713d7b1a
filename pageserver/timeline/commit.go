package timeline

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"

	"github.com/holdfastdb/holdfast/internal/blob"
)

// errChanged means that the manifest in the bucket is neither the one that was to be
// replaced nor the one that was to replace it.
var errChanged = errors.New("the manifest was changed by someone else")

// readManifest gets the manifest as it is in the bucket.
func readManifest(ctx context.Context, cfg *Config) (*manifest, blob.ETag, error) {
	data, etag, err := cfg.Store.Get(ctx, cfg.manifestKey())
	if err != nil {
		return nil, "", fmt.Errorf("reading manifest %s: %w", cfg.manifestKey(), err)
	}
	m, err := decodeManifest(cfg, data)
	return m, etag, err
}

// swapOnce replaces the manifest. Outcomes that are not known are looked up: a write that
// was reported as failed may have been done. again tells that it was not, and that the same
// call may be repeated; no other write may be tried in its place, for a write that is
// still under way could win against it.
func swapOnce(ctx context.Context, cfg *Config, data []byte, old blob.ETag) (etag blob.ETag, again bool, err error) {
	etag, err = cfg.Store.Swap(ctx, cfg.manifestKey(), data, old)
	if err == nil {
		return etag, false, nil
	}
	err = fmt.Errorf("writing manifest %s: %w", cfg.manifestKey(), err)
	have, etag, lookErr := cfg.Store.Get(ctx, cfg.manifestKey())
	switch {
	case errors.Is(lookErr, blob.ErrNotFound):
		return "", false, fmt.Errorf("%w: it is gone", err)
	case lookErr != nil || etag == old:
		return "", true, err
	case bytes.Equal(have, data):
		return etag, false, nil
	}
	return "", false, fmt.Errorf("writing manifest %s: %w", cfg.manifestKey(), errChanged)
}

// takeOver opens a new generation.
func takeOver(ctx context.Context, cfg *Config) (*manifest, blob.ETag, error) {
	for {
		m, old, err := readManifest(ctx, cfg)
		if err != nil {
			return nil, "", err
		}
		m.Generation++
		m.Revision++
		m.Server = rand.Text()
		data, err := m.encode()
		if err != nil {
			return nil, "", err
		}
		etag, err := swapRetrying(ctx, cfg, data, old)
		if err == nil {
			return m, etag, nil
		}
		if !errors.Is(err, errChanged) {
			return nil, "", err
		}
	}
}

func swapRetrying(ctx context.Context, cfg *Config, data []byte, old blob.ETag) (etag blob.ETag, err error) {
	for wait := cfg.backoff(); ; {
		var again bool
		etag, again, err = swapOnce(ctx, cfg, data, old)
		if err == nil || !again {
			return etag, err
		}
		if !wait.sleep(ctx, err) {
			return "", err
		}
	}
}

// commit advances the manifest by what edit does to it, and then the view: nothing
// counts before the bucket has it. One commit is under way at a time. then runs under
// t.mu, before the view is made.
func (t *Timeline) commit(edit func(m *manifest), then func()) error {
	_, err := t.commitSized(edit, then)
	return err
}

// commitSized also tells how many bytes the manifest has.
func (t *Timeline) commitSized(edit func(m *manifest), then func()) (size int64, err error) {
	t.commitMu.Lock()
	defer t.commitMu.Unlock()
	t.mu.Lock()
	next, err := t.mu.manifest.clone(), t.mu.err
	t.mu.Unlock()
	if err != nil {
		return 0, err
	}
	edit(next)
	next.Revision++
	if err := next.check(t.cfg.layerPrefix()); err != nil {
		return 0, fmt.Errorf("manifest %s would be wrong: %w", t.cfg.manifestKey(), err)
	}
	data, err := next.encode()
	if err != nil {
		return 0, err
	}
	etag, err := swapRetrying(t.ctx, &t.cfg, data, t.etag)
	if errors.Is(err, errChanged) {
		err = t.superseded(err)
	}
	if err != nil {
		return 0, err
	}
	// Commit point: after a crash here the new layers count.
	t.etag = etag
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.mu.err != nil {
		return 0, t.mu.err
	}
	then()
	t.installLocked(next)
	return int64(len(data)), nil
}

// superseded looks whether another generation explains err; if so this server stops.
func (t *Timeline) superseded(err error) error {
	m, _, lookErr := readManifest(t.ctx, &t.cfg)
	if lookErr != nil || m.Generation <= t.generation {
		return err
	}
	err = fmt.Errorf("branch %s: %w: its generation is %d, this server's is %d", t.cfg.Branch, ErrSuperseded, m.Generation, t.generation)
	t.fail(err)
	return err
}
