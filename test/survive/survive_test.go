// Package survive looks whether what PostgreSQL keeps outside of its WAL, and users expect
// to survive their server, does: after a kill what survives a crash of stock PostgreSQL, after a
// stop all that survives its shutdown.
package survive

import (
	"bytes"
	"context"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5"

	"github.com/holdfastdb/holdfast/test/cluster"
	"github.com/holdfastdb/holdfast/test/testenv"
)

// world is the cluster under test, and what chapters remember of it.
type world struct {
	*testing.T
	ctx  context.Context
	c    *cluster.Cluster
	seen map[string]string
}

func newWorld(t *testing.T, settings map[string]string) *world {
	t.Helper()
	testenv.NeedPostgres(t)
	testenv.NeedFUSE(t)
	if testing.Short() {
		t.Skip("runs a cluster")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 8*time.Minute)
	t.Cleanup(cancel)
	c := cluster.ForTest(t, cluster.Options{Dir: testenv.TempDir(t), Settings: settings})
	if err := c.Start(ctx); err != nil {
		t.Fatal(err)
	}
	return &world{T: t, ctx: ctx, c: c, seen: make(map[string]string)}
}

// renew ends the endpoint's Postgres and starts another.
func (w *world) renew(how string) {
	w.Helper()
	for _, do := range []string{how, "start"} {
		if _, err := w.c.CLI(w.ctx, "endpoint", do); err != nil {
			w.Fatalf("%v\n%s", err, w.c.Logs())
		}
	}
}

func (w *world) conn() *pgx.Conn {
	w.Helper()
	conn, err := w.c.Target().WaitConnect(w.ctx)
	if err != nil {
		w.Fatal(err)
	}
	w.Cleanup(func() { _ = conn.Close(context.WithoutCancel(w.ctx)) })
	return conn
}

func (w *world) exec(statements ...string) {
	w.Helper()
	if err := w.c.Target().Exec(w.ctx, statements...); err != nil {
		w.Fatal(err)
	}
}

// ask gives a query's rows, one a line.
func (w *world) ask(query string) string {
	w.Helper()
	conn, err := w.c.Target().WaitConnect(w.ctx)
	if err != nil {
		w.Fatal(err)
	}
	defer conn.Close(w.ctx)
	return askOver(w, conn, query)
}

func askOver(w *world, conn *pgx.Conn, query string) string {
	w.Helper()
	results, err := conn.PgConn().Exec(w.ctx, query).ReadAll()
	if err != nil {
		w.Fatalf("%s: %v", query, err)
	}
	var lines []string
	for _, row := range results[len(results)-1].Rows {
		lines = append(lines, string(bytes.Join(row, []byte(" "))))
	}
	return strings.Join(lines, "\n")
}

func (w *world) want(what, want, query string) {
	w.Helper()
	if diff := cmp.Diff(want, w.ask(query)); diff != "" {
		w.Errorf("%s (-want +got):\n%s", what, diff)
	}
}

// note remembers what a query answers, under the query itself; same compares.
func (w *world) note(query string) { w.Helper(); w.seen[query] = w.ask(query) }

func (w *world) same(what, query string) { w.Helper(); w.want(what, w.seen[query], query) }

// eventually waits for an answer.
func (w *world) eventually(want, query string) {
	w.Helper()
	for {
		got := w.ask(query)
		if got == want {
			return
		}
		select {
		case <-w.ctx.Done():
			w.Fatalf("%s: %q, want %q", query, got, want)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// chapter is one thing that has to survive: what is done on the first server, what must be
// true after it was killed (and what is done then), and after the next was stopped in order.
type chapter struct {
	name                string
	do, killed, stopped func(*world)
}

var chapters = []chapter{slots, stream, rewritten, transactionOverTheKill, physicalSlot, origins, settings, statistics, prepared, objects}

func TestWhatSurvivesAnEndpoint(t *testing.T) {
	w := newWorld(t, map[string]string{"wal_level": "logical", "max_prepared_transactions": "10", "shared_buffers": "32MB", "autovacuum": "off"})
	phase := func(name string, pick func(chapter) func(*world)) {
		for _, ch := range chapters {
			if fn := pick(ch); fn != nil && !t.Failed() {
				t.Run(ch.name+", "+name, func(t *testing.T) {
					inner := *w
					inner.T = t
					fn(&inner)
				})
			}
		}
	}
	phase("at first", func(c chapter) func(*world) { return c.do })
	w.renew("kill")
	phase("after a kill", func(c chapter) func(*world) { return c.killed })
	w.renew("stop")
	phase("after a stop", func(c chapter) func(*world) { return c.stopped })
	if t.Failed() {
		return
	}
	const decoding = "SELECT count(*) FROM (SELECT pg_ls_dir('pg_logical/mappings') UNION ALL SELECT pg_ls_dir('pg_logical/snapshots')) x"
	w.exec("CHECKPOINT")
	w.want("files of decoding after the last slot was dropped", "0", decoding)
	// Nothing that was kept for a stop comes back at the next kill, and nothing that is gone.
	w.renew("kill")
	w.want("files of decoding after a kill", "0", decoding)
	w.want("slots after a kill", "0", "SELECT count(*) FROM pg_replication_slots")
	w.want("statistics after a kill that follows a stop", "0", statsQuery)
	if err := w.c.Target().Amcheck(w.ctx); err != nil {
		t.Error(err)
	}
}
