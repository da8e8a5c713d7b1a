// Package ledger is a client that knows what a database must hold: it writes transactions
// over several connections, notes outside the database what each one's COMMIT was answered
// with, and later holds the database against its notes.
//
// Every transaction's content follows from its id, so a reader can tell whether it is there
// whole and exact. A transaction whose COMMIT was acknowledged must be there. One whose
// connection was lost during COMMIT may be there or not, but whole, and what was found
// once must stay so. Anything else that is there is an error.
package ledger

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/holdfastdb/holdfast/test/pgtools"
)

// State is what is known about a transaction.
type State string

// The states.
const (
	Acked   State = "acked"   // COMMIT was acknowledged, or a check found it after it was unknown
	Unknown State = "unknown" // the connection was lost during COMMIT
	Aborted State = "aborted" // rolled back, refused, or never got as far as COMMIT
)

// Config is how a ledger works.
type Config struct {
	Target      pgtools.Target
	Connections int           // that write at once; 0: 4
	Pause       time.Duration // of a connection between transactions
	Accounts    int           // of the bank; 0: 50
	Journal     string        // a file to which each outcome is appended; empty: memory only
	Seed        uint64        // of the transactions' contents
}

const initialBalance = 1000

// txn is one transaction: what it writes follows from ID.
type txn struct {
	ID     string `json:"id"`
	Worker int    `json:"worker"`
	Seq    int    `json:"seq"`
	State  State  `json:"state"`
}

// Ledger writes and checks. Its methods, Bulk excepted, are for one goroutine.
type Ledger struct {
	cfg     Config
	journal *os.File

	stop    context.CancelFunc
	workers sync.WaitGroup
	acked   atomic.Int64
	paused  bool

	mu struct {
		sync.Mutex
		txns    map[string]*txn
		seq     []int         // of each worker: the last that was begun
		bulk    int           // the number of the last bulk
		bulks   map[int]State // by number
		maxID   int64         // the greatest sequence value seen in an acknowledged transaction
		failure error         // a database's answer that cannot be right
	}
}

const schema = `
CREATE TABLE accounts (id int PRIMARY KEY, balance bigint NOT NULL);
CREATE TABLE transfers (txn text PRIMARY KEY, source int NOT NULL, target int NOT NULL, amount bigint NOT NULL);
CREATE TABLE entries (id bigserial PRIMARY KEY, txn text NOT NULL, part int NOT NULL, parts int NOT NULL, body text NOT NULL, UNIQUE (txn, part));
CREATE INDEX entries_body ON entries (md5(body));
CREATE TABLE blobs (txn text PRIMARY KEY, body text NOT NULL);
ALTER TABLE blobs ALTER body SET STORAGE EXTERNAL;
CREATE TABLE docs (txn text PRIMARY KEY, body text NOT NULL);
CREATE TABLE marks (worker int PRIMARY KEY, seq int NOT NULL);
`

// New makes the ledger's tables in an empty database.
func New(ctx context.Context, cfg Config) (*Ledger, error) {
	if cfg.Connections == 0 {
		cfg.Connections = 4
	}
	if cfg.Accounts == 0 {
		cfg.Accounts = 50
	}
	l := &Ledger{cfg: cfg, paused: true}
	l.mu.txns = make(map[string]*txn)
	l.mu.bulks = make(map[int]State)
	l.mu.seq = make([]int, cfg.Connections)
	if cfg.Journal != "" {
		f, err := os.OpenFile(cfg.Journal, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
		if err != nil {
			return nil, err
		}
		l.journal = f
	}
	err := cfg.Target.Exec(ctx, schema, bulkSchema,
		fmt.Sprintf("INSERT INTO accounts SELECT i, %d FROM generate_series(1, %d) i", initialBalance, cfg.Accounts),
		fmt.Sprintf("INSERT INTO marks SELECT i, 0 FROM generate_series(0, %d) i", cfg.Connections-1))
	if err != nil {
		return nil, fmt.Errorf("making the ledger's tables: %w", err)
	}
	return l, nil
}

// Retarget has the ledger use another address from the next Start on.
func (l *Ledger) Retarget(t pgtools.Target) { l.cfg.Target = t }

// Acked is the number of acknowledged transactions so far.
func (l *Ledger) Acked() int64 { return l.acked.Load() }

// Start lets the connections write until Pause.
func (l *Ledger) Start() {
	ctx, cancel := context.WithCancel(context.Background())
	l.stop, l.paused = cancel, false
	for w := range l.cfg.Connections {
		l.workers.Add(1)
		go func() { defer l.workers.Done(); l.work(ctx, w) }()
	}
}

// Pause lets each connection end its transaction and waits for it.
func (l *Ledger) Pause() {
	if !l.paused {
		l.stop()
		l.workers.Wait()
		l.paused = true
	}
}

// Close ends the ledger.
func (l *Ledger) Close() error {
	l.Pause()
	if l.journal == nil {
		return nil
	}
	return l.journal.Close()
}

// WaitAcked waits until n more transactions were acknowledged.
func (l *Ledger) WaitAcked(ctx context.Context, n int64) error {
	want := l.Acked() + n
	for l.Acked() < want {
		select {
		case <-ctx.Done():
			return fmt.Errorf("%d of %d transactions were acknowledged: %w", n-(want-l.Acked()), n, ctx.Err())
		case <-time.After(5 * time.Millisecond):
		}
	}
	return nil
}

// opTimeout bounds one transaction: a server that neither answers nor hangs up.
const opTimeout = 60 * time.Second

func (l *Ledger) work(ctx context.Context, worker int) {
	var conn *pgx.Conn
	drop := func() {
		if conn != nil {
			closeCtx, cancel := context.WithTimeout(context.Background(), time.Second)
			_ = conn.Close(closeCtx) // it is broken, or of no more use
			cancel()
			conn = nil
		}
	}
	defer drop()
	for ctx.Err() == nil {
		if conn == nil {
			c, err := l.cfg.Target.Connect(ctx)
			if err != nil {
				select {
				case <-ctx.Done():
				case <-time.After(50 * time.Millisecond):
				}
				continue
			}
			conn = c
		}
		if !l.one(conn, worker) {
			drop()
		}
		if l.cfg.Pause > 0 {
			time.Sleep(l.cfg.Pause)
		}
	}
}

// one runs one transaction to its end and notes the outcome; false: the connection is lost.
func (l *Ledger) one(conn *pgx.Conn, worker int) bool {
	ctx, cancel := context.WithTimeout(context.Background(), opTimeout)
	defer cancel()
	l.mu.Lock()
	l.mu.seq[worker]++
	t := &txn{Worker: worker, Seq: l.mu.seq[worker]}
	t.ID = fmt.Sprintf("%x-%d-%d", l.cfg.Seed, worker, t.Seq)
	l.mu.Unlock()

	c := l.content(t)
	tx, err := conn.Begin(ctx)
	if err != nil {
		l.note(t, Aborted, 0)
		return false
	}
	maxID, err := c.write(ctx, tx)
	if err != nil {
		l.note(t, Aborted, 0)
		_ = tx.Rollback(ctx) // fails where the connection is lost
		var pgErr *pgconn.PgError
		if errors.As(err, &pgErr) && pgErr.Severity == "ERROR" && outlives(ctx, conn) {
			l.fail(fmt.Errorf("transaction %s was refused: %w", t.ID, err))
		}
		return false
	}
	if c.rollback {
		err := tx.Rollback(ctx)
		l.note(t, Aborted, 0)
		return err == nil
	}
	if err := tx.Commit(ctx); err != nil {
		// An error that the server sent instead of "COMMIT" means that it rolled back; only
		// FATAL and PANIC, and a lost connection, leave the outcome open.
		var pgErr *pgconn.PgError
		if errors.As(err, &pgErr) && pgErr.Severity == "ERROR" {
			l.note(t, Aborted, 0)
			return true
		}
		l.note(t, Unknown, 0)
		return false
	}
	l.note(t, Acked, maxID)
	l.acked.Add(1)
	return true
}

// outlives tells whether the server still answers a while after an error. One whose disk
// has gone away, since it is being killed, may say so before it ends: that refuses nothing.
func outlives(ctx context.Context, conn *pgx.Conn) bool {
	_, err := conn.Exec(ctx, "SELECT pg_sleep(1)")
	return err == nil
}

func (l *Ledger) fail(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.mu.failure == nil {
		l.mu.failure = err
	}
}

func (l *Ledger) note(t *txn, s State, maxID int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	t.State = s
	l.mu.txns[t.ID] = t
	l.mu.maxID = max(l.mu.maxID, maxID)
	if l.journal != nil {
		line, _ := json.Marshal(t) // a struct of strings and numbers
		if _, err := l.journal.Write(append(line, '\n')); err != nil && l.mu.failure == nil {
			l.mu.failure = fmt.Errorf("writing the journal: %w", err)
		}
	}
}

// content is what a transaction writes.
type content struct {
	t        *txn
	parts    []string // the bodies of its entries
	blob     string   // "" for none; longer than TOAST's threshold, not compressed
	doc      string   // "" for none; long and compressible
	source   int      // of a transfer; 0 for none
	target   int
	amount   int64
	rollback bool
	savedOff int // that many further entries are written behind a savepoint and rolled back to it
}

func (l *Ledger) content(t *txn) content {
	sum := sha256.Sum256([]byte(t.ID))
	rng := rand.New(rand.NewChaCha8(sum))
	c := content{t: t}
	for range 1 + rng.IntN(5) {
		c.parts = append(c.parts, text(rng, 20+rng.IntN(300)))
	}
	if rng.IntN(100) < 40 {
		c.source, c.target = 1+rng.IntN(l.cfg.Accounts), 1+rng.IntN(l.cfg.Accounts)
		if c.source == c.target {
			c.source = 0
		}
		c.amount = 1 + rng.Int64N(20)
	}
	if rng.IntN(100) < 10 {
		c.blob = text(rng, 3000+rng.IntN(20000))
	}
	if rng.IntN(100) < 10 {
		c.doc = strings.Repeat(text(rng, 64)+" ", 100+rng.IntN(300))
	}
	if rng.IntN(100) < 10 {
		c.savedOff = 1 + rng.IntN(3)
	}
	c.rollback = rng.IntN(100) < 5
	return c
}

func text(rng *rand.Rand, n int) string {
	raw := make([]byte, (n+1)/2)
	for i := range raw {
		raw[i] = byte(rng.Uint32())
	}
	return hex.EncodeToString(raw)[:n]
}

// write does all but the end of the transaction; it returns the last sequence value.
func (c *content) write(ctx context.Context, tx pgx.Tx) (int64, error) {
	var id int64
	entry := func(q pgx.Tx, part int, body string) error {
		return q.QueryRow(ctx, "INSERT INTO entries (txn, part, parts, body) VALUES ($1, $2, $3, $4) RETURNING id",
			c.t.ID, part, len(c.parts), body).Scan(&id)
	}
	for i, body := range c.parts {
		if err := entry(tx, i, body); err != nil {
			return 0, err
		}
	}
	if c.savedOff > 0 {
		sub, err := tx.Begin(ctx)
		if err != nil {
			return 0, err
		}
		for i := range c.savedOff {
			if err := entry(sub, 1000+i, "rolled back to a savepoint"); err != nil {
				return 0, err
			}
		}
		if err := sub.Rollback(ctx); err != nil {
			return 0, err
		}
	}
	if _, err := tx.Exec(ctx, "UPDATE marks SET seq = $1 WHERE worker = $2", c.t.Seq, c.t.Worker); err != nil {
		return 0, err
	}
	if c.blob != "" {
		if _, err := tx.Exec(ctx, "INSERT INTO blobs VALUES ($1, $2)", c.t.ID, c.blob); err != nil {
			return 0, err
		}
	}
	if c.doc != "" {
		if _, err := tx.Exec(ctx, "INSERT INTO docs VALUES ($1, $2)", c.t.ID, c.doc); err != nil {
			return 0, err
		}
	}
	return id, c.transfer(ctx, tx)
}

func (c *content) transfer(ctx context.Context, tx pgx.Tx) error {
	if c.source == 0 {
		return nil
	}
	if _, err := tx.Exec(ctx, "INSERT INTO transfers VALUES ($1, $2, $3, $4)", c.t.ID, c.source, c.target, c.amount); err != nil {
		return err
	}
	// In the order of account numbers, so that two transfers never wait for each other.
	type change struct {
		account int
		by      int64
	}
	changes := []change{{c.source, -c.amount}, {c.target, c.amount}}
	if c.source > c.target {
		changes[0], changes[1] = changes[1], changes[0]
	}
	for _, ch := range changes {
		if _, err := tx.Exec(ctx, "UPDATE accounts SET balance = balance + $1 WHERE id = $2", ch.by, ch.account); err != nil {
			return err
		}
	}
	return nil
}
