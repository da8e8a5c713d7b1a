package group

import (
	cryptorand "crypto/rand"
	"encoding/binary"
	"flag"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"testing"

	"go.etcd.io/raft/v3/raftpb"

	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/safekeeper/walstate"
	"github.com/holdfastdb/holdfast/safekeeper/walstore"
	"github.com/holdfastdb/holdfast/safekeeper/walstore/walstoretest"
)

var (
	simSeed  = flag.Uint64("seed", 0, "run the simulation from this seed only")
	simSeeds = flag.Int("seeds", 25, "how many seeds the simulation runs from")
	simSteps = flag.Int("steps", 20000, "steps of the simulation from each seed")
)

// TestSimulation runs three Cores over a network that loses, delays, doubles and
// partitions, and over disks that forget in a crash what was not synced, are full, or are lost as a
// whole (one at a time). It asserts, at every step, that no two replicas apply
// different entries, that appends are contiguous (W3) and of the newest epoch (W2), and in the end, with
// all replicas back, that all that was ever applied anywhere is still there (W1).
func TestSimulation(t *testing.T) {
	if *simSeed != 0 {
		runSim(t, *simSeed)
		return
	}
	accepted := 0
	for range *simSeeds {
		accepted += runSim(t, rand.Uint64())
	}
	if accepted < *simSeeds**simSteps/200 {
		t.Errorf("only %d appends were accepted from %d seeds: the simulation simulates nothing", accepted, *simSeeds)
	}
}

func runSim(t *testing.T, seed uint64) (accepted int) {
	t.Helper()
	var key [32]byte
	binary.LittleEndian.PutUint64(key[:], seed)
	had := cryptorand.Reader
	cryptorand.Reader = rand.NewChaCha8(key) // the Raft library draws its election timeouts from it
	defer func() { cryptorand.Reader = had }()
	s := &sim{t: t, seed: seed, rng: rand.New(rand.NewPCG(seed, 1)), applied: map[uint64]uint32{}, epochEnd: map[epochOf]pg.LSN{}}
	defer func() {
		if p := recover(); p != nil {
			t.Fatalf("seed %d, step %d: panic: %v", seed, s.step, p)
		}
	}()
	for id := uint64(1); id <= simNodes; id++ {
		n := &simNode{id: id, fs: walstoretest.New()}
		s.nodes = append(s.nodes, n)
		s.open(n)
	}
	for s.step = 0; s.step < *simSteps; s.step++ {
		s.act()
	}
	s.settle()
	t.Logf("seed %d: %d entries applied, %d appends accepted, %d crashes, %d disks lost, %d snapshots taken, %d rejected, highest term %d", seed, len(s.applied), s.accepted, s.crashes, s.lost, s.compactions, s.rejected, s.maxTerm)
	return s.accepted
}

const simNodes = 3

type sim struct {
	t     *testing.T
	seed  uint64
	rng   *rand.Rand
	step  int
	nodes []*simNode
	net   []simMessage
	cut   [simNodes + 1][simNodes + 1]bool // cut[from][to]
	calm  bool                             // no faults any more

	applied  map[uint64]uint32 // index -> CRC of the entry
	chunks   [3][]simChunk     // by branch number: what was accepted, in order
	epochEnd map[epochOf]pg.LSN
	payload  uint64

	accepted, crashes, lost, compactions, rejected int
	maxTerm                                        uint64
}

type epochOf struct {
	branch uint32
	epoch  uint64
}

type simChunk struct {
	begin, end pg.LSN
	epoch      uint64
	index      uint64
	crc        uint32
}

type simMessage struct {
	to     uint64
	from   uint64
	inc    uint64
	out    Outgoing
	answer *HelloInfo // instead of out
	round  int
}

type simNode struct {
	id      uint64
	fs      *walstoretest.FS
	core    *Core // nil: down
	queue   []*raftpb.Message
	round   int
	compact compactor
	// as a leader's writers
	term uint64
	tail [3]pg.LSN
	of   [3]uint64 // epoch
}

func (s *sim) fail(format string, args ...any) {
	s.t.Helper()
	s.t.Fatalf("seed %d, step %d: %s (run again with -run TestSimulation -seed %d)", s.seed, s.step, fmt.Sprintf(format, args...), s.seed)
}

func (s *sim) open(n *simNode) {
	core, err := OpenCore(CoreConfig{NodeID: n.id, Voters: []uint64{1, 2, 3}, Dir: "d", ElectionTicks: 10, HeartbeatTicks: 1,
		Store:       walstore.Options{FS: n.fs, FileBytes: 8 << 10, CacheBytes: 2 << 10, Random: s.rng.Uint64},
		Incarnation: func() uint64 { return s.rng.Uint64() | 1 }, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		s.fail("node %d does not open: %v", n.id, err)
	}
	n.core, n.queue, n.term, n.compact = core, nil, 0, compactor{}
}

func (s *sim) node() *simNode { return s.nodes[s.rng.IntN(simNodes)] }

func (s *sim) act() {
	switch p := s.rng.IntN(1000); {
	case p < 400:
		s.deliver()
	case p < 560:
		s.tick(s.node())
	case p < 760:
		s.write(s.node())
	case p < 900:
		s.propose(s.node())
	case p < 930:
		s.hello(s.node())
	case p < 940:
		s.compactNode(s.node())
	case s.calm:
		s.deliver()
	case p < 960:
		a, b := s.rng.IntN(simNodes)+1, s.rng.IntN(simNodes)+1
		s.cut[a][b] = true
	case p < 985:
		s.cut = [simNodes + 1][simNodes + 1]bool{}
	case p < 990:
		s.node().fs.SetFree(int64(s.rng.IntN(2000) - 500)) // negative: no limit
	case p < 996:
		s.tick(s.node())
	default:
		s.fault(s.node())
	}
}

// fault crashes a node, kills it, or loses its disk; or starts one that is down.
func (s *sim) fault(n *simNode) {
	if n.core == nil {
		n.fs.SetFree(-1) // a full disk may make the start fail: that is another test
		s.open(n)
		return
	}
	s.crashes++
	others := true // a second disk may be lost only when the first is whole again
	for _, o := range s.nodes {
		others = others && (o == n || o.core != nil && o.core.Joined())
	}
	n.core, n.queue = nil, nil
	switch s.rng.IntN(4) {
	case 0:
		n.fs.Kill()
	case 1:
		n.fs.Crash(s.rng)
		if others {
			n.fs.RemoveAll("d")
			s.lost++
		}
	default:
		n.fs.Crash(s.rng)
	}
	// Messages of the dead process still arrive, in part; those to it do not.
	s.net = slices.DeleteFunc(s.net, func(m simMessage) bool { return m.to == n.id && s.rng.IntN(4) > 0 })
}

func (s *sim) tick(n *simNode) {
	if n.core != nil {
		n.core.Tick()
		s.ready(n)
	}
}

func (s *sim) send(n *simNode, o Outgoing) {
	if s.cut[n.id][o.To] {
		return
	}
	s.net = append(s.net, simMessage{to: o.To, from: n.id, inc: n.core.Incarnation(), out: o})
}

func (s *sim) deliver() {
	if len(s.net) == 0 {
		return
	}
	i := 0
	if s.rng.IntN(4) == 0 { // out of order
		i = s.rng.IntN(len(s.net))
	}
	m := s.net[i]
	again := !s.calm && s.rng.IntN(50) == 0
	if !again {
		s.net = slices.Delete(s.net, i, i+1)
	}
	n := s.nodes[m.to-1]
	if n.core == nil || !s.calm && s.rng.IntN(40) == 0 {
		return
	}
	if m.answer != nil {
		if m.round == n.round && m.inc == n.core.Incarnation() {
			if err := n.core.Heard(m.from, *m.answer); err != nil {
				s.fail("node %d: %v", n.id, err)
			}
		}
	} else {
		n.core.Step(m.out.Msg, m.inc, m.out.ToIncarnation)
	}
	s.ready(n)
}

// hello begins a round of a node that has not joined. The peers answer now; when the
// answers arrive is the network's.
func (s *sim) hello(n *simNode) {
	if n.core == nil || n.core.Joined() {
		return
	}
	if n.core.join.answers != nil && s.rng.IntN(20) > 0 {
		return // the round goes on; at some time it is given up
	}
	n.round++
	n.core.BeginRound()
	for _, o := range s.nodes {
		if o == n || o.core == nil || s.cut[n.id][o.id] || s.cut[o.id][n.id] {
			continue
		}
		info, err := o.core.Hello(n.id, n.core.Incarnation())
		if err != nil {
			s.fail("node %d: %v", o.id, err)
		}
		s.ready(o)
		s.net = append(s.net, simMessage{to: n.id, from: o.id, answer: &info, round: n.round, inc: n.core.Incarnation()})
	}
}

func (s *sim) ready(n *simNode) {
	for {
		var fx Effects
		more, err := n.core.Ready(&fx)
		if err != nil {
			s.fail("node %d: %v", n.id, err)
		}
		if !more {
			break
		}
		for _, o := range fx.Send {
			s.send(n, o)
		}
		n.queue = append(n.queue, fx.Append...)
		for i := range fx.Results {
			s.check(n, &fx.Results[i])
		}
	}
	s.checkApplied(n)
}

// write makes what a node queued durable.
func (s *sim) write(n *simNode) {
	if n.core == nil || len(n.queue) == 0 {
		return
	}
	queue := n.queue[:1+s.rng.IntN(len(n.queue))]
	batches := make([]walstore.Batch, len(queue))
	for i, m := range queue {
		batches[i] = walstore.Batch{Entries: m.GetEntries(), Snapshot: m.GetSnapshot()}
		if m.Term != nil {
			batches[i].HardState = &raftpb.HardState{Term: m.Term, Vote: m.Vote, Commit: m.Commit}
		}
	}
	if err := n.core.Store().Write(batches); walstore.IsFull(err) {
		n.core.SetStalled(true)
		n.fs.SetFree(-1)
		s.ready(n)
		return
	} else if err != nil {
		s.fail("node %d: writing: %v", n.id, err)
	}
	if s.rng.IntN(8) == 0 {
		if err := n.core.Store().Mark(); err != nil {
			s.fail("node %d: marking: %v", n.id, err)
		}
	}
	n.core.SetStalled(false)
	n.queue = n.queue[len(queue):]
	for _, m := range queue {
		own := n.core.Responses(m, func(o Outgoing) { s.send(n, o) })
		if err := n.core.Written(own); err != nil {
			s.fail("node %d: %v", n.id, err)
		}
	}
	s.ready(n)
}

// propose lets a client do something at a node, if that leads.
func (s *sim) propose(n *simNode) {
	if n.core == nil {
		return
	}
	term := n.core.LeadsTerm(n.term == 0)
	if term == 0 || term != n.term {
		n.term = 0
		if term = n.core.LeadsTerm(true); term == 0 {
			return
		}
		n.term, n.of = term, [3]uint64{}
	}
	no := uint32(s.rng.IntN(2) + 1)
	var b walstate.Branch
	n.core.View(func(st *walstate.State) {
		if br := st.Branch(no); br != nil {
			b = *br
		}
	})
	cmd := walstate.Command{Branch: no}
	switch p := s.rng.IntN(40); {
	case b.No == 0:
		cmd = walstate.Command{Kind: walstate.KindCreateBranch, Name: walstate.Name{Project: "p", Branch: fmt.Sprint(s.rng.IntN(2))}, Begin: 8}
	case b.Epoch == 0 || p == 0:
		cmd.Kind, cmd.Node = walstate.KindOpenEpoch, "sim"
	case p < 5:
		cmd.Kind, cmd.Begin = walstate.KindDurable, b.End-pg.LSN(s.rng.Uint64N(uint64(b.End-b.Durable)+1))
	default:
		if n.of[no] != b.Epoch && s.rng.IntN(3) > 0 || n.of[no] == 0 {
			n.of[no], n.tail[no] = b.Epoch, b.End
		}
		s.payload++
		size := s.rng.IntN(600) + 1
		cmd.Kind, cmd.Epoch, cmd.Begin, cmd.End = walstate.KindAppend, n.of[no], n.tail[no], n.tail[no]+pg.LSN(size)
		cmd.Ciphertext = binary.LittleEndian.AppendUint64(make([]byte, size), s.payload)
		n.tail[no] = cmd.End
	}
	if n.core.Propose(cmd.Encode(nil)) != nil {
		n.term = 0
	}
	s.ready(n)
}

func (s *sim) compactNode(n *simNode) {
	if n.core == nil {
		return
	}
	first, last, ok := n.core.Store().Oldest()
	if !ok {
		return
	}
	wanted := false
	n.core.View(func(st *walstate.State) {
		b, _, _ := st.Needs(last)
		wanted = b == nil && st.Applied() >= last
	})
	if !wanted {
		return
	}
	data, err := n.compact.upTo(n.core.Store(), first, last)
	if err != nil {
		s.fail("node %d: state up to %d: %v", n.id, last, err)
	}
	if data == nil {
		return
	}
	if err := n.core.Store().Compact(last, data); walstore.IsFull(err) {
		return
	} else if err != nil {
		s.fail("node %d: compacting up to %d: %v", n.id, last, err)
	}
	n.core.mu.state.Forget(last)
	s.compactions++
}
