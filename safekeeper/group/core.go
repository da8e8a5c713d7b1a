// Package group replicates the WAL of a set of branches: it drives one Raft group, whose log
// is a walstore.Store and whose state machine is a walstate.State.
//
// Core decides and has no goroutine and no clock: messages, proposals, ticks and finished
// writes go in, messages and writes to do come out. Group runs a Core for real: one goroutine for
// Raft, one that writes and syncs the log (a batch per fdatasync, while Raft goes on and
// sends to the followers), one for truncation and the archive. The simulation in the tests
// runs Cores from a seed.
//
// A replica whose directory was lost (file join.go) takes no part in votes until it holds
// again all that it may have acknowledged.
package group

import (
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"sync"

	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"

	"github.com/holdfastdb/holdfast/safekeeper/walstate"
	"github.com/holdfastdb/holdfast/safekeeper/walstore"
)

// CoreConfig of one replica of one group.
type CoreConfig struct {
	NodeID         uint64
	Voters         []uint64 // all replicas, this one included, an odd number
	Dir            string
	Store          walstore.Options
	ElectionTicks  int
	HeartbeatTicks int
	Incarnation    func() uint64 // makes a new one, never 0
	Log            *slog.Logger
}

const (
	maxMsgBytes      = 1 << 20  // of entries in one MsgApp; a larger entry goes alone
	maxInflightBytes = 32 << 20 // to one follower
	maxInflightMsgs  = 4096

	bootRound = 3 // ticks in which one replica may win the first election
)

// Core is one replica of one group. Its methods are for one goroutine, but for View and
// Store.
type Core struct {
	cfg   CoreConfig
	log   *slog.Logger
	id    identity
	store *walstore.Store
	rn    *raft.RawNode // nil until the replica may listen to a leader: see join.go
	join  joining

	// peers are the incarnations of the peers, as far as known.
	peers map[uint64]uint64

	term        uint64 // of the last Ready
	isLeader    bool
	appliedTerm uint64
	inflight    int  // own entries of this term, proposed and not applied
	stalled     bool // the disk is full
	bootTicks   int  // until the first election is tried; 0: done

	mu struct {
		sync.RWMutex
		state *walstate.State
	}
}

// An Outgoing message is made for one incarnation of a peer (0: not known).
type Outgoing struct {
	To            uint64
	ToIncarnation uint64
	Msg           *raftpb.Message
}

// Effects are what the caller of Ready has to do.
type Effects struct {
	Send    []Outgoing
	Append  []*raftpb.Message // MsgStorageAppend: write in order, then see to their Responses
	Results []walstate.Result // of what was applied, in order
	Lead    uint64            // who leads, as far as known
}

// OpenCore opens a replica's directory, or makes it.
func OpenCore(cfg CoreConfig) (*Core, error) {
	if len(cfg.Voters)%2 == 0 {
		return nil, fmt.Errorf("group of %d replicas: the number must be odd", len(cfg.Voters))
	}
	c := &Core{cfg: cfg, log: cfg.Log, peers: map[uint64]uint64{}}
	if c.cfg.Store.FS == nil {
		c.cfg.Store.FS = walstore.OS{}
	}
	if err := c.cfg.Store.FS.MkdirAll(cfg.Dir); err != nil {
		return nil, err
	}
	if err := c.loadIdentity(); err != nil {
		return nil, err
	}
	c.cfg.Store.Log = cfg.Log
	var err error
	if c.store, err = walstore.Open(cfg.Dir, cfg.Voters, c.cfg.Store); err != nil {
		return nil, err
	}
	if err = c.restoreState(); err == nil && (c.id.Joined || len(cfg.Voters) == 1) {
		if err = c.setJoined(); err == nil {
			err = c.startRaft()
		}
	}
	if err != nil {
		return nil, errors.Join(err, c.store.Close())
	}
	return c, nil
}

// restoreState takes the state of the store's snapshot; Raft applies the rest again.
func (c *Core) restoreState() error {
	snap, err := c.store.Snapshot()
	if err != nil {
		return err
	}
	state := walstate.New()
	if !raft.IsEmptySnap(snap) {
		if state, err = walstate.Restore(snap.GetData()); err != nil {
			return fmt.Errorf("%s: %w", c.cfg.Dir, err)
		}
	}
	c.mu.Lock()
	c.mu.state = state
	c.mu.Unlock()
	return nil
}

func (c *Core) startRaft() error {
	var err error
	c.rn, err = raft.NewRawNode(&raft.Config{
		ID:                        c.cfg.NodeID,
		ElectionTick:              c.cfg.ElectionTicks,
		HeartbeatTick:             c.cfg.HeartbeatTicks,
		Storage:                   c.store,
		Applied:                   c.mu.state.Applied(),
		AsyncStorageWrites:        true,
		MaxSizePerMsg:             maxMsgBytes,
		MaxCommittedSizePerReady:  16 << 20,
		MaxInflightMsgs:           maxInflightMsgs,
		MaxInflightBytes:          maxInflightBytes,
		CheckQuorum:               true,
		PreVote:                   true,
		DisableProposalForwarding: true,
		Logger:                    raftLogger{c.log},
	})
	if err != nil {
		return fmt.Errorf("starting Raft over %s: %w", c.cfg.Dir, err)
	}
	// When all start together, they try in turn and do not wait for an election timeout,
	// until there is a leader. PreVote keeps this from disturbing one.
	c.bootTicks = 2
	for _, v := range c.cfg.Voters {
		if v < c.cfg.NodeID {
			c.bootTicks += bootRound
		}
	}
	return nil
}

// Store is the replica's log.
func (c *Core) Store() *walstore.Store { return c.store }

// View calls fn with the state; nothing of it may be kept or changed.
func (c *Core) View(fn func(*walstate.State)) {
	c.mu.RLock()
	defer c.mu.RUnlock()
	fn(c.mu.state)
}

// Tick moves Raft's clock. A replica that cannot write does not tick: a leader falls silent
// and its followers elect another, a follower does not campaign.
func (c *Core) Tick() {
	if c.rn == nil || !c.id.Joined || c.stalled {
		return
	}
	c.rn.Tick()
	if c.bootTicks == 0 {
		return
	}
	if c.rn.BasicStatus().Lead != raft.None {
		c.bootTicks = 0
	} else if c.bootTicks--; c.bootTicks == 0 {
		c.bootTicks = bootRound * len(c.cfg.Voters)
		_ = c.rn.Campaign() // its only error is a message from outside
	}
}

// Step takes a peer's message that carries these incarnations. What it may not hear is
// dropped: Raft repeats itself.
func (c *Core) Step(m *raftpb.Message, from, to uint64) {
	if c.rn == nil || m.GetTo() != c.cfg.NodeID || !c.mayHear(m, from, to) {
		return
	}
	_ = c.rn.Step(m) // an error means that the message does not fit: from a stranger, or a proposal
}

func (c *Core) mayHear(m *raftpb.Message, from, to uint64) bool {
	if raft.IsLocalMsg(m.GetType()) || m.GetType() == raftpb.MsgProp {
		return false
	}
	known := c.peers[m.GetFrom()]
	switch {
	case to != c.id.Incarnation && (to != 0 || !c.id.Joined):
		return false // made for the replica that this directory's predecessor was
	case known != 0 && known != from:
		return false // from the predecessor of the peer
	case known == 0:
		c.peers[m.GetFrom()] = from
	}
	isVote := m.GetType() == raftpb.MsgVote || m.GetType() == raftpb.MsgPreVote || m.GetType() == raftpb.MsgTimeoutNow
	return !isVote || c.id.Joined && !c.stalled
}

// Propose adds a command to the log, if this replica leads. An error means that it is not in
// the log.
func (c *Core) Propose(data []byte) error {
	if c.rn == nil || c.stalled {
		return raft.ErrProposalDropped
	}
	if err := c.rn.Propose(data); err != nil {
		return err
	}
	c.inflight++
	return nil
}

// SetStalled tells whether the disk takes writes. A leader whose disk is full hands over.
func (c *Core) SetStalled(stalled bool) {
	c.stalled = stalled
	if stalled {
		c.HandOver()
	}
}

// HandOver asks the follower that is furthest to lead, if this replica does.
func (c *Core) HandOver() {
	if c.rn == nil || c.rn.BasicStatus().RaftState != raft.StateLeader {
		return
	}
	var best, match uint64
	for id, pr := range c.rn.Status().Progress {
		if id != c.cfg.NodeID && pr.RecentActive && (best == 0 || pr.Match > match || pr.Match == match && id < best) {
			best, match = id, pr.Match
		}
	}
	if best != 0 {
		c.rn.TransferLeader(best)
	}
}

// LeadsTerm is the term that this replica leads, once it may accept proposals that depend
// on the state: all of former terms is applied, and nothing of its own is in flight that
// the caller does not know of (fresh: it has none yet). 0: not now.
func (c *Core) LeadsTerm(fresh bool) uint64 {
	if !c.isLeader || c.stalled || c.appliedTerm != c.term || fresh && c.inflight > 0 {
		return 0
	}
	return c.term
}

// Ready collects what is to be done; false if nothing is. An error is final.
func (c *Core) Ready(fx *Effects) (bool, error) {
	if c.rn == nil || !c.rn.HasReady() {
		return false, nil
	}
	rd := c.rn.Ready()
	st := c.rn.BasicStatus()
	fx.Lead = st.Lead
	if st.GetTerm() != c.term || c.isLeader != (st.RaftState == raft.StateLeader) {
		c.term, c.isLeader, c.inflight = st.GetTerm(), st.RaftState == raft.StateLeader, 0
	}
	for _, m := range rd.Messages {
		switch m.GetTo() {
		case raft.LocalAppendThread:
			fx.Append = append(fx.Append, m)
		case raft.LocalApplyThread:
			if err := c.apply(m, fx); err != nil {
				return false, err
			}
		default:
			fx.Send = append(fx.Send, c.outgoing(m))
		}
	}
	return true, c.checkJoined()
}

func (c *Core) outgoing(m *raftpb.Message) Outgoing {
	if m.GetType() == raftpb.MsgSnap {
		// Whether it arrives shows in the follower's next answer; if not, Raft probes again.
		c.rn.ReportSnapshot(m.GetTo(), raft.SnapshotFinish)
	}
	return Outgoing{To: m.GetTo(), ToIncarnation: c.peers[m.GetTo()], Msg: m}
}

func (c *Core) apply(m *raftpb.Message, fx *Effects) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, e := range m.GetEntries() {
		r, err := c.mu.state.Apply(e.GetIndex(), e.GetData())
		if err != nil {
			return fmt.Errorf("%s: %w", c.cfg.Dir, err)
		}
		c.appliedTerm = e.GetTerm()
		if e.GetTerm() == c.term && c.inflight > 0 && len(e.GetData()) > 0 {
			c.inflight--
		}
		fx.Results = append(fx.Results, r)
	}
	for _, resp := range m.GetResponses() {
		if err := c.rn.Step(resp); err != nil {
			return err
		}
	}
	return nil
}

// Responses are the answers to a MsgStorageAppend that was written: those for this
// replica go to Written, the others out.
func (c *Core) Responses(m *raftpb.Message, send func(Outgoing)) (own []*raftpb.Message) {
	for _, resp := range m.GetResponses() {
		if resp.GetTo() == c.cfg.NodeID {
			own = append(own, resp)
		} else {
			send(Outgoing{To: resp.GetTo(), Msg: resp})
		}
	}
	return own
}

// Written takes what Responses gave for this replica.
func (c *Core) Written(own []*raftpb.Message) error {
	for _, m := range own {
		if !raft.IsEmptySnap(m.GetSnapshot()) {
			if err := c.restoreState(); err != nil {
				return err
			}
		}
		if err := c.rn.Step(m); err != nil {
			return err
		}
	}
	return nil
}

// Status is what an operator sees of the replica.
type Status struct {
	Term, Lead, Commit, Applied uint64
	Joined                      bool
}

// Status tells the replica's state.
func (c *Core) Status() Status {
	st := Status{Joined: c.id.Joined}
	if c.rn != nil {
		b := c.rn.BasicStatus()
		st.Term, st.Lead, st.Commit, st.Applied = b.GetTerm(), b.Lead, b.GetCommit(), b.Applied
	}
	return st
}

// Close closes the log. No write may be under way.
func (c *Core) Close() error { return c.store.Close() }

func (c *Core) path(name string) string { return filepath.Join(c.cfg.Dir, name) }
