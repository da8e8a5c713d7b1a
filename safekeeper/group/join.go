package group

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"

	"github.com/holdfastdb/holdfast/safekeeper/walstore"
)

// How a replica that lost its directory comes back, and why that is safe.
//
// Raft lets a replica forget neither its vote nor an entry that it acknowledged. One that
// starts with an empty directory, R, has forgotten both. Each life of a directory therefore
// has a random incarnation, and R is not Joined: it asks all its peers Hello, again and
// again, and
//
//  1. hears Raft only after one whole round of answers. Until Joined it neither votes nor
//     campaigns, but it does take and acknowledge entries: those it really holds.
//  2. Before it hears Raft it persists the highest term of that round, T, with its vote spent.
//     The candidate of a vote in a term above T would have been in that term when it answered,
//     unless it has forgotten that candidacy with a crash; then the vote died with the
//     connection. So R's old votes that count are in terms up to T, and there R cannot vote
//     again.
//  3. It is Joined when it has applied X, the highest last index of a round. Say entry E was
//     committed with R's old acknowledgment: another replica holds E durably (a majority has
//     more members than R), and all have answered, so X is at least E's index. No leader
//     since lacks E: none was elected with R's help. A commit index of X that such a leader
//     told therefore covers E, and R holds E again before it first votes.
//  4. A peer that answers Hello from a new incarnation drops what the old one still has
//     under way, marks what it sends to R with the new one (R drops the rest), and as leader
//     forgets how far R's log matched (else it would never send the beginning). It does that by
//     removing R from its own configuration and adding it again, which with an odd number of
//     replicas never makes a quorum smaller.
//
// A round with peers that are themselves not Joined counts for 3 only if nobody has any log:
// then the cluster is new. Two of three directories lost is more than Raft survives, and the
// replicas wait rather than guess. All peers, not a majority, have to answer: a peer
// that is away might hold the only other copy, or the vote.

// identity is the replica's document about itself.
type identity struct {
	NodeID      uint64
	Incarnation uint64
	Joined      bool
}

const (
	identityName  = "replica"
	identityMagic = "HFREPLIC"
)

// HelloInfo is a peer's answer to Hello.
type HelloInfo struct {
	Incarnation uint64
	Joined      bool
	Term        uint64
	LastIndex   uint64
}

// joining is the progress of a replica that is not Joined.
type joining struct {
	answers map[uint64]HelloInfo // of the round that goes on
	goal    *uint64              // to be applied; nil: no round has told it yet
}

func (c *Core) loadIdentity() error {
	names, err := c.cfg.Store.FS.List(c.cfg.Dir)
	if err != nil {
		return err
	}
	hasLog := slices.ContainsFunc(names, func(n string) bool { return strings.HasSuffix(n, ".log") })
	b, err := walstore.ReadDoc(c.cfg.Store.FS, c.path(identityName), identityMagic)
	if errors.Is(err, os.ErrNotExist) && !hasLog {
		return c.newIdentity()
	}
	if err == nil {
		err = json.Unmarshal(b, &c.id)
	}
	switch {
	case err == nil && c.id.NodeID != c.cfg.NodeID:
		return fmt.Errorf("%s belongs to safekeeper %d, this is safekeeper %d: check the configuration", c.cfg.Dir, c.id.NodeID, c.cfg.NodeID)
	case err == nil && !hasLog && !c.id.Joined: // a crash came before there was a log
		return c.newIdentity()
	case err == nil && !hasLog:
		err = fmt.Errorf("%w: the log files are gone", walstore.ErrDamaged)
	}
	if err != nil {
		return fmt.Errorf("%s: %w; this replica does not start. Its peers have what it holds: delete the folder %s and start again, and it is rebuilt from them", c.path(identityName), err, c.cfg.Dir)
	}
	return nil
}

func (c *Core) newIdentity() error {
	c.id = identity{NodeID: c.cfg.NodeID, Incarnation: c.cfg.Incarnation()}
	return c.saveIdentity()
}

func (c *Core) saveIdentity() error {
	b, err := json.Marshal(c.id)
	if err != nil {
		return err
	}
	return walstore.WriteDoc(c.cfg.Store.FS, c.path(identityName), identityMagic, b)
}

// Incarnation is that of this replica's directory.
func (c *Core) Incarnation() uint64 { return c.id.Incarnation }

// Joined tells whether the replica votes.
func (c *Core) Joined() bool { return c.id.Joined }

// Hello answers a peer.
func (c *Core) Hello(from, incarnation uint64) (HelloInfo, error) {
	info := HelloInfo{Incarnation: c.id.Incarnation, Joined: c.id.Joined}
	hs, _, err := c.store.InitialState()
	if err != nil {
		return info, err
	}
	info.Term = hs.GetTerm()
	if info.LastIndex, err = c.store.LastIndex(); err != nil {
		return info, err
	}
	if c.rn != nil {
		st := c.rn.BasicStatus()
		info.Term = max(info.Term, st.GetTerm())
	}
	if had := c.peers[from]; had != incarnation {
		c.peers[from] = incarnation
		c.forgetProgress(from, had)
	}
	return info, nil
}

// forgetProgress is point 4.
func (c *Core) forgetProgress(peer, had uint64) {
	if c.rn == nil || c.rn.BasicStatus().RaftState != raft.StateLeader {
		return
	}
	c.log.Warn("a peer's directory is new: sending it the log from the beginning", "peer", peer, "had", had)
	for _, typ := range []raftpb.ConfChangeType{raftpb.ConfChangeRemoveNode, raftpb.ConfChangeAddNode} {
		c.rn.ApplyConfChange(&raftpb.ConfChange{Type: typ.Enum(), NodeId: new(peer)})
	}
}

// BeginRound forgets the answers of the last round.
func (c *Core) BeginRound() { c.join.answers = map[uint64]HelloInfo{} }

// Heard takes a peer's answer to this replica's Hello of the round that goes on.
func (c *Core) Heard(from uint64, info HelloInfo) error {
	if c.id.Joined || c.join.answers == nil || from == c.cfg.NodeID {
		return nil
	}
	c.join.answers[from] = info
	if had := c.peers[from]; had != info.Incarnation {
		c.peers[from] = info.Incarnation
	}
	if len(c.join.answers) < len(c.cfg.Voters)-1 {
		return nil
	}
	return c.endRound()
}

func (c *Core) endRound() error {
	var term, last uint64
	joined := true
	for _, a := range c.join.answers {
		term, last = max(term, a.Term), max(last, a.LastIndex)
		joined = joined && a.Joined
	}
	c.join.answers = nil
	if c.rn == nil {
		if err := c.spendVotes(term); walstore.IsFull(err) {
			return nil // there will be another round
		} else if err != nil {
			return err
		}
		if err := c.startRaft(); err != nil {
			return err
		}
	}
	if joined || last == 0 && term == 0 {
		c.join.goal = &last
	}
	return c.checkJoined()
}

// spendVotes is point 2.
func (c *Core) spendVotes(term uint64) error {
	hs, _, err := c.store.InitialState()
	if err != nil || hs.GetTerm() >= term {
		return err
	}
	return c.store.Write([]walstore.Batch{{HardState: &raftpb.HardState{
		Term: new(term), Vote: new(c.cfg.NodeID), Commit: new(hs.GetCommit())}}})
}

// checkJoined is point 3.
func (c *Core) checkJoined() error {
	if c.id.Joined || c.join.goal == nil || c.mu.state.Applied() < *c.join.goal {
		return nil
	}
	if err := c.setJoined(); err != nil {
		if walstore.IsFull(err) {
			return nil // it stays without a vote until there is room
		}
		return err
	}
	c.log.Info("joined the group", "dir", c.cfg.Dir, "applied", c.mu.state.Applied())
	return nil
}

func (c *Core) setJoined() error {
	if c.id.Joined {
		return nil
	}
	c.id.Joined = true
	err := c.saveIdentity()
	c.id.Joined = err == nil
	return err
}
