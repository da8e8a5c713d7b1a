package revocation

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/rpc"
	"github.com/holdfastdb/holdfast/test/cluster"
	"github.com/holdfastdb/holdfast/test/ledger"
	"github.com/holdfastdb/holdfast/test/proc"
	"github.com/holdfastdb/holdfast/test/testenv"
)

// bound is what is published: from the moment at which the KMS stops saying yes, nothing answers and no
// key is held (K2), also on a node that is cut off.
const bound = 15 * time.Second

// slack is for the machine: a test must not fail because others use it. What was measured is printed.
const slack = 15 * time.Second

// settings make much happen in little time.
var settings = map[string]string{"shared_buffers": "16MB", "max_wal_size": "64MB", "checkpoint_timeout": "30s", "autovacuum_naptime": "1s"}

// world is a cluster, a ledger that writes in it, and the customer who holds its key.
type world struct {
	t    *testing.T
	c    *cluster.Cluster
	l    *ledger.Ledger
	rng  *rand.Rand
	dir  string
	cust *customer

	project, branch string
	links           map[string]*link // by role: its way to the key manager
	stopped         map[int]string   // processes that were stopped
	canaries        []string
	began           time.Time
}

func seed(t *testing.T) uint64 {
	s := uint64(time.Now().UnixNano())
	if v := os.Getenv("HOLDFAST_SEED"); v != "" {
		n, err := strconv.ParseUint(v, 10, 64)
		if err != nil {
			t.Fatalf("HOLDFAST_SEED: %v", err)
		}
		s = n
	}
	t.Logf("SHOW: HOLDFAST_SEED=%d", s)
	return s
}

func (w *world) logf(format string, args ...any) {
	w.t.Helper()
	w.t.Logf("SHOW: %5.1fs "+format, append([]any{time.Since(w.began).Seconds()}, args...)...)
}

func need(t *testing.T) {
	t.Helper()
	testenv.NeedPostgres(t)
	testenv.NeedFUSE(t)
	testenv.NeedRoot(t) // reads other processes' memory
	if testing.Short() {
		t.Skip("runs a cluster")
	}
}

// newWorld starts a cluster under the customer's key.
func newWorld(t *testing.T, ctx context.Context, cust *customer, seed uint64) *world {
	t.Helper()
	dir := testenv.TempDir(t)
	w := &world{t: t, dir: dir, cust: cust, rng: rand.New(rand.NewPCG(seed, seed)), links: make(map[string]*link), stopped: make(map[int]string), began: time.Now()}
	via := func(role string) string { return "unix:" + filepath.Join(dir, "via", role) }
	w.c = cluster.ForTest(t, cluster.Options{Dir: dir, Separate: true, Settings: settings, CMK: cust.cmk, KMS: cust.kms, KeymgrFor: via})
	t.Cleanup(w.wake) // before the cluster ends: a stopped process does not
	if err := cust.ownKMS(w.localKMS()); err != nil {
		t.Fatal(err)
	}
	for _, role := range cluster.Roles()[1:] {
		w.links[role] = newLink(t, via(role), w.c.Socket(cluster.Keymgr))
	}
	if err := w.c.Start(ctx); err != nil {
		t.Fatal(err)
	}
	s, err := w.c.Status(ctx)
	if err != nil || len(s.Endpoints) == 0 {
		t.Fatalf("status: %+v, %v", s, err)
	}
	w.project, w.branch = s.Endpoints[0].Project, s.Endpoints[0].Branch
	w.l, err = ledger.New(ctx, ledger.Config{Target: w.c.Target(), Seed: seed, Pause: 2 * time.Millisecond, Journal: filepath.Join(dir, "journal")})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = w.l.Close() }) // a test that failed has the worse news
	if err := w.c.Target().Exec(ctx, "CREATE TABLE canaries (body text)"); err != nil {
		t.Fatal(err)
	}
	return w
}

// admin calls the key manager's KeyAdmin.
func (w *world) admin(call func(pb.KeyAdminClient) error) error {
	conn, err := rpc.Dial(w.c.Socket(cluster.Keymgr))
	if err != nil {
		return err
	}
	defer conn.Close()
	return call(pb.NewKeyAdminClient(conn))
}

// setGrace says how long the key may be used without an answer of the KMS.
func (w *world) setGrace(ctx context.Context, d time.Duration) error {
	return w.admin(func(c pb.KeyAdminClient) error {
		_, err := c.SetGrace(ctx, &pb.SetGraceRequest{Key: &pb.KeyRef{Project: w.project}, GraceMs: d.Milliseconds()})
		return err
	})
}

// probe is one way to read.
type probe struct {
	name string
	ask  func(context.Context) error
}

// probes are all ways to read that a cluster has.
func (w *world) probes() []probe {
	return []probe{
		{"SQL", func(ctx context.Context) error { return w.c.Target().Exec(ctx, "SELECT count(*) FROM pg_class") }},
		{"GetPages", w.getPage},
		{"StartupState", func(ctx context.Context) error {
			return w.pages(ctx, func(c pb.PageServerClient) error {
				_, err := c.StartupState(ctx, &pb.StartupStateRequest{At: &pb.ReadPoint{Project: w.project, Branch: w.branch, Latest: true}})
				return err
			})
		}},
		{"ListRelations", func(ctx context.Context) error {
			return w.pages(ctx, func(c pb.PageServerClient) error {
				_, err := c.ListRelations(ctx, &pb.ListRelationsRequest{At: &pb.ReadPoint{Project: w.project, Branch: w.branch, Latest: true}, Tablespace: 1663, Database: postgresDB})
				return err
			})
		}},
		{"a lease", func(ctx context.Context) error {
			conn, err := rpc.Dial(w.c.Socket(cluster.Keymgr))
			if err != nil {
				return err
			}
			defer conn.Close()
			_, err = pb.NewKeyManagerClient(conn).Lease(ctx, &pb.LeaseRequest{Project: w.project, Branch: w.branch, Node: "probe"})
			return err
		}},
	}
}

const (
	postgresDB = 5 // oid of the database "postgres"
	pgClass    = 1259
)

func (w *world) pages(ctx context.Context, call func(pb.PageServerClient) error) error {
	conn, err := rpc.Dial(w.c.Socket(cluster.Pageserver))
	if err != nil {
		return err
	}
	defer conn.Close()
	return call(pb.NewPageServerClient(conn))
}

func (w *world) getPage(ctx context.Context) error {
	return w.pages(ctx, func(c pb.PageServerClient) error {
		_, err := c.GetPages(ctx, &pb.GetPagesRequest{At: &pb.ReadPoint{Project: w.project, Branch: w.branch, Latest: true},
			Rel: &pb.RelFork{Tablespace: 1663, Database: postgresDB, Relation: pgClass}, Count: 1})
		return err
	})
}

// askTimeout bounds one probe: what does not answer in that time has not answered.
const askTimeout = 3 * time.Second

// answering names the probes that are answered, and what still runs of an endpoint.
func (w *world) answering(ctx context.Context, probes []probe) (names []string) {
	for _, p := range probes {
		ask, cancel := context.WithTimeout(ctx, askTimeout)
		if err := p.ask(ask); err == nil {
			names = append(names, p.name)
		}
		cancel()
	}
	for _, p := range proc.Using(w.c.Dir("compute")) {
		if strings.Contains(p.Command, "postgres") {
			names = append(names, "process "+p.String())
			break
		}
	}
	return names
}

// waitShut waits until nothing answers, and tells when the last answer was.
func (w *world) waitShut(ctx context.Context, since time.Time) (took time.Duration, err error) {
	probes := w.probes()
	for {
		names := w.answering(ctx, probes)
		took = time.Since(since)
		if len(names) == 0 {
			return took, nil
		}
		if took > bound+slack {
			return took, fmt.Errorf("%.1fs after the key was taken away these still answer: %s", took.Seconds(), strings.Join(names, ", "))
		}
		select {
		case <-ctx.Done():
			return took, ctx.Err()
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// waitServing waits for SQL, starting what has ended as a supervisor would.
func (w *world) waitServing(ctx context.Context) (time.Duration, error) {
	began := time.Now()
	for {
		if err := w.revive(); err != nil {
			return 0, err
		}
		attempt, cancel := context.WithTimeout(ctx, 30*time.Second)
		err := w.c.Target().Exec(attempt, "SELECT 1")
		cancel()
		if err == nil {
			return time.Since(began), nil
		}
		select {
		case <-ctx.Done():
			return 0, fmt.Errorf("the endpoint did not come back: %w", errors.Join(err, ctx.Err()))
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// revive starts the roles that have ended.
func (w *world) revive() error {
	for _, role := range cluster.Roles() {
		if w.c.Exited(role) {
			w.logf("%s had ended, and is started again", role)
			if err := w.c.Kill(role); err != nil {
				return err
			}
		}
		if !w.c.Running(role) {
			if err := w.c.StartRole(role); err != nil {
				return err
			}
		}
	}
	return nil
}
