package ledger_test

import (
	"context"
	"errors"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/holdfastdb/holdfast/test/ledger"
	"github.com/holdfastdb/holdfast/test/pgtools"
	"github.com/holdfastdb/holdfast/test/proc"
	"github.com/holdfastdb/holdfast/test/stock"
	"github.com/holdfastdb/holdfast/test/testenv"
)

// startStock runs a stock server with the settings, in a folder that goes with the test.
func startStock(t *testing.T, ctx context.Context, settings map[string]string) *stock.Server {
	t.Helper()
	dir := testenv.TempDir(t)
	s, err := stock.New(ctx, dir, "stock", settings)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Start(ctx); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Kill(); err != nil {
			t.Error(err)
		}
		if left := proc.Using(dir); len(left) > 0 {
			t.Errorf("left running: %v", left)
		}
	})
	return s
}

// What stock PostgreSQL keeps through kill -9 must satisfy the ledger: else it would
// accuse Holdfast of what is no fault.
func TestStockPostgresSurvivesKills(t *testing.T) {
	testenv.NeedPostgres(t)
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	s := startStock(t, ctx, nil)
	l, err := ledger.New(ctx, ledger.Config{Target: s.Target(), Seed: 1, Journal: filepath.Join(t.TempDir(), "journal")})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for range 2 {
		l.Start()
		bulk := make(chan error, 1)
		go func() { bulk <- errors.Join(l.Bulk(ctx), l.Bulk(ctx), l.Bulk(ctx), l.Bulk(ctx), l.Bulk(ctx)) }()
		if err := l.WaitAcked(ctx, 300); err != nil {
			t.Fatal(err)
		}
		if err := s.Kill(); err != nil {
			t.Fatal(err)
		}
		if err := s.Start(ctx); err != nil {
			t.Fatal(err)
		}
		if err := <-bulk; err != nil {
			t.Fatal(err)
		}
		report, err := l.Check(ctx)
		if err != nil {
			t.Fatal(err)
		}
		t.Log(report)
	}
	if err := s.Target().Amcheck(ctx); err != nil {
		t.Error(err)
	}
	before, after := filepath.Join(t.TempDir(), "before"), filepath.Join(t.TempDir(), "after")
	if err := s.Target().Dump(ctx, before); err != nil {
		t.Fatal(err)
	}
	if err := s.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := s.Start(ctx); err != nil {
		t.Fatal(err)
	}
	if err := s.Target().Dump(ctx, after); err != nil {
		t.Fatal(err)
	}
	diff, err := pgtools.FirstDifference(before, after)
	if err != nil || diff != "" {
		t.Errorf("%v; the dump changed over a kill: %s", err, diff)
	}
}

// With synchronous_commit=off and a WAL writer that stands still, stock PostgreSQL loses what
// it acknowledged: the ledger must see it. (A delay alone does not hold the WAL writer back:
// each whole page of WAL wakes it, XLogSetAsyncXactLSN in xlog.c.)
func TestLossIsSeen(t *testing.T) {
	testenv.NeedPostgres(t)
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	s := startStock(t, ctx, map[string]string{"synchronous_commit": "off", "wal_buffers": "64MB", "shared_buffers": "256MB"})
	l, err := ledger.New(ctx, ledger.Config{Target: s.Target(), Seed: 2})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if err := s.Target().Exec(ctx, "CHECKPOINT"); err != nil {
		t.Fatal(err)
	}
	walWriter := stopWALWriter(t, ctx, s.Target())
	l.Start()
	if err := l.WaitAcked(ctx, 200); err != nil {
		t.Fatal(err)
	}
	for _, pid := range []int{s.PID(), walWriter} { // suspended, it would not see the postmaster's end
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := s.Start(ctx); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Check(ctx); err == nil || !strings.Contains(err.Error(), "is gone") {
		t.Errorf("the check says %v, want lost transactions", err)
	}
}

// stopWALWriter suspends the server's WAL writer and returns its process id.
func stopWALWriter(t *testing.T, ctx context.Context, target pgtools.Target) int {
	t.Helper()
	conn, err := target.Connect(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(ctx)
	var pid int
	if err := conn.QueryRow(ctx, "SELECT pid FROM pg_stat_activity WHERE backend_type = 'walwriter'").Scan(&pid); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	return pid
}

func TestTamperingIsSeen(t *testing.T) {
	testenv.NeedPostgres(t)
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	s := startStock(t, ctx, nil)
	l, err := ledger.New(ctx, ledger.Config{Target: s.Target(), Seed: 3})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if err := l.Bulk(ctx); err != nil {
		t.Fatal(err)
	}
	l.Start()
	if err := l.WaitAcked(ctx, 100); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Check(ctx); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct{ do, undo, want string }{
		{"UPDATE entries SET body = body || 'x' WHERE id = (SELECT min(id) FROM entries)",
			"UPDATE entries SET body = rtrim(body, 'x') WHERE id = (SELECT min(id) FROM entries)", "another content"},
		{"UPDATE accounts SET balance = balance + 1 WHERE id = 7", "UPDATE accounts SET balance = balance - 1 WHERE id = 7", "account 7 has"},
		{"UPDATE marks SET seq = seq - 1 WHERE worker = 0", "UPDATE marks SET seq = seq + 1 WHERE worker = 0", "mark is at"},
		{"INSERT INTO entries (txn, part, parts, body) VALUES ('stranger', 0, 1, 'b')", "DELETE FROM entries WHERE txn = 'stranger'", "never written"},
		{"UPDATE entries SET part = 900 WHERE id = (SELECT min(id) FROM entries WHERE part = 0)", "UPDATE entries SET part = 0 WHERE part = 900", "another content"},
		{"DELETE FROM bulk WHERE i = 17", "", "bulk 1 has 7999 rows"},
		{"UPDATE docs SET body = 'short'", "", "long values"},
	} {
		if err := s.Target().Exec(ctx, tc.do); err != nil {
			t.Fatal(err)
		}
		if _, err := l.Check(ctx); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("after %s the check says %v, want %q", tc.do, err, tc.want)
		}
		if tc.undo != "" {
			if err := s.Target().Exec(ctx, tc.undo); err != nil {
				t.Fatal(err)
			}
		}
	}
}
