package group

import (
	"context"
	"errors"
	"time"

	"go.etcd.io/raft/v3"

	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/safekeeper/archive"
	"github.com/holdfastdb/holdfast/safekeeper/walstate"
	"github.com/holdfastdb/holdfast/safekeeper/walstore"
)

const (
	maintainEvery  = time.Second
	archiveTimeout = time.Minute
	archiveObject  = 8 << 20 // of ciphertext in one archived object
)

// keepUp prepares log files, lets old ones go, and archives what holds them.
func (g *Group) keepUp() {
	every := time.NewTicker(maintainEvery)
	defer every.Stop()
	var c compactor
	for {
		select {
		case <-g.ctx.Done():
			return
		case <-every.C:
		case <-g.maintain:
		}
		if err := g.core.Store().Prepare(); err != nil {
			g.log.Warn("the next log file could not be made ready", "err", err)
		}
		for g.ctx.Err() == nil {
			more, err := g.compactOne(&c)
			if err != nil && g.ctx.Err() == nil {
				g.log.Warn("the log could not be shortened; it is tried again", "err", err)
			}
			if err != nil || !more {
				break
			}
		}
	}
}

// compactor replays the log behind the real state, to have the state as of the entry up to
// which the log is let go.
type compactor struct {
	base *walstate.State
	// Pieces that hold the log, and since when nothing came to them.
	pinned walstate.Branch
	since  time.Time
}

// compactOne lets the oldest log file go, if there is reason to and nobody needs it.
func (g *Group) compactOne(c *compactor) (more bool, err error) {
	store := g.core.Store()
	first, last, ok := store.Oldest()
	size := store.Bytes()
	if !ok || size <= g.cfg.RetainBytes {
		return false, nil
	}
	var applied, branch uint64
	var name walstate.Name
	var from, to pg.LSN
	var pinned *walstate.Branch
	g.View(func(s *walstate.State) {
		applied = s.Applied()
		if b := s.Pinned(last); b != nil {
			pinned = &walstate.Branch{No: b.No, Name: b.Name, Held: b.Held}
		}
		if b, f, t := s.Needs(last); b != nil {
			branch, name, from, to = uint64(b.No), b.Name, f, t
		}
	})
	switch {
	case applied < last:
		return false, nil
	case pinned != nil:
		return false, g.dropStale(c, pinned)
	case branch != 0 && (size <= g.cfg.ArchiveBytes || g.leadership.Load() == nil):
		return false, nil
	case branch != 0:
		return true, g.archive(uint32(branch), name, from, to)
	}
	data, err := c.upTo(store, first, last)
	if err != nil || data == nil {
		return false, err
	}
	if err := store.Compact(last, data); err != nil {
		return false, err
	}
	// Readers that looked a chunk up before this line are told that it is gone, and look again.
	g.core.mu.Lock()
	g.core.mu.state.Forget(last)
	g.core.mu.Unlock()
	return true, nil
}

// stalePieces is after how long without a new one the pieces of a record no longer hold the
// log. A compute that still sends is not lost by that: it sends the record again.
const stalePieces = time.Minute

// dropStale forgets pieces of a record whose compute is gone.
func (g *Group) dropStale(c *compactor, b *walstate.Branch) error {
	if c.pinned.No != b.No || c.pinned.Held != b.Held {
		c.pinned, c.since = walstate.Branch{No: b.No, Held: b.Held}, time.Now()
	}
	if time.Since(c.since) < stalePieces || g.leadership.Load() == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(g.ctx, archiveTimeout)
	defer cancel()
	_, err := g.Do(ctx, walstate.Command{Kind: walstate.KindDropPieces, Branch: b.No, Begin: b.Held})
	if err == nil {
		g.log.Warn("the pieces of a large record are forgotten: the compute that sent them is gone, and the record was never whole",
			"project", b.Name.Project, "branch", b.Name.Branch)
	}
	return err
}

// upTo gives the state after entry last, in its snapshot form; nil if a snapshot from the leader came in
// between.
func (c *compactor) upTo(store *walstore.Store, first, last uint64) ([]byte, error) {
	if c.base == nil || c.base.Applied()+1 != first {
		snap, err := store.Snapshot()
		if err != nil {
			return nil, err
		}
		c.base = walstate.New()
		if !raft.IsEmptySnap(snap) {
			if c.base, err = walstate.Restore(snap.GetData()); err != nil {
				return nil, err
			}
		}
		if c.base.Applied()+1 != first {
			return nil, nil
		}
	}
	for i := first; i <= last; i++ {
		e, err := store.Entry(i)
		if errors.Is(err, raft.ErrCompacted) {
			c.base = nil
			return nil, nil
		}
		if err == nil {
			_, err = c.base.Apply(i, e.GetData())
		}
		if err != nil {
			c.base = nil
			return nil, err
		}
	}
	c.base.Forget(last)
	return c.base.Snapshot()
}

// archive puts WAL of a branch from from on, at least to to, into the bucket.
func (g *Group) archive(branch uint32, name walstate.Name, from, to pg.LSN) error {
	ctx, cancel := context.WithTimeout(g.ctx, archiveTimeout)
	defer cancel()
	for from < to {
		var chunks []walstate.Chunk
		g.View(func(s *walstate.State) {
			if b := s.Branch(branch); b != nil {
				if i, ok := b.Find(from); ok {
					chunks = append(chunks, b.Chunks[i:]...)
				}
			}
		})
		w := archive.NewWriter()
		for _, ch := range chunks {
			if ch.Begin >= to || w.Size() >= archiveObject {
				break
			}
			e, err := g.core.Store().Entry(ch.Index)
			if err != nil {
				return err
			}
			cmd, err := walstate.Decode(e.GetData())
			if err != nil {
				return err
			}
			w.Add(&cmd)
		}
		if w.Size() == 0 {
			return nil // a snapshot or a report of the page server overtook this
		}
		a, err := w.Put(ctx, g.cfg.Blob, name)
		if err != nil {
			return err
		}
		r, err := g.Do(ctx, walstate.Command{Kind: walstate.KindArchived, Branch: branch, Begin: a.Begin, End: a.End, Bytes: a.Bytes})
		if err != nil {
			return err
		}
		if errors.Is(r.Err, walstate.ErrNoBranch) { // it was deleted meanwhile: nobody else knows of this object
			return g.cfg.Blob.Delete(ctx, archive.Key(name, a))
		}
		if r.Err != nil && !errors.Is(r.Err, walstate.ErrGap) {
			return r.Err
		}
		from = a.End
	}
	return nil
}

// dropArchived deletes objects that the branch's durable LSN has passed, which no later
// command can bring back. Every replica does: one that only the leader deleted would stay for
// ever if the leadership ended just then, and deleting what is gone is no error.
func (g *Group) dropArchived(name walstate.Name, gone []walstate.Archived) {
	g.done.Go(func() {
		ctx, cancel := context.WithTimeout(g.ctx, archiveTimeout)
		defer cancel()
		for _, a := range gone {
			if err := g.cfg.Blob.Delete(ctx, archive.Key(name, a)); err != nil {
				g.log.Warn("an archived stretch of WAL that nobody needs could not be deleted", "key", archive.Key(name, a), "err", err)
			}
		}
	})
}
