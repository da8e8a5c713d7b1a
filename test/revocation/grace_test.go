package revocation

import (
	"context"
	"slices"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

// session is a client that would notice anything: one connection that is never made anew.
type session struct {
	conn *pgx.Conn
	asks int
}

func (s *session) ask(ctx context.Context) error {
	s.asks++
	_, err := s.conn.Exec(ctx, "INSERT INTO canaries VALUES ('asked')")
	return err
}

// TestUnreachableIsNotDenied: a KMS that does not answer for less than the grace is not noticed by
// anybody; past the grace it is as if it had denied; and it all comes back.
func TestUnreachableIsNotDenied(t *testing.T) {
	need(t)
	i := slices.IndexFunc(kinds, func(k struct {
		name string
		make func(*testing.T) *customer
	}) bool {
		return k.name == "AWS"
	})
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	w := newWorld(t, ctx, kinds[i].make(t), seed(t))
	for _, name := range []string{"black-holed", "throttled"} {
		f := w.cust.faults[slices.IndexFunc(w.cust.faults, func(f fault) bool { return f.name == name })]
		if err := w.setGrace(ctx, 10*time.Minute); err != nil {
			t.Fatal(err)
		}
		w.withinGrace(ctx, f, 20*time.Second)
		w.pastGrace(ctx, f)
	}
}

// withinGrace: for longer than any lease lives, nothing is noticed.
func (w *world) withinGrace(ctx context.Context, f fault, lasts time.Duration) {
	w.t.Helper()
	conn, err := w.c.Target().Connect(ctx)
	if err != nil {
		w.t.Fatal(err)
	}
	defer conn.Close(ctx)
	s := &session{conn: conn}
	if err := f.do(); err != nil {
		w.t.Fatal(err)
	}
	for began := time.Now(); time.Since(began) < lasts; time.Sleep(20 * time.Millisecond) {
		if err := s.ask(ctx); err != nil {
			w.t.Fatalf("%s, %.1fs of a grace of 10 minutes: the workload noticed: %v", f.name, time.Since(began).Seconds(), err)
		}
	}
	if err := w.getPage(ctx); err != nil {
		w.t.Errorf("%s, within the grace: GetPages: %v", f.name, err)
	}
	if err := f.undo(); err != nil {
		w.t.Fatal(err)
	}
	if err := s.ask(ctx); err != nil {
		w.t.Errorf("%s, after it: %v", f.name, err)
	}
	w.logf("%s for %v of a grace of 10 minutes: %d statements on one connection, none failed", f.name, lasts, s.asks)
}

// pastGrace: with a grace that is over, the key is gone as if it had been denied.
func (w *world) pastGrace(ctx context.Context, f fault) {
	w.t.Helper()
	const grace = 10 * time.Second
	if err := w.setGrace(ctx, grace); err != nil {
		w.t.Fatal(err)
	}
	w.l.Start()
	if err := w.l.WaitAcked(ctx, 20); err != nil {
		w.t.Fatal(err)
	}
	if err := f.do(); err != nil {
		w.t.Fatal(err)
	}
	struck := time.Now()
	time.Sleep(grace / 2)
	if err := w.getPage(ctx); err != nil {
		w.t.Errorf("%s, halfway through the grace: %v", f.name, err)
	}
	for len(w.answering(ctx, w.probes())) > 0 {
		if time.Since(struck) > grace+bound+slack {
			w.t.Fatalf("%s: %.1fs after, with a grace of %v, it is still answered", f.name, time.Since(struck).Seconds(), grace)
		}
		time.Sleep(100 * time.Millisecond)
	}
	w.logf("%s past a grace of %v: nothing answers, %.1fs after (bound %v)", f.name, grace, time.Since(struck).Seconds(), grace+bound)
	if err := w.giveBack(ctx, f); err != nil {
		w.t.Fatal(err)
	}
}
