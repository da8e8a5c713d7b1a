package ledger

import (
	"context"
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// bulkRows is the number of rows of a bulk transaction; each has about 1 kB.
const bulkRows = 8000

// keptBulks is how many bulks stay; each new one deletes the oldest.
const keptBulks = 3

const bulkSchema = `
CREATE TABLE bulk (bulk int NOT NULL, i int NOT NULL, v text NOT NULL, PRIMARY KEY (bulk, i));
`

// bulkValue makes a row's content from its keys, in SQL.
const bulkValue = "repeat(md5($1::int || '-' || i), 32)"

// Bulk writes some MiB in one transaction, and deletes what an earlier one wrote. It makes
// WAL enough for layers, for the logs to be cut, and for pages to leave local stores. It may run
// beside the ledger's connections; an error of the connection is no error of Bulk.
func (l *Ledger) Bulk(ctx context.Context) error {
	conn, err := l.cfg.Target.WaitConnect(ctx)
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	l.mu.Lock()
	l.mu.bulk++
	n := l.mu.bulk
	l.mu.bulks[n] = Unknown
	l.mu.Unlock()
	outcome, err := l.writeBulk(ctx, conn, n)
	l.mu.Lock()
	l.mu.bulks[n] = outcome
	l.mu.Unlock()
	return err
}

func (l *Ledger) writeBulk(ctx context.Context, conn *pgx.Conn, n int) (State, error) {
	tx, err := conn.Begin(ctx)
	if err != nil {
		return Aborted, nil
	}
	_, err = tx.Exec(ctx, "INSERT INTO bulk SELECT $1, i, "+bulkValue+" FROM generate_series(1, $2::int) i", n, bulkRows)
	if err == nil {
		_, err = tx.Exec(ctx, "DELETE FROM bulk WHERE bulk <= $1", n-keptBulks)
	}
	var pgErr *pgconn.PgError
	if err != nil {
		_ = tx.Rollback(ctx) // fails where the connection is lost
		if errors.As(err, &pgErr) && pgErr.Severity == "ERROR" && outlives(ctx, conn) {
			return Aborted, fmt.Errorf("bulk %d was refused: %w", n, err)
		}
		return Aborted, nil
	}
	if err := tx.Commit(ctx); err != nil {
		if errors.As(err, &pgErr) && pgErr.Severity == "ERROR" {
			return Aborted, nil
		}
		return Unknown, nil
	}
	return Acked, nil
}

// checkBulksLocked holds the bulk table against what must be there: of each bulk all rows,
// exact, or none.
func (l *Ledger) checkBulksLocked(ctx context.Context, conn *pgx.Conn, p *problems) error {
	found := make(map[int]bool)
	for n := 1; n <= l.mu.bulk; n++ {
		var rows, exact int
		err := conn.QueryRow(ctx, "SELECT count(*), count(*) FILTER (WHERE v = "+bulkValue+") FROM bulk WHERE bulk = $1", n).Scan(&rows, &exact)
		if err != nil {
			return err
		}
		if rows != 0 && rows != bulkRows || exact != rows {
			p.add("bulk %d has %d rows, %d of them exact; want %d or none", n, rows, exact, bulkRows)
		}
		found[n] = rows != 0
	}
	// Settle the newest first: it says up to where older ones were deleted.
	deleted := 0
	for n := l.mu.bulk; n >= 1; n-- {
		s := l.mu.bulks[n]
		if s == Unknown {
			s = Aborted
			if found[n] || n <= deleted { // if it was deleted since, it makes no difference
				s = Acked
			}
			l.mu.bulks[n] = s
		}
		want := s == Acked && n > deleted
		if found[n] != want {
			p.add("bulk %d is there: %v, want %v", n, found[n], want)
		}
		if s == Acked {
			deleted = max(deleted, n-keptBulks)
		}
	}
	return nil
}
