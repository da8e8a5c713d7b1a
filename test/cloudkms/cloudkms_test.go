// Package cloudkms runs whole clusters whose key manager asks a simulated cloud over its wire
// protocol, through the cloud's own client.
package cloudkms

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/holdfastdb/holdfast/internal/config"
	"github.com/holdfastdb/holdfast/test/cluster"
	"github.com/holdfastdb/holdfast/test/kmsim"
	"github.com/holdfastdb/holdfast/test/kmsim/kmsimtest"
	"github.com/holdfastdb/holdfast/test/testenv"
)

// count asks for the rows of a table.
func count(ctx context.Context, c *cluster.Cluster, table string) (n int, err error) {
	conn, err := c.Target().WaitConnect(ctx)
	if err != nil {
		return 0, err
	}
	defer conn.Close(ctx)
	err = conn.QueryRow(ctx, "SELECT count(*) FROM "+table).Scan(&n)
	return n, err
}

// TestKeyInAWS: disabled in AWS KMS, the key takes everything away, from a cluster that is
// started anew as well; enabled, it brings all of it back.
func TestKeyInAWS(t *testing.T) {
	testenv.NeedPostgres(t)
	testenv.NeedFUSE(t)
	if testing.Short() {
		t.Skip("runs a cluster")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 8*time.Minute)
	defer cancel()
	for name, value := range map[string]string{"AWS_ACCESS_KEY_ID": "AKIAHOLDFAST", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_EC2_METADATA_DISABLED": "true"} {
		t.Setenv(name, value)
	}
	sim, ca := kmsimtest.Start(t)
	arn := kmsimtest.Key(t, sim, kmsim.AWS)
	c := cluster.ForTest(t, cluster.Options{Dir: testenv.TempDir(t), Separate: true, CMK: "aws-kms:" + arn,
		KMS: config.KMS{AWS: &config.AWSKMS{Endpoint: sim.URL(), CAFile: ca}}})
	if err := c.Start(ctx); err != nil {
		t.Fatal(err)
	}
	if err := c.Target().Exec(ctx, "CREATE TABLE held AS SELECT generate_series(1, 1000) AS i"); err != nil {
		t.Fatal(err)
	}

	if err := sim.SetState(arn, kmsim.Disabled); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	for c.Target().Exec(ctx, "SELECT 1") == nil {
		select {
		case <-ctx.Done():
			t.Fatal("PostgreSQL still answers under a disabled key")
		case <-time.After(100 * time.Millisecond):
		}
	}
	t.Logf("SHOW: shut %.1fs after AWS disabled the key", time.Since(began).Seconds())
	wantRevoked(t, ctx, c)

	// Nothing that a new process can read opens: not the bucket, not the safekeepers' disks.
	if err := c.KillAll(); err != nil {
		t.Fatal(err)
	}
	if err := c.Launch(); err != nil {
		t.Fatal(err)
	}
	before := len(sim.Log())
	waitFor(t, ctx, "denials of the new key manager", func() bool {
		denied := 0
		for _, e := range sim.Log()[before:] {
			if e.Outcome == "DisabledException" {
				denied++
			}
		}
		return denied >= 3
	})
	if err := c.Target().Exec(ctx, "SELECT 1"); err == nil {
		t.Error("a cluster that was started under a disabled key answers SQL")
	}

	if err := sim.SetState(arn, kmsim.Enabled); err != nil {
		t.Fatal(err)
	}
	// A manager that starts under a denied key says so and ends; who supervises it starts it again.
	waitFor(t, ctx, "SQL under the enabled key", func() bool {
		if c.Exited(cluster.Manager) {
			if err := errors.Join(c.Kill(cluster.Manager), c.StartRole(cluster.Manager)); err != nil {
				t.Fatal(err)
			}
		}
		return c.Target().Exec(ctx, "SELECT 1") == nil
	})
	if n, err := count(ctx, c, "held"); err != nil || n != 1000 {
		t.Errorf("the table holds %d rows, %v; want 1000", n, err)
	}
	for _, e := range sim.Log() {
		if e.Principal != "AKIAHOLDFAST" || e.RequestID == "" || e.Key != arn {
			t.Errorf("the KMS's log has %+v", e)
		}
	}
}

func waitFor(t *testing.T, ctx context.Context, what string, ok func() bool) {
	t.Helper()
	for !ok() {
		select {
		case <-ctx.Done():
			t.Fatalf("waiting for %s: %v", what, ctx.Err())
		case <-time.After(100 * time.Millisecond):
		}
	}
}

func wantRevoked(t *testing.T, ctx context.Context, c *cluster.Cluster) {
	t.Helper()
	if out, err := c.CLI(ctx, "status"); err != nil || !strings.Contains(out, "revoked") {
		t.Errorf("status under a disabled key: %q, %v; want revoked", out, err)
	}
}
