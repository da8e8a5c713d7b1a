package shredding

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/protojson"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/proctree"
	"github.com/holdfastdb/holdfast/internal/shredreport"
	"github.com/holdfastdb/holdfast/test/cluster"
	"github.com/holdfastdb/holdfast/test/testenv"
)

func startCluster(t *testing.T) *cluster.Cluster {
	t.Helper()
	testenv.NeedPostgres(t)
	testenv.NeedFUSE(t)
	if testing.Short() {
		t.Skip("runs a cluster")
	}
	c := cluster.ForTest(t, cluster.Options{Dir: testenv.TempDir(t), Separate: true})
	if err := c.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := c.Target().Exec(t.Context(), "CREATE TABLE t AS SELECT g, md5(g::text) FROM generate_series(1, 20000) g"); err != nil {
		t.Fatal(err)
	}
	return c
}

// load reads and writes until the context ends; what becomes of each query is not its concern.
func load(ctx context.Context, c *cluster.Cluster) {
	for ctx.Err() == nil {
		_ = c.Target().Exec(ctx, "UPDATE t SET md5 = md5(md5) WHERE g % 50 = 0; SELECT count(*) FROM t")
	}
}

func agentPID(t *testing.T, c *cluster.Cluster) int {
	t.Helper()
	s, err := c.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(s.Endpoints[0].PID)
	if err != nil || pid == 0 {
		t.Fatalf("the endpoint's process is %q", s.Endpoints[0].PID)
	}
	return pid
}

func gone(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ESRCH) || strings.Contains(string(stat), ") Z ")
}

func awaitGone(t *testing.T, what string, pids ...int) {
	t.Helper()
	limit := time.After(2 * (bound + slack))
	for slices.ContainsFunc(pids, func(pid int) bool { return !gone(pid) }) {
		select {
		case <-limit:
			t.Fatalf("%s lives: %v", what, pids)
		case <-time.After(10 * time.Millisecond):
		}
	}
}

func cli(t *testing.T, c *cluster.Cluster, args ...string) string {
	t.Helper()
	out, err := c.CLI(t.Context(), args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// bound is what is published, from the KMS's first denial on (docs/keys.md), and slack is for a machine
// that others use, too.
const (
	bound = 15 * time.Second
	slack = 15 * time.Second
)

func withinBound(t *testing.T, what string, since time.Time) {
	t.Helper()
	took := time.Since(since)
	t.Logf("SHOW: key disabled to %s: %v (published: %v)", what, took.Round(time.Millisecond), bound)
	if took > bound+slack {
		t.Errorf("%s %v after the key was disabled, published are %v", what, took, bound)
	}
}

// An agent that is stopped kills nothing. Its guard does: Postgres, which would go on answering, and
// the agent. The page server is stopped at the same time, and holds pages in its memory.
func TestStoppedProcessesAreKilled(t *testing.T) {
	c := startCluster(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	go load(ctx, c)
	agent, pageserver := agentPID(t, c), c.PID(cluster.Pageserver)
	guards := proctree.Below(pageserver)
	postgres := proctree.Below(agent) // with the guard
	if len(postgres) < 4 || len(guards) != 1 {
		t.Fatalf("below the agent are %d processes, below the page server %d: want Postgres and a guard, and a guard", len(postgres), len(guards))
	}
	cli(t, c, "kms", "disable", "dev")
	since := time.Now()
	for _, pid := range []int{agent, pageserver} {
		if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
			t.Fatal(err)
		}
	}
	awaitGone(t, "Postgres", postgres...)
	withinBound(t, "a stopped agent's Postgres killed", since)
	awaitGone(t, "the agent", agent)
	awaitGone(t, "the page server", append(guards, pageserver)...)
	withinBound(t, "a stopped page server killed", since)
	if err := c.Kill(cluster.Pageserver); err != nil { // it has ended: this takes note
		t.Fatal(err)
	}
	cli(t, c, "kms", "enable", "dev")
	enabled := time.Now()
	if err := c.StartRole(cluster.Pageserver); err != nil {
		t.Fatal(err)
	}
	if err := c.WaitReady(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Logf("SHOW: key enabled, and the page server started, to the first answer: %v", time.Since(enabled).Round(time.Millisecond))
	if err := c.Target().Exec(t.Context(), "SELECT 1 / (count(*) = 20000)::int FROM t"); err != nil {
		t.Errorf("rows are missing: %v", err)
	}
}

// Each role that held the key reports, signed by itself, what it dropped.
func TestEachRoleReports(t *testing.T) {
	c := startCluster(t)
	const rounds = 3
	for range rounds {
		if err := c.Target().Exec(t.Context(), "UPDATE t SET md5 = md5(md5) WHERE g % 50 = 0; SELECT count(*) FROM t"); err != nil {
			t.Fatal(err)
		}
		cli(t, c, "key", "revoke", "--reason", "a test")
		r := lastReceipt(t, c)
		checkReceipt(t, r)
		resumed := time.Now()
		told := make(chan error, 1)
		go func() { // it returns when all who held the key do again, which is later than the first answer
			_, err := c.CLI(t.Context(), "key", "resume")
			told <- err
		}()
		if err := c.WaitReady(t.Context()); err != nil {
			t.Fatal(err)
		}
		t.Logf("SHOW: resumed to the first answer: %v", time.Since(resumed).Round(time.Millisecond))
		if err := <-told; err != nil {
			t.Fatal(err)
		}
	}
}

func lastReceipt(t *testing.T, c *cluster.Cluster) *pb.Receipt {
	t.Helper()
	list := &pb.ListReceiptsResponse{}
	if err := protojson.Unmarshal([]byte(cli(t, c, "key", "receipts", "--json")), list); err != nil || len(list.Receipts) == 0 {
		t.Fatalf("%d receipts: %v", len(list.Receipts), err)
	}
	return slices.MaxFunc(list.Receipts, func(a, b *pb.Receipt) int { return int(a.RevokedUnixUs - b.RevokedUnixUs) })
}

func checkReceipt(t *testing.T, r *pb.Receipt) {
	t.Helper()
	var nodes []string
	for _, e := range r.Entries {
		if e.Report == nil {
			t.Errorf("%s has not reported", e.Node)
			continue
		}
		if err := shredreport.VerifyBy(e.Report, e.PublicKey); err != nil {
			t.Error(err)
		}
		nodes = append(nodes, e.Node)
		after := func(us int64) time.Duration { return time.Duration(us-r.RevokedUnixUs) * time.Microsecond }
		t.Logf("SHOW: %-14s %d keys wiped after %v, all shredded after %v: %s", e.Node, e.Report.Keys,
			after(e.Report.KeysWipedUnixUs), after(e.Report.ShreddedUnixUs), strings.Join(e.Report.Dropped, "; "))
	}
	isRole := func(prefix string) bool {
		return slices.ContainsFunc(nodes, func(n string) bool { return strings.HasPrefix(n, prefix) })
	}
	if !r.Complete || !isRole("compute/") || !isRole("pageserver") || !isRole("safekeeper") {
		t.Errorf("reports came from %v, complete: %v; want a compute's, the page server's and a safekeeper's", nodes, r.Complete)
	}
}
