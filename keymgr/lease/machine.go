// Package lease decides who may hold the DEKs under a key, and until when. It is pure: time and
// what happened come in, decisions come out; it has no clock, no goroutine and does no I/O.
//
// A lease is granted and renewed only while the last check of the CMK that succeeded began at most
// CheckInterval ago, and lives for TTL. A node counts its lease from before it asked. So (invariant K2)
// a node holds keys at a moment t only if the KMS said yes at some moment after t - CheckInterval - TTL,
// whatever is lost, late or cut off in between. Only a KMS that does not answer (Unreachable) may be
// bridged: for Grace after the last success, and only if nothing but silence came since. A denial, or a
// hold, ends the key's leases here at once, and nodes learn of it when they renew.
//
// The caller:
//  1. on Request: Grant hands the lease out; Check has it do a real unwrap under the key, tell
//     CheckResult with the moment from before it, and ask again, once; Refuse says why;
//  2. on Use, lets a call that needs a live lease go on or not;
//  3. on Tick, often, checks the keys that it names, forgets the KEKs, and the state, of those it names;
//  4. after each of these, tells the Changes to who wants to know.
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
	Unreachable // no answer, or one that asks to try later
	Unknown     // an answer that says nothing
	Held        // of a refusal only: the key is held back, whatever the KMS says
)

// State is what users are told of a key.
type State string

// The states.
const (
	StateNone        State = "unknown" // not checked yet
	Active           State = "active"
	Grace            State = "grace"       // the KMS does not answer; leases are granted all the same, for some time
	Revoked          State = "revoked"     // denied or held
	StateUnreachable State = "unreachable" // the grace is over, or there is none
	Resuming         State = "resuming"    // active again; not all who lost leases hold one yet
)

// Config holds the times.
type Config struct {
	CheckInterval time.Duration // how old the last good check may be
	Lead          time.Duration // how long before that a key with leases is checked again, by itself
	TTL           time.Duration // how long a lease lives unrenewed
	RetryGap      time.Duration // from a failed check to the next
	MaxRetryGap   time.Duration // to which the gap grows, twofold, while the key cannot be used
	Grace         time.Duration // of keys without their own
	Idle          time.Duration // how long KEKs stay without leases after the last good check
	Resume        time.Duration // how long a key that came back counts as resuming at the most
	ResumeQuiet   time.Duration // and how long it does for nodes that have not asked since: some need it no more
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
	Why   Outcome       // with Refuse: Denied, Held, Unreachable or Unknown
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

// Change is a key's state that was not that before.
type Change struct {
	Key    string
	Before State
	Status
}

// Status is what is known of a key.
type Status struct {
	State State
	Since Instant
	Until Instant // with Grace: when leases are granted no more
	Why   Outcome // with Revoked and StateUnreachable
	Stale bool    // it is time for another check
}

// key is what is known of one.
type key struct {
	name string

	// Of the check that began last, of those that have ended. A Release counts as one that said nothing.
	last         Outcome
	began, ended Instant
	failures     int // checks in a row, up to that one, that did not succeed

	// Of all checks.
	hasGood bool
	good    Instant // when the last check that succeeded began; without one, when the key was first heard of
	denied  bool    // by a check after good, or released and not checked since
	// Invariant: denied implies forfeit.
	forfeit bool // something other than silence came after good: there is no grace

	held   bool
	grace  time.Duration
	leases map[string]*Lease

	// lost holds the nodes whose leases ended with the key, until they hold one again; true: the
	// node has asked for one since, and so waits for it.
	lost      map[string]bool
	resumed   Instant // when the key came back
	lastUsed  Instant
	forgot    bool // its KEKs, since good
	state     State
	since     Instant
	whyBefore Outcome
}

// Machine is the state. It is used by one goroutine at a time.
type Machine struct {
	cfg     Config
	keys    map[string]*key
	leases  map[string]*Lease
	changes []Change
}

// New starts without leases and without knowledge of any key.
func New(cfg Config) *Machine {
	return &Machine{cfg: cfg, keys: make(map[string]*key), leases: make(map[string]*Lease)}
}

func (m *Machine) key(now Instant, name string) *key {
	k := m.keys[name]
	if k == nil {
		k = &key{name: name, good: now, grace: m.cfg.Grace, lastUsed: now, state: StateNone, since: now,
			leases: make(map[string]*Lease), lost: make(map[string]bool)}
		m.keys[name] = k
	}
	return k
}

// fresh tells whether the last success supports leases now.
func (m *Machine) fresh(now Instant, k *key) bool {
	return k.hasGood && !k.denied && !k.held && now-k.good <= m.cfg.CheckInterval
}

// bridged tells whether silence since the last success is still forgiven.
func (k *key) bridged(now Instant) bool {
	return k.hasGood && !k.forfeit && !k.held && k.last == Unreachable && now < k.good+k.grace
}

// gap is the time from a failed check to the next. It grows while nobody can use the key, and so
// bounds what revoked keys cost.
func (m *Machine) gap(now Instant, k *key) time.Duration {
	gap := m.cfg.RetryGap
	if m.fresh(now, k) || k.bridged(now) {
		return gap
	}
	for range k.failures - 1 {
		if gap *= 2; gap >= m.cfg.MaxRetryGap {
			return max(m.cfg.MaxRetryGap, m.cfg.RetryGap)
		}
	}
	return gap
}

func (k *key) failed() bool { return k.last != Never && k.last != OK }

// why is the reason of a refusal.
func (k *key) why() Outcome {
	switch {
	case k.held:
		return Held
	case k.denied:
		return Denied
	}
	return k.last
}

// Request asks for a lease, or to renew one.
func (m *Machine) Request(now Instant, a Ask) Decision {
	k := m.key(now, a.Key)
	k.lastUsed = now
	if _, lost := k.lost[a.Node]; lost {
		k.lost[a.Node] = true
	}
	m.settle(now, k)
	switch {
	case k.held:
		return Decision{Kind: Refuse, Why: Held}
	case m.fresh(now, k):
		return m.grant(now, k, a)
	case k.bridged(now) && now-k.ended <= m.cfg.CheckInterval:
		// The attempt itself must be recent: the KMS may have come back, and deny.
		return m.grant(now, k, a)
	case k.failed() && now-k.ended < m.gap(now, k):
		return Decision{Kind: Refuse, Why: k.why()}
	}
	return Decision{Kind: Check}
}

func (m *Machine) grant(now Instant, k *key, a Ask) Decision {
	l := m.leases[a.ID]
	isNew := l == nil || l.Key != a.Key || l.Node != a.Node || l.PublicKey != a.PublicKey || now >= l.End
	if isNew {
		l = &Lease{ID: a.NewID, Key: a.Key, Node: a.Node, Branch: a.Branch, PublicKey: a.PublicKey}
		m.leases[a.NewID], k.leases[a.NewID] = l, l
	}
	l.End = now + m.cfg.TTL
	delete(k.lost, a.Node)
	m.settle(now, k)
	return Decision{Kind: Grant, Lease: l.ID, New: isNew, TTL: m.cfg.TTL}
}

// CheckResult tells what a check that began at the moment began said. A result that
// arrives after that of a later check, or that is from before a Release, is ignored. It returns the leases that a denial ended.
func (m *Machine) CheckResult(began, now Instant, name string, outcome Outcome) (ended []Lease) {
	k := m.key(now, name)
	if began < k.began {
		return nil
	}
	k.last, k.began, k.ended = outcome, began, now
	k.failures++
	switch outcome {
	case OK:
		k.good, k.hasGood, k.failures = began, true, 0
		k.denied, k.forfeit, k.forgot = false, false, false
	case Denied:
		k.denied, k.forfeit = true, true
		ended = m.endLeases(k)
	case Unreachable:
		// No answer takes nothing from what an earlier one still supports.
	default:
		k.forfeit = true
	}
	m.settle(now, k)
	return ended
}

// Hold keeps the key back until Release. It returns the leases that this ended.
func (m *Machine) Hold(now Instant, name string) (ended []Lease) {
	k := m.key(now, name)
	k.held = true
	ended = m.endLeases(k)
	m.settle(now, k)
	return ended
}

// CheckedBefore tells whether a key's last check began before t, or there was none.
func (m *Machine) CheckedBefore(t Instant, name string) bool {
	k := m.keys[name]
	return k == nil || k.last == Never || k.began < t
}

// Release ends a hold. The key may be used again once a check after it has succeeded.
func (m *Machine) Release(now Instant, name string) {
	k := m.key(now, name)
	if !k.held {
		return
	}
	k.held, k.denied, k.forfeit = false, true, true
	k.last, k.began, k.failures = Never, now, 0
	m.settle(now, k)
}

// Held tells whether the key is held back.
func (m *Machine) Held(name string) bool {
	k := m.keys[name]
	return k != nil && k.held
}

// SetGrace sets the key's own grace.
func (m *Machine) SetGrace(now Instant, name string, grace time.Duration) {
	k := m.key(now, name)
	k.grace = grace
	m.settle(now, k)
}

func (m *Machine) endLeases(k *key) (ended []Lease) {
	for _, l := range k.leases {
		ended = append(ended, *l)
		delete(m.leases, l.ID)
		k.lost[l.Node] = false
	}
	clear(k.leases)
	sortLeases(ended)
	return ended
}

// Use tells whether a lease lives, and of which key it is.
func (m *Machine) Use(now Instant, id string) (Lease, bool) {
	l := m.leases[id]
	if l == nil || now >= l.End {
		return Lease{}, false
	}
	return *l, true
}

// Leases lists the leases on a key that live.
func (m *Machine) Leases(now Instant, name string) []Lease {
	k := m.keys[name]
	if k == nil {
		return nil
	}
	var live []Lease
	for _, l := range k.leases {
		if now < l.End {
			live = append(live, *l)
		}
	}
	sortLeases(live)
	return live
}

// Status is what is known of a key.
func (m *Machine) Status(now Instant, name string) Status {
	k := m.key(now, name)
	m.settle(now, k)
	return m.status(now, k)
}

func (m *Machine) status(now Instant, k *key) Status {
	s := Status{State: k.state, Since: k.since, Stale: m.stale(now, k)}
	switch k.state {
	case Grace:
		s.Until = k.good + k.grace
	case Revoked, StateUnreachable:
		s.Why = k.why()
	}
	return s
}

func (m *Machine) stale(now Instant, k *key) bool {
	switch {
	case k.held:
		return false
	case k.failed():
		return now-k.ended >= m.gap(now, k)
	}
	return !m.fresh(now, k)
}

// settle finds the key's state and notes a change.
func (m *Machine) settle(now Instant, k *key) {
	state := m.stateOf(now, k)
	why := k.why()
	if state != Revoked && state != StateUnreachable {
		why = Never
	}
	if state == k.state && why == k.whyBefore {
		return
	}
	before := k.state
	if state != before {
		k.state, k.since = state, now
	}
	k.whyBefore = why
	m.changes = append(m.changes, Change{Key: k.name, Before: before, Status: m.status(now, k)})
}

func (m *Machine) stateOf(now Instant, k *key) State {
	switch {
	case k.held, k.denied:
		return Revoked
	case m.fresh(now, k), k.last == OK:
		return m.activeState(now, k)
	case k.last == Never:
		return StateNone
	case k.bridged(now):
		return Grace
	}
	return StateUnreachable
}

// activeState is Resuming from a revocation until who lost leases, and waits, holds them again.
func (m *Machine) activeState(now Instant, k *key) State {
	if k.state == Revoked || k.state == StateUnreachable {
		k.resumed = now
	}
	for _, waits := range k.lost {
		if since := now - k.resumed; since < m.cfg.ResumeQuiet || waits && since < m.cfg.Resume {
			return Resuming
		}
	}
	clear(k.lost)
	return Active
}

// Changes gives the changes of state since it was called last.
func (m *Machine) Changes() []Change {
	changes := m.changes
	m.changes = nil
	return changes
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
