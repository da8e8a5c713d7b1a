package compute

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync"

	"github.com/holdfastdb/holdfast/internal/auxfile"
	"github.com/holdfastdb/holdfast/internal/pg"
)

// auxKeeper puts what becomes of files that WAL does not describe into the log. While
// Postgres runs it is Postgres that writes it there, in its place among the WAL. What
// Postgres does to such files before it takes connections, and during a shutdown, when it
// takes none any more, waits for the next message; the last one is the agent's own.
type auxKeeper struct {
	seal func(ctx context.Context, changes []auxfile.Change) ([]byte, error)
	emit func(ctx context.Context, message []byte) error // fails with errNotServing

	mu struct {
		sync.Mutex // held while a message is under way: the log's order is that of the changes
		pending    []auxfile.Change
		kept       map[string]bool // what the branch has, or is about to have
	}
}

// errNotServing means that Postgres takes no connections at this time.
var errNotServing = errors.New("the endpoint's Postgres takes no connections")

// begin tells what the branch has at the start, and what the log is to be told of it as soon as
// Postgres takes connections.
func (k *auxKeeper) begin(kept []string, waiting []auxfile.Change) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.mu.kept = make(map[string]bool)
	for _, name := range kept {
		k.mu.kept[name] = true
	}
	k.mu.pending = waiting
}

// keep makes changes durable. If it fails, they must not show.
func (k *auxKeeper) keep(ctx context.Context, changes []auxfile.Change) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	all, waits := k.mu.pending, true
	for _, c := range changes {
		switch {
		case c.Path == auxfile.Stats: // taken at the end, if that is in order
			continue
		case !c.Removed && isTemporarySlot(c):
			continue
		case c.Removed && !k.mu.kept[c.Path] && !strings.HasPrefix(c.Path, auxfile.Mappings+"/"):
			continue
		}
		// That an old snapshot or mapping is gone is no news that must not get lost.
		waits = waits && c.Removed && !strings.HasPrefix(c.Path, auxfile.Slots+"/")
		all = with(all, c)
	}
	if waits {
		k.mu.pending = all
		return nil
	}
	err := k.sendLocked(ctx, all)
	if errors.Is(err, errNotServing) && !slices.ContainsFunc(changes, func(c auxfile.Change) bool { return c.Path == auxfile.Settings }) {
		k.mu.pending = all
		err = nil
	}
	if err == nil {
		for _, c := range all {
			if c.Removed {
				delete(k.mu.kept, c.Path)
			} else {
				k.mu.kept[c.Path] = true
			}
		}
	}
	return err
}

// flush sends what waits.
func (k *auxKeeper) flush(ctx context.Context) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if len(k.mu.pending) == 0 {
		return nil
	}
	return k.sendLocked(ctx, k.mu.pending)
}

func (k *auxKeeper) sendLocked(ctx context.Context, changes []auxfile.Change) error {
	message, err := k.seal(ctx, changes)
	if err != nil {
		return err
	}
	if err := k.emit(ctx, message); err != nil {
		return err
	}
	k.mu.pending = nil
	return nil
}

// last is the message for the end of a shutdown in order; nil if there is nothing to say.
func (k *auxKeeper) last(ctx context.Context, changes ...auxfile.Change) ([]byte, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	all := k.mu.pending
	for _, c := range changes {
		all = with(all, c)
	}
	if len(all) == 0 {
		return nil, nil
	}
	return k.seal(ctx, all)
}

// with adds a change in the place of an older one of the same file.
func with(list []auxfile.Change, c auxfile.Change) []auxfile.Change {
	list = slices.DeleteFunc(slices.Clone(list), func(old auxfile.Change) bool { return old.Path == c.Path })
	return append(list, c)
}

// isTemporarySlot tells of a slot that ends with its connection.
func isTemporarySlot(c auxfile.Change) bool {
	if !strings.HasPrefix(c.Path, auxfile.Slots+"/") {
		return false
	}
	s, err := pg.ParseReplicationSlot(c.Content)
	return err == nil && s.Persistency == pg.SlotTemporary
}
