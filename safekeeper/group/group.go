package group

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"go.etcd.io/raft/v3/raftpb"

	"github.com/holdfastdb/holdfast/internal/blob"
	"github.com/holdfastdb/holdfast/safekeeper/walstate"
	"github.com/holdfastdb/holdfast/safekeeper/walstore"
)

// Transport carries messages to peers. Send does not block and may lose what it is given.
type Transport interface {
	Send(group uint64, from uint64, out Outgoing)
	Hello(ctx context.Context, to, group, incarnation uint64) (HelloInfo, error)
}

// Config of a Group.
type Config struct {
	Group     uint64
	NodeID    uint64
	Voters    []uint64
	Dir       string
	Store     walstore.Options
	Blob      blob.Store
	Transport Transport
	Log       *slog.Logger

	Tick           time.Duration // 0: 50 ms
	ElectionTicks  int           // 0: 20
	HeartbeatTicks int           // 0: 2
	RetainBytes    int64         // of log kept though nobody needs it; 0: 64 MiB
	ArchiveBytes   int64         // of log from which on what is needed goes to the bucket; 0: 256 MiB
}

func (c *Config) ensureDefaults() {
	if c.Tick == 0 {
		c.Tick = 50 * time.Millisecond
	}
	if c.ElectionTicks == 0 {
		c.ElectionTicks = 20
	}
	if c.HeartbeatTicks == 0 {
		c.HeartbeatTicks = 2
	}
	if c.RetainBytes == 0 {
		c.RetainBytes = 64 << 20
	}
	if c.ArchiveBytes == 0 {
		c.ArchiveBytes = 256 << 20
	}
}

// Errors on which callers branch.
var (
	ErrNotLeader = errors.New("this replica does not lead")
	ErrStopped   = errors.New("this replica has stopped")
	ErrFull      = errors.New("the disk is full")
)

// Leadership is a time in which this replica leads and may propose. Done is closed when it
// ends; what was proposed under it and is not applied may then be lost.
type Leadership struct {
	Term uint64
	Done chan struct{}
}

// Group is one replica of one group, running.
type Group struct {
	cfg  Config
	core *Core // owned by run, but for View and Store
	log  *slog.Logger

	lead       atomic.Uint64
	leadership atomic.Pointer[Leadership]
	full       atomic.Bool
	status     atomic.Pointer[Status]
	held       map[uint64]Outgoing // owned by run: see send

	inbox struct {
		sync.Mutex
		msgs  []received
		props []proposal
		own   [][]*raftpb.Message // written
		calls []func()
	}
	wake chan struct{}

	writes struct {
		sync.Mutex
		queue []*raftpb.Message
	}
	writeWake chan struct{}
	maintain  chan struct{}

	waiters sync.Map // proposal id -> chan walstate.Result
	subs    subscribers

	ctx    context.Context // ends with the Group
	cancel context.CancelFunc
	done   sync.WaitGroup
	failed atomic.Pointer[error]
}

type received struct {
	msg      *raftpb.Message
	from, to uint64
}

type proposal struct {
	lead *Leadership
	data []byte
}

// Open opens the replica's directory and starts it.
func Open(cfg Config) (*Group, error) {
	cfg.ensureDefaults()
	g := &Group{cfg: cfg, log: cfg.Log.With("group", cfg.Group), held: map[uint64]Outgoing{},
		wake: make(chan struct{}, 1), writeWake: make(chan struct{}, 1), maintain: make(chan struct{}, 1)}
	g.subs.byBranch = map[uint32]map[*Subscription]struct{}{}
	g.ctx, g.cancel = context.WithCancel(context.Background())
	var err error
	g.core, err = OpenCore(CoreConfig{NodeID: cfg.NodeID, Voters: cfg.Voters, Dir: cfg.Dir, Store: cfg.Store,
		ElectionTicks: cfg.ElectionTicks, HeartbeatTicks: cfg.HeartbeatTicks, Log: g.log,
		Incarnation: func() uint64 { return rand.Uint64() | 1 }})
	if err != nil {
		return nil, err
	}
	g.publishStatus()
	for _, fn := range []func(){g.run, g.write, g.keepUp, g.joinGroup} {
		g.done.Add(1)
		go func() {
			defer g.done.Done()
			defer g.contain()
			fn()
		}()
	}
	return g, nil
}

// contain turns a panic of the Raft library, which is how it reports failed storage, into the end of
// this replica of this group.
func (g *Group) contain() {
	if p := recover(); p != nil {
		g.fail(fmt.Errorf("raft stopped: %v", p))
	}
}

func (g *Group) fail(err error) {
	if g.failed.CompareAndSwap(nil, &err) {
		g.log.Error("this replica stops; its peers go on. Restart it once the cause is gone", "err", err)
	}
	g.cancel()
}

// Err tells why the replica stopped, or nil.
func (g *Group) Err() error {
	if p := g.failed.Load(); p != nil {
		return *p
	}
	return nil
}

// HandOver makes another replica the leader, if this one is, so that nobody waits for an
// election when it stops. It takes a moment at most.
func (g *Group) HandOver() {
	const patience, look = 200 * time.Millisecond, 10 * time.Millisecond
	if g.ctx.Err() != nil || g.leadership.Load() == nil {
		return
	}
	g.call(func() { g.core.HandOver() })
	for i := time.Duration(0); i < patience && g.leadership.Load() != nil; i += look {
		time.Sleep(look)
	}
}

// Close stops the replica.
func (g *Group) Close() error {
	g.cancel()
	g.done.Wait()
	g.endLeadership()
	g.subs.notifyAll()
	return g.core.Close()
}

func poke(ch chan struct{}) {
	select {
	case ch <- struct{}{}:
	default:
	}
}

// Deliver takes a message from a peer.
func (g *Group) Deliver(m *raftpb.Message, from, to uint64) {
	if g.ctx.Err() != nil {
		return // nobody empties the inbox any more
	}
	g.inbox.Lock()
	g.inbox.msgs = append(g.inbox.msgs, received{m, from, to})
	g.inbox.Unlock()
	poke(g.wake)
}

// call runs fn in the goroutine that owns core.
func (g *Group) call(fn func()) {
	g.inbox.Lock()
	g.inbox.calls = append(g.inbox.calls, fn)
	g.inbox.Unlock()
	poke(g.wake)
}

// Propose queues a command, in the order of the calls. It is lost if lead has ended, or ends.
func (g *Group) Propose(lead *Leadership, data []byte) {
	g.inbox.Lock()
	g.inbox.props = append(g.inbox.props, proposal{lead, data})
	g.inbox.Unlock()
	poke(g.wake)
}

// Do proposes a command and waits until it is applied. If it fails for any reason but the
// Result's own Err, the command may still be applied later.
func (g *Group) Do(ctx context.Context, c walstate.Command) (walstate.Result, error) {
	lead := g.leadership.Load()
	if lead == nil {
		return walstate.Result{}, g.notLeader()
	}
	c.ID = rand.Uint64() | 1
	ch := make(chan walstate.Result, 1)
	g.waiters.Store(c.ID, ch)
	defer g.waiters.Delete(c.ID)
	g.Propose(lead, c.Encode(nil))
	select {
	case r := <-ch:
		return r, nil
	case <-lead.Done:
		return walstate.Result{}, g.notLeader()
	case <-ctx.Done():
		return walstate.Result{}, ctx.Err()
	}
}

func (g *Group) notLeader() error {
	switch {
	case g.ctx.Err() != nil:
		return ErrStopped
	case g.full.Load():
		return ErrFull
	}
	return ErrNotLeader
}

// Leadership is the present one, or nil with the reason.
func (g *Group) Leadership() (*Leadership, error) {
	if l := g.leadership.Load(); l != nil {
		return l, nil
	}
	return nil, g.notLeader()
}

// Leader is the id of the replica that leads, as far as known; 0: none.
func (g *Group) Leader() uint64 { return g.lead.Load() }

// View calls fn with the state; nothing of it may be kept or changed.
func (g *Group) View(fn func(*walstate.State)) { g.core.View(fn) }

// Store is the log, to read from.
func (g *Group) Store() *walstore.Store { return g.core.Store() }

// Status tells the replica's state.
func (g *Group) Status() Status { return *g.status.Load() }

// Done is closed when the replica stops.
func (g *Group) Done() <-chan struct{} { return g.ctx.Done() }

// Hello answers a peer's Hello.
func (g *Group) Hello(ctx context.Context, from, incarnation uint64) (HelloInfo, error) {
	type answer struct {
		info HelloInfo
		err  error
	}
	ch := make(chan answer, 1)
	g.call(func() {
		info, err := g.core.Hello(from, incarnation)
		ch <- answer{info, err}
	})
	select {
	case a := <-ch:
		return a.info, a.err
	case <-ctx.Done():
		return HelloInfo{}, ctx.Err()
	case <-g.ctx.Done():
		return HelloInfo{}, ErrStopped
	}
}

// joinGroup asks the peers, round by round, until the replica may vote.
func (g *Group) joinGroup() {
	const limit, maxPause = 2 * time.Second, time.Second
	for pause := 20 * time.Millisecond; !g.Status().Joined; pause = min(2*pause, maxPause) {
		g.call(g.core.BeginRound)
		ctx, cancel := context.WithTimeout(g.ctx, limit)
		var round sync.WaitGroup
		for _, v := range g.cfg.Voters {
			if v == g.cfg.NodeID {
				continue
			}
			round.Go(func() {
				info, err := g.cfg.Transport.Hello(ctx, v, g.cfg.Group, g.core.Incarnation())
				if err != nil {
					return // the round is not whole: there will be another
				}
				g.call(func() {
					if err := g.core.Heard(v, info); err != nil {
						g.fail(err)
					}
				})
			})
		}
		round.Wait()
		cancel()
		select {
		case <-g.ctx.Done():
			return
		case <-time.After(pause):
		}
	}
}
