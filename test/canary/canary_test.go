package canary

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/test/cluster"
	"github.com/holdfastdb/holdfast/test/proc"
	"github.com/holdfastdb/holdfast/test/testenv"
)

// scanAll searches what rests of a cluster: its folder, files without a name that its
// processes hold open, and swap. The search must find nothing (invariant K1).
func scanAll(t *testing.T, when string, c *cluster.Cluster, dir string, canaries map[string]string) {
	t.Helper()
	s := NewScanner(canaries)
	if err := s.ScanTree(c.Data); err != nil {
		t.Fatal(err)
	}
	running := proc.Using(dir)
	for _, p := range running {
		outside, err := s.ScanOpenFiles(p.PID, c.Data)
		if err != nil {
			if !os.IsNotExist(err) && !strings.Contains(err.Error(), "no such") {
				t.Errorf("%s: %v", when, err)
			}
			continue // it has ended
		}
		for _, path := range outside {
			t.Errorf("%s: process %v writes to %s, outside the data directory", when, p, path)
		}
		if limits, err := os.ReadFile(fmt.Sprintf("/proc/%d/limits", p.PID)); err == nil && strings.Contains(p.Command, "postgres") {
			for line := range strings.Lines(string(limits)) {
				if f := strings.Fields(line); strings.HasPrefix(line, "Max core file size") && (len(f) < 6 || f[4] > "1" || f[5] > "1") {
					t.Errorf("%s: process %v may dump core: %s", when, p, strings.TrimSpace(line))
				}
			}
		}
	}
	for _, unread := range s.ScanSwap() {
		t.Errorf("%s: swap cannot be searched: %s", when, unread)
	}
	shown := make(map[string]int)
	for _, h := range s.Hits {
		if shown[h.Kind]++; shown[h.Kind] <= 3 {
			t.Errorf("%s: found %v", when, h)
		}
	}
	t.Logf("SHOW: %s: %d canaries, %d files, %d MiB, %d processes searched, %d hits", when, len(canaries), s.Files, s.Bytes>>20, len(running), len(s.Hits))
}

func TestNothingRestsInPlaintext(t *testing.T) {
	testenv.NeedPostgres(t)
	testenv.NeedFUSE(t)
	if testing.Short() {
		t.Skip("runs a cluster")
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()
	dir := testenv.TempDir(t)
	settings := Settings()
	delete(settings, "logging_collector") // where the server's log goes is for Holdfast to say
	c := cluster.ForTest(t, cluster.Options{Dir: dir, Separate: true, Settings: settings})
	if err := c.Start(ctx); err != nil {
		t.Fatal(err)
	}
	w, err := Run(ctx, c.Target())
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	w.Canaries["superuser password"] = cluster.Password
	fillLayers(t, ctx, c)
	scanAll(t, "running", c, dir, w.Canaries)

	if err := c.KillAll(); err != nil {
		t.Fatal(err)
	}
	scanAll(t, "killed", c, dir, w.Canaries)

	if err := c.Start(ctx); err != nil {
		t.Fatal(err)
	}
	conn, err := c.Target().WaitConnect(ctx)
	if err != nil {
		t.Fatal(err)
	}
	var v string
	if err := conn.QueryRow(ctx, "SELECT v FROM t").Scan(&v); err != nil || v != w.Canaries["table"] {
		t.Errorf("after the restart the table holds %q, %v", v, err)
	}
	if _, err := conn.Exec(ctx, "COMMIT PREPARED '"+w.Canaries["name of a prepared transaction"]+"'"); err != nil {
		t.Errorf("the prepared transaction did not survive: %v", err)
	}
	_ = conn.Close(ctx)
	if _, err := c.CLI(ctx, "endpoint", "kill"); err != nil {
		t.Fatal(err)
	}
	scanAll(t, "endpoint killed", c, dir, w.Canaries)
	if left, _ := filepath.Glob(filepath.Join(c.Dir("compute"), "*")); len(left) > 0 {
		t.Errorf("the killed endpoint left %v", left)
	}
	if err := c.Stop(); err != nil {
		t.Fatal(err)
	}
	scanAll(t, "stopped", c, dir, w.Canaries)
}

// fillLayers writes until the workload's WAL has gone into layers in the bucket.
func fillLayers(t *testing.T, ctx context.Context, c *cluster.Cluster) {
	t.Helper()
	conn, err := c.Target().Connect(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(ctx)
	var end string
	if err := conn.QueryRow(ctx, "SELECT pg_current_wal_insert_lsn()::text").Scan(&end); err != nil {
		t.Fatal(err)
	}
	want, err := pg.ParseLSN(end)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Exec(ctx, "SET log_statement = 'none'; CREATE TABLE filler (v text)"); err != nil {
		t.Fatal(err)
	}
	for range 60 {
		s, err := c.Status(ctx)
		if err != nil {
			t.Fatal(err)
		}
		for _, b := range s.Pageserver.Branches {
			if b.DurableLSN >= want {
				t.Logf("SHOW: the workload is in layers: %s of them, %s bytes", b.Layers, b.LayerBytes)
				return
			}
		}
		if _, err := conn.Exec(ctx, "INSERT INTO filler SELECT repeat(md5(i::text), 30) FROM generate_series(1, 20000) i"); err != nil {
			t.Fatal(err)
		}
	}
	t.Error("the workload's WAL did not get into layers")
}
