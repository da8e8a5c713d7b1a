package compute

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/holdfastdb/holdfast/compute/boot"
	"github.com/holdfastdb/holdfast/compute/pgfs"
	"github.com/holdfastdb/holdfast/compute/pgproc"
	"github.com/holdfastdb/holdfast/internal/pg"
)

// postgres is the server as a child of this process.
type postgres struct {
	*pgproc.Process
	log      *pgproc.Log
	settings *boot.Settings
	parting  parting

	standing struct {
		sync.Mutex                // held while the connection is used
		conn       *pgconn.PgConn // poll's; nil: none
	}
}

// awaitAddress waits until the address can be listened on: the kernel may still be busy with
// ending the Postgres of an agent that was killed. Postgres itself would give up at once.
func awaitAddress(ctx context.Context, addr string) error {
	ctx, cancel := context.WithTimeout(ctx, listenWait)
	defer cancel()
	for {
		l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", addr)
		if err == nil {
			return l.Close()
		}
		if !errors.Is(err, syscall.EADDRINUSE) {
			return fmt.Errorf("address for clients: %w", err)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("address for clients: %w; stop what listens there, or choose another address", err)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// startPostgres starts the server. life is the agent's: its cause tells why the server is killed.
func startPostgres(life context.Context, mount string, user pgproc.User, settings *boot.Settings, log *slog.Logger) (*postgres, error) {
	path, err := pgproc.Binary("postgres")
	if err != nil {
		return nil, err
	}
	out := &pgproc.Log{Panic: func(state string) {
		log.Error("Postgres panicked; its log, which may hold users' data, is not shown", "sqlstate", state)
	}}
	p, err := pgproc.Start(pgproc.Command{Path: path, Args: append([]string{"-D", mount}, settings.Args()...), User: user, Stdout: out, Stderr: out, Mount: mount})
	if err != nil {
		return nil, err
	}
	started := &postgres{Process: p, log: out, settings: settings}
	started.parting.life, started.parting.log = life, log
	started.parting.clients.encrypted = true // until Postgres was asked
	return started, nil
}

// ended describes Postgres's end.
func (p *postgres) ended() error {
	err := p.Err()
	if err == nil {
		err = errors.New("exit status 0")
	}
	if said := p.log.Startup(); said != "" {
		return fmt.Errorf("the server ended before it took connections (%w); it said:\n%s", err, said)
	}
	return fmt.Errorf("the server ended: %w", err)
}

// inOrder tells what was not in order with a shutdown that has ended. The exit status does not
// tell: it is 0 after an immediate shutdown, too.
func (p *postgres) inOrder(fs *pgfs.FS) error {
	if err := p.Err(); err != nil {
		return err
	}
	data, err := fs.ReadFile(controlFile)
	if err != nil {
		return err
	}
	control, err := pg.ParseControlFile(data)
	if err != nil {
		return err
	}
	if control.State != pg.DBShutdowned {
		return fmt.Errorf("the server left the cluster in state %d, not shut down (%d)", control.State, pg.DBShutdowned)
	}
	return nil
}

// controlFile is where Postgres says how it ended.
const controlFile = "global/pg_control"

// stop shuts Postgres down in order, then with less and less of it. cut ends the patience.
func (p *postgres) stop(cut <-chan struct{}) {
	for _, step := range []struct {
		signal syscall.Signal
		wait   time.Duration
	}{{syscall.SIGINT, stopWait}, {syscall.SIGQUIT, quitWait}} {
		p.Signal(step.signal)
		select {
		case <-p.Done():
			return
		case <-cut:
			p.kill()
			return
		case <-time.After(step.wait):
		}
	}
	p.kill()
}

// kill kills Postgres with all its backends and tells whether they are gone.
func (p *postgres) kill() bool {
	if reason := context.Cause(p.parting.life); KeyLost(reason) {
		p.goodbye(reason)
	}
	p.Kill()
	select {
	case <-p.Done():
		return true
	case <-time.After(killWait):
		return false
	}
}

// Bounds of the agent's own connection.
const (
	connectTimeout = 5 * time.Second
	queryTimeout   = 10 * time.Second
	pollInterval   = 2 * time.Second

	// SQLSTATEs.
	noSuchDatabase   = "3D000"
	notInThisState   = "55000" // of a database that takes no connections, for one
	cannotConnectNow = "57P03"
	adminShutdown    = "57P01"

	tooManyConnections = "53300"
	notAuthorized      = "28000" // the role is gone, or may not log in
)

// sqlState is the server's code for an error; empty if the error is not the server's.
func sqlState(err error) string {
	if pgErr := (*pgconn.PgError)(nil); errors.As(err, &pgErr) {
		return pgErr.Code
	}
	return ""
}

// connect opens the agent's connection over the private socket.
func (p *postgres) connect(ctx context.Context, database string) (*pgconn.PgConn, error) {
	// Every parameter that the environment could set is set here.
	cfg, err := pgconn.ParseConfig("sslmode=disable passfile=/dev/null servicefile=/dev/null user=" + boot.Superuser)
	if err != nil {
		return nil, err
	}
	port, err := net.LookupPort("tcp", p.settings.Port())
	if err != nil {
		return nil, err
	}
	cfg.Host, cfg.Port, cfg.Database, cfg.Password = p.settings.SocketDir, uint16(port), database, ""
	cfg.TLSConfig, cfg.Fallbacks, cfg.ConnectTimeout = nil, nil, connectTimeout
	cfg.RuntimeParams = map[string]string{"application_name": "holdfast", "statement_timeout": "5s", "search_path": "",
		// A library that is missing would keep the agent out, and with it everybody.
		"session_preload_libraries": "", "local_preload_libraries": "",
		"default_transaction_read_only": "off", "synchronous_commit": "local"}
	return pgconn.ConnectConfig(ctx, cfg)
}

// open connects to the database postgres or, where somebody dropped or closed that, template1. A
// connection to template1 must not stay: it keeps users from making databases.
func (p *postgres) open(ctx context.Context) (conn *pgconn.PgConn, stay bool, err error) {
	conn, err = p.connect(ctx, "postgres")
	if state := sqlState(err); state == noSuchDatabase || state == notInThisState {
		conn, err = p.connect(ctx, "template1")
		return conn, false, err
	}
	return conn, true, err
}

// errNoRole means that the server runs, and has no role as which the agent can connect.
var errNoRole = errors.New("the server runs, but the role " + boot.Superuser + ", as which Holdfast connects, was renamed or may not log in")

// noRoleWait is for how long the role is asked for again.
const noRoleWait = 3 * time.Second

// awaitReady waits until Postgres answers a query.
func (p *postgres) awaitReady(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, readyTimeout, fmt.Errorf("the server did not answer within %v", readyTimeout))
	defer cancel()
	var last error
	for began := time.Now(); ; {
		conn, _, err := p.open(ctx)
		if err == nil {
			err = conn.Exec(ctx, "SELECT 1").Close()
			closeConn(conn)
			if err == nil {
				p.log.Ready()
				return nil
			}
		}
		last = err
		if sqlState(err) == notAuthorized && time.Since(began) > noRoleWait {
			return fmt.Errorf("%w: %w", errNoRole, err)
		}
		select {
		case <-p.Done():
			return p.ended()
		case <-ctx.Done():
			return fmt.Errorf("%w (last: %w)", context.Cause(ctx), last)
		case <-time.After(5 * time.Millisecond):
		}
	}
}

func closeConn(conn *pgconn.PgConn) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	_ = conn.Close(ctx) // the server may be gone
}

// quietWait bounds the wait for a connection that nobody sees; see openQuiet.
const quietWait = 500 * time.Millisecond

// openQuiet connects to template1, where nobody has replication slots: those of another
// database are not shown a message that was written there. A CREATE DATABASE keeps connections
// to its template waiting, which must not keep a checkpoint waiting that it asked for.
func (p *postgres) openQuiet(ctx context.Context) (*pgconn.PgConn, error) {
	quiet, cancel := context.WithTimeout(ctx, quietWait)
	conn, err := p.connect(quiet, "template1")
	late := quiet.Err() != nil
	cancel()
	if state := sqlState(err); state == noSuchDatabase || state == notInThisState || err != nil && late {
		conn, _, err = p.open(ctx)
	}
	return conn, err
}

// emit writes a logical message into the WAL and waits for the quorum.
func (p *postgres) emit(ctx context.Context, prefix string, content []byte) error {
	err := p.emitOnce(ctx, prefix, content)
	if sqlState(err) == adminShutdown { // or pg_terminate_backend: a shutdown takes no new connection
		err = p.emitOnce(ctx, prefix, content)
	}
	if sqlState(err) == tooManyConnections {
		p.standing.Lock()
		if conn := p.standing.conn; conn != nil && !conn.IsClosed() {
			err = emitOn(ctx, conn, prefix, content)
		}
		p.standing.Unlock()
	}
	if state := sqlState(err); state == cannotConnectNow || state == adminShutdown {
		return fmt.Errorf("%w: %w", errNotServing, err)
	}
	return err
}

func (p *postgres) emitOnce(ctx context.Context, prefix string, content []byte) error {
	conn, err := p.openQuiet(ctx)
	if err != nil {
		return err
	}
	defer closeConn(conn)
	return emitOn(ctx, conn, prefix, content)
}

func emitOn(ctx context.Context, conn *pgconn.PgConn, prefix string, content []byte) error {
	const binary = 1
	return conn.ExecParams(ctx, "SELECT pg_catalog.pg_logical_emit_message(true, $1::pg_catalog.text, $2::pg_catalog.bytea)",
		[][]byte{[]byte(prefix), content}, nil, []int16{0, binary}, nil).Read().Err
}

// poll tells the mount, now and then, what runs in Postgres, so that it may let pages go
// (C1). When a poll fails, pages stay. Its connection stands, and is of use to emit where users
// take all others.
func (p *postgres) poll(ctx context.Context, fs *pgfs.FS, log *slog.Logger) {
	defer p.endStanding()
	for failed := false; ; {
		select {
		case <-ctx.Done():
			return
		case <-time.After(pollInterval):
		}
		err := p.pollStanding(ctx, fs)
		if err != nil && !failed && ctx.Err() == nil {
			log.Warn("asking Postgres what runs in it", "error", err)
		}
		failed = err != nil
	}
}

func (p *postgres) endStanding() {
	p.standing.Lock()
	defer p.standing.Unlock()
	p.endStandingLocked()
}

func (p *postgres) endStandingLocked() {
	if p.standing.conn != nil {
		closeConn(p.standing.conn)
		p.standing.conn = nil
	}
}

func (p *postgres) pollStanding(ctx context.Context, fs *pgfs.FS) error {
	p.standing.Lock()
	defer p.standing.Unlock()
	stay := true
	if p.standing.conn == nil || p.standing.conn.IsClosed() {
		conn, mayStay, err := p.open(ctx)
		if err != nil {
			p.standing.conn = nil
			return err
		}
		p.standing.conn, stay = conn, mayStay
	}
	err := pollOnce(ctx, p.standing.conn, fs)
	if err == nil {
		err = p.noteClients(ctx, p.standing.conn)
	}
	if err != nil || !stay {
		p.endStandingLocked()
	}
	return err
}

// running asks which transactions run, then how far WAL was inserted: in that order.
const running = `SELECT virtualtransaction FROM pg_catalog.pg_locks
WHERE locktype OPERATOR(pg_catalog.=) 'virtualxid' AND pid OPERATOR(pg_catalog.<>) pg_catalog.pg_backend_pid();
SELECT pg_catalog.pg_current_wal_insert_lsn()`

func pollOnce(ctx context.Context, conn *pgconn.PgConn, fs *pgfs.FS) error {
	ctx, cancel := context.WithTimeout(ctx, queryTimeout)
	defer cancel()
	var before []string
	if _, on := fs.Verified(); on {
		var err error
		if before, err = vacuumsNow(ctx, conn); err != nil {
			return err
		}
	}
	results, err := conn.Exec(ctx, running).ReadAll()
	if err != nil {
		return err
	}
	if _, on := fs.Verified(); on {
		if err := tellSeen(ctx, conn, fs, before); err != nil {
			return err
		}
	}
	if len(results) != 2 || len(results[1].Rows) != 1 || len(results[1].Rows[0]) != 1 {
		return fmt.Errorf("%d results, want the running transactions and an LSN", len(results))
	}
	insert, err := pg.ParseLSN(string(results[1].Rows[0][0]))
	if err != nil {
		return err
	}
	vxids := make(map[string]struct{}, len(results[0].Rows))
	for _, row := range results[0].Rows {
		vxids[string(row[0])] = struct{}{}
	}
	fs.Advance(vxids, insert)
	return nil
}
