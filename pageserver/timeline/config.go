package timeline

import (
	"errors"
	"fmt"
	"log/slog"
	"regexp"
	"time"

	"github.com/holdfastdb/holdfast/internal/blob"
	"github.com/holdfastdb/holdfast/internal/keyring"
	"github.com/holdfastdb/holdfast/pageserver/keyspace"
)

// Errors on which callers branch. They are wrapped: use errors.Is. A revoked key is
// keyring.ErrRevoked; a branch that is not there or there already, blob.ErrNotFound and
// blob.ErrExists.
var (
	// ErrClosed is the answer of a closed timeline.
	ErrClosed = errors.New("the timeline is closed")
	// ErrSuperseded means that another server opened the branch: this one must stop.
	ErrSuperseded = errors.New("another page server has opened the branch")
	// ErrNotYet means that the LSN is beyond LastLSN: use WaitFor first.
	ErrNotYet = errors.New("the LSN is not ingested yet")
	// ErrTooOld means that the LSN is below the history that is kept.
	ErrTooOld = errors.New("the LSN is older than the history that is kept")
)

// MaxValue bounds the data of one value, in bytes.
const MaxValue = 32 << 20

// Config says which branch, and where and how it is kept.
type Config struct {
	Project, Branch string
	Store           blob.Store
	Ring            keyring.Ring
	// Dir is a folder of this timeline alone for the local, sealed copies of layers. Empty:
	// none are kept.
	Dir string
	// Materialize makes a value from its history, which has a base or an origin. After an error the
	// key keeps its changes. Nil: no images are made. It is called concurrently, in the
	// background and by Get for long histories; it may keep nothing it is given, and
	// gives its result away.
	Materialize func(keyspace.Key, History) ([]byte, error)
	Log         *slog.Logger

	FlushBytes      int64         // size at which the open layer is frozen; default 64 MiB
	FlushAge        time.Duration // age at which it is; default 5 min, negative: never
	MaxFrozen       int           // frozen layers at which Put waits; default 3
	BlockCacheBytes int64         // decompressed blocks in memory, and a quarter more for images of hot keys; default 64 MiB
	DiskCacheBytes  int64         // local copies; default 4 GiB
	OpenLayers      int           // layers whose index is kept in memory; default 512
	CompactAfter    int           // L0 files at which compaction begins; default 6, negative: never
	LayerBytes      int64         // size at which an L1 or L2 file ends; default 64 MiB
	MaxStack        int           // L1 files over one L2 file before they are merged; default 4
	ImageAfter      int           // changes after which a key gets an image; default 16
	// HistoryBytes is the history window, in bytes of WAL before DurableLSN. Compaction
	// removes nothing that a read within it needs (invariant P3). Default 256 MiB.
	HistoryBytes int64

	retryMin, retryMax time.Duration // back-off of what the bucket or the key manager failed
}

func setDefault[T int | int64 | time.Duration](p *T, v T) {
	if *p == 0 {
		*p = v
	}
}

// EnsureDefaults fills in what was left zero.
func (c *Config) EnsureDefaults() {
	setDefault(&c.FlushBytes, 64<<20)
	setDefault(&c.FlushAge, 5*time.Minute)
	setDefault(&c.MaxFrozen, 3)
	setDefault(&c.BlockCacheBytes, 64<<20)
	setDefault(&c.DiskCacheBytes, 4<<30)
	setDefault(&c.OpenLayers, 512)
	setDefault(&c.CompactAfter, 6)
	setDefault(&c.LayerBytes, 64<<20)
	setDefault(&c.MaxStack, 4)
	setDefault(&c.ImageAfter, 16)
	setDefault(&c.HistoryBytes, 256<<20)
	setDefault(&c.retryMin, 100*time.Millisecond)
	setDefault(&c.retryMax, 10*time.Second)
	if c.Log == nil {
		c.Log = slog.Default()
	}
	c.Log = c.Log.With("project", c.Project, "branch", c.Branch)
}

var nameRE = regexp.MustCompile(`^[a-zA-Z0-9_=-][a-zA-Z0-9._=-]{0,99}$`)

// Validate says what is missing or cannot be.
func (c *Config) Validate() error {
	switch {
	case !nameRE.MatchString(c.Project):
		return fmt.Errorf("timeline: project %q: want a name of 1 to 100 of [a-zA-Z0-9._=-]", c.Project)
	case !nameRE.MatchString(c.Branch):
		return fmt.Errorf("timeline: branch %q: want a name of 1 to 100 of [a-zA-Z0-9._=-]", c.Branch)
	case c.Store == nil || c.Ring == nil:
		return fmt.Errorf("timeline: branch %s: a store and a key ring are needed", c.Branch)
	}
	return nil
}

// prefix is where the branch's objects are in the bucket.
func (c *Config) prefix() string {
	return "projects/" + c.Project + "/branches/" + c.Branch + "/"
}

func (c *Config) manifestKey() string { return c.prefix() + "manifest" }
func (c *Config) layerPrefix() string { return c.prefix() + "layers/" }
