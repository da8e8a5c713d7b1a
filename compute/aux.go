package compute

import (
	"context"
	"errors"
	"fmt"
	iofs "io/fs"
	"maps"
	"slices"
	"strings"
	"sync"

	"github.com/holdfastdb/holdfast/internal/api/pb"
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
	show func(name string) ([]byte, error)               // what the data directory has

	mu struct {
		sync.Mutex // held while a message is under way: the log's order is that of the changes
		pending    []auxfile.Change
		kept       map[string]int  // what the branch has, or is about to have, and its bytes
		behind     map[string]bool // slots of which the branch has an older state than Postgres
		unsure     map[string]bool // slots and settings of which it is not known what the branch has
	}
}

// errNotServing means that Postgres takes no connections at this time.
var errNotServing = errors.New("the endpoint's Postgres takes no connections")

// begin tells what the branch has at the start, and what the log is to be told of it as soon as
// Postgres takes connections.
func (k *auxKeeper) begin(files []*pb.NamedFile, waiting []auxfile.Change) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.mu.kept, k.mu.behind, k.mu.unsure = make(map[string]int), make(map[string]bool), make(map[string]bool)
	for _, f := range files {
		if auxfile.Carried(f.Path) && f.Path != auxfile.Stats {
			k.mu.kept[f.Path] = len(f.Data)
		}
	}
	k.mu.pending = waiting
}

// keep makes changes durable. If it fails, they must not show.
func (k *auxKeeper) keep(ctx context.Context, changes []auxfile.Change) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	all, waits := k.mu.pending, true
	var told []auxfile.Change
	for _, c := range changes {
		switch {
		case c.Path == auxfile.Stats: // taken at the end, if that is in order
			continue
		case !c.Removed && isTemporarySlot(c):
			continue
		case c.Removed && !k.isKeptLocked(c.Path):
			continue
		}
		if err := k.checkLocked(c); err != nil {
			return err
		}
		// That an old snapshot or mapping is gone is no news that must not get lost.
		waits = waits && c.Removed && isDecoding(c.Path)
		all, told = with(all, c), append(told, c)
	}
	if waits {
		k.mu.pending = all
		return nil
	}
	err := k.sendLocked(ctx, all, told)
	if errors.Is(err, errNotServing) && mayWait(all, told) {
		k.mu.pending = all
		err = nil
	}
	for _, c := range told {
		k.noteLocked(c, err)
	}
	return err
}

// maxWaiting leaves room for statistics in the last message.
const maxWaiting = auxfile.MaxContent/2 - 1<<20

// mayWait tells whether told can wait among all for Postgres to take connections: a client that
// sets something is to know, and what waits must not outgrow a message.
func mayWait(all, told []auxfile.Change) bool {
	size := 0
	for _, c := range all {
		size += len(c.Content)
	}
	return size <= maxWaiting && !slices.ContainsFunc(told, func(c auxfile.Change) bool { return c.Path == auxfile.Settings })
}

// isKeptLocked tells whether the branch has a file, as far as is known. Mappings are in WAL,
// and nobody tells of new ones.
func (k *auxKeeper) isKeptLocked(name string) bool {
	_, kept := k.mu.kept[name]
	return kept || k.mu.unsure[name] || strings.HasPrefix(name, auxfile.Mappings+"/")
}

// maxCarried bounds what the log carries for a branch: a start gets it in one message
// (rpc.MaxMessage), with statistics and all that WAL describes.
const maxCarried = 32 << 20

// checkLocked refuses what would keep the branch from starting. Slots are small and always the
// same size.
func (k *auxKeeper) checkLocked(c auxfile.Change) error {
	switch {
	case c.Removed:
		return nil
	case isSlot(c.Path):
		if _, err := pg.ParseReplicationSlot(c.Content); err != nil {
			return fmt.Errorf("%s: %w", c.Path, err)
		}
		return nil
	}
	sum := len(c.Content) - k.mu.kept[c.Path]
	for _, size := range k.mu.kept {
		sum += size
	}
	if sum > maxCarried {
		return fmt.Errorf("%s with %d bytes: files that the log carries would have %d bytes, more than %d; drop replication slots that nobody uses",
			c.Path, len(c.Content), sum, maxCarried)
	}
	return nil
}

// noteLocked remembers what is known of a file now. A message that failed may have reached the
// log all the same, and be found there at the next start: harmless for a snapshot, which would
// be made again as it was, but not for a slot or settings.
func (k *auxKeeper) noteLocked(c auxfile.Change, err error) {
	if err == nil {
		k.hasLocked(c)
		delete(k.mu.behind, c.Path)
		return
	}
	if !isDecoding(c.Path) {
		k.mu.unsure[c.Path] = true
	}
	if isSlot(c.Path) && !c.Removed {
		k.mu.behind[c.Path] = true
	}
}

// hasLocked notes that the branch has what a change says.
func (k *auxKeeper) hasLocked(c auxfile.Change) {
	delete(k.mu.unsure, c.Path)
	if c.Removed {
		delete(k.mu.kept, c.Path)
	} else {
		k.mu.kept[c.Path] = len(c.Content)
	}
}

// flush sends what waits.
func (k *auxKeeper) flush(ctx context.Context) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.sendLocked(ctx, k.mu.pending, nil)
}

// sendLocked sends changes: those that wait and, among them, told.
func (k *auxKeeper) sendLocked(ctx context.Context, changes, told []auxfile.Change) error {
	shown, err := k.shownLocked(told)
	if err != nil {
		return err
	}
	for _, c := range shown {
		changes = with(changes, c)
	}
	changes, held := k.holdLocked(changes, told)
	if len(changes) == 0 {
		return nil
	}
	message, err := k.seal(ctx, changes)
	if err != nil {
		return err
	}
	if err := k.emit(ctx, message); err != nil {
		return err
	}
	k.mu.pending = held
	for _, c := range changes {
		if c.Removed {
			delete(k.mu.kept, c.Path)
		}
	}
	for _, c := range shown {
		k.hasLocked(c)
		if c.Removed { // else Postgres still has what was refused
			delete(k.mu.behind, c.Path)
		}
	}
	return nil
}

// shownLocked gives the files of which it is not known what the branch has, told apart, as the
// data directory has them: what was refused does not show.
func (k *auxKeeper) shownLocked(told []auxfile.Change) (shown []auxfile.Change, err error) {
	for _, name := range slices.Sorted(maps.Keys(k.mu.unsure)) {
		if slices.ContainsFunc(told, func(c auxfile.Change) bool { return c.Path == name }) {
			continue
		}
		content, err := k.show(name)
		c := auxfile.Change{Path: name, Content: content}
		switch {
		case errors.Is(err, iofs.ErrNotExist), err == nil && isTemporarySlot(c):
			c = auxfile.Change{Path: name, Removed: true}
		case err != nil:
			return nil, fmt.Errorf("looking what is to be kept: %w", err)
		}
		shown = append(shown, c)
	}
	return shown, nil
}

// holdLocked keeps back what a slot may need at the next start that is behind, and that told
// does not bring up to date: Postgres removes files of logical decoding by where its slots
// stand, the branch has to by where they stood.
func (k *auxKeeper) holdLocked(changes, told []auxfile.Change) (now, held []auxfile.Change) {
	behind := len(k.mu.behind)
	for _, c := range told {
		if k.mu.behind[c.Path] {
			behind--
		}
	}
	if behind == 0 {
		return changes, nil
	}
	for _, c := range changes {
		if c.Removed && isDecoding(c.Path) {
			held = append(held, c)
		} else {
			now = append(now, c)
		}
	}
	return now, held
}

// last is the message for the end of a shutdown in order; nil if there is nothing to say.
func (k *auxKeeper) last(ctx context.Context, changes ...auxfile.Change) ([]byte, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	shown, err := k.shownLocked(nil)
	if err != nil {
		return nil, err
	}
	all := k.mu.pending
	for _, c := range slices.Concat(shown, changes) {
		all = with(all, c)
	}
	all, _ = k.holdLocked(all, nil)
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

// isDecoding tells of a file of logical decoding, which slots need.
func isDecoding(name string) bool {
	return strings.HasPrefix(name, auxfile.Snapshots+"/") || strings.HasPrefix(name, auxfile.Mappings+"/")
}

func isSlot(name string) bool { return strings.HasPrefix(name, auxfile.Slots+"/") }

// isTemporarySlot tells of a slot that ends with its connection.
func isTemporarySlot(c auxfile.Change) bool {
	if !isSlot(c.Path) {
		return false
	}
	s, err := pg.ParseReplicationSlot(c.Content)
	return err == nil && s.Persistency == pg.SlotTemporary
}
