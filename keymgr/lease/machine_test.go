package lease

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

const s = time.Second

var cfg = Config{CheckInterval: 5 * s, Lead: s, TTL: 10 * s, RetryGap: s / 2, MaxRetryGap: 5 * s / 2, Idle: 20 * s, Resume: 30 * s, ResumeQuiet: 2 * s}

func ask(key, node, id, newID string) Ask { return Ask{Key: key, Node: node, ID: id, NewID: newID} }

func want(t *testing.T, what string, got, want any) {
	t.Helper()
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("%s: %s", what, diff)
	}
}

func TestLifeOfALease(t *testing.T) {
	m := New(cfg)
	now := 100 * s
	want(t, "first request", m.Request(now, ask("p", "n", "", "l1")), Decision{Kind: Check})
	m.CheckResult(now, now+s, "p", OK)
	want(t, "after a good check", m.Request(now+s, ask("p", "n", "", "l1")), Decision{Kind: Grant, Lease: "l1", New: true, TTL: cfg.TTL})
	want(t, "renewal", m.Request(now+4*s, ask("p", "n", "l1", "l2")), Decision{Kind: Grant, Lease: "l1", TTL: cfg.TTL})
	// The check's age counts from its beginning.
	want(t, "at the interval's end", m.Request(now+5*s, ask("p", "n", "l1", "l2")), Decision{Kind: Grant, Lease: "l1", TTL: cfg.TTL})
	want(t, "past it", m.Request(now+5*s+1, ask("p", "n", "l1", "l2")), Decision{Kind: Check})
	if l, ok := m.Use(now+15*s-1, "l1"); !ok || l.Key != "p" || l.Node != "n" {
		t.Errorf("just before the end: %+v %v", l, ok)
	}
	if _, ok := m.Use(now+15*s, "l1"); ok {
		t.Error("the lease lives past its end")
	}
}

func TestALeaseIsOfOneNodeAndProject(t *testing.T) {
	m := New(cfg)
	for _, p := range []string{"p", "q"} {
		m.CheckResult(0, 0, p, OK)
	}
	m.Request(0, ask("p", "n", "", "l1"))
	for _, tc := range [][2]string{{"p", "other node"}, {"q", "n"}} {
		if d := m.Request(s, ask(tc[0], tc[1], "l1", "l2")); !d.New || d.Lease != "l2" {
			t.Errorf("%v renewed another's lease: %+v", tc, d)
		}
	}
}

func TestDenialEndsLeasesAtOnce(t *testing.T) {
	m := New(cfg)
	m.CheckResult(0, 0, "p", OK)
	m.CheckResult(0, 0, "q", OK)
	m.Request(0, ask("p", "n1", "", "l1"))
	m.Request(0, ask("p", "n2", "", "l2"))
	m.Request(0, ask("q", "n1", "", "l3"))
	ended := m.CheckResult(s, s, "p", Denied)
	want(t, "ended", ended, []Lease{{ID: "l1", Key: "p", Node: "n1", End: cfg.TTL}, {ID: "l2", Key: "p", Node: "n2", End: cfg.TTL}})
	if _, ok := m.Use(s, "l1"); ok {
		t.Error("a lease outlived the denial")
	}
	if _, ok := m.Use(s, "l3"); !ok {
		t.Error("another project's lease ended")
	}
	want(t, "right after", m.Request(s, ask("p", "n1", "l1", "l4")), Decision{Kind: Refuse, Why: Denied})
	want(t, "a while after", m.Request(s+cfg.RetryGap, ask("p", "n1", "l1", "l4")), Decision{Kind: Check})
	m.CheckResult(2*s, 2*s, "p", OK)
	want(t, "enabled again", m.Request(2*s, ask("p", "n1", "l1", "l4")), Decision{Kind: Grant, Lease: "l4", New: true, TTL: cfg.TTL})
}

func TestUnreachableTakesNothingWhileFresh(t *testing.T) {
	m := New(cfg)
	m.CheckResult(0, 0, "p", OK)
	m.Request(0, ask("p", "n", "", "l1"))
	m.CheckResult(s, 2*s, "p", Unreachable)
	if d := m.Request(3*s, ask("p", "n", "l1", "l2")); d.Kind != Grant {
		t.Errorf("while the last answer is fresh: %+v", d)
	}
	m.CheckResult(6*s, 7*s, "p", Unreachable)
	want(t, "stale", m.Request(7*s, ask("p", "n", "l1", "l2")), Decision{Kind: Refuse, Why: Unreachable})
	if _, ok := m.Use(12*s, "l1"); !ok {
		t.Error("a lease must live to its end")
	}
}

func TestResultsOutOfOrder(t *testing.T) {
	m := New(cfg)
	m.CheckResult(2*s, 3*s, "p", Denied)
	m.CheckResult(s, 4*s, "p", OK) // began before the denied one
	if st := m.Status(4*s, "p"); st.State != Revoked {
		t.Errorf("an older answer replaced a newer one: %v", st)
	}
}

func TestTickForgetsWhatIsIdle(t *testing.T) {
	m := New(cfg)
	m.CheckResult(0, 0, "p", OK)
	m.Request(0, ask("p", "n", "", "l1"))
	want(t, "nothing yet", m.Tick(9*s), Ticked{Check: []string{"p"}})
	want(t, "expired", m.Tick(10*s).Expired, []Lease{{ID: "l1", Key: "p", Node: "n", End: 10 * s}})
	want(t, "forgotten", m.Tick(20*s), Ticked{Forget: []string{"p"}, Gone: []string{"p"}})
	want(t, "named once", m.Tick(21*s), Ticked{})
}

func TestTickLeavesAFirstCheckAlone(t *testing.T) {
	m := New(cfg)
	m.Request(100*s, ask("p", "n", "", "l1")) // says Check; meanwhile:
	want(t, "named", m.Tick(101*s), Ticked{})
}

func TestKEKsAreForgottenWhileNodesKeepAsking(t *testing.T) {
	m := New(cfg)
	m.CheckResult(0, 0, "p", OK)
	m.Request(0, ask("p", "n", "", "l1"))
	m.CheckResult(6*s, 6*s, "p", Unreachable)
	var forgotten int
	for now := 6 * s; now < 60*s; now += s {
		m.Request(now, ask("p", "n", "l1", "l2"))
		ticked := m.Tick(now)
		forgotten += len(ticked.Forget)
		want(t, "gone while it is asked for", len(ticked.Gone), 0)
	}
	want(t, "times forgotten", forgotten, 1)
	m.CheckResult(60*s, 60*s, "p", OK)
	if d := m.Request(60*s, ask("p", "n", "l1", "l3")); d.Kind != Grant {
		t.Errorf("reachable again: %+v", d)
	}
}

func TestGraceBridgesSilenceOnly(t *testing.T) {
	for _, tc := range []struct {
		name    string
		answers []Outcome // one a second, after a good one at 0
		want    Decision  // at 8 s, of a renewal
	}{
		{"silence", []Outcome{Unreachable, Unreachable, Unreachable, Unreachable, Unreachable, Unreachable, Unreachable}, Decision{Kind: Grant, Lease: "l1", TTL: cfg.TTL}},
		{"an answer that says nothing", []Outcome{Unreachable, Unreachable, Unreachable, Unreachable, Unreachable, Unreachable, Unknown}, Decision{Kind: Refuse, Why: Unknown}},
		{"such an answer, then silence", []Outcome{Unreachable, Unknown, Unreachable, Unreachable, Unreachable, Unreachable, Unreachable}, Decision{Kind: Refuse, Why: Unreachable}},
		{"denied, then silence", []Outcome{Denied, Unreachable, Unreachable, Unreachable, Unreachable, Unreachable, Unreachable}, Decision{Kind: Refuse, Why: Denied}},
	} {
		m := New(cfg)
		m.SetGrace(0, "p", 60*s)
		m.CheckResult(0, 0, "p", OK)
		m.Request(0, ask("p", "n", "", "l1"))
		for i, outcome := range tc.answers {
			at := Instant(i+1) * s
			m.CheckResult(at, at, "p", outcome)
		}
		want(t, tc.name, m.Request(7*s+s/4, ask("p", "n", "l1", "l2")), tc.want)
	}
}

func TestGraceEnds(t *testing.T) {
	m := New(cfg)
	m.SetGrace(0, "p", 20*s)
	m.CheckResult(0, 0, "p", OK)
	m.Request(0, ask("p", "n", "", "l1"))
	for now := 2 * s; now < 20*s; now += 2 * s {
		m.CheckResult(now, now, "p", Unreachable)
		if d := m.Request(now, ask("p", "n", "l1", "l2")); d.Kind != Grant || d.New {
			t.Fatalf("at %v, in grace: %+v", now, d)
		}
	}
	want(t, "in grace", m.Status(19*s, "p"), Status{State: Grace, Since: 6 * s, Until: 20 * s, Stale: true})
	m.CheckResult(20*s, 20*s, "p", Unreachable)
	want(t, "past it", m.Request(20*s, ask("p", "n", "l1", "l2")), Decision{Kind: Refuse, Why: Unreachable})
	want(t, "state", m.Status(20*s, "p"), Status{State: StateUnreachable, Since: 20 * s, Why: Unreachable})
	if l := m.Leases(20*s, "p"); len(l) != 1 || l[0].End != 28*s {
		t.Errorf("leases %+v: they run out, at the latest a lease's time after the grace", l)
	}
	m.Tick(28 * s)
	m.CheckResult(29*s, 29*s, "p", OK)
	want(t, "back", m.Status(29*s, "p").State, Resuming)
	m.Request(29*s, ask("p", "n", "l1", "l2"))
	want(t, "leased again", m.Status(29*s, "p"), Status{State: Active, Since: 29 * s})
}

// In grace the KMS must have been tried lately: it may be back, and deny.
func TestGraceNeedsAttempts(t *testing.T) {
	m := New(cfg)
	m.SetGrace(0, "p", 60*s)
	m.CheckResult(0, 0, "p", OK)
	m.CheckResult(s, 5*s, "p", Unreachable)
	want(t, "tried lately", m.Request(10*s, ask("p", "n", "", "l1")).Kind, Grant)
	want(t, "not tried lately", m.Request(10*s+1, ask("p", "n", "", "l1")).Kind, Check)
}

func TestNoGraceWithoutAGoodCheck(t *testing.T) {
	m := New(cfg)
	m.SetGrace(0, "p", 60*s)
	m.CheckResult(s, s, "p", Unreachable)
	want(t, "never good", m.Request(s, ask("p", "n", "", "l1")), Decision{Kind: Refuse, Why: Unreachable})
}

func TestHoldIsStrongerThanTheKMS(t *testing.T) {
	m := New(cfg)
	m.CheckResult(0, 0, "p", OK)
	m.Request(0, ask("p", "n", "", "l1"))
	want(t, "ended", m.Hold(s, "p"), []Lease{{ID: "l1", Key: "p", Node: "n", End: cfg.TTL}})
	m.CheckResult(2*s, 2*s, "p", OK)
	want(t, "held", m.Request(2*s, ask("p", "n", "l1", "l2")), Decision{Kind: Refuse, Why: Held})
	want(t, "state", m.Status(2*s, "p"), Status{State: Revoked, Since: s, Why: Held})
	if m.Due(60*s, "p") {
		t.Error("a held key need not be checked")
	}
	m.Release(3*s, "p")
	want(t, "released, not checked", m.Request(3*s, ask("p", "n", "", "l2")).Kind, Check)
	want(t, "state", m.Status(3*s, "p").State, Revoked)
	m.CheckResult(3*s-1, 3*s+1, "p", OK)
	want(t, "a check from before the release", m.Status(3*s+1, "p").State, Revoked)
	m.CheckResult(3*s, 4*s, "p", OK)
	want(t, "checked", m.Request(4*s, ask("p", "n", "", "l2")).Kind, Grant)
}

func TestKeysWithLeasesAreCheckedBeforeTheAnswerIsOld(t *testing.T) {
	m := New(cfg)
	m.CheckResult(0, 0, "p", OK)
	m.CheckResult(0, 0, "idle", OK)
	m.Request(0, ask("p", "n", "", "l1"))
	want(t, "early", m.Tick(4*s-1).Check, []string(nil))
	want(t, "due", m.Tick(4*s).Check, []string{"p"})
}

func TestRefusedKeysAreCheckedEverLess(t *testing.T) {
	m := New(cfg)
	m.CheckResult(0, 0, "p", Denied)
	var gaps []time.Duration
	last := Instant(0)
	for now := Instant(0); len(gaps) < 5; now += s / 10 {
		m.Request(now, ask("p", "n", "", "l"))
		if m.Due(now, "p") {
			m.CheckResult(now, now, "p", Denied)
			gaps = append(gaps, now-last)
			last = now
		}
	}
	want(t, "gaps", gaps, []time.Duration{s / 2, s, 2 * s, 5 * s / 2, 5 * s / 2})
}

func TestChangesAreToldOnce(t *testing.T) {
	m := New(cfg)
	states := func() (got []State) {
		for _, c := range m.Changes() {
			got = append(got, c.State)
		}
		return got
	}
	m.CheckResult(0, 0, "p", OK)
	m.Request(0, ask("p", "n", "", "l1"))
	m.CheckResult(s, s, "p", OK)
	want(t, "active", states(), []State{Active})
	m.CheckResult(2*s, 2*s, "p", Denied)
	m.CheckResult(3*s, 3*s, "p", Denied)
	want(t, "revoked", states(), []State{Revoked})
	m.CheckResult(4*s, 4*s, "p", OK)
	m.Request(4*s, ask("p", "n", "", "l2"))
	want(t, "back", states(), []State{Resuming, Active})
	m.CheckResult(5*s, 5*s, "p", OK)
	m.CheckResult(6*s, 6*s, "p", Denied)
	m.CheckResult(7*s, 7*s, "p", OK)
	m.Changes()
	m.Tick(9*s - 1)
	want(t, "a node that does not come back, at first", states(), []State(nil))
	m.Tick(9 * s)
	want(t, "a node that does not come back", states(), []State{Active})
}

func TestResumingLastsForThoseWhoWait(t *testing.T) {
	m := New(cfg)
	m.CheckResult(0, 0, "p", OK)
	m.Request(0, ask("p", "waits", "", "l1"))
	m.Request(0, ask("p", "needs it no more", "", "l2"))
	m.CheckResult(s, s, "p", Denied)
	m.Request(2*s, ask("p", "waits", "", "l3"))
	m.CheckResult(3*s, 3*s, "p", OK)
	want(t, "a while after", m.Status(6*s, "p").State, Resuming)
	m.Request(6*s, ask("p", "waits", "", "l3"))
	want(t, "leased again", m.Status(6*s, "p").State, Active)
}
