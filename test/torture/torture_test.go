// Package torture kills what can be killed while a ledger writes, in a random order from a
// printed seed, and holds the database against the ledger after each kill.
package torture

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"github.com/holdfastdb/holdfast/test/cluster"
	"github.com/holdfastdb/holdfast/test/ledger"
	"github.com/holdfastdb/holdfast/test/pgtools"
	"github.com/holdfastdb/holdfast/test/proc"
	"github.com/holdfastdb/holdfast/test/testenv"
)

// kills is how many `make test` does: each kind four times.
const kills = 32

// settings make much happen in little time: many checkpoints, vacuums, and pages that do
// not stay in shared_buffers.
var settings = map[string]string{"shared_buffers": "16MB", "max_wal_size": "64MB", "checkpoint_timeout": "30s",
	"autovacuum_naptime": "1s", "autovacuum_vacuum_threshold": "10", "autovacuum_vacuum_scale_factor": "0.01"}

const cacheBytes = 256 << 20

type torturer struct {
	c    *cluster.Cluster
	l    *ledger.Ledger
	rng  *rand.Rand
	dir  string
	log  func(format string, args ...any)
	done int // kills
}

type action struct {
	name string
	do   func(*torturer, context.Context) error
}

func (a *torturer) pause(most time.Duration) { time.Sleep(time.Duration(a.rng.Int64N(int64(most)))) }

// restart kills a role and starts it after a while, during which the ledger goes on, if
// it can.
func (a *torturer) restart(role string, down time.Duration) error {
	if err := a.c.Kill(role); err != nil {
		return err
	}
	a.pause(down)
	return a.c.StartRole(role)
}

func (a *torturer) replica() string { return cluster.Safekeeper(1 + a.rng.IntN(3)) }

var actions = []action{
	{"endpoint killed", func(a *torturer, ctx context.Context) error {
		if _, err := a.c.CLI(ctx, "endpoint", "kill"); err != nil {
			return err
		}
		_, err := a.c.CLI(ctx, "endpoint", "start")
		return err
	}},
	{"safekeeper killed", func(a *torturer, _ context.Context) error { return a.restart(a.replica(), 3*time.Second) }},
	{"leader killed", func(a *torturer, ctx context.Context) error {
		leader, err := a.c.Leader(ctx)
		if err != nil {
			return err
		}
		return a.restart(leader, 4*time.Second)
	}},
	{"pageserver killed", func(a *torturer, _ context.Context) error { return a.restart(cluster.Pageserver, 2*time.Second) }},
	{"key manager killed", func(a *torturer, _ context.Context) error { return a.restart(cluster.Keymgr, time.Second) }},
	{"manager killed, and its endpoint with it", func(a *torturer, _ context.Context) error { return a.restart(cluster.Manager, time.Second) }},
	{"whole cluster killed", func(a *torturer, ctx context.Context) error {
		if err := a.c.KillAll(); err != nil {
			return err
		}
		return a.c.Launch()
	}},
	{"all that is ephemeral destroyed", func(a *torturer, ctx context.Context) error {
		if err := a.c.KillAll(); err != nil {
			return err
		}
		lost := a.replica()
		a.log("destroying the computes' and the pageserver's folders and %s's", lost)
		for _, dir := range []string{a.c.Dir("compute"), a.c.Dir(cluster.Pageserver), a.c.Dir(lost)} {
			if err := proc.RemoveAll(dir); err != nil { // with the dead mounts there
				return err
			}
		}
		return a.c.Launch()
	}},
}

// plan is n actions in random order; each comes as often as any other, give or take one.
func plan(rng *rand.Rand, n int) []action {
	var list []action
	for len(list) < n {
		for _, i := range rng.Perm(len(actions)) {
			list = append(list, actions[i])
		}
	}
	return list[:n]
}

// check holds the database against the ledger, and its indexes against its tables.
func (a *torturer) check(ctx context.Context) error {
	report, err := a.l.Check(ctx)
	if err != nil {
		return err
	}
	a.log("%v", report)
	return a.c.Target().Amcheck(ctx)
}

// writing kills while the ledger writes.
func (a *torturer) writing(ctx context.Context, act action) error {
	a.l.Start()
	bulk := make(chan error, 1)
	go func() { bulk <- a.l.Bulk(ctx) }()
	if err := a.l.WaitAcked(ctx, 20+a.rng.Int64N(200)); err != nil {
		return err
	}
	a.pause(800 * time.Millisecond) // the bulk may have ended, or be cut off
	a.done++
	a.log("kill %d, writing: %s", a.done, act.name)
	began := time.Now()
	if err := act.do(a, ctx); err != nil {
		return err
	}
	if err := a.l.WaitAcked(ctx, 20); err != nil {
		return fmt.Errorf("no transaction was acknowledged any more: %w", err)
	}
	a.log("commits went on after %.1fs", time.Since(began).Seconds())
	if err := <-bulk; err != nil {
		return err
	}
	return a.check(ctx)
}

// quiet kills while nothing writes: a dump before must equal the one after.
func (a *torturer) quiet(ctx context.Context, act action) error {
	before, after := filepath.Join(a.dir, "before.sql"), filepath.Join(a.dir, "after.sql")
	if err := a.c.Target().Dump(ctx, before); err != nil {
		return err
	}
	a.done++
	a.log("kill %d, quiet: %s", a.done, act.name)
	if err := act.do(a, ctx); err != nil {
		return err
	}
	if err := a.c.WaitReady(ctx); err != nil {
		return err
	}
	if err := a.c.Target().Dump(ctx, after); err != nil {
		return err
	}
	diff, err := pgtools.FirstDifference(before, after)
	if err != nil {
		return err
	}
	if diff != "" {
		return fmt.Errorf("the dump after differs from the one before: %s", diff)
	}
	return a.check(ctx)
}

func seed(t *testing.T) uint64 {
	s := uint64(time.Now().UnixNano())
	if v := os.Getenv("HOLDFAST_SEED"); v != "" {
		n, err := strconv.ParseUint(v, 10, 64)
		if err != nil {
			t.Fatalf("HOLDFAST_SEED: %v", err)
		}
		s = n
	}
	t.Logf("SHOW: HOLDFAST_SEED=%d", s)
	return s
}

// soak is how long to go on, and whether to; zero: without end.
func soak(t *testing.T) (d time.Duration, on bool) {
	v := os.Getenv("HOLDFAST_SOAK")
	if v == "" || v == "forever" {
		return 0, v != ""
	}
	d, err := time.ParseDuration(v)
	if err != nil {
		t.Fatalf("HOLDFAST_SOAK: %v", err)
	}
	return d, true
}

func start(t *testing.T, ctx context.Context, s uint64) *torturer {
	t.Helper()
	testenv.NeedPostgres(t)
	testenv.NeedFUSE(t)
	if testing.Short() {
		t.Skip("runs a cluster")
	}
	dir := testenv.TempDir(t)
	c := cluster.ForTest(t, cluster.Options{Dir: dir, Separate: true, Settings: settings, CacheBytes: cacheBytes})
	if err := c.Start(ctx); err != nil {
		t.Fatal(err)
	}
	l, err := ledger.New(ctx, ledger.Config{Target: c.Target(), Seed: s, Pause: 2 * time.Millisecond, Journal: filepath.Join(dir, "journal")})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	began := time.Now()
	return &torturer{c: c, l: l, rng: rand.New(rand.NewPCG(s, s)), dir: dir, log: func(format string, args ...any) {
		t.Logf("SHOW: %5.1fs "+format, append([]any{time.Since(began).Seconds()}, args...)...)
	}}
}

// stepTimeout bounds one kill with its checks.
const stepTimeout = 5 * time.Minute

func TestTorture(t *testing.T) {
	limit, endless := soak(t)
	began := time.Now()
	s := seed(t)
	a := start(t, t.Context(), s)
	for round := 0; ; round++ {
		for i, act := range plan(a.rng, kills) {
			ctx, cancel := context.WithTimeout(t.Context(), stepTimeout)
			err := error(nil)
			if i%3 == 2 { // a third of them when it is quiet
				err = a.quiet(ctx, act)
			} else {
				err = a.writing(ctx, act)
			}
			cancel()
			if err != nil {
				t.Fatalf("kill %d (%s), HOLDFAST_SEED=%d: %v", a.done, act.name, s, err)
			}
			if endless && limit > 0 && time.Since(began) > limit {
				break
			}
		}
		if !endless || limit > 0 && time.Since(began) > limit {
			break
		}
	}
	a.log("%d kills, %d transactions acknowledged", a.done, a.l.Acked())
}

// A replica that lost its disk has forgotten what it voted for and what it acknowledged.
// With one that lags it must not make a quorum: what only the third knows would be gone (W1).
func TestAReplicaThatLostItsDiskMakesNoQuorumWithALaggard(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), stepTimeout)
	defer cancel()
	a := start(t, ctx, seed(t))
	a.l.Start()
	if err := a.l.WaitAcked(ctx, 50); err != nil {
		t.Fatal(err)
	}
	if err := a.c.Kill(cluster.Safekeeper(3)); err != nil {
		t.Fatal(err)
	}
	if err := a.l.WaitAcked(ctx, 200); err != nil {
		t.Fatal(err)
	}
	a.l.Pause()
	if err := a.c.KillAll(); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(a.c.Dir(cluster.Safekeeper(1))); err != nil {
		t.Fatal(err)
	}
	for _, role := range []string{cluster.Keymgr, cluster.Safekeeper(1), cluster.Safekeeper(3), cluster.Pageserver, cluster.Manager} {
		if err := a.c.StartRole(role); err != nil {
			t.Fatal(err)
		}
	}
	early, cancelEarly := context.WithTimeout(ctx, 10*time.Second)
	if err := a.c.WaitReady(early); err == nil {
		a.log("the endpoint started on a replica without a disk and a laggard")
	}
	cancelEarly()
	if err := a.c.StartRole(cluster.Safekeeper(2)); err != nil {
		t.Fatal(err)
	}
	if err := a.c.WaitReady(ctx); err != nil {
		t.Fatal(err)
	}
	if err := a.check(ctx); err != nil {
		t.Error(err)
	}
}

// Started again and again without a word in between, a cluster has all its data: the same
// binary, one process, stopped in order.
func TestOneProcessStopsAndStarts(t *testing.T) {
	testenv.NeedPostgres(t)
	testenv.NeedFUSE(t)
	if testing.Short() {
		t.Skip("runs a cluster")
	}
	ctx, cancel := context.WithTimeout(t.Context(), stepTimeout)
	defer cancel()
	c := cluster.ForTest(t, cluster.Options{Dir: testenv.TempDir(t), Settings: settings})
	if err := c.Start(ctx); err != nil {
		t.Fatal(err)
	}
	l, err := ledger.New(ctx, ledger.Config{Target: c.Target(), Seed: seed(t)})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for _, end := range []func() error{c.Stop, c.KillAll, c.Stop} {
		l.Start()
		if err := l.WaitAcked(ctx, 100); err != nil {
			t.Fatal(err)
		}
		if err := end(); err != nil {
			t.Fatal(err)
		}
		if err := c.Start(ctx); err != nil {
			t.Fatal(err)
		}
		if _, err := l.Check(ctx); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.Target().Amcheck(ctx); err != nil {
		t.Error(err)
	}
}
