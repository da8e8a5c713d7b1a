package group

import (
	"errors"
	"time"

	"go.etcd.io/raft/v3/raftpb"

	"github.com/holdfastdb/holdfast/safekeeper/walstate"
	"github.com/holdfastdb/holdfast/safekeeper/walstore"
)

const (
	// holdCommit is how long news of the commit index alone wait for entries to go with:
	// a follower that answers one message less leaves its processor to others.
	holdCommit = 2 * time.Millisecond
	// quiet is after how long without writes the log is marked.
	quiet = 200 * time.Millisecond
	// retryFull is how often a write to a full disk is tried again.
	retryFull = 500 * time.Millisecond
)

// run owns the core.
func (g *Group) run() {
	tick := time.NewTicker(g.cfg.Tick)
	defer tick.Stop()
	hold := time.NewTimer(time.Hour)
	defer hold.Stop()
	holding := false
	for {
		select {
		case <-g.ctx.Done():
			return
		case <-tick.C:
			g.core.Tick()
			g.publishStatus()
		case <-hold.C:
			holding = false
			g.releaseHeld()
		case <-g.wake:
		}
		if err := g.turn(); err != nil {
			g.fail(err)
			return
		}
		if len(g.held) > 0 && !holding {
			hold.Reset(holdCommit)
			holding = true
		}
	}
}

// turn takes what came in and does what follows from it.
func (g *Group) turn() error {
	g.inbox.Lock()
	msgs, props, own, calls := g.inbox.msgs, g.inbox.props, g.inbox.own, g.inbox.calls
	g.inbox.msgs, g.inbox.props, g.inbox.own, g.inbox.calls = nil, nil, nil, nil
	g.inbox.Unlock()
	for _, fn := range calls {
		fn()
	}
	for _, o := range own {
		if err := g.core.Written(o); err != nil {
			return err
		}
	}
	for _, m := range msgs {
		g.core.Step(m.msg, m.from, m.to)
	}
	for _, p := range props {
		if l := g.leadership.Load(); l == nil || l != p.lead {
			continue
		}
		if g.core.Propose(p.data) != nil {
			g.endLeadership()
		}
	}
	for {
		var fx Effects
		more, err := g.core.Ready(&fx)
		if err != nil {
			return err
		}
		if !more {
			break
		}
		g.effect(&fx)
	}
	g.checkLeadership()
	if !g.status.Load().Joined && g.core.Joined() {
		g.publishStatus()
	}
	return nil
}

func (g *Group) effect(fx *Effects) {
	g.lead.Store(fx.Lead)
	for _, o := range fx.Send {
		g.send(o)
	}
	if len(fx.Append) > 0 {
		g.writes.Lock()
		g.writes.queue = append(g.writes.queue, fx.Append...)
		g.writes.Unlock()
		poke(g.writeWake)
	}
	for i := range fx.Results {
		g.applied(&fx.Results[i])
	}
}

func (g *Group) applied(r *walstate.Result) {
	if r.Command.ID != 0 {
		if ch, ok := g.waiters.Load(r.Command.ID); ok {
			ch.(chan walstate.Result) <- *r // has room for the one result there is
		}
	}
	if r.Branch == nil {
		return
	}
	// What this leader let pass did not fit: its idea of the log's end is wrong, and with a
	// new leadership it begins from what is applied.
	isWAL := r.Command.Kind == walstate.KindAppend || r.Command.Kind == walstate.KindPiece
	if isWAL && errors.Is(r.Err, walstate.ErrGap) {
		g.endLeadership()
	}
	g.subs.notify(r.Branch.No)
	if len(r.Dropped) > 0 {
		g.dropArchived(r.Branch.Name, r.Dropped)
	}
}

func (g *Group) endLeadership() {
	if l := g.leadership.Swap(nil); l != nil {
		close(l.Done)
	}
}

func (g *Group) checkLeadership() {
	l := g.leadership.Load()
	if l != nil && g.core.LeadsTerm(false) != l.Term {
		g.endLeadership()
		l = nil
	}
	if l == nil {
		if term := g.core.LeadsTerm(true); term != 0 {
			g.leadership.Store(&Leadership{Term: term, Done: make(chan struct{})})
			g.log.Info("leads", "term", term)
		}
	}
}

// send sends a message, or, if it is only news of the commit index, holds it back for a
// moment: the next entries carry the same news.
func (g *Group) send(o Outgoing) {
	if o.Msg.GetType() == raftpb.MsgApp {
		if len(o.Msg.GetEntries()) == 0 {
			g.held[o.To] = o
			return
		}
		delete(g.held, o.To)
	}
	g.cfg.Transport.Send(g.cfg.Group, g.core.Incarnation(), o)
}

func (g *Group) releaseHeld() {
	for to, o := range g.held {
		delete(g.held, to)
		g.cfg.Transport.Send(g.cfg.Group, g.core.Incarnation(), o)
	}
}

func (g *Group) publishStatus() {
	st := g.core.Status()
	g.status.Store(&st)
}

// write owns the writing side of the log.
func (g *Group) write() {
	// Until there is something to write the store is not this goroutine's: before Raft runs,
	// the one that joins the group writes to it (spendVotes).
	idle := time.NewTimer(quiet)
	idle.Stop()
	defer idle.Stop()
	var kicked bool
	for {
		select {
		case <-g.ctx.Done():
			return
		case <-idle.C:
			if err := g.core.Store().Mark(); err != nil {
				g.log.Warn("the log could not be marked", "err", err)
			}
			continue
		case <-g.writeWake:
		}
		for {
			g.writes.Lock()
			queue := g.writes.queue
			g.writes.queue = nil
			g.writes.Unlock()
			if len(queue) == 0 {
				break
			}
			if !g.writeBatch(queue) {
				return
			}
		}
		if half := g.core.Store().HalfFull(); half != kicked {
			kicked = half
			poke(g.maintain)
		}
		idle.Reset(quiet)
	}
}

// writeBatch makes the queue durable with one sync, then sends what waited for that.
func (g *Group) writeBatch(queue []*raftpb.Message) bool {
	batches := make([]walstore.Batch, len(queue))
	for i, m := range queue {
		batches[i] = walstore.Batch{Entries: m.GetEntries(), Snapshot: m.GetSnapshot()}
		if m.Term != nil {
			batches[i].HardState = &raftpb.HardState{Term: m.Term, Vote: m.Vote, Commit: m.Commit}
		}
	}
	for {
		err := g.core.Store().Write(batches)
		if err == nil {
			break
		}
		if !walstore.IsFull(err) {
			g.fail(err)
			return false
		}
		g.setFull(true, err)
		select {
		case <-g.ctx.Done():
			return false
		case <-time.After(retryFull):
		}
	}
	if g.full.Load() {
		g.setFull(false, nil)
	}
	var own []*raftpb.Message
	for _, m := range queue {
		own = append(own, g.core.Responses(m, func(o Outgoing) { g.cfg.Transport.Send(g.cfg.Group, g.core.Incarnation(), o) })...)
	}
	if len(own) > 0 {
		g.inbox.Lock()
		g.inbox.own = append(g.inbox.own, own)
		g.inbox.Unlock()
		poke(g.wake)
	}
	return true
}

func (g *Group) setFull(full bool, err error) {
	if g.full.Swap(full) == full {
		return
	}
	if full {
		g.log.Error("the disk is full: this replica accepts no WAL until there is room", "dir", g.cfg.Dir, "err", err)
	} else {
		g.log.Info("the disk takes writes again", "dir", g.cfg.Dir)
	}
	g.call(func() { g.core.SetStalled(full) })
}
