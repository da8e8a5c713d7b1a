package keymgr

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/holdfastdb/holdfast/internal/blob"
)

// document is what the bucket keeps of a key: projects/PROJECT/keys.json, or
// projects/PROJECT/branches/BRANCH/keys.json of a branch that has its own. It is made by Create
// and changed by Swap only (updateDocument), so that of two key managers one wins.
//
// Format 1 had neither branches nor a CMK for each KEK. It is read, and becomes format 2 at
// the next write.
type document struct {
	Format  int    `json:"format"`
	Project string `json:"project"`
	// Revision is one more with each update, so that what was read late is known to be old.
	Revision uint64       `json:"revision,omitempty"`
	Branch   string       `json:"branch,omitempty"`
	CMK      string       `json:"cmk"`     // wraps new versions of the KEK
	Current  uint32       `json:"current"` // the version of the KEK that wraps new DEKs
	KEKs     []kekVersion `json:"keks"`
	// Hold, if there, keeps the key from being used whatever the KMS says.
	Hold *hold `json:"hold,omitempty"`
	// GraceMS is for how long the key may be used after the KMS stopped answering; nil: the default.
	GraceMS *int64 `json:"grace_ms,omitempty"`
	// RotateEveryMS is the age of the current KEK at which a new version is made; 0: never by itself.
	RotateEveryMS int64 `json:"rotate_every_ms,omitempty"`
	// Rewrap is a re-wrapping that has begun: until it is done KEKs may be under two CMKs.
	Rewrap *rewrapTarget `json:"rewrap,omitempty"`

	old bool // it was read as format 1
}

// kekVersion is one version of the KEK, wrapped by a CMK.
type kekVersion struct {
	Version       uint32 `json:"version"`
	CreatedUnixMS int64  `json:"created_unix_ms,omitempty"` // 0: made under format 1, not known
	CMK           string `json:"cmk"`
	CMKVersion    string `json:"cmk_version"`
	Wrapped       []byte `json:"wrapped"` // kekPayload's, under CMK
}

// hold is `holdfast key revoke`.
type hold struct {
	SinceUnixMS int64  `json:"since_unix_ms"`
	Reason      string `json:"reason"`
}

// rewrapTarget is the CMK under which every KEK is to be.
type rewrapTarget struct {
	CMK         string `json:"cmk"`
	SinceUnixMS int64  `json:"since_unix_ms"`
	// Done are the versions of the KEK that have been wrapped again since.
	Done []uint32 `json:"done,omitempty"`
}

const (
	documentFormat    = 2
	documentFormatOld = 1
	maxDocument       = 1 << 20
	maxUpdates        = 20 // lost races, or failed writes, of one update
	// maxRevision is more than there ever are; one that cannot grow would keep later ones from being believed.
	maxRevision = 1 << 53
)

// errBucket says nothing of the document that was to be read.
var errBucket = errors.New("the bucket does not answer")

func (d *document) id() keyID { return keyID{d.Project, d.Branch} }

// clone gives a document that may be changed. What its pointers and wrapped KEKs are of is never altered.
func (d *document) clone() *document {
	c := *d
	c.KEKs = slices.Clone(d.KEKs)
	if d.Rewrap != nil {
		r := *d.Rewrap
		r.Done = slices.Clone(r.Done)
		c.Rewrap = &r
	}
	return &c
}

// find gives a version of the KEK, or nil.
func (d *document) find(version uint32) *kekVersion {
	for i := range d.KEKs {
		if d.KEKs[i].Version == version {
			return &d.KEKs[i]
		}
	}
	return nil
}

// graceMS is the key's own grace, or the default.
func (d *document) graceMS(byDefault int64) int64 {
	if d.GraceMS == nil {
		return byDefault
	}
	return *d.GraceMS
}

// probes are the versions of the KEK whose unwraps tell whether the key may be used: the current
// one and, while a re-wrapping is under way, the newest one under each other CMK.
func (d *document) probes() []kekVersion {
	probes := []kekVersion{*d.find(d.Current)}
	for _, k := range slices.Backward(d.KEKs) {
		if !slices.ContainsFunc(probes, func(p kekVersion) bool { return p.CMK == k.CMK }) {
			probes = append(probes, k)
		}
	}
	return probes
}

// sort orders the KEKs by version, as the format has them.
func (d *document) sort() {
	slices.SortFunc(d.KEKs, func(a, b kekVersion) int { return int(a.Version) - int(b.Version) })
}

func (d *document) check(id keyID) error {
	if d.id() != id {
		return fmt.Errorf("it is of %.200q", d.id())
	}
	if d.Revision > maxRevision {
		return fmt.Errorf("its revision is %d, the most is %d", d.Revision, uint64(maxRevision))
	}
	if d.CMK == "" || d.find(d.Current) == nil {
		return fmt.Errorf("no CMK, or no KEK of the current version %d", d.Current)
	}
	for i, k := range d.KEKs {
		if k.Version == 0 || k.CMK == "" || len(k.Wrapped) == 0 {
			return fmt.Errorf("its KEK of version %d lacks its version, CMK or wrapped form", k.Version)
		}
		if i > 0 && d.KEKs[i-1].Version >= k.Version {
			return fmt.Errorf("its KEK versions %d and %d are not in order", d.KEKs[i-1].Version, k.Version)
		}
	}
	if d.GraceMS != nil && *d.GraceMS < 0 || d.RotateEveryMS < 0 {
		return errors.New("a time in it is negative")
	}
	return nil
}

// upgrade makes format 2 of format 1.
func (d *document) upgrade() {
	if d.Format != documentFormatOld {
		return
	}
	for i := range d.KEKs {
		d.KEKs[i].CMK = d.CMK
	}
	d.Format, d.old = documentFormat, true
}

func parseDocument(id keyID, data []byte) (*document, error) {
	d := &document{}
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	err := dec.Decode(d)
	switch {
	case len(data) > maxDocument:
		err = fmt.Errorf("it has %d bytes, the most is %d", len(data), maxDocument)
	case err != nil:
	case dec.Decode(new(any)) != io.EOF:
		err = errors.New("something follows it")
	case d.Format != documentFormat && d.Format != documentFormatOld:
		err = fmt.Errorf("format %d, this program reads formats %d and %d", d.Format, documentFormatOld, documentFormat)
	default:
		d.upgrade()
		err = d.check(id)
	}
	if err != nil {
		return nil, fmt.Errorf("keys of %s (object %s) are damaged: %w", id.words(), id.document(), err)
	}
	return d, nil
}

func (d *document) marshal() ([]byte, error) {
	d.Format = documentFormat
	d.sort()
	if err := d.check(d.id()); err != nil {
		return nil, fmt.Errorf("keys of %s, about to be written: %w", d.id().words(), err)
	}
	data, err := json.MarshalIndent(d, "", "  ")
	if err == nil && len(data) > maxDocument {
		err = fmt.Errorf("keys of %s have grown to %d bytes, the most is %d", d.id().words(), len(data), maxDocument)
	}
	return data, err
}

// loadDocument gives blob.ErrNotFound for a key that was not made.
func loadDocument(ctx context.Context, store blob.Store, id keyID) (*document, error) {
	d, _, _, err := readDocument(ctx, store, id)
	return d, err
}

func readDocument(ctx context.Context, store blob.Store, id keyID) (*document, []byte, blob.ETag, error) {
	data, etag, err := store.Get(ctx, id.document())
	if err != nil && !errors.Is(err, blob.ErrNotFound) {
		err = fmt.Errorf("%w: %w", errBucket, err)
	}
	if err != nil {
		return nil, nil, "", fmt.Errorf("keys of %s: %w", id.words(), err)
	}
	d, err := parseDocument(id, data)
	return d, data, etag, err
}

// createDocument makes a key durable. If there is one already, made by an earlier call, by
// another key manager, or by this call although it was reported to have failed, then that is
// the key and is returned.
func createDocument(ctx context.Context, store blob.Store, d *document) (*document, error) {
	data, err := d.marshal()
	if err != nil {
		return nil, err
	}
	_, createErr := store.Create(ctx, d.id().document(), bytes.NewReader(data), int64(len(data)))
	have, err := loadDocument(ctx, store, d.id())
	if err != nil && createErr != nil && !errors.Is(createErr, blob.ErrExists) {
		return nil, fmt.Errorf("keeping the keys of %s: %w", d.id().words(), createErr)
	}
	return have, err
}

// updateDocument changes a key's document by compare-and-swap and gives it as it is then.
// change is called with the document as the bucket has it and alters it in place. It may be called
// several times, each time anew, also after its change was made by a write that was reported to
// have failed: so it must do nothing to a document that has its change. A document that
// change leaves as it is is not written. A change's error ends the update and is returned as it is.
func updateDocument(ctx context.Context, store blob.Store, id keyID, change func(*document) error) (*document, error) {
	var lastErr error
	for range maxUpdates {
		d, before, etag, err := readDocument(ctx, store, id)
		if err != nil {
			return nil, errors.Join(err, lastErr)
		}
		if err := change(d); err != nil {
			return nil, err
		}
		after, err := d.marshal()
		if err == nil && bytes.Equal(before, after) {
			return d, nil
		}
		d.Revision++
		if after, err = d.marshal(); err != nil {
			return nil, err
		}
		if _, err = store.Swap(ctx, id.document(), after, etag); err == nil { // the commit point
			return d, nil
		}
		// Lost a race, or the outcome is not known: the next turn looks at what is there.
		lastErr = fmt.Errorf("keeping the keys of %s: %w", id.words(), err)
		if ctx.Err() != nil {
			break
		}
	}
	return nil, lastErr
}
