package compute

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/holdfastdb/holdfast/compute/pgfs"
	"github.com/holdfastdb/holdfast/internal/pg"
)

// The comparison of pages (Config.VerifyPages): what it needs to know of Postgres, and when.

// cycles names what can have a btree's vacuum cycle: vacuums, and CREATE INDEX CONCURRENTLY.
const cycles = `SELECT pid::pg_catalog.text || ' ' || xact_start::pg_catalog.text FROM pg_catalog.pg_stat_activity
WHERE xact_start IS NOT NULL AND pid OPERATOR(pg_catalog.=) ANY (ARRAY(
	SELECT pid FROM pg_catalog.pg_stat_progress_vacuum UNION ALL SELECT pid FROM pg_catalog.pg_stat_progress_create_index))`

// transactions asks first which is the last one that has ended, then which run. Prepared ones
// do not run: they give no commands any more.
const transactions = `SELECT pg_catalog.pg_snapshot_xmax(pg_catalog.pg_current_snapshot());
SELECT backend_xid FROM pg_catalog.pg_stat_activity WHERE backend_xid IS NOT NULL`

func vacuumsNow(ctx context.Context, conn *pgconn.PgConn) (names []string, err error) {
	results, err := conn.Exec(ctx, cycles).ReadAll()
	if err != nil {
		return nil, fmt.Errorf("asking which vacuums run: %w", err)
	}
	for _, r := range results {
		for _, row := range r.Rows {
			names = append(names, string(row[0]))
		}
	}
	return names, nil
}

// tellSeen tells the mount what is known besides what Advance is told, and was asked before.
func tellSeen(ctx context.Context, conn *pgconn.PgConn, fs *pgfs.FS, before []string) error {
	after, err := vacuumsNow(ctx, conn)
	if err != nil {
		return err
	}
	results, err := conn.Exec(ctx, transactions).ReadAll()
	if err != nil {
		return fmt.Errorf("asking which transactions run: %w", err)
	}
	var oldest pg.TransactionID
	for _, r := range results {
		for _, row := range r.Rows {
			full, err := strconv.ParseUint(string(row[0]), 10, 64)
			if err != nil {
				return fmt.Errorf("asking which transactions run: %w", err)
			}
			if xid := pg.TransactionID(full); oldest == 0 || int32(xid-oldest) < 0 {
				oldest = xid
			}
		}
	}
	fs.Saw(pgfs.Seen{Oldest: oldest, VacuumsBefore: before, VacuumsAfter: after})
	return nil
}

// verifyAll compares what is left of what Postgres wrote, after it has ended in order.
func (a *agent) verifyAll(ctx context.Context) {
	if !a.cfg.VerifyPages {
		return
	}
	err := a.postgres.inOrder(a.fs)
	if err == nil {
		err = a.compareAll(ctx)
	}
	if err != nil {
		a.log.Error("what is left could not be compared with the page server", "error", err)
		return
	}
	a.verified = true
}

func (a *agent) compareAll(ctx context.Context) error {
	if err := a.writer.Sync(ctx); err != nil {
		return fmt.Errorf("committing the end of the WAL: %w", err)
	}
	end := a.writer.Committed()
	state, err := a.pages.StartupState(ctx, end) // which waits until the page server is there
	if err != nil {
		return err
	}
	files := make(map[string][]byte, len(state.Files)+1)
	for _, f := range state.Files {
		files[f.Path] = f.Data
	}
	files[controlFile] = state.ControlFile
	return errors.Join(a.fs.VerifyAll(ctx, end, files), ctx.Err())
}

// tellVerified says at the end what was compared.
func (a *agent) tellVerified() {
	if a.fs == nil {
		return
	}
	counts, on := a.fs.Verified()
	if !on {
		return
	}
	var skipped []string
	for why, n := range counts.Skipped {
		skipped = append(skipped, fmt.Sprintf("%s: %d", why, n))
	}
	slices.Sort(skipped)
	a.log.Info("pages were compared with the page server's", "whole", a.verified, "compared", counts.Compared, "mismatched", counts.Mismatched,
		"withdrawn", counts.Withdrawn, "left", a.fs.Stats().EvictedPages, "skipped", strings.Join(skipped, ", "))
}
