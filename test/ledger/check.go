package ledger

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sort"

	"github.com/jackc/pgx/v5"
)

// Report is what a check found.
type Report struct {
	Acked    int // transactions that must be there, and are
	Resolved int // of those whose outcome was unknown: found there
	Lost     int // of those whose outcome was unknown: not there
}

func (r Report) String() string {
	return fmt.Sprintf("%d transactions acknowledged and exact; of those cut off in COMMIT %d are there, %d are not", r.Acked, r.Resolved, r.Lost)
}

// maxProblems bounds an error's length.
const maxProblems = 10

type problems struct {
	list  []error
	total int
}

func (p *problems) add(format string, args ...any) {
	p.total++
	if len(p.list) < maxProblems {
		p.list = append(p.list, fmt.Errorf(format, args...))
	}
}

func (p *problems) err() error {
	if p.total == 0 {
		return nil
	}
	return fmt.Errorf("%d problems, such as:\n%w", p.total, errors.Join(p.list...))
}

// stored is what the database holds of one transaction.
type stored struct {
	entries map[int]string
	parts   int
	blob    string
	doc     string
	source  int
	target  int
	amount  int64
}

// Check pauses the ledger and holds the database against its notes.
func (l *Ledger) Check(ctx context.Context) (Report, error) {
	l.Pause()
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.mu.failure != nil {
		return Report{}, l.mu.failure
	}
	conn, err := l.cfg.Target.WaitConnect(ctx)
	if err != nil {
		return Report{}, err
	}
	defer conn.Close(ctx)
	found, err := readAll(ctx, conn)
	if err != nil {
		return Report{}, fmt.Errorf("reading the ledger back: %w", err)
	}
	var p problems
	report := l.compareLocked(found, &p)
	if err := l.checkBalancesLocked(ctx, conn, &p); err != nil {
		return report, err
	}
	if err := l.checkMarksLocked(ctx, conn, &p); err != nil {
		return report, err
	}
	if err := l.checkBulksLocked(ctx, conn, &p); err != nil {
		return report, err
	}
	return report, errors.Join(p.err(), l.checkSequenceLocked(ctx, conn))
}

// compareLocked settles what was unknown by what is there.
func (l *Ledger) compareLocked(found map[string]*stored, p *problems) Report {
	var r Report
	for _, id := range slices.Sorted(maps.Keys(found)) {
		if _, ok := l.mu.txns[id]; !ok {
			p.add("transaction %s is there, but was never written", id)
		}
	}
	for _, id := range slices.Sorted(maps.Keys(l.mu.txns)) {
		t, s := l.mu.txns[id], found[id]
		switch {
		case t.State == Aborted && s != nil:
			p.add("transaction %s was rolled back, but is there", id)
		case t.State == Acked && s == nil:
			p.add("transaction %s was acknowledged, but is gone", id)
		case t.State == Unknown && s == nil:
			t.State = Aborted
			r.Lost++
		case s != nil:
			if t.State == Unknown {
				t.State = Acked
				r.Resolved++
			}
			r.Acked++
			if err := l.content(t).compare(s); err != nil {
				p.add("transaction %s: %w", id, err)
			}
		}
	}
	return r
}

func (c content) compare(s *stored) error {
	if len(s.entries) != len(c.parts) || s.parts != len(c.parts) {
		return fmt.Errorf("%d of %d entries are there", len(s.entries), len(c.parts))
	}
	for i, body := range c.parts {
		if s.entries[i] != body {
			return fmt.Errorf("entry %d has another content than was written", i)
		}
	}
	if s.blob != c.blob || s.doc != c.doc {
		return fmt.Errorf("its long values (%d and %d bytes) differ from those written (%d and %d)", len(s.blob), len(s.doc), len(c.blob), len(c.doc))
	}
	if c.source == 0 && s.source == 0 {
		return nil
	}
	if s.source != c.source || s.target != c.target || s.amount != c.amount {
		return fmt.Errorf("its transfer is %d from %d to %d, want %d from %d to %d", s.amount, s.source, s.target, c.amount, c.source, c.target)
	}
	return nil
}

func readAll(ctx context.Context, conn *pgx.Conn) (map[string]*stored, error) {
	found := make(map[string]*stored)
	get := func(id string) *stored {
		s := found[id]
		if s == nil {
			s = &stored{entries: make(map[int]string)}
			found[id] = s
		}
		return s
	}
	var id, body string
	var a, b int
	var n int64
	rows, err := conn.Query(ctx, "SELECT txn, part, parts, body FROM entries")
	if err != nil {
		return nil, err
	}
	if _, err := pgx.ForEachRow(rows, []any{&id, &a, &b, &body}, func() error {
		s := get(id)
		if _, twice := s.entries[a]; twice {
			return fmt.Errorf("entry %d of transaction %s is there twice, against its unique index", a, id)
		}
		s.entries[a], s.parts = body, b
		return nil
	}); err != nil {
		return nil, err
	}
	for _, table := range []string{"blobs", "docs"} {
		rows, err := conn.Query(ctx, "SELECT txn, body FROM "+table)
		if err != nil {
			return nil, err
		}
		if _, err := pgx.ForEachRow(rows, []any{&id, &body}, func() error {
			if table == "blobs" {
				get(id).blob = body
			} else {
				get(id).doc = body
			}
			return nil
		}); err != nil {
			return nil, err
		}
	}
	rows, err = conn.Query(ctx, "SELECT txn, source, target, amount FROM transfers")
	if err != nil {
		return nil, err
	}
	_, err = pgx.ForEachRow(rows, []any{&id, &a, &b, &n}, func() error {
		s := get(id)
		s.source, s.target, s.amount = a, b, n
		return nil
	})
	return found, err
}

// checkBalancesLocked holds each account against the transfers that must be there.
func (l *Ledger) checkBalancesLocked(ctx context.Context, conn *pgx.Conn, p *problems) error {
	want := make(map[int]int64)
	for i := 1; i <= l.cfg.Accounts; i++ {
		want[i] = initialBalance
	}
	for _, t := range l.mu.txns {
		if c := l.content(t); t.State == Acked && c.source != 0 {
			want[c.source] -= c.amount
			want[c.target] += c.amount
		}
	}
	rows, err := conn.Query(ctx, "SELECT id, balance FROM accounts")
	if err != nil {
		return err
	}
	var id, n int
	var balance, sum int64
	if _, err := pgx.ForEachRow(rows, []any{&id, &balance}, func() error {
		n++
		sum += balance
		if balance != want[id] {
			p.add("account %d has %d, want %d", id, balance, want[id])
		}
		return nil
	}); err != nil {
		return err
	}
	if n != l.cfg.Accounts || sum != int64(l.cfg.Accounts)*initialBalance {
		p.add("%d accounts have %d together, want %d with %d", n, sum, l.cfg.Accounts, l.cfg.Accounts*initialBalance)
	}
	return nil
}

// checkMarksLocked holds the row that each connection updates against its last transaction.
func (l *Ledger) checkMarksLocked(ctx context.Context, conn *pgx.Conn, p *problems) error {
	last := make(map[int]int)
	for _, t := range l.mu.txns {
		if t.State == Acked {
			last[t.Worker] = max(last[t.Worker], t.Seq)
		}
	}
	rows, err := conn.Query(ctx, "SELECT worker, seq FROM marks")
	if err != nil {
		return err
	}
	var worker, seq int
	got := make(map[int]int)
	if _, err := pgx.ForEachRow(rows, []any{&worker, &seq}, func() error { got[worker] = seq; return nil }); err != nil {
		return err
	}
	workers := make([]int, 0, l.cfg.Connections)
	for w := range l.cfg.Connections {
		workers = append(workers, w)
	}
	sort.Ints(workers)
	for _, w := range workers {
		if s, ok := got[w]; !ok || s != last[w] {
			p.add("connection %d's mark is at %d (there: %v), want %d", w, s, ok, last[w])
		}
	}
	return nil
}

// checkSequenceLocked: a value that an acknowledged transaction used is not given out again.
func (l *Ledger) checkSequenceLocked(ctx context.Context, conn *pgx.Conn) error {
	var next int64
	if err := conn.QueryRow(ctx, "SELECT nextval('entries_id_seq')").Scan(&next); err != nil {
		return err
	}
	if next <= l.mu.maxID {
		return fmt.Errorf("the sequence gave out %d, but an acknowledged transaction has used %d", next, l.mu.maxID)
	}
	return nil
}
