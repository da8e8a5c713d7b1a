package revocation

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/holdfastdb/holdfast/test/cluster"
	"github.com/holdfastdb/holdfast/test/memscan"
	"github.com/holdfastdb/holdfast/test/proc"
)

// moment is when a key is taken away: what is under way just then.
type moment struct {
	name  string
	begin func(*world, context.Context) error
}

// inBackground runs what may fail, since it is cut off.
func inBackground(fn func() error) error {
	go func() { _ = fn() }()
	return nil
}

var moments = []moment{
	{"any", func(*world, context.Context) error { return nil }},
	{"a checkpoint", func(w *world, ctx context.Context) error {
		return inBackground(func() error { return w.c.Target().Exec(ctx, "CHECKPOINT") })
	}},
	{"a layer upload", func(w *world, ctx context.Context) error {
		return inBackground(func() error {
			return w.c.Target().Exec(ctx, "CREATE TABLE IF NOT EXISTS filler (body text)",
				"INSERT INTO filler SELECT repeat(md5(i::text), 30) FROM generate_series(1, 40000) i")
		})
	}},
	{"a Raft election", func(w *world, ctx context.Context) error {
		leader, err := w.c.Leader(ctx)
		if err != nil {
			return err
		}
		return errors.Join(w.c.Kill(leader), w.c.StartRole(leader))
	}},
	{"an endpoint start", func(w *world, ctx context.Context) error {
		if _, err := w.c.CLI(ctx, "endpoint", "kill"); err != nil {
			return err
		}
		return inBackground(func() error { _, err := w.c.CLI(ctx, "endpoint", "start"); return err })
	}},
	{"a rotation", func(w *world, ctx context.Context) error {
		return inBackground(func() error { _, err := w.c.CLI(ctx, "key", "rotate"); return err })
	}},
}

// companion is what else goes wrong at the same time.
type companion struct {
	name string
	do   func(*world) error
}

// nodes are the roles that hold keys.
var nodes = cluster.Roles()[1:]

func (w *world) anyNode() string { return nodes[w.rng.IntN(len(nodes))] }

var companions = []companion{
	{"alone", func(*world) error { return nil }},
	{"with a node cut off from the key manager", func(w *world) error {
		role := w.anyNode()
		w.logf("%s is cut off", role)
		w.links[role].set(true)
		return nil
	}},
	{"with a process stopped", func(w *world) error {
		if w.rng.IntN(3) == 0 {
			return w.stopAgent()
		}
		role := cluster.Roles()[w.rng.IntN(len(cluster.Roles()))]
		return w.stop(role, w.c.PID(role))
	}},
	{"with a process killed", func(w *world) error {
		role := cluster.Roles()[w.rng.IntN(len(cluster.Roles()))]
		w.logf("%s is killed", role)
		return w.c.Kill(role)
	}},
}

func (w *world) stop(name string, pid int) error {
	w.logf("%s is stopped (process %d)", name, pid)
	w.stopped[pid] = name
	return syscall.Kill(pid, syscall.SIGSTOP)
}

// stopAgent stops the process beside Postgres, so that Postgres itself goes on.
func (w *world) stopAgent() error {
	for _, p := range proc.Using(w.c.Dir(cluster.Manager)) {
		if f := strings.Fields(p.Command); len(f) > 1 && f[1] == "compute" {
			return w.stop("the endpoint's agent", p.PID)
		}
	}
	return nil // the endpoint is just being started
}

// wake lets stopped processes go on.
func (w *world) wake() {
	for pid := range w.stopped {
		_ = syscall.Kill(pid, syscall.SIGCONT) // it may have been killed meanwhile
	}
	clear(w.stopped)
}

func (w *world) mend() {
	for _, k := range w.links {
		k.set(false)
	}
}

// round takes the key away once and gives it back.
func (w *world) round(ctx context.Context, f fault, m moment, with companion) error {
	if err := w.before(ctx); err != nil {
		return err
	}
	set, err := w.wanted(ctx)
	if err != nil {
		return err
	}
	if err := w.scannerFinds(set); err != nil {
		return err
	}
	w.logf("%s, at %s, %s", f.name, m.name, with.name)
	if err := errors.Join(m.begin(w, ctx), pauseUpTo(w, 500*time.Millisecond)); err != nil {
		return err
	}
	if err := errors.Join(with.do(w), f.do()); err != nil {
		return err
	}
	struck := time.Now()
	took, err := w.waitShut(ctx, struck)
	if err != nil {
		return err
	}
	w.logf("nothing answers, %.1fs after (bound %v)", took.Seconds(), bound)
	if took > bound {
		w.t.Errorf("%s, at %s, %s: the last answer came %.1fs after, the bound is %v", f.name, m.name, with.name, took.Seconds(), bound)
	}
	if err := w.memoryIsClean(ctx, set, struck); err != nil {
		return err
	}
	if err := w.wokenUp(ctx, struck, set); err != nil {
		return err
	}
	return w.giveBack(ctx, f)
}

func pauseUpTo(w *world, d time.Duration) error {
	time.Sleep(time.Duration(w.rng.Int64N(int64(d))))
	return nil
}

// before lets the ledger write and plants something to be found.
func (w *world) before(ctx context.Context) error {
	w.l.Start()
	if err := w.l.WaitAcked(ctx, 20+w.rng.Int64N(100)); err != nil {
		return err
	}
	return w.plant(ctx)
}

// wokenUp lets stopped processes go on, long after their leases ended: they must answer nothing,
// and be clean soon.
func (w *world) wokenUp(ctx context.Context, struck time.Time, set *memscan.Set) error {
	if len(w.stopped) == 0 {
		return nil
	}
	if left := bound - time.Since(struck); left > 0 {
		time.Sleep(left)
	}
	w.wake()
	for range 20 {
		if names := w.answering(ctx, w.probes()); len(names) > 0 {
			return fmt.Errorf("a process that was stopped past its lease's end goes on and answers: %s", strings.Join(names, ", "))
		}
		time.Sleep(20 * time.Millisecond)
	}
	return w.memoryIsClean(ctx, set, time.Now())
}

// giveBack enables the key: everything is there again, by itself.
func (w *world) giveBack(ctx context.Context, f fault) error {
	w.mend()
	if err := f.undo(); err != nil {
		return err
	}
	took, err := w.waitServing(ctx)
	if err != nil {
		return err
	}
	w.logf("SQL again, %.1fs after the key was given back", took.Seconds())
	report, err := w.l.Check(ctx)
	if err != nil {
		return err
	}
	w.logf("%v", report)
	return w.c.Target().Amcheck(ctx)
}

// roundTimeout bounds one round with its checks.
const roundTimeout = 5 * time.Minute

// TestChaos: for each kind of KMS, whatever makes the key unusable, whatever is under way and whatever
// else fails at the same time: after the bound nothing answers and nothing is in memory, and with the
// key everything acknowledged is there. `make test` does a few rounds of each kind, in a random order
// that follows from HOLDFAST_SEED; HOLDFAST_SOAK (a duration) goes on.
func TestChaos(t *testing.T) {
	need(t)
	s := seed(t)
	for i, kind := range kinds {
		t.Run(kind.name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 2*roundTimeout)
			defer cancel()
			w := newWorld(t, ctx, kind.make(t), s+uint64(i))
			if err := w.setGrace(ctx, 0); err != nil && status.Code(err) != codes.Unimplemented {
				t.Fatal(err)
			}
			rounds := roundsOf(t)
			began := time.Now()
			for n := 0; ; n++ {
				if rounds.n > 0 && n >= rounds.n || rounds.d > 0 && time.Since(began) > rounds.d/time.Duration(len(kinds)) {
					break
				}
				ctx, cancel := context.WithTimeout(t.Context(), roundTimeout)
				f, m, with := w.draw(i + n)
				err := w.round(ctx, f, m, with)
				cancel()
				if err != nil {
					t.Fatalf("round %d, %s, at %s, %s, HOLDFAST_SEED=%d: %v", n, f.name, m.name, with.name, s, err)
				}
			}
		})
	}
}

// draw gives a round. Companions come in turn, so that each is there in every run.
func (w *world) draw(n int) (fault, moment, companion) {
	m := moments[w.rng.IntN(len(moments))]
	if name := os.Getenv("HOLDFAST_MOMENT"); name != "" { // to see one
		m = moments[slices.IndexFunc(moments, func(m moment) bool { return m.name == name })]
	}
	return w.cust.faults[w.rng.IntN(len(w.cust.faults))], m, companions[n%len(companions)]
}

// limit is how much to do: a number of rounds of each kind, or a time for all.
type limit struct {
	n int
	d time.Duration
}

func roundsOf(t *testing.T) limit {
	t.Helper()
	if v := os.Getenv("HOLDFAST_ROUNDS"); v != "" {
		n, err := strconv.Atoi(v)
		if err != nil {
			t.Fatalf("HOLDFAST_ROUNDS: %v", err)
		}
		return limit{n: n}
	}
	v := os.Getenv("HOLDFAST_SOAK")
	if v == "" {
		return limit{n: 1}
	}
	d, err := time.ParseDuration(v)
	if err != nil {
		t.Fatalf("HOLDFAST_SOAK: %v", err)
	}
	return limit{d: d}
}
