package keymgr

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/holdfastdb/holdfast/internal/blob"
	"github.com/holdfastdb/holdfast/internal/seal"
)

// document is what the bucket keeps of a project's keys, at projects/PROJECT/keys.json. It is
// made by Create and changed by Swap only, so that of two key managers one wins.
type document struct {
	Format  int       `json:"format"`
	Project string    `json:"project"`
	CMK     string    `json:"cmk"`
	Current uint32    `json:"current"` // the KEK version that wraps new DEKs
	KEKs    []wrapped `json:"keks"`
}

// wrapped is one version of the KEK.
type wrapped struct {
	Version    uint32 `json:"version"`
	Wrapped    []byte `json:"wrapped"` // the payload below, wrapped by the CMK
	CMKVersion string `json:"cmk_version"`
}

const (
	documentFormat = 1
	maxDocument    = 1 << 20
	maxProject     = 64
)

func documentKey(project string) string { return "projects/" + project + "/keys.json" }

// checkProject keeps hostile ids out of object keys and logs.
func checkProject(project string) error {
	if project == "" || len(project) > maxProject {
		return fmt.Errorf("project id %.80q has %d bytes, want 1..%d", project, len(project), maxProject)
	}
	for _, c := range []byte(project) {
		if !('a' <= c && c <= 'z' || '0' <= c && c <= '9' || c == '-') {
			return fmt.Errorf("project id %q: want only [a-z0-9-]", project)
		}
	}
	return nil
}

func (d *document) find(version uint32) *wrapped {
	for i := range d.KEKs {
		if d.KEKs[i].Version == version {
			return &d.KEKs[i]
		}
	}
	return nil
}

func parseDocument(project string, data []byte) (*document, error) {
	d := &document{}
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	err := dec.Decode(d)
	switch {
	case len(data) > maxDocument:
		err = fmt.Errorf("it has %d bytes, the most is %d", len(data), maxDocument)
	case err != nil:
	case d.Format != documentFormat:
		err = fmt.Errorf("format %d, this program reads format %d", d.Format, documentFormat)
	case d.Project != project:
		err = fmt.Errorf("it is of project %.80q", d.Project)
	case d.CMK == "" || d.find(d.Current) == nil:
		err = fmt.Errorf("no CMK, or no KEK of the current version %d", d.Current)
	}
	if err != nil {
		return nil, fmt.Errorf("keys of project %s (object %s) are damaged: %w", project, documentKey(project), err)
	}
	return d, nil
}

// loadDocument gives blob.ErrNotFound for a project that was not created.
func loadDocument(ctx context.Context, store blob.Store, project string) (*document, error) {
	data, _, err := store.Get(ctx, documentKey(project))
	if err != nil {
		return nil, fmt.Errorf("keys of project %s: %w", project, err)
	}
	return parseDocument(project, data)
}

// createDocument makes a project's keys durable. If there are keys already, made by an earlier
// call, by another key manager, or by this call although it was reported to have failed, then
// those are the project's keys and are returned.
func createDocument(ctx context.Context, store blob.Store, d *document) (*document, error) {
	data, err := json.MarshalIndent(d, "", "  ")
	if err != nil {
		return nil, err
	}
	_, createErr := store.Create(ctx, documentKey(d.Project), bytes.NewReader(data), int64(len(data)))
	have, err := loadDocument(ctx, store, d.Project)
	if err != nil && createErr != nil && !errors.Is(createErr, blob.ErrExists) {
		return nil, fmt.Errorf("keeping the keys of project %s: %w", d.Project, createErr)
	}
	return have, err
}

// A KEK travels to the CMK in a payload that names what it is for, since not every KMS
// binds an EncryptionContext: {1} SHA-256 of the context's AAD (32 bytes) KEK (32 bytes).
const (
	payloadFormat = 1
	payloadSize   = 1 + sha256.Size + seal.KeySize
)

func kekPayload(ec EncryptionContext, raw []byte) []byte {
	sum := sha256.Sum256(ec.AAD())
	b := append(make([]byte, 0, payloadSize), payloadFormat)
	return append(append(b, sum[:]...), raw...)
}

// parsePayload takes the KEK out, if it is for ec.
func parsePayload(ec EncryptionContext, payload []byte) ([]byte, error) {
	if len(payload) != payloadSize || payload[0] != payloadFormat {
		return nil, fmt.Errorf("what the CMK unwrapped has %d bytes and is no KEK of a format that this program reads", len(payload))
	}
	if sum := sha256.Sum256(ec.AAD()); !bytes.Equal(sum[:], payload[1:1+sha256.Size]) {
		return nil, fmt.Errorf("what the CMK unwrapped is not version %d of the KEK of project %s: it was moved", ec.KEKVersion, ec.Project)
	}
	return payload[1+sha256.Size:], nil
}
