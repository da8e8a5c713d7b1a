// Package fencing runs two computes on one branch: only the newer may append (W2).
package fencing

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/holdfastdb/holdfast/internal/config"
	"github.com/holdfastdb/holdfast/test/cluster"
	"github.com/holdfastdb/holdfast/test/ledger"
	"github.com/holdfastdb/holdfast/test/pgtools"
	"github.com/holdfastdb/holdfast/test/proc"
	"github.com/holdfastdb/holdfast/test/testenv"
)

// startSecond starts another compute on the branch of the cluster's endpoint.
func startSecond(t *testing.T, c *cluster.Cluster, dir string) (pgtools.Target, *exec.Cmd) {
	t.Helper()
	var cfg config.Compute
	if err := config.Load(filepath.Join(c.Dir(cluster.Manager), "endpoint-main.yaml"), &cfg); err != nil {
		t.Fatal(err)
	}
	port, err := pgtools.FreePort()
	if err != nil {
		t.Fatal(err)
	}
	cfg.Name, cfg.Dir, cfg.Listen = "second", filepath.Join(c.Dir("compute"), "second"), fmt.Sprintf("127.0.0.1:%d", port)
	file := filepath.Join(dir, "second.yaml")
	if err := config.Save(file, &cfg); err != nil {
		t.Fatal(err)
	}
	bin, err := cluster.Binary()
	if err != nil {
		t.Fatal(err)
	}
	log, err := os.Create(filepath.Join(c.LogDir(), "second.log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	cmd := exec.Command(bin, "compute", "--config", file)
	cmd.Stdout, cmd.Stderr = log, log
	if err := proc.Start(cmd); err != nil {
		t.Fatal(err)
	}
	target := c.Target()
	target.Port = port
	return target, cmd
}

func waitRefused(ctx context.Context, target pgtools.Target) error {
	for {
		conn, err := target.Connect(ctx)
		if err != nil {
			return nil
		}
		_ = conn.Close(ctx)
		select {
		case <-ctx.Done():
			return errors.New("the fenced Postgres still takes connections")
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func TestTheOlderComputeCannotCommit(t *testing.T) {
	testenv.NeedPostgres(t)
	testenv.NeedFUSE(t)
	if testing.Short() {
		t.Skip("runs a cluster")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	dir := testenv.TempDir(t)
	c := cluster.ForTest(t, cluster.Options{Dir: dir, Separate: true})
	if err := c.Start(ctx); err != nil {
		t.Fatal(err)
	}
	l, err := ledger.New(ctx, ledger.Config{Target: c.Target(), Seed: 5})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	older, err := c.Target().Connect(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []string{"CREATE TABLE f (v text)", "BEGIN", "INSERT INTO f VALUES ('written before the fence, committed after')"} {
		if _, err := older.Exec(ctx, s); err != nil {
			t.Fatal(err)
		}
	}
	l.Start()
	if err := l.WaitAcked(ctx, 100); err != nil {
		t.Fatal(err)
	}

	target, second := startSecond(t, c, dir)
	ended := make(chan error, 1)
	go func() { ended <- second.Wait() }()
	newer, err := target.WaitConnect(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := older.Exec(ctx, "COMMIT"); err == nil {
		t.Error("the older compute reported a commit after a newer one had opened the branch")
	}
	if err := waitRefused(ctx, c.Target()); err != nil {
		t.Error(err)
	}
	var n int
	if err := newer.QueryRow(ctx, "SELECT count(*) FROM f").Scan(&n); err != nil || n != 0 {
		t.Errorf("the newer compute sees %d rows of the transaction that was cut off, %v", n, err)
	}
	_ = newer.Close(ctx)
	l.Pause()
	l.Retarget(target)
	report, err := l.Check(ctx)
	if err != nil {
		t.Fatalf("on the newer compute: %v", err)
	}
	t.Logf("SHOW: %v", report)
	for {
		st, err := c.Status(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if len(st.Endpoints) == 1 && st.Endpoints[0].State == "failed" && strings.Contains(st.Endpoints[0].Error, "fenced") {
			break
		}
		select {
		case <-ctx.Done():
			t.Fatalf("the fenced endpoint is shown as %+v", st.Endpoints)
		case <-time.After(100 * time.Millisecond):
		}
	}

	// And back: the user starts the endpoint, which fences the other.
	l.Start()
	if err := l.WaitAcked(ctx, 50); err != nil {
		t.Fatal(err)
	}
	if _, err := c.CLI(ctx, "endpoint", "start"); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-ended:
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.ExitCode() != 3 {
			t.Errorf("the fenced compute ended with %v, want exit status 3", err)
		}
	case <-ctx.Done():
		t.Error("the fenced compute did not end")
	}
	l.Pause()
	l.Retarget(c.Target())
	if _, err := l.Check(ctx); err != nil {
		t.Errorf("back on the first endpoint: %v", err)
	}
}
