package timeline

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/internal/seal"
	"github.com/holdfastdb/holdfast/pageserver/keyspace"
	"github.com/holdfastdb/holdfast/pageserver/layer"
)

// A manifest is the list of a branch's layers that count: one JSON document, after a line
// that names the format and has the SHA-256 of the rest. It tells nothing of the data but which
// keys and LSNs exist. The sum finds damage, and no forger: who can write to the bucket can
// leave layers out (docs/decisions/0008), or put an older manifest in its place, which the
// safekeepers contradict: the WAL that has to follow it is gone there.
type manifest struct {
	Project string `json:"project"`
	Branch  string `json:"branch"`
	// Generation counts the servers that opened the branch; only the newest may write.
	Generation uint64 `json:"generation"`
	// Server is a random name of the server that opened the generation: two that open the
	// branch at once must not write the same bytes, or both would find their own there.
	Server string `json:"server,omitempty"`
	// Revision counts the writes.
	Revision uint64 `json:"revision"`
	// Start is the LSN of the branch's first versions.
	Start lsnText `json:"start_lsn"`
	// Durable: every version at or below it is in the layers.
	Durable lsnText `json:"durable_lsn"`
	// Horizon: reads below it are refused, since compaction may have dropped what they need.
	Horizon lsnText `json:"horizon_lsn"`
	// Layers from the oldest to the newest within their level.
	Layers []layerDesc `json:"layers"`
}

// The levels of layers.
const (
	levelFlushed = 0 // a frozen layer as it was
	levelChanges = 1 // over one partition
	levelBase    = 2 // one partition's images, and changes within the window; none overlap
)

// layerDesc describes a layer. Wrapped is the authoritative wrapped DEK: the one in the
// file's header is not used. A rotation of the KEK replaces it, and nothing else of a layer ever changes (P2).
type layerDesc struct {
	Object  string   `json:"object"`
	Level   int      `json:"level"`
	First   keyText  `json:"first_key"`
	Last    keyText  `json:"last_key"`
	MinLSN  lsnText  `json:"min_lsn"`
	MaxLSN  lsnText  `json:"max_lsn"`
	Entries uint64   `json:"entries"`
	Size    int64    `json:"size"`
	ETag    string   `json:"etag"`
	SHA256  hashText `json:"sha256"` // of the sealed file
	Wrapped []byte   `json:"wrapped_dek"`
}

const manifestMagic = "holdfast timeline manifest 1 sha256:"

// ErrManifest means that a manifest is damaged, or another branch's.
var ErrManifest = errors.New("the manifest is damaged or not where it belongs")

func (m *manifest) encode() ([]byte, error) {
	body, err := json.MarshalIndent(m, "", " ")
	if err != nil {
		return nil, fmt.Errorf("encoding the manifest: %w", err)
	}
	return sumManifest(body), nil
}

// sumManifest puts the first line before the rest.
func sumManifest(body []byte) []byte {
	sum := sha256.Sum256(body)
	return append([]byte(manifestMagic+hex.EncodeToString(sum[:])+"\n"), body...)
}

// decodeManifest reads the manifest of the branch that cfg names.
func decodeManifest(cfg *Config, data []byte) (*manifest, error) {
	fail := func(format string, args ...any) (*manifest, error) {
		return nil, fmt.Errorf("manifest %s: %w: %s", cfg.manifestKey(), ErrManifest, fmt.Sprintf(format, args...))
	}
	line, body, ok := bytes.Cut(data, []byte("\n"))
	sum, isManifest := strings.CutPrefix(string(line), manifestMagic)
	if !ok || !isManifest {
		return fail("it does not begin with %q", manifestMagic)
	}
	if have := sha256.Sum256(body); hex.EncodeToString(have[:]) != sum {
		return fail("SHA-256 of its %d bytes is %x, want %s", len(body), have, sum)
	}
	m := &manifest{}
	dec := json.NewDecoder(bytes.NewReader(body))
	dec.DisallowUnknownFields()
	if err := dec.Decode(m); err != nil {
		return fail("%v", err)
	}
	if m.Project != cfg.Project || m.Branch != cfg.Branch {
		return fail("it is that of project %s, branch %s", m.Project, m.Branch)
	}
	if err := m.check(cfg.layerPrefix()); err != nil {
		return fail("%v", err)
	}
	return m, nil
}

// check sees that the layers can be what the reader takes them for.
func (m *manifest) check(prefix string) error {
	if m.Generation == 0 || m.Durable < m.Start || m.Horizon > m.Durable {
		return fmt.Errorf("generation %d, start %s, durable %s, horizon %s contradict one another", m.Generation, m.Start, m.Durable, m.Horizon)
	}
	seen := make(map[string]bool)
	var bases []layerDesc
	for _, d := range m.Layers {
		switch {
		case !strings.HasPrefix(d.Object, prefix) || seen[d.Object]:
			return fmt.Errorf("layer %q is not below %s, or listed twice", d.Object, prefix)
		case d.Level < levelFlushed || d.Level > levelBase || d.Last.key().Compare(d.First.key()) < 0 || d.MaxLSN < d.MinLSN:
			return fmt.Errorf("layer %s: level %d, keys or LSNs cannot be", d.Object, d.Level)
		case d.Size <= 0 || d.Entries == 0 || len(d.Wrapped) == 0 || len(d.Wrapped) > seal.MaxWrapped:
			return fmt.Errorf("layer %s: size %d, %d entries, wrapped DEK of %d bytes", d.Object, d.Size, d.Entries, len(d.Wrapped))
		}
		seen[d.Object] = true
		if d.Level == levelBase {
			bases = append(bases, d)
		}
	}
	slices.SortFunc(bases, byFirst)
	for i := 1; i < len(bases); i++ {
		if bases[i].First.key().Compare(bases[i-1].Last.key()) <= 0 {
			return fmt.Errorf("layers %s and %s overlap", bases[i-1].Object, bases[i].Object)
		}
	}
	return nil
}

func byFirst(a, b layerDesc) int { return a.First.key().Compare(b.First.key()) }

func (m *manifest) clone() *manifest {
	c := *m
	c.Layers = slices.Clone(m.Layers)
	return &c
}

// replace takes layers out and puts others in, each at the end of its level.
func (m *manifest) replace(out map[string]bool, in []layerDesc) {
	m.Layers = slices.DeleteFunc(m.Layers, func(d layerDesc) bool { return out[d.Object] })
	m.Layers = append(m.Layers, in...)
	slices.SortStableFunc(m.Layers, func(a, b layerDesc) int { return a.Level - b.Level })
}

// matches tells whether a file is the layer that the manifest means.
func (d *layerDesc) matches(p layer.Properties) error {
	if keyText(p.First) != d.First || keyText(p.Last) != d.Last || p.Entries != d.Entries ||
		lsnText(p.MinLSN) != d.MinLSN || lsnText(p.MaxLSN) != d.MaxLSN {
		return fmt.Errorf("layer %s: %w: its properties are not those of the file", d.Object, ErrManifest)
	}
	return nil
}

func (c *Config) sealContext(object string) seal.Context {
	return seal.Context{Purpose: seal.PurposeLayer, Project: c.Project, Branch: c.Branch, Object: object}
}

// layerName is an object's key: unique, since a generation belongs to one server.
func (c *Config) layerName(generation, number uint64, level int) string {
	return fmt.Sprintf("%s%08x-%08x-l%d", c.layerPrefix(), generation, number, level)
}

// generationOf reads an object's key; ok is false for what layerName did not make.
func (c *Config) generationOf(object string) (generation uint64, ok bool) {
	var number uint64
	var level int
	name := strings.TrimPrefix(object, c.layerPrefix())
	if _, err := fmt.Sscanf(name, "%08x-%08x-l%d", &generation, &number, &level); err != nil {
		return 0, false
	}
	return generation, object == c.layerName(generation, number, level)
}

// lsnText is an LSN in PostgreSQL's form.
type lsnText pg.LSN

func (l lsnText) String() string               { return pg.LSN(l).String() }
func (l lsnText) MarshalText() ([]byte, error) { return []byte(l.String()), nil }

func (l *lsnText) UnmarshalText(b []byte) error {
	v, err := pg.ParseLSN(string(b))
	*l = lsnText(v)
	return err
}

// keyText is a key in hexadecimal.
type keyText keyspace.Key

func (k keyText) key() keyspace.Key            { return keyspace.Key(k) }
func (k keyText) MarshalText() ([]byte, error) { return []byte(hex.EncodeToString(k[:])), nil }
func (k *keyText) UnmarshalText(b []byte) error {
	return unhex(k[:], b)
}

// hashText is a SHA-256 in hexadecimal.
type hashText [sha256.Size]byte

func (h hashText) MarshalText() ([]byte, error)  { return []byte(hex.EncodeToString(h[:])), nil }
func (h *hashText) UnmarshalText(b []byte) error { return unhex(h[:], b) }

func unhex(dst, text []byte) error {
	if len(text) != 2*len(dst) {
		return fmt.Errorf("%d hexadecimal digits, want %d", len(text), 2*len(dst))
	}
	_, err := hex.Decode(dst, text)
	return err
}
