package compute

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/holdfastdb/holdfast/compute/pgfs"
	"github.com/holdfastdb/holdfast/internal/auxfile"
	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/internal/walrec"
)

// When the agent has the log told of files that WAL does not describe.

// untold is what the start changes of the branch's files.
func (a *agent) untold() (changes []auxfile.Change) {
	for _, name := range a.plan.Stale {
		changes = append(changes, auxfile.Change{Path: name, Removed: true})
	}
	if len(a.cfg.ResetSettings) > 0 {
		changes = append(changes, auxfile.Change{Path: auxfile.Settings, Content: a.plan.Auto})
	}
	return changes
}

// settleAux makes durable what has waited for Postgres to take connections, unless a client's
// ALTER SYSTEM, faster than this, took it along.
func (a *agent) settleAux(ctx context.Context) error {
	err := a.flushOnce(ctx)
	if err != nil && len(a.cfg.ResetSettings) > 0 {
		return fmt.Errorf("making durable that settings were reset: %w", err)
	}
	if err != nil {
		a.log.Warn("telling the log of files that are gone; it is tried again", "error", err)
	}
	return nil
}

// flushAux makes durable, now and then, what waits.
func (a *agent) flushAux(ctx context.Context) {
	for failed := false; ; {
		select {
		case <-ctx.Done():
			return
		case <-time.After(pollInterval):
		}
		err := a.flushOnce(ctx)
		if err != nil && !failed && ctx.Err() == nil {
			a.log.Warn("telling the log of files that WAL does not describe; it is tried again", "error", err)
		}
		failed = err != nil
	}
}

func (a *agent) flushOnce(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, queryTimeout)
	defer cancel()
	return a.aux.flush(ctx)
}

// sayLast puts into the log, behind a shutdown in order, what Postgres left in files then:
// where replication slots stand, and the statistics. It is not known to be lost if it fails: a
// slot stands where it stood before, and statistics begin anew, as after a crash.
func (a *agent) sayLast() {
	select {
	case <-a.postgres.Done():
	default:
		return
	}
	if a.postgres.inOrder(a.fs) != nil {
		return
	}
	ctx, cancel := context.WithTimeout(a.life, queryTimeout)
	defer cancel()
	var changes []auxfile.Change
	switch stats, err := readUpTo(a.fs, auxfile.Stats, maxStats); {
	case err == nil:
		changes = append(changes, auxfile.Change{Path: auxfile.Stats, Content: stats})
	case !errors.Is(err, os.ErrNotExist):
		a.log.Warn("the statistics could not be kept at the shutdown, and begin anew", "error", err)
	}
	message, err := a.aux.last(ctx, changes...)
	if err == nil && message != nil {
		err = a.writer.Append(a.plan.SystemID, func(prev pg.LSN) []byte {
			return walrec.Build(walrec.RmLogicalMsg, 0, 0, prev, auxfile.Record(message))
		})
		if err == nil {
			err = a.writer.Sync(ctx)
		}
	}
	if err != nil {
		a.log.Warn("statistics, and where replication slots stand, could not be kept at the shutdown", "error", err)
	}
}

// maxStats leaves room in the last message for all else.
const maxStats = auxfile.MaxContent / 2

// readUpTo reads a whole file of at most limit bytes.
func readUpTo(fs *pgfs.FS, name string, limit int) ([]byte, error) {
	data := make([]byte, limit+1)
	n, err := fs.ReadAt(name, data, 0)
	switch {
	case err == nil:
		return nil, fmt.Errorf("%s has more than %d bytes, the most that is kept", name, limit)
	case err != io.EOF:
		return nil, err
	}
	return data[:n], nil
}
