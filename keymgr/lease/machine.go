// Package lease decides who may hold a project's keys, and until when. It is pure: time and
// what happened come in, decisions come out; it has no clock, no goroutine and does no I/O.
//
// A lease is granted and renewed only while the last check of the CMK that succeeded began
// at most CheckInterval ago, and lives for TTL. A node counts its lease from before it asked. So
// (invariant K2) a node holds keys at a moment t only if the KMS said yes at some moment after
// t - CheckInterval - TTL, whatever is lost, late or cut off in between. A denial ends the
// project's leases here at once, and nodes learn of it when they renew.
//
// The caller, on Request:
//  1. on Grant, hands the lease out;
//  2. on Check, does a real unwrap of the project's KEK, tells CheckResult with the moment from before
//     it, and asks again, once;
//  3. on Refuse, says why;
//  4. on Use, lets a call that needs a live lease go on or not;
//  5. on Tick, now and then, forgets the KEKs, and the state, of the projects it names.
package lease

import (
	"slices"
	"time"
)

// Instant is a moment on a clock that never jumps and goes on during suspension.
type Instant = time.Duration

// Outcome is what a check of the CMK said.
type Outcome int

// The outcomes.
const (
	Never Outcome = iota // not checked yet
	OK
	Denied
	Unreachable // no answer, or one that says nothing
)

// Config holds the times.
type Config struct {
	CheckInterval time.Duration // how old the last good check may be
	TTL           time.Duration // how long a lease lives unrenewed
	RetryGap      time.Duration // from a failed check to the next
	Idle          time.Duration // how long KEKs stay without leases after the last good check
}

// Kind is a kind of decision.
type Kind int

// The kinds.
const (
	Refuse Kind = iota
	Grant
	Check
)

// Decision answers Request.
type Decision struct {
	Kind  Kind
	Lease string        // with Grant
	New   bool          // with Grant: not a renewal
	TTL   time.Duration // with Grant, from now
	Why   Outcome       // with Refuse: Denied or Unreachable
}

// Lease is one node's right to the DEKs under a key.
type Lease struct {
	ID        string
	Key       string
	Node      string
	Branch    string // that it was asked for, empty: any under the key
	PublicKey string // of the process, as it was asked for with
	End       Instant
}

// Ask is a node's request.
type Ask struct {
	Key       string
	Node      string
	ID        string // of the lease to renew
	NewID     string // that a new one will have
	Branch    string
	PublicKey string
}

type project struct {
	// Invariant: fresh only if outcome is OK.
	outcome  Outcome // of the check that began last, of those that have ended
	began    Instant // when that check began
	ended    Instant // when it ended
	good     Instant // when the last check that succeeded began, or the project was first heard of
	lastUsed Instant
	forgot   bool // its KEKs, since then
	leases   map[string]*Lease
}

// Machine is the state. It is used by one goroutine at a time.
type Machine struct {
	cfg      Config
	projects map[string]*project
	leases   map[string]*Lease
}

// New starts without leases and without knowledge of any key.
func New(cfg Config) *Machine {
	return &Machine{cfg: cfg, projects: make(map[string]*project), leases: make(map[string]*Lease)}
}

func (m *Machine) project(now Instant, name string) *project {
	p := m.projects[name]
	if p == nil {
		p = &project{good: now, leases: make(map[string]*Lease)}
		m.projects[name] = p
	}
	p.lastUsed = now
	return p
}

// fresh tells whether the last check supports leases now.
func (m *Machine) fresh(now Instant, p *project) bool {
	return p.outcome == OK && now-p.began <= m.cfg.CheckInterval
}

// Request asks for a lease, or to renew one.
func (m *Machine) Request(now Instant, a Ask) Decision {
	p := m.project(now, a.Key)
	if !m.fresh(now, p) {
		if p.outcome != OK && p.outcome != Never && now-p.ended < m.cfg.RetryGap {
			return Decision{Kind: Refuse, Why: p.outcome}
		}
		return Decision{Kind: Check}
	}
	l := m.leases[a.ID]
	isNew := l == nil || l.Key != a.Key || l.Node != a.Node || l.PublicKey != a.PublicKey || now >= l.End
	if isNew {
		l = &Lease{ID: a.NewID, Key: a.Key, Node: a.Node, Branch: a.Branch, PublicKey: a.PublicKey}
		m.leases[a.NewID], p.leases[a.NewID] = l, l
	}
	l.End = now + m.cfg.TTL
	return Decision{Kind: Grant, Lease: l.ID, New: isNew, TTL: m.cfg.TTL}
}

// CheckResult tells what a check that began at the moment began said. A result that
// arrives after that of a later check is ignored. It returns the leases that a denial ended.
func (m *Machine) CheckResult(began, now Instant, name string, outcome Outcome) (ended []Lease) {
	p := m.project(now, name)
	if p.outcome != Never && began < p.began {
		return nil
	}
	if outcome == Unreachable && m.fresh(now, p) {
		// No answer takes nothing from what an earlier one still supports.
		return nil
	}
	p.outcome, p.began, p.ended = outcome, began, now
	if outcome == OK {
		p.good, p.forgot = began, false
	}
	if outcome != Denied {
		return nil
	}
	for _, l := range p.leases {
		ended = append(ended, *l)
		delete(m.leases, l.ID)
	}
	clear(p.leases)
	sortLeases(ended)
	return ended
}

// Use tells whether a lease lives, and of which project it is.
func (m *Machine) Use(now Instant, id string) (Lease, bool) {
	l := m.leases[id]
	if l == nil || now >= l.End {
		return Lease{}, false
	}
	return *l, true
}

// State is what is known of a project's key, and whether it is time for another check.
func (m *Machine) State(now Instant, name string) (outcome Outcome, stale bool) {
	p := m.project(now, name)
	if p.outcome == OK {
		return OK, !m.fresh(now, p)
	}
	return p.outcome, p.outcome == Never || now-p.ended >= m.cfg.RetryGap
}

// Tick removes the leases that ran out. It names the projects whose KEKs are to be
// forgotten, since no lease and no fresh answer of the KMS speaks for keeping them, and those
// of which nobody has asked for so long that nothing of them needs to be remembered.
func (m *Machine) Tick(now Instant) (expired []Lease, forget, gone []string) {
	for id, l := range m.leases {
		if now >= l.End {
			expired = append(expired, *l)
			delete(m.leases, id)
			delete(m.projects[l.Key].leases, id)
		}
	}
	for name, p := range m.projects {
		if len(p.leases) > 0 {
			continue
		}
		if !p.forgot && now-p.good >= m.cfg.Idle {
			forget = append(forget, name)
			p.forgot = true
		}
		if p.forgot && now-p.lastUsed >= m.cfg.Idle {
			gone = append(gone, name)
			delete(m.projects, name)
		}
	}
	sortLeases(expired)
	slices.Sort(forget)
	slices.Sort(gone)
	return expired, forget, gone
}

// sortLeases makes decisions repeatable: maps have no order.
func sortLeases(leases []Lease) {
	slices.SortFunc(leases, func(a, b Lease) int {
		if a.ID < b.ID {
			return -1
		}
		return 1
	})
}
