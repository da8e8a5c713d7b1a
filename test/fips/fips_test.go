// Package fips runs a whole cluster in Go's FIPS 140-3 mode.
package fips

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/holdfastdb/holdfast/test/cluster"
	"github.com/holdfastdb/holdfast/test/testenv"
)

// TestClusterInFIPSMode: every role says that it is in the mode, and data survives all of them.
func TestClusterInFIPSMode(t *testing.T) {
	testenv.NeedPostgres(t)
	testenv.NeedFUSE(t)
	if testing.Short() {
		t.Skip("runs a cluster")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 8*time.Minute)
	defer cancel()
	t.Setenv("GODEBUG", "fips140=on") // the cluster's processes inherit it
	c := cluster.ForTest(t, cluster.Options{Dir: testenv.TempDir(t), Separate: true})
	if err := c.Start(ctx); err != nil {
		t.Fatal(err)
	}
	if err := c.Target().Exec(ctx, "CREATE TABLE held AS SELECT generate_series(1, 10000) AS i; CHECKPOINT"); err != nil {
		t.Fatal(err)
	}
	logs, err := filepath.Glob(filepath.Join(c.LogDir(), "*"))
	if err != nil || len(logs) < 7 {
		t.Fatalf("logs %v, %v: want one of each role and of the endpoint", logs, err)
	}
	for _, log := range logs {
		if text, err := os.ReadFile(log); err != nil || !strings.Contains(string(text), "fips140=on") {
			t.Errorf("%s does not say that the role is in FIPS mode: %.2000s %v", log, text, err)
		}
	}
	if err := c.KillAll(); err != nil {
		t.Fatal(err)
	}
	if err := c.Start(ctx); err != nil {
		t.Fatal(err)
	}
	conn, err := c.Target().WaitConnect(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(ctx)
	var n int
	if err := conn.QueryRow(ctx, "SELECT count(*) FROM held").Scan(&n); err != nil || n != 10000 {
		t.Errorf("after the restart the table holds %d rows, %v; want 10000", n, err)
	}
}
