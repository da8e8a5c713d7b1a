package keyloss

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"

	"github.com/holdfastdb/holdfast/test/cluster"
	"github.com/holdfastdb/holdfast/test/testenv"
)

const (
	adminShutdown    = "57P01"
	cannotConnectNow = "57P03"
)

func start(t *testing.T, args ...string) (*cluster.Cluster, context.Context) {
	t.Helper()
	testenv.NeedPostgres(t)
	testenv.NeedFUSE(t)
	if testing.Short() {
		t.Skip("runs a cluster")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 8*time.Minute)
	t.Cleanup(cancel)
	c := cluster.ForTest(t, cluster.Options{Dir: testenv.TempDir(t)})
	if err := c.Launch(args...); err != nil {
		t.Fatal(err)
	}
	if err := c.WaitReady(ctx); err != nil {
		t.Fatal(err)
	}
	return c, ctx
}

func kms(t *testing.T, ctx context.Context, c *cluster.Cluster, verb string) {
	t.Helper()
	if _, err := c.CLI(ctx, "kms", verb); err != nil {
		t.Fatal(err)
	}
}

func connect(t *testing.T, ctx context.Context, c *cluster.Cluster) *pgx.Conn {
	t.Helper()
	conn, err := c.Target().Connect(ctx)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close(context.WithoutCancel(ctx)) })
	return conn
}

// wantFatal checks what a client is told when the key is disabled.
func wantFatal(t *testing.T, what, code string, err error) {
	t.Helper()
	var pg *pgconn.PgError
	if !errors.As(err, &pg) {
		t.Errorf("%s: %v, want a FATAL", what, err)
		return
	}
	if pg.Severity != "FATAL" || pg.Code != code || !strings.Contains(pg.Message, "is disabled") ||
		!strings.Contains(pg.Hint, "controlled by its owner") || !strings.Contains(pg.Hint, "dev") || !strings.Contains(pg.Detail, "what was committed is kept") {
		t.Errorf("%s: %s %s %q, detail %q, hint %q; want FATAL %s that the key is disabled, and by whom it is controlled",
			what, pg.Severity, pg.Code, pg.Message, pg.Detail, pg.Hint, code)
	}
}

// heard checks what a connection that was there ended with: our FATAL, or a mere end where there was no
// time on a busy machine, but no other error of PostgreSQL's. It tells whether it was the FATAL.
func heard(t *testing.T, what string, err error) bool {
	t.Helper()
	if err == nil {
		t.Errorf("%s: no error", what)
	}
	if pg := (*pgconn.PgError)(nil); !errors.As(err, &pg) {
		return false
	}
	wantFatal(t, what, adminShutdown, err)
	return true
}

// refusedAtOnce waits until new connections are refused for the key, and gives the longest that one
// took. None may end in anything but an answer of PostgreSQL's protocol, a refused or a broken connection.
func refusedAtOnce(t *testing.T, ctx context.Context, c *cluster.Cluster) {
	t.Helper()
	var longest time.Duration
	var between []string
	for {
		began := time.Now()
		conn, err := c.Target().Connect(ctx)
		took := time.Since(began)
		longest = max(longest, took)
		if err == nil {
			_ = conn.Close(ctx)
			time.Sleep(10 * time.Millisecond)
			continue
		}
		if pg := (*pgconn.PgError)(nil); errors.As(err, &pg) && pg.Code == cannotConnectNow && strings.Contains(pg.Message, "the key of") {
			wantFatal(t, "a new connection", cannotConnectNow, err)
			break
		}
		between = append(between, err.Error())
		if ctx.Err() != nil {
			t.Fatalf("new connections are not told why: %v", err)
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Logf("SHOW: the longest answer to a new connection took %v; %d attempts fell between the server's end and the first answer", longest.Round(time.Millisecond), len(between))
}

// committer commits rows one after another and counts those that were acknowledged.
type committer struct {
	acked, sent atomic.Int64
	err         error
}

func (k *committer) run(ctx context.Context, conn *pgx.Conn, who int) {
	for i := 1; ; i++ {
		k.sent.Store(int64(i))
		if _, k.err = conn.Exec(ctx, "INSERT INTO ledger VALUES ($1, $2)", who, i); k.err != nil {
			return
		}
		k.acked.Store(int64(i))
	}
}

// Whatever a connection is doing when the key is disabled, it ends with the reason; new ones get it at
// once; enabled, all goes on by itself with every commit that was acknowledged, and none that was not sent.
func TestDisabledAndEnabled(t *testing.T) {
	c, ctx := start(t)
	if err := c.Target().Exec(ctx, "CREATE TABLE ledger (who int, i int)"); err != nil {
		t.Fatal(err)
	}
	connections, told := 0, 0
	for round := range 3 {
		idle, inTx, sleeping := connect(t, ctx, c), connect(t, ctx, c), connect(t, ctx, c)
		if _, err := inTx.Exec(ctx, "BEGIN; INSERT INTO ledger VALUES (-1, -1)"); err != nil {
			t.Fatal(err)
		}
		slow, copying := connect(t, ctx, c), connect(t, ctx, c)
		stream(t, slow, rows)
		stream(t, copying, "COPY ("+rows+") TO STDOUT")
		sleepErr := make(chan error, 1)
		go func() { _, err := sleeping.Exec(ctx, "SELECT pg_sleep(1000)"); sleepErr <- err }()
		var committers [4]committer
		var ends sync.WaitGroup
		for i := range committers {
			conn, who := connect(t, ctx, c), round*10+i
			ends.Go(func() { committers[i].run(ctx, conn, who) })
		}
		time.Sleep(2500 * time.Millisecond) // the agent has looked at who is connected
		began := time.Now()
		kms(t, ctx, c, "disable")
		all := map[string]error{"in pg_sleep": <-sleepErr}
		t.Logf("SHOW: round %d: connections ended %.2fs after the key was disabled", round, time.Since(began).Seconds())
		refusedAtOnce(t, ctx, c)
		_, all["idle"] = idle.Exec(ctx, "SELECT 1")
		_, all["idle in a transaction"] = inTx.Exec(ctx, "COMMIT")
		cutOff(t, "a slow reader of rows", slow)
		cutOff(t, "a slow reader of COPY", copying)
		ends.Wait()
		for i := range committers {
			all[fmt.Sprint("in COMMIT, ", i)] = committers[i].err
		}
		for what, err := range all {
			connections++
			if heard(t, what, err) {
				told++
			}
		}
		if out, err := c.CLI(ctx, "endpoint", "list"); err != nil || !strings.Contains(out, "key revoked") || !strings.Contains(out, "is disabled") {
			t.Errorf("endpoint list: %v\n%s\nwant the state key revoked, and why", err, out)
		}
		resume(t, ctx, c, round)
		for i := range committers {
			checkLedger(t, ctx, c, round*10+i, &committers[i])
		}
		if got := count(t, ctx, c, "SELECT count(*) FROM ledger WHERE who = -1"); got != 0 {
			t.Errorf("%d rows of a transaction that was not committed", got)
		}
	}
	t.Logf("SHOW: %d of %d connections heard the reason, slow readers not counted", told, connections)
	if told < connections/2 {
		t.Errorf("%d of %d connections heard the reason", told, connections)
	}
}

func resume(t *testing.T, ctx context.Context, c *cluster.Cluster, round int) {
	t.Helper()
	began := time.Now()
	kms(t, ctx, c, "enable")
	if err := c.WaitReady(ctx); err != nil {
		t.Fatal(err)
	}
	t.Logf("SHOW: round %d: SQL is answered %.2fs after the key was enabled", round, time.Since(began).Seconds())
}

func count(t *testing.T, ctx context.Context, c *cluster.Cluster, sql string) (n int64) {
	t.Helper()
	conn := connect(t, ctx, c)
	if err := conn.QueryRow(ctx, sql).Scan(&n); err != nil {
		t.Fatal(err)
	}
	return n
}

// checkLedger checks that what was acknowledged is there, all of it, and nothing but perhaps the one
// commit whose answer did not come.
func checkLedger(t *testing.T, ctx context.Context, c *cluster.Cluster, who int, k *committer) {
	t.Helper()
	n := count(t, ctx, c, fmt.Sprintf("SELECT count(DISTINCT i) FROM ledger WHERE who = %d", who))
	high := count(t, ctx, c, fmt.Sprintf("SELECT coalesce(max(i), 0) FROM ledger WHERE who = %d", who))
	if n != high || n < k.acked.Load() || n > k.sent.Load() {
		t.Errorf("client %d: %d rows up to %d; %d were acknowledged, %d sent", who, n, high, k.acked.Load(), k.sent.Load())
	}
	if k.acked.Load() == 0 {
		t.Errorf("client %d committed nothing", who)
	}
}

const rows = "SELECT repeat('x', 5000) FROM (SELECT generate_series(1, 1000000000)) AS g"

// stream begins a statement whose rows nobody reads.
func stream(t *testing.T, c *pgx.Conn, sql string) {
	t.Helper()
	front := c.PgConn().Frontend()
	front.SendQuery(&pgproto3.Query{String: sql})
	if err := front.Flush(); err != nil {
		t.Fatal(err)
	}
}

// cutOff reads a stream to its end: whole messages, at most one that is cut short, and no message of
// ours in the middle of a row.
func cutOff(t *testing.T, what string, c *pgx.Conn) {
	t.Helper()
	data, _ := io.ReadAll(c.PgConn().Conn()) // it ends with the connection
	n := 0
	for len(data) >= 5 {
		size := 1 + int(data[1])<<24 + int(data[2])<<16 + int(data[3])<<8 + int(data[4])
		if size > len(data) {
			break
		}
		body := string(data[5:size])
		if kind := data[0]; (kind == 'D' || kind == 'd') && strings.Count(body, "x") < 5000 {
			t.Errorf("%s: a row is not as it was", what)
		}
		data = data[size:]
		n++
	}
	if n < 100 || strings.Contains(string(data), "the key of") {
		t.Errorf("%s: %d messages, then %d bytes, in which the notice must not be", what, n, len(data))
	}
}

// Started while the key is disabled, the cluster comes up, says so, and goes on when it is enabled.
func TestStartUnderADisabledKey(t *testing.T) {
	c, ctx := start(t)
	if err := c.Target().Exec(ctx, "CREATE TABLE held AS SELECT generate_series(1, 1000) AS i"); err != nil {
		t.Fatal(err)
	}
	if err := c.Stop(); err != nil {
		t.Fatal(err)
	}
	kms(t, ctx, c, "disable")
	if err := c.Launch(); err != nil {
		t.Fatal(err)
	}
	refusedAtOnce(t, ctx, c)
	out, err := c.CLI(ctx, "status")
	if err != nil || !strings.Contains(out, "key revoked") {
		t.Errorf("status: %v\n%s\nwant the endpoint's state key revoked", err, out)
	}
	if _, err := c.CLI(ctx, "endpoint", "start"); err == nil || !strings.Contains(err.Error(), "starts by itself when its key can be used") {
		t.Errorf("endpoint start: %v, want that it waits for its key", err)
	}
	if _, err := c.CLI(ctx, "psql", "--", "-c", "SELECT 1"); err == nil || !strings.Contains(err.Error(), "is disabled") {
		t.Errorf("psql: %v, want why not", err)
	}
	if c.Exited("up") {
		t.Fatalf("`up` ended:\n%s", c.LogTail("up"))
	}
	resume(t, ctx, c, 0)
	if got := count(t, ctx, c, "SELECT count(*) FROM held"); got != 1000 {
		t.Errorf("%d rows, want 1000", got)
	}
	if log := c.LogTail("up"); !strings.Contains(log, "not ready: the key of project") || strings.Index(log, "not ready: ") > strings.LastIndex(log, "\nready: ") {
		t.Errorf("`up` said\n%s\nwant that it is not ready, for the key, and later that it is", log)
	}
}

// Stopped while it waits, an endpoint is stopped, and does not start when the key is enabled.
func TestStoppedWhileItWaits(t *testing.T) {
	c, ctx := start(t)
	kms(t, ctx, c, "disable")
	refusedAtOnce(t, ctx, c)
	if _, err := c.CLI(ctx, "endpoint", "stop"); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Target().Connect(ctx); err == nil || !strings.Contains(err.Error(), "refused") {
		t.Errorf("a stopped endpoint answers: %v", err)
	}
	kms(t, ctx, c, "enable")
	if _, err := c.CLI(ctx, "endpoint", "start"); err != nil {
		t.Fatal(err)
	}
	if err := c.Target().Exec(ctx, "SELECT 1"); err != nil {
		t.Error(err)
	}
}

// Clients from elsewhere are under TLS: into that nobody but PostgreSQL can write, and it says in its
// own words that the connection was ended. New connections hear all of it.
func TestUnderTLS(t *testing.T) {
	c, ctx := start(t)
	if err := c.Stop(); err != nil {
		t.Fatal(err)
	}
	if err := c.Launch("--listen", fmt.Sprintf("0.0.0.0:%d", c.Port)); err != nil {
		t.Fatal(err)
	}
	if err := c.WaitReady(ctx); err != nil {
		t.Fatal(err)
	}
	url := fmt.Sprintf("postgres://postgres:%s@127.0.0.1:%d/postgres?sslmode=require", cluster.Password, c.Port)
	secret, err := pgx.Connect(ctx, url)
	if err != nil {
		t.Fatal(err)
	}
	defer secret.Close(context.WithoutCancel(ctx))
	plain := connect(t, ctx, c)
	time.Sleep(2500 * time.Millisecond)
	kms(t, ctx, c, "disable")
	refusedAtOnce(t, ctx, c)
	_, err = plain.Exec(ctx, "SELECT 1")
	heard(t, "plain", err)
	_, err = secret.Exec(ctx, "SELECT 1")
	if pg := (*pgconn.PgError)(nil); errors.As(err, &pg) && (pg.Severity != "FATAL" || pg.Code != adminShutdown) {
		t.Errorf("under TLS: %v, want PostgreSQL's own FATAL", err)
	}
	_, err = pgx.Connect(ctx, url)
	wantFatal(t, "a new connection under TLS", cannotConnectNow, err)
	resume(t, ctx, c, 0)
}

// What an operator holds back says so, and how to end it; it is not the KMS's.
func TestHeldBackByTheOperator(t *testing.T) {
	c, ctx := start(t)
	idle := connect(t, ctx, c)
	time.Sleep(2500 * time.Millisecond)
	if _, err := c.CLI(ctx, "key", "revoke", "--reason", "a drill"); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	for {
		_, err := c.Target().Connect(ctx)
		if pg := (*pgconn.PgError)(nil); errors.As(err, &pg) && pg.Code == cannotConnectNow && strings.Contains(pg.Message, "held back") {
			if !strings.Contains(pg.Hint, "holdfast key resume") {
				t.Errorf("hint %q, want how to end it", pg.Hint)
			}
			break
		}
		if ctx.Err() != nil {
			t.Fatalf("new connections are not told why: %v", err)
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Logf("SHOW: new connections are refused %.2fs after `holdfast key revoke`", time.Since(began).Seconds())
	_, err := idle.Exec(ctx, "SELECT 1")
	if pg := (*pgconn.PgError)(nil); errors.As(err, &pg) && (pg.Code != adminShutdown || !strings.Contains(pg.Message, "held back")) {
		t.Errorf("idle: %s %q", pg.Code, pg.Message)
	}
	if _, err := c.CLI(ctx, "key", "resume"); err != nil {
		t.Fatal(err)
	}
	began = time.Now()
	if err := c.WaitReady(ctx); err != nil {
		t.Fatal(err)
	}
	t.Logf("SHOW: SQL is answered %.2fs after `holdfast key resume`", time.Since(began).Seconds())
}
