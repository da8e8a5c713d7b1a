package lease

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"
)

var seedFlag = flag.Uint64("seed", 0, "run the simulation with this seed only")

// sim is a world in one queue of events: a KMS that is enabled, disabled or cut off at
// random; a key manager around the Machine, which restarts at random; and nodes whose messages are
// late, lost, doubled and out of order, and which pause.
type sim struct {
	t    *testing.T
	seed uint64
	rnd  *rand.Rand
	now  Instant
	seq  int
	q    []event

	kms      Outcome
	kmsSaid  Instant // last moment at which the KMS was enabled
	calm     bool    // no faults any more
	machine  *Machine
	checking map[string][]func() // callers that wait for a project's check
	ids      int
	nodes    []*simNode
	grants   int
	denials  int
}

type event struct {
	at  Instant
	seq int
	do  func()
}

type simNode struct {
	name  string
	lease string
	end   Instant // 0: holds nothing
}

func (w *sim) after(d time.Duration, do func()) {
	w.seq++
	e := event{w.now + d, w.seq, do}
	i, _ := slices.BinarySearchFunc(w.q, e, func(a, b event) int {
		if a.at != b.at {
			return int(a.at - b.at)
		}
		return a.seq - b.seq
	})
	w.q = slices.Insert(w.q, i, e)
}

func (w *sim) delay() time.Duration {
	if w.calm {
		return 5 * time.Millisecond
	}
	if w.rnd.IntN(20) == 0 {
		return time.Duration(w.rnd.Int64N(int64(12 * s))) // a partition or a pause
	}
	return time.Duration(w.rnd.Int64N(int64(300 * time.Millisecond)))
}

// send delivers a message late, never, or twice.
func (w *sim) send(do func()) {
	if !w.calm && w.rnd.IntN(12) == 0 {
		return
	}
	w.after(w.delay(), do)
	if !w.calm && w.rnd.IntN(12) == 0 {
		w.after(w.delay(), do)
	}
}

// check asks the KMS; the answer is that of a moment between asking and hearing.
func (w *sim) check(then func()) {
	const project = "p"
	w.checking[project] = append(w.checking[project], then)
	if len(w.checking[project]) > 1 {
		return
	}
	began, m := w.now, w.machine
	w.after(w.delay(), func() {
		outcome := w.kms
		w.after(w.delay(), func() {
			waiting := w.checking[project]
			delete(w.checking, project)
			if m != w.machine {
				return // the key manager restarted meanwhile
			}
			w.machine.CheckResult(began, w.now, project, outcome)
			for _, then := range waiting {
				then()
			}
		})
	})
}

// request is the key manager's Lease call.
func (w *sim) request(n *simNode, id string, checked bool, reply func(Decision)) {
	w.ids++
	d := w.machine.Request(w.now, ask("p", n.name, id, fmt.Sprint("l", w.ids)))
	if d.Kind == Check && !checked {
		w.check(func() { w.request(n, id, true, reply) })
		return
	}
	reply(d)
}

// loop is a node's renewal, forever.
func (w *sim) loop(n *simNode) {
	asked := w.now
	w.send(func() {
		w.request(n, n.lease, false, func(d Decision) {
			w.send(func() { w.answered(n, asked, d) })
		})
	})
	w.after(cfg.TTL/4, func() { w.loop(n) })
}

func (w *sim) answered(n *simNode, asked Instant, d Decision) {
	switch {
	case d.Kind == Grant && asked+d.TTL > w.now:
		n.lease, n.end = d.Lease, max(n.end, asked+d.TTL)
		w.grants++
	case d.Kind == Refuse && d.Why == Denied:
		n.lease, n.end = "", 0
		w.denials++
	}
}

func (w *sim) chaos() {
	if w.calm {
		return
	}
	switch w.rnd.IntN(8) {
	case 0, 1:
		w.setKMS(Denied)
	case 2:
		w.setKMS(Unreachable)
	case 3, 4, 5:
		w.setKMS(OK)
	case 6:
		w.machine = New(cfg)
		clear(w.checking)
	case 7:
		w.machine.Tick(w.now)
	}
	w.after(time.Duration(w.rnd.Int64N(int64(8*s))), w.chaos)
}

func (w *sim) setKMS(o Outcome) {
	if w.kms == OK {
		w.kmsSaid = w.now
	}
	w.kms = o
}

// invariant is K2: who holds the key now had the KMS's yes within the bound.
func (w *sim) invariant() {
	if w.kms == OK {
		return
	}
	for _, n := range w.nodes {
		if w.now < n.end && w.kmsSaid < w.now-cfg.CheckInterval-cfg.TTL {
			w.t.Fatalf("seed %d: at %v %s holds the key until %v; the KMS last said yes at %v", w.seed, w.now, n.name, n.end, w.kmsSaid)
		}
	}
}

func (w *sim) run(until Instant) {
	for len(w.q) > 0 && w.q[0].at <= until {
		e := w.q[0]
		w.q = w.q[1:]
		w.now = e.at
		e.do()
		w.invariant()
	}
	w.now = until
}

func simulate(t *testing.T, seed uint64) (grants, denials int) {
	w := &sim{t: t, seed: seed, rnd: rand.New(rand.NewPCG(seed, 1)), now: 1000 * s, kms: OK,
		machine: New(cfg), checking: make(map[string][]func())}
	for i := range 4 {
		n := &simNode{name: fmt.Sprint("node", i)}
		w.nodes = append(w.nodes, n)
		w.loop(n)
	}
	w.chaos()
	w.run(1300 * s)
	// Enabled and reachable again, everything resumes by itself.
	w.calm = true
	w.setKMS(OK)
	w.run(1300*s + 40*s)
	for _, n := range w.nodes {
		if w.now >= n.end {
			t.Errorf("seed %d: %s holds no lease after the key came back", seed, n.name)
		}
	}
	return w.grants, w.denials
}

func TestSimulation(t *testing.T) {
	if *seedFlag != 0 {
		simulate(t, *seedFlag)
		return
	}
	base := uint64(time.Now().UnixNano())
	var grants, denials int
	for i := range uint64(200) {
		g, d := simulate(t, base+i)
		grants, denials = grants+g, denials+d
		if t.Failed() {
			t.Fatalf("run again with -seed %d", base+i)
		}
	}
	t.Logf("200 seeds from %d: %d grants, %d denials", base, grants, denials)
	if grants == 0 || denials == 0 {
		t.Error("the simulation reached nothing")
	}
}
