package goodbye

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"

	"golang.org/x/sys/unix"

	"github.com/holdfastdb/holdfast/internal/keyloss"
	"github.com/holdfastdb/holdfast/test/stock"
)

var notice = keyloss.Notice{Message: "the key of project p is disabled", Detail: "This is so now.", Hint: "Its owner controls it."}

// enough is more than any of it takes, on a machine that is busy.
const enough = 20 * time.Second

func server(t *testing.T, settings map[string]string) *stock.Server {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	s, err := stock.New(ctx, t.TempDir(), "s", settings)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Start(ctx); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Kill() }) // it may have ended
	return s
}

func connect(t *testing.T, s *stock.Server) *pgx.Conn {
	t.Helper()
	c, err := s.Target().Connect(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close(context.Background()) })
	return c
}

func run(t *testing.T, c *pgx.Conn, sql string) {
	t.Helper()
	if _, err := c.Exec(t.Context(), sql); err != nil {
		t.Fatal(err)
	}
}

// background runs a statement and gives its error when it ends.
func background(c *pgx.Conn, sql string) <-chan error {
	ended := make(chan error, 1)
	go func() { _, err := c.Exec(context.Background(), sql); ended <- err }()
	return ended
}

// active waits until so many statements run besides the one that asks.
func active(t *testing.T, s *stock.Server, want int) {
	t.Helper()
	c := connect(t, s)
	for {
		var n int
		if err := c.QueryRow(t.Context(), "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' AND state = 'active' AND pid <> pg_backend_pid()").Scan(&n); err != nil {
			t.Fatal(err)
		}
		if n == want {
			break
		}
		time.Sleep(5 * time.Millisecond)
	}
	_ = c.Close(t.Context())
}

// waiting waits until a backend waits for something.
func waiting(t *testing.T, s *stock.Server, event string) {
	t.Helper()
	c := connect(t, s)
	defer c.Close(t.Context())
	for n := 0; n == 0; time.Sleep(5 * time.Millisecond) {
		if err := c.QueryRow(t.Context(), "SELECT count(*) FROM pg_stat_activity WHERE wait_event = $1", event).Scan(&n); err != nil {
			t.Fatal(err)
		}
	}
}

func say(s *stock.Server, plain func(netip.AddrPort) bool) Told {
	defer s.Kill()
	return Say(Server{PID: s.PID(), Port: s.Target().Port, Plain: plain}, notice.Fatal(keyloss.AdminShutdown), enough)
}

// wantOurs checks that an error is our message, whole.
func wantOurs(t *testing.T, what string, err error) {
	t.Helper()
	var pg *pgconn.PgError
	if !errors.As(err, &pg) {
		t.Errorf("%s: %v, want the FATAL", what, err)
		return
	}
	if pg.Severity != "FATAL" || pg.Code != keyloss.AdminShutdown || pg.Message != notice.Message || pg.Detail != notice.Detail || pg.Hint != notice.Hint {
		t.Errorf("%s: %s %s %q, detail %q, hint %q; want what was said", what, pg.Severity, pg.Code, pg.Message, pg.Detail, pg.Hint)
	}
}

// Whatever its backend is doing, a client reads our message and no other error.
func TestEveryStateOfABackend(t *testing.T) {
	s := server(t, nil)
	idle, inTx, aborted, sleeping, computing, locked := connect(t, s), connect(t, s), connect(t, s), connect(t, s), connect(t, s), connect(t, s)
	run(t, inTx, "CREATE TABLE t (i int)")
	run(t, inTx, "BEGIN")
	run(t, inTx, "LOCK TABLE t")
	run(t, aborted, "BEGIN")
	if _, err := aborted.Exec(t.Context(), "SELECT 1/0"); err == nil {
		t.Fatal("1/0 succeeded")
	}
	ends := map[string]<-chan error{
		"sleeping":  background(sleeping, "SELECT pg_sleep(1000)"),
		"computing": background(computing, "SELECT count(*) FROM generate_series(1, 1e12::bigint)"),
		"locked":    background(locked, "SELECT * FROM t"),
	}
	active(t, s, len(ends))
	if told := say(s, nil); told.Ours != 6 {
		t.Errorf("told %+v, want six in our words", told)
	}
	for what, end := range ends {
		wantOurs(t, what, <-end)
	}
	for what, c := range map[string]*pgx.Conn{"idle": idle, "in a transaction": inTx, "in a failed transaction": aborted} {
		_, err := c.Exec(t.Context(), "SELECT 1")
		wantOurs(t, what, err)
	}
}

// rows streams: what generate_series gives in FROM would be made as a whole first.
const rows = "SELECT repeat('x', 5000) FROM (SELECT generate_series(1, 1000000000)) AS g"

// A client that takes rows more slowly than they come has a backend in the middle of one.
func TestNothingIsPutWithinARow(t *testing.T) {
	for _, sql := range []string{
		rows, "COPY (" + rows + ") TO STDOUT",
	} {
		s := server(t, nil)
		c := connect(t, s)
		front := c.PgConn().Frontend()
		front.SendQuery(&pgproto3.Query{String: sql})
		if err := front.Flush(); err != nil {
			t.Fatal(err)
		}
		waiting(t, s, "ClientWrite")
		told := Say(Server{PID: s.PID(), Port: s.Target().Port}, notice.Fatal(keyloss.AdminShutdown), 300*time.Millisecond)
		_ = s.Kill()
		if told.Ours != 0 {
			t.Errorf("%.4s: told %+v, want silence", sql, told)
		}
		if end := readRows(t, c.PgConn().Conn(), c.PgConn()); end != "" {
			t.Errorf("%.4s: the stream ends with %q, want a mere end", sql, end)
		}
	}
}

// A client that keeps up gets the message between two rows, and every row is whole.
func TestBetweenRows(t *testing.T) {
	ours := 0
	for range 2 {
		s := server(t, nil)
		c := connect(t, s)
		front := c.PgConn().Frontend()
		front.SendQuery(&pgproto3.Query{String: rows})
		if err := front.Flush(); err != nil {
			t.Fatal(err)
		}
		end := make(chan string, 1)
		go func() { end <- readRows(t, c.PgConn().Conn(), c.PgConn()) }()
		active(t, s, 1)
		time.Sleep(100 * time.Millisecond)
		told := say(s, nil)
		ours += told.Ours
		got := <-end
		if want := map[bool]string{true: notice.Message, false: ""}[told.Ours == 1]; got != want {
			t.Errorf("the stream ends with %q, want %q", got, want)
		}
	}
	t.Logf("SHOW: in %d of 2 streams the message came between rows", ours)
}

// readRows reads messages to the end and checks that each row is one. It gives the text of the
// FATAL, if there is one, which must be the last.
func readRows(t *testing.T, conn net.Conn, c *pgconn.PgConn) (fatal string) {
	row := bytes.Repeat([]byte("x"), 5000)
	var head [5]byte
	for {
		if _, err := io.ReadFull(conn, head[:]); err != nil {
			return fatal
		}
		if fatal != "" {
			t.Error("something follows the FATAL")
		}
		body := make([]byte, binary.BigEndian.Uint32(head[1:])-4)
		n, err := io.ReadFull(conn, body)
		if err != nil {
			if bytes.Contains(body[:n], []byte(notice.Message)) {
				t.Error("our message is within another")
			}
			return ""
		}
		switch head[0] {
		case 'D', 'd':
			if !bytes.Contains(body, row) || bytes.ContainsAny(bytes.ReplaceAll(body, row, nil), "FHk") {
				t.Errorf("a row of %d bytes is not as it was", len(body))
			}
		case 'E':
			var m pgproto3.ErrorResponse
			if err := m.Decode(body); err != nil {
				t.Error(err)
			}
			fatal = m.Message
		}
	}
}

// What a transaction has not committed is not reported, what was reported is there.
func TestPsqlShowsIt(t *testing.T) {
	s := server(t, nil)
	cmd, err := s.Target().Command(t.Context(), "psql", "-X", "-c", "SELECT pg_sleep(1000)")
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	active(t, s, 1)
	say(s, nil)
	var exit *exec.ExitError
	if err := cmd.Wait(); !errors.As(err, &exit) || exit.ExitCode() != 2 {
		t.Errorf("psql ended with %v, want status 2 of a lost connection", err)
	}
	for _, want := range []string{"FATAL:  " + notice.Message, "DETAIL:  " + notice.Detail, "HINT:  " + notice.Hint} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("psql shows\n%s\nwant %q", out.String(), want)
		}
	}
	t.Logf("SHOW: psql:\n%s", out.String())
}

// Where we must not write, PostgreSQL says that an administrator ended the connection.
func TestEncryptedConnectionsHearItFromPostgres(t *testing.T) {
	s := server(t, nil)
	secret, plain := connect(t, s), connect(t, s)
	own := secret.PgConn().Conn().LocalAddr().(*net.TCPAddr).AddrPort()
	busy := background(secret, "SELECT pg_sleep(1000)")
	active(t, s, 1)
	told := say(s, func(a netip.AddrPort) bool { return a != own })
	if told.Ours != 1 || told.Theirs != 1 {
		t.Errorf("told %+v, want one each", told)
	}
	_, err := plain.Exec(t.Context(), "SELECT 1")
	wantOurs(t, "plain", err)
	var pg *pgconn.PgError
	if err := <-busy; !errors.As(err, &pg) || pg.Severity != "FATAL" || pg.Code != keyloss.AdminShutdown {
		t.Errorf("under TLS: %v, want PostgreSQL's FATAL", err)
	}
}

// Without the right to duplicate sockets, as in a container that lacks CAP_SYS_PTRACE, PostgreSQL speaks.
func TestWithoutTheRightToDuplicateSockets(t *testing.T) {
	s := server(t, nil)
	idle, sleeping := connect(t, s), connect(t, s)
	busy := background(sleeping, "SELECT pg_sleep(1000)")
	active(t, s, 1)
	told := Say(Server{PID: s.PID(), Port: s.Target().Port, dup: func(int, int, int) (int, error) { return -1, unix.EPERM }},
		notice.Fatal(keyloss.AdminShutdown), enough)
	_ = s.Kill()
	if told.Ours != 0 || told.Theirs < 2 {
		t.Errorf("told %+v, want two in PostgreSQL's words", told)
	}
	_, idleErr := idle.Exec(t.Context(), "SELECT 1")
	for what, err := range map[string]error{"idle": idleErr, "sleeping": <-busy} {
		var pg *pgconn.PgError
		if !errors.As(err, &pg) || pg.Severity != "FATAL" || pg.Code != keyloss.AdminShutdown {
			t.Errorf("%s: %v, want PostgreSQL's FATAL", what, err)
		}
	}
}

// Many clients are told in the time of few.
func TestManyClients(t *testing.T) {
	s := server(t, map[string]string{"max_connections": "80"})
	var conns []*pgx.Conn
	for range 60 {
		conns = append(conns, connect(t, s))
	}
	began := time.Now()
	told := say(s, nil)
	t.Logf("SHOW: 60 idle clients were told in %v", time.Since(began).Round(time.Millisecond))
	if told.Ours < 55 { // one that has just answered may still be within its write
		t.Errorf("told %+v, want all but a few of 60", told)
	}
	heard := 0
	for i, c := range conns {
		_, err := c.Exec(t.Context(), "SELECT 1")
		if pg := (*pgconn.PgError)(nil); !errors.As(err, &pg) {
			continue
		}
		heard++
		wantOurs(t, fmt.Sprint("client ", i), err)
	}
	if heard != told.Ours {
		t.Errorf("%d clients heard what %d were told", heard, told.Ours)
	}
}

// However many clients there are, the looking for them ends in time.
func TestTheSearchForClientsEnds(t *testing.T) {
	s := server(t, nil)
	connect(t, s)
	look := Server{PID: s.PID(), Port: s.Target().Port, dup: unix.PidfdGetfd}
	count := func(until time.Time) int {
		list := look.find(until)
		for _, c := range list {
			c.close()
		}
		return len(list)
	}
	if n := count(time.Now().Add(time.Hour)); n != 1 {
		t.Errorf("found %d clients, want 1", n)
	}
	if n := count(time.Now()); n != 0 {
		t.Errorf("found %d clients when the time was over", n)
	}
}
