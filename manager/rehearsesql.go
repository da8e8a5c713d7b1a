package manager

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// connectLimit bounds one attempt to connect.
const connectLimit = 10 * time.Second

type connector func(context.Context) (*pgx.Conn, error)

func (r *rehearsal) connect(ctx context.Context) (*pgx.Conn, error) {
	cfg, err := pgx.ParseConfig("postgres://" + superuser + "@" + r.endpoint.Listen + "/postgres?sslmode=prefer")
	if err != nil {
		return nil, err
	}
	cfg.Password = r.password
	ctx, cancel := context.WithTimeout(ctx, connectLimit)
	defer cancel()
	return pgx.ConnectConfig(ctx, cfg)
}

// ledger is a table of numbers, and how many of them PostgreSQL acknowledged: 1 to acked.
type ledger struct {
	acked atomic.Int64
}

func (l *ledger) acknowledged() int64 { return l.acked.Load() }

// create makes the table and its first rows.
func (l *ledger) create(ctx context.Context, connect connector) error {
	conn, err := connect(ctx)
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	if _, err := conn.Exec(ctx, "CREATE TABLE holdfast_rehearsal (id bigint PRIMARY KEY, at timestamptz DEFAULT now())"); err != nil {
		return fmt.Errorf("making the rehearsal's table: %w", err)
	}
	for range rehearsalRows {
		if err := l.insert(ctx, conn); err != nil {
			return fmt.Errorf("writing the rehearsal's rows: %w", err)
		}
	}
	return nil
}

// insert writes the next row. One whose answer was lost may be there, and is not counted.
func (l *ledger) insert(ctx context.Context, conn *pgx.Conn) error {
	_, err := conn.Exec(ctx, "INSERT INTO holdfast_rehearsal VALUES ($1)", l.acked.Load()+1)
	if err == nil {
		l.acked.Add(1)
	}
	return err
}

// write writes one more row, the next that is free.
func (l *ledger) write(ctx context.Context, connect connector) error {
	conn, err := connect(ctx)
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	_, err = conn.Exec(ctx, "INSERT INTO holdfast_rehearsal SELECT max(id) + 1 FROM holdfast_rehearsal")
	return err
}

// seen is what the table holds.
type seen struct{ total, acknowledged int64 }

// await reads the table until that succeeds.
func (l *ledger) await(ctx context.Context, connect connector) (s seen, err error) {
	for {
		if s, err = l.read(ctx, connect); err == nil {
			return s, nil
		}
		select {
		case <-time.After(rehearsalPoll):
		case <-ctx.Done():
			return s, err
		}
	}
}

func (l *ledger) read(ctx context.Context, connect connector) (s seen, err error) {
	conn, err := connect(ctx)
	if err != nil {
		return s, err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	err = conn.QueryRow(ctx, "SELECT count(*), count(*) FILTER (WHERE id BETWEEN 1 AND $1) FROM holdfast_rehearsal", l.acked.Load()).Scan(&s.total, &s.acknowledged)
	return s, err
}

// check sees that each acknowledged row is there, and beside them at most the one whose answer was lost.
func (l *ledger) check(s seen) error {
	if acked := l.acked.Load(); s.acknowledged != acked || s.total > acked+1 {
		return fmt.Errorf("%d rows were acknowledged; of them %d are there, of %d in all", acked, s.acknowledged, s.total)
	}
	return nil
}

// watched is two connections that are looked at until they end: one that writes, and one that is idle.
type watched struct {
	stop  context.CancelFunc
	conns []*pgx.Conn
	done  sync.WaitGroup
	ended chan ending
	ends  []ending
}

type ending struct {
	at  time.Time
	err error
}

const writerPause = 2 * time.Millisecond

func (r *rehearsal) watch(ctx context.Context) (*watched, error) {
	ctx, stop := context.WithCancel(ctx)
	w := &watched{stop: stop, ended: make(chan ending, 2)}
	for _, use := range []func(context.Context, *pgx.Conn) error{r.led.keepWriting, idle} {
		conn, err := r.connect(ctx)
		if err != nil {
			w.close()
			return nil, err
		}
		w.conns = append(w.conns, conn)
		w.done.Go(func() {
			err := use(ctx, conn)
			w.ended <- ending{time.Now(), err}
		})
	}
	return w, nil
}

func (l *ledger) keepWriting(ctx context.Context, conn *pgx.Conn) error {
	for {
		if err := l.insert(ctx, conn); err != nil {
			return err
		}
		time.Sleep(writerPause)
	}
}

// idle waits for the end of a connection that does nothing, as a pool's.
func idle(ctx context.Context, conn *pgx.Conn) error {
	for {
		if _, err := conn.WaitForNotification(ctx); err != nil {
			return err
		}
	}
}

// writing waits until the writer is in the middle of its work.
func (w *watched) writing(ctx context.Context, l *ledger) error {
	for l.acknowledged() < 2*rehearsalRows {
		select {
		case e := <-w.ended:
			return fmt.Errorf("a connection ended before the key was revoked: %w", e.err)
		case <-time.After(rehearsalPoll):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

// wait waits until both have ended, and gives when.
func (w *watched) wait(ctx context.Context) (last time.Time, err error) {
	for len(w.ends) < len(w.conns) {
		select {
		case e := <-w.ended:
			w.ends = append(w.ends, e)
			last = e.at
		case <-ctx.Done():
			return last, fmt.Errorf("%d of %d connections outlived the bound: %w", len(w.conns)-len(w.ends), len(w.conns), ctx.Err())
		}
	}
	return last, nil
}

// words is what the connections were told.
func (w *watched) words() string {
	var all []string
	for _, e := range w.ends {
		words, ok := fatal(e.err)
		if !ok {
			words = "no word"
		}
		if !slices.Contains(all, words) {
			all = append(all, words)
		}
	}
	return strings.Join(all, "; ")
}

func (w *watched) close() {
	w.stop()
	w.done.Wait()
	for _, c := range w.conns {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		_ = c.Close(ctx) // it has ended, or is of no use any more
		cancel()
	}
}

// fatal gives PostgreSQL's words, if err is a FATAL error of its.
func fatal(err error) (words string, ok bool) {
	var pe *pgconn.PgError
	if !errors.As(err, &pe) || pe.Severity != "FATAL" {
		return "", false
	}
	words = fmt.Sprintf("FATAL %s: %s", pe.Code, pe.Message)
	for _, more := range []string{pe.Detail, pe.Hint} {
		if more != "" {
			words += " / " + more
		}
	}
	return words, true
}

// refusal tries to connect until it is refused with a FATAL error, and gives when that was.
func (r *rehearsal) refusal(ctx context.Context) (at time.Time, words string, err error) {
	for {
		conn, err := r.connect(ctx)
		if words, ok := fatal(err); ok {
			return time.Now(), words, nil
		}
		if err == nil {
			_ = conn.Close(ctx) // that it could be made is what counts
			err = errors.New("a connection could be made")
		}
		select {
		case <-time.After(rehearsalPoll):
		case <-ctx.Done():
			return at, "", fmt.Errorf("new connections are not refused with FATAL: %w", err)
		}
	}
}
