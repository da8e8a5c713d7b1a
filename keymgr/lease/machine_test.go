package lease

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

const s = time.Second

var cfg = Config{CheckInterval: 5 * s, TTL: 10 * s, RetryGap: s / 2, Idle: 20 * s}

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
	if outcome, _ := m.State(4*s, "p"); outcome != Denied {
		t.Errorf("an older answer replaced a newer one: %v", outcome)
	}
}

func TestTickForgetsWhatIsIdle(t *testing.T) {
	m := New(cfg)
	m.CheckResult(0, 0, "p", OK)
	m.Request(0, ask("p", "n", "", "l1"))
	expired, forget, gone := m.Tick(9 * s)
	want(t, "nothing yet", len(expired)+len(forget)+len(gone), 0)
	expired, _, _ = m.Tick(10 * s)
	want(t, "expired", expired, []Lease{{ID: "l1", Key: "p", Node: "n", End: 10 * s}})
	_, forget, gone = m.Tick(20 * s)
	want(t, "forgotten", forget, []string{"p"})
	want(t, "gone", gone, []string{"p"})
	_, forget, gone = m.Tick(21 * s)
	want(t, "named once", len(forget)+len(gone), 0)
}

func TestTickLeavesAFirstCheckAlone(t *testing.T) {
	m := New(cfg)
	m.Request(100*s, ask("p", "n", "", "l1")) // says Check; meanwhile:
	_, forget, gone := m.Tick(101 * s)
	want(t, "named", len(forget)+len(gone), 0)
}

func TestKEKsAreForgottenWhileNodesKeepAsking(t *testing.T) {
	m := New(cfg)
	m.CheckResult(0, 0, "p", OK)
	m.Request(0, ask("p", "n", "", "l1"))
	m.CheckResult(6*s, 6*s, "p", Unreachable)
	var forgotten int
	for now := 6 * s; now < 60*s; now += s {
		m.Request(now, ask("p", "n", "l1", "l2"))
		_, forget, gone := m.Tick(now)
		forgotten += len(forget)
		want(t, "gone while it is asked for", len(gone), 0)
	}
	want(t, "times forgotten", forgotten, 1)
	m.CheckResult(60*s, 60*s, "p", OK)
	if d := m.Request(60*s, ask("p", "n", "l1", "l3")); d.Kind != Grant {
		t.Errorf("reachable again: %+v", d)
	}
}
