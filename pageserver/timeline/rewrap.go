package timeline

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/holdfastdb/holdfast/internal/keyring"
	"github.com/holdfastdb/holdfast/internal/seal"
)

// A rotation of the KEK ends with every layer's DEK wrapped under the new version. The one
// wrapped form that counts is the manifest's, so that one write of the manifest does it, and no
// layer is read or written; the form in a layer file's own header stays the old one and is never
// used.

// Rewrapped is what came of Rewrap.
type Rewrapped struct {
	DEKs       int    // that were wrapped again
	Bytes      int64  // of manifests that were written
	KEKVersion uint32 // the current one; 0: there is no layer
}

// Rewrap wraps the DEKs of all layers of the manifest again that are not under the KEK's
// current version. A layer that is in work comes into the manifest under the version it was
// made with: KeyUse tells of it, and a later call finds it. What is done when Rewrap fails stays
// done.
func (t *Timeline) Rewrap(ctx context.Context) (done Rewrapped, err error) {
	for {
		old := t.notUnder(done.KEKVersion)
		if len(old) == 0 {
			return done, nil
		}
		fresh, version, err := t.rewrapDEKs(ctx, old)
		if err != nil {
			return done, fmt.Errorf("branch %s: %w", t.cfg.Branch, err)
		}
		done.KEKVersion = version
		if len(fresh) == 0 {
			return done, nil
		}
		n, size, err := t.putDEKs(fresh)
		if err != nil {
			return done, err
		}
		done.DEKs += n
		done.Bytes += size
	}
}

// notUnder lists the layers whose DEK is not under a version of the KEK.
func (t *Timeline) notUnder(version uint32) (list []layerDesc) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, d := range t.mu.manifest.Layers {
		if v, err := seal.KEKVersion(d.Wrapped); err != nil || v != version {
			list = append(list, d)
		}
	}
	return list
}

// rewrapped is a layer's DEK in its old form and its new one.
type rewrapped struct{ old, fresh []byte }

// rewrapDEKs asks for new forms, and gives those that differ, by object.
func (t *Timeline) rewrapDEKs(ctx context.Context, layers []layerDesc) (fresh map[string]rewrapped, version uint32, err error) {
	list := make([]keyring.Wrapped, len(layers))
	for i, d := range layers {
		list[i] = keyring.Wrapped{Context: t.cfg.sealContext(d.Object), DEK: d.Wrapped}
	}
	wrapped, version, err := t.cfg.Ring.Rewrap(ctx, list)
	if errors.Is(err, keyring.ErrRevoked) {
		t.revoked(err)
	}
	if err != nil {
		return nil, 0, err
	}
	fresh = make(map[string]rewrapped)
	for i, d := range layers {
		if !bytes.Equal(wrapped[i], d.Wrapped) {
			fresh[d.Object] = rewrapped{d.Wrapped, wrapped[i]}
		}
	}
	return fresh, version, nil
}

// putDEKs makes new forms durable. A layer that was merged meanwhile needs none any more; one that somebody
// else re-wrapped is looked at again.
func (t *Timeline) putDEKs(fresh map[string]rewrapped) (deks int, size int64, err error) {
	size, err = t.commitSized(func(next *manifest) {
		deks = 0
		for i := range next.Layers {
			d := &next.Layers[i]
			if r, ok := fresh[d.Object]; ok && bytes.Equal(d.Wrapped, r.old) {
				d.Wrapped = r.fresh
				deks++
			}
		}
	}, func() {})
	return deks, size, err
}

// making are the DEKs of layers that are in work: they are in no manifest, and may come into one.
type making struct {
	sync.Mutex
	versions map[string]uint32 // by object; 0: it is being asked for, under a version that is not known
}

func (m *making) set(object string, version uint32) {
	m.Lock()
	defer m.Unlock()
	if m.versions == nil {
		m.versions = make(map[string]uint32)
	}
	m.versions[object] = version
}

func (m *making) drop(object string) {
	m.Lock()
	defer m.Unlock()
	delete(m.versions, object)
}

// KeyUse counts the layers by the version of the KEK that their DEK is under, those in work
// included. Version 0 stands for DEKs of which it is not known.
func (t *Timeline) KeyUse() map[uint32]int {
	// In this order: a layer that leaves making is in the manifest by then.
	t.making.Lock()
	inWork := make(map[string]uint32, len(t.making.versions))
	for object, v := range t.making.versions {
		inWork[object] = v
	}
	t.making.Unlock()
	t.mu.Lock()
	defer t.mu.Unlock()
	uses := t.mu.manifest.keyUse()
	for object, v := range inWork {
		if t.mu.handles[object] == nil {
			uses[v]++
		}
	}
	return uses
}

// ReadKeyUse is KeyUse of a branch that is open nowhere, as its manifest in the bucket says.
func ReadKeyUse(ctx context.Context, cfg Config) (map[uint32]int, error) {
	m, _, err := readManifest(ctx, &cfg)
	if err != nil {
		return nil, err
	}
	return m.keyUse(), nil
}

func (m *manifest) keyUse() map[uint32]int {
	uses := make(map[uint32]int)
	for i := range m.Layers {
		v, err := seal.KEKVersion(m.Layers[i].Wrapped)
		if err != nil {
			v = 0
		}
		uses[v]++
	}
	return uses
}
