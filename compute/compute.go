// Package compute is the agent beside one stock Postgres. It gives Postgres a data directory
// that is a mount of ours, starts it at the end of the branch's log, and holds the two
// together: when Postgres ends, the agent ends; when the agent ends, is fenced by a newer
// compute, or loses the lease on the project's keys, Postgres is killed.
//
// One start, in order:
//
//  1. a lease on the project's keys (without one nothing starts: K2);
//  2. a new epoch at the safekeepers, which fences every older compute (W2) and tells where
//     the committed log ends;
//  3. the start-up state as of exactly there, from the page server;
//  4. a shutdown checkpoint, made of that state, committed as the epoch's first WAL;
//  5. the mount, with its local bytes sealed under a key that only this process has;
//  6. Postgres, which finds that it was shut down in order and replays nothing.
//
// Nothing local survives the agent, by design: the folder is emptied at the start.
//
// Postgres's own log never rests in plaintext, for statements and error details hold users'
// data (K1). The agent keeps its end in memory and in the sealed file log/postgresql.log,
// which a superuser can read (pg_read_file). Outside it shows only what Postgres said before
// it took connections, such as a wrong setting, and the SQLSTATE of a PANIC.
package compute

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"
	"time"

	"github.com/holdfastdb/holdfast/internal/keyring"
)

// Config is what an endpoint needs.
type Config struct {
	Project, Branch string
	Name            string // of the endpoint, for leases, audit and logs
	// Dir is the endpoint's folder. It is emptied at each start.
	Dir string
	// Listen is the host:port for Postgres's clients. Beyond this machine they need TLS, for
	// which each start makes a certificate.
	Listen string
	// Addresses of the other roles: see internal/rpc.
	Safekeepers []string
	PageServer  string
	KeyManager  string
	// ExtraSettings go into postgresql.conf. Settings on which Holdfast's promises depend are
	// refused.
	ExtraSettings map[string]string
	// ResetSettings names settings of ALTER SYSTEM that are taken back before Postgres starts;
	// "all" is every one.
	ResetSettings []string
	// CacheBytes bounds the local sealed copy of pages. 0: pgfs's default.
	CacheBytes int64
	// VerifyPages has each page that Postgres wrote compared with the page server's before it
	// leaves the local store, and all that is left at a stop in order. Slow, for tests.
	VerifyPages bool
	Guard       Guard        // nil: none
	Logger      *slog.Logger // nil: slog.Default()
}

// Guard ends this process and Postgres if the process goes on past its lease's end: see
// internal/leaseguard.
type Guard interface {
	keyring.Guard
	// Also names a process that has to end with this one: Postgres.
	Also(pid int)
}

// ErrFenced means that a newer compute has opened the branch: this one is to stay ended.
var ErrFenced = errors.New("a newer compute has opened the branch")

// ErrSetting means that Postgres does not start for a setting, such as one that ALTER SYSTEM made:
// trying again does not help.
var ErrSetting = errors.New("a wrong setting")

// Bounds of a start and a stop.
const (
	listenWait   = 15 * time.Second // for a killed predecessor to let the address go
	readyTimeout = 2 * time.Minute  // from Postgres's start to its first answer
	stopWait     = 20 * time.Second // for a fast shutdown, which writes a checkpoint
	quitWait     = 3 * time.Second  // for an immediate one
	killWait     = 10 * time.Second // for SIGKILL, which the kernel may have to deliver first
)

// EnsureDefaults fills in what was left out.
func (c *Config) EnsureDefaults() {
	if c.Logger == nil {
		c.Logger = slog.Default()
	}
}

// Validate tells what is missing or makes no sense.
func (c *Config) Validate() error {
	for _, f := range []struct{ name, value string }{{"project", c.Project}, {"branch", c.Branch}, {"name", c.Name}, {"folder", c.Dir},
		{"page server's address", c.PageServer}, {"key manager's address", c.KeyManager}} {
		if f.value == "" {
			return fmt.Errorf("compute: the %s is missing", f.name)
		}
	}
	switch _, _, err := net.SplitHostPort(c.Listen); {
	case err != nil:
		return fmt.Errorf("compute: listen address %q: want HOST:PORT: %w", c.Listen, err)
	case len(c.Safekeepers) == 0:
		return errors.New("compute: no safekeeper's address was given")
	case !filepath.IsAbs(c.Dir):
		return fmt.Errorf("compute: the folder %q is not an absolute path", c.Dir)
	case c.CacheBytes < 0:
		return fmt.Errorf("compute: a cache of %d bytes", c.CacheBytes)
	}
	return nil
}
