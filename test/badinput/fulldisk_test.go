package badinput

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/holdfastdb/holdfast/test/cluster"
	"github.com/holdfastdb/holdfast/test/ledger"
	"github.com/holdfastdb/holdfast/test/testenv"
)

// disk is a small file system that can be filled and freed.
type disk struct{ dir string }

const diskSize = 384 << 20

// mountDisk mounts a small file system for one role.
func mountDisk(t *testing.T, dir string) disk {
	t.Helper()
	if err := os.MkdirAll(dir, 0o711); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mount("holdfast-test", dir, "tmpfs", 0, fmt.Sprintf("size=%d,mode=711", diskSize)); err != nil {
		t.Fatalf("mounting a small disk at %s: %v", dir, err)
	}
	return disk{dir: dir}
}

func (d disk) ballast() string { return filepath.Join(d.dir, "ballast") }

// fill leaves no room.
func (d disk) fill(t *testing.T) {
	t.Helper()
	f, err := os.Create(d.ballast())
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	buf := make([]byte, 1<<20)
	for size := len(buf); size >= 4096; {
		if _, err := f.Write(buf[:size]); err != nil {
			size /= 2
		}
	}
}

func (d disk) free(t *testing.T) {
	t.Helper()
	if err := os.Remove(d.ballast()); err != nil {
		t.Error(err)
	}
}

// fullCluster is a cluster with a disk of its own for each role.
type fullCluster struct {
	*cluster.Cluster
	l     *ledger.Ledger
	disks map[string]disk
}

func startOnSmallDisks(t *testing.T, ctx context.Context) *fullCluster {
	t.Helper()
	c := &fullCluster{Cluster: cluster.ForTest(t, cluster.Options{Dir: testenv.TempDir(t), Separate: true,
		Settings: map[string]string{"shared_buffers": "16MB"}}), disks: make(map[string]disk)}
	for _, role := range []string{cluster.Safekeeper(1), cluster.Safekeeper(2), cluster.Safekeeper(3), cluster.Pageserver, "bucket", "compute", cluster.Keymgr} {
		c.disks[role] = mountDisk(t, c.Dir(role))
	}
	if err := c.Start(ctx); err != nil {
		t.Fatal(err)
	}
	l, err := ledger.New(ctx, ledger.Config{Target: c.Target(), Seed: 7})
	if err != nil {
		t.Fatal(err)
	}
	c.l = l
	t.Cleanup(func() { l.Close() })
	return c
}

// progress lets the ledger write n transactions, and a table of some megabytes go by.
func (c *fullCluster) progress(ctx context.Context, n int64) error {
	c.l.Start()
	defer c.l.Pause()
	return c.l.WaitAcked(ctx, n)
}

// churn writes and drops so many MiB.
func (c *fullCluster) churn(ctx context.Context, mib int) error {
	return c.Target().Exec(ctx, "DROP TABLE IF EXISTS churn",
		fmt.Sprintf("CREATE TABLE churn AS SELECT repeat(md5(i::text), 32) AS v FROM generate_series(1, %d) i", mib*1000), "DROP TABLE churn")
}

func TestFullDisks(t *testing.T) {
	needCluster(t)
	testenv.NeedRoot(t)
	ctx, cancel := context.WithTimeout(t.Context(), 12*time.Minute)
	defer cancel()
	c := startOnSmallDisks(t, ctx)
	if err := c.progress(ctx, 50); err != nil {
		t.Fatal(err)
	}
	step := func(name string, do func(t *testing.T)) {
		t.Run(name, func(t *testing.T) {
			do(t)
			if err := c.progress(ctx, 50); err != nil {
				t.Fatalf("after the disk was freed: %v", err)
			}
			if _, err := c.l.Check(ctx); err != nil {
				t.Fatalf("after the disk was freed: %v", err)
			}
		})
	}
	step("of one safekeeper", func(t *testing.T) {
		d := c.disks[cluster.Safekeeper(2)]
		d.fill(t)
		if err := c.churn(ctx, 30); err != nil {
			t.Errorf("commits did not go on with two safekeepers: %v", err)
		}
		if err := c.progress(ctx, 100); err != nil {
			t.Errorf("commits did not go on with two safekeepers: %v", err)
		}
		c.mustSay(t, cluster.Safekeeper(2))
		d.free(t)
		c.revive(t, ctx)
		// It counts again: with another one down it makes the quorum.
		if err := c.Kill(cluster.Safekeeper(3)); err != nil {
			t.Fatal(err)
		}
		if err := c.progress(ctx, 20); err != nil {
			t.Errorf("the freed safekeeper makes no quorum: %v", err)
		}
		if err := c.StartRole(cluster.Safekeeper(3)); err != nil {
			t.Fatal(err)
		}
	})
	step("of every safekeeper", func(t *testing.T) {
		for id := 1; id <= 3; id++ {
			c.disks[cluster.Safekeeper(id)].fill(t)
		}
		short, cancel := context.WithTimeout(ctx, 20*time.Second)
		defer cancel()
		_ = c.churn(short, 30) // stands still: nothing may be acknowledged that no disk has
		for id := 1; id <= 3; id++ {
			c.disks[cluster.Safekeeper(id)].free(t)
		}
		c.revive(t, ctx)
	})
	step("of the bucket", func(t *testing.T) {
		c.disks["bucket"].fill(t)
		if err := c.churn(ctx, 40); err != nil {
			t.Errorf("commits did not go on without the bucket: %v", err)
		}
		if err := c.progress(ctx, 50); err != nil {
			t.Errorf("commits did not go on without the bucket: %v", err)
		}
		c.disks["bucket"].free(t)
		c.revive(t, ctx)
	})
	step("of the pageserver", func(t *testing.T) {
		c.disks[cluster.Pageserver].fill(t)
		if err := c.churn(ctx, 40); err != nil {
			t.Errorf("commits did not go on: %v", err)
		}
		if _, err := c.CLI(ctx, "endpoint", "kill"); err != nil {
			t.Fatal(err)
		}
		if _, err := c.CLI(ctx, "endpoint", "start"); err != nil {
			t.Errorf("an endpoint cannot start without the pageserver's local copies: %v", err)
		}
		if _, err := c.l.Check(ctx); err != nil {
			t.Errorf("with a full disk: %v", err)
		}
		c.disks[cluster.Pageserver].free(t)
		c.revive(t, ctx)
	})
	step("of the compute", func(t *testing.T) {
		c.disks["compute"].fill(t)
		short, cancel := context.WithTimeout(ctx, 30*time.Second)
		defer cancel()
		_ = c.churn(short, 60) // may be refused: the local store cannot grow
		c.disks["compute"].free(t)
		c.revive(t, ctx)
	})
	step("of the key manager's audit log", func(t *testing.T) {
		c.disks[cluster.Keymgr].fill(t)
		short, cancel := context.WithTimeout(ctx, 30*time.Second)
		defer cancel()
		_ = c.churn(short, 40) // new keys cannot be audited, so none is given out
		c.disks[cluster.Keymgr].free(t)
		c.revive(t, ctx)
	})
}

// mustSay wants a role's log to say that the disk is full.
func (c *fullCluster) mustSay(t *testing.T, role string) {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(c.LogDir(), role+".log"))
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(data), "no space left on device") {
		t.Errorf("%s's log does not say that its disk is full:\n%s", role, tail(string(data)))
	}
}

// revive does what an operator's supervisor does: a role that ended is started again.
func (c *fullCluster) revive(t *testing.T, ctx context.Context) {
	t.Helper()
	for _, role := range cluster.Roles() {
		if c.Exited(role) {
			t.Logf("SHOW: %s had ended and is started again", role)
			if err := c.Kill(role); err != nil {
				t.Fatal(err)
			}
			if err := c.StartRole(role); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := c.WaitReady(ctx); err != nil {
		t.Fatal(err)
	}
}

// A full bucket must not let the safekeepers forget what is in no layer yet, and must show
// in the status.
func TestLayersGoOnWhenTheBucketHasRoomAgain(t *testing.T) {
	needCluster(t)
	testenv.NeedRoot(t)
	ctx, cancel := context.WithTimeout(t.Context(), 6*time.Minute)
	defer cancel()
	c := startOnSmallDisks(t, ctx)
	c.disks["bucket"].fill(t)
	for range 3 {
		if err := c.churn(ctx, 40); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.progress(ctx, 50); err != nil {
		t.Fatal(err)
	}
	c.disks["bucket"].free(t)
	target, err := c.ingested(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for {
		st, err := c.Status(ctx)
		if err != nil {
			t.Fatal(err)
		}
		var durable uint64
		for _, b := range st.Pageserver.Branches {
			durable = uint64(b.DurableLSN) // 0 until attached
		}
		if durable >= target {
			break
		}
		// More WAL makes more layers.
		if err := c.churn(ctx, 20); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := c.l.Check(ctx); err != nil {
		t.Error(err)
	}
}

func (c *fullCluster) ingested(ctx context.Context) (uint64, error) {
	st, err := c.Status(ctx)
	if err != nil {
		return 0, err
	}
	if len(st.Pageserver.Branches) == 0 {
		return 0, fmt.Errorf("the pageserver serves no branch: %v", st.Errors)
	}
	return uint64(st.Pageserver.Branches[0].IngestedLSN), nil
}
