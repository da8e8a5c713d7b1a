package revocation

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/blob/dirblob"
	"github.com/holdfastdb/holdfast/internal/dekwire"
	"github.com/holdfastdb/holdfast/internal/keyring"
	"github.com/holdfastdb/holdfast/internal/rpc"
	"github.com/holdfastdb/holdfast/internal/seal"
	"github.com/holdfastdb/holdfast/keymgr"
	"github.com/holdfastdb/holdfast/keymgr/localkms"
)

// pushBound is what is published for a revocation that the key manager is told of.
const pushBound = 2 * time.Second

// spread is a distribution of times.
type spread []time.Duration

func (s spread) at(part float64) time.Duration { return s[min(int(part*float64(len(s))), len(s)-1)] }

func (s spread) String() string {
	slices.Sort(s)
	return fmt.Sprintf("%d times: min %.2f s, median %.2f s, p99 %.2f s, max %.2f s", len(s), s[0].Seconds(), s.at(0.5).Seconds(), s.at(0.99).Seconds(), s[len(s)-1].Seconds())
}

// show prints a distribution, and fails if it is over its bound by more than the machine may add.
func show(t *testing.T, what string, s spread, bound time.Duration) {
	t.Helper()
	if len(s) == 0 {
		t.Errorf("%s: nothing was measured", what)
		return
	}
	t.Logf("SHOW: %s: %v; bound %v", what, s, bound)
	if worst := s[len(s)-1]; worst > bound+slack {
		t.Errorf("%s: %v, the bound is %v", what, worst, bound)
	}
}

func roundsFrom(t *testing.T, otherwise int) int {
	t.Helper()
	v := os.Getenv("HOLDFAST_ROUNDS")
	if v == "" {
		return otherwise
	}
	n, err := strconv.Atoi(v)
	if err != nil {
		t.Fatalf("HOLDFAST_ROUNDS: %v", err)
	}
	return n
}

// nodesAtOnce is how many nodes, each with a project and a CMK of its own, are revoked at once.
const nodesAtOnce = 50

// farm is a key manager with its default times, and many nodes that hold keys and nothing else.
type farm struct {
	kms   *localkms.KMS
	admin pb.KeyAdminClient
	nodes []*farmNode
}

type farmNode struct {
	project string
	ring    keyring.Ring
	link    *link
	wrapped []byte
}

func (n *farmNode) context() seal.Context {
	return seal.Context{Purpose: seal.PurposeWAL, Project: n.project, Branch: "b", Object: "s1"}
}

func newFarm(t *testing.T, n int) *farm {
	t.Helper()
	dir, err := os.MkdirTemp("", "hf-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	bucket, err := dirblob.Open(filepath.Join(dir, "bucket"))
	if err != nil {
		t.Fatal(err)
	}
	kms, err := localkms.Open(filepath.Join(dir, "keys.json"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(dir, "keymgr"), 0o700); err != nil {
		t.Fatal(err)
	}
	srv, err := keymgr.New(keymgr.Config{Dir: filepath.Join(dir, "keymgr"), BlobStore: bucket, Provider: kms})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = srv.Close() })
	addr := "unix:" + filepath.Join(dir, "run", "k")
	l, err := rpc.Listen(addr)
	if err != nil {
		t.Fatal(err)
	}
	g := rpc.NewServer()
	pb.RegisterKeyManagerServer(g, dekwire.Server(srv))
	if a, ok := any(srv).(pb.KeyAdminServer); ok {
		pb.RegisterKeyAdminServer(g, a)
	}
	go func() { _ = g.Serve(l) }() // ends with Stop
	t.Cleanup(g.Stop)
	f := &farm{kms: kms, admin: pb.NewKeyAdminClient(dial(t, addr))}
	for i := range n {
		f.add(t, dir, addr, i)
	}
	return f
}

func dial(t *testing.T, addr string) *grpc.ClientConn {
	t.Helper()
	conn, err := rpc.Dial(addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// add makes a node that holds a key.
func (f *farm) add(t *testing.T, dir, addr string, i int) {
	t.Helper()
	n := &farmNode{project: fmt.Sprintf("p%d", i)}
	if err := f.kms.Create(n.project); err != nil {
		t.Fatal(err)
	}
	near := "unix:" + filepath.Join(dir, "via", n.project)
	n.link = newLink(t, near, addr)
	client := pb.NewKeyManagerClient(dial(t, near))
	if _, err := client.CreateProject(t.Context(), &pb.CreateProjectRequest{Project: n.project, Cmk: n.project}, grpc.WaitForReady(true)); err != nil {
		t.Fatal(err)
	}
	n.ring = keyring.New(dekwire.Client(client), n.project)
	t.Cleanup(n.ring.Close)
	_, wrapped, err := n.ring.Generate(t.Context(), n.context())
	if err != nil {
		t.Fatal(err)
	}
	n.wrapped = wrapped
	f.nodes = append(f.nodes, n)
}

// way is a way to take a key away from a node, and to give it back.
type way struct {
	name       string
	bound      time.Duration
	take, give func(ctx context.Context, n *farmNode) error
}

func (f *farm) ways() []way {
	disable := func(_ context.Context, n *farmNode) error { return f.kms.Disable(n.project) }
	enable := func(_ context.Context, n *farmNode) error { return f.kms.Enable(n.project) }
	return []way{
		{"disabled in the KMS, found by polling", bound, disable, enable},
		{"disabled in the KMS, node cut off from the key manager", bound,
			func(ctx context.Context, n *farmNode) error { n.link.set(true); return disable(ctx, n) },
			func(ctx context.Context, n *farmNode) error { n.link.set(false); return enable(ctx, n) }},
		{"holdfast key revoke, pushed", pushBound,
			func(ctx context.Context, n *farmNode) error {
				_, err := f.admin.RevokeKey(ctx, &pb.RevokeKeyRequest{Key: &pb.KeyRef{Project: n.project}, Reason: "test"})
				return err
			},
			func(ctx context.Context, n *farmNode) error {
				_, err := f.admin.ResumeKey(ctx, &pb.KeyRef{Project: n.project})
				return err
			}},
		{"disabled in the KMS, with its notice pushed", pushBound,
			func(ctx context.Context, n *farmNode) error {
				if err := disable(ctx, n); err != nil {
					return err
				}
				_, err := f.admin.CheckKeys(ctx, &pb.CheckKeysRequest{Cmk: n.project})
				return err
			}, enable},
	}
}

// cycle takes a key from a node at a random moment and gives it back.
func (n *farmNode) cycle(ctx context.Context, w way, delay time.Duration) (shredded, back time.Duration, err error) {
	if _, err := n.ring.Open(ctx, n.context(), n.wrapped); err != nil {
		return 0, 0, err
	}
	gone := make(chan time.Time, 1)
	cancel := n.ring.OnShred(n.project, "b", func(error) []string { gone <- time.Now(); return nil })
	defer cancel()
	time.Sleep(delay)
	began := time.Now()
	if err := w.take(ctx, n); err != nil {
		return 0, 0, err
	}
	select {
	case at := <-gone:
		shredded = at.Sub(began)
	case <-ctx.Done():
		return 0, 0, fmt.Errorf("%s: %s was not shredded: %w", w.name, n.project, ctx.Err())
	}
	if err := w.give(ctx, n); err != nil {
		return 0, 0, err
	}
	began = time.Now()
	for {
		_, err := n.ring.Open(ctx, n.context(), n.wrapped)
		if err == nil {
			return shredded, time.Since(began), nil
		}
		select {
		case <-ctx.Done():
			return 0, 0, errors.Join(err, ctx.Err())
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// TestBound measures how long after a revocation a node's keys are gone, with the times that are in
// force by default, and how soon they are there again. HOLDFAST_ROUNDS=4 makes 200 revocations of each way.
func TestBound(t *testing.T) {
	if testing.Short() {
		t.Skip("waits for leases to run out")
	}
	f := newFarm(t, nodesAtOnce)
	rng := rand.New(rand.NewPCG(seed(t), 1))
	for _, w := range f.ways() {
		var mu sync.Mutex
		var shredded, back spread
		for range roundsFrom(t, 1) {
			var all sync.WaitGroup
			for _, n := range f.nodes {
				delay := time.Duration(rng.Int64N(int64(5 * time.Second)))
				all.Go(func() {
					ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
					defer cancel()
					s, b, err := n.cycle(ctx, w, delay)
					mu.Lock()
					defer mu.Unlock()
					switch {
					case status.Code(err) == codes.Unimplemented:
					case err != nil:
						t.Error(err)
					default:
						shredded, back = append(shredded, s), append(back, b)
					}
				})
			}
			all.Wait()
		}
		show(t, w.name+", to keys wiped", shredded, w.bound)
		show(t, w.name+", given back, to keys there", back, 10*time.Second)
	}
}

// TestBoundOfACluster measures the same with everything that there is to shred: Postgres killed, its mount
// gone, and no answer from anything. HOLDFAST_ROUNDS=10 makes 20 revocations.
func TestBoundOfACluster(t *testing.T) {
	need(t)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Minute)
	defer cancel()
	w := newWorld(t, ctx, &customer{kind: "local"}, seed(t))
	key := &pb.KeyRef{Project: w.project}
	ways := []struct {
		name       string
		bound      time.Duration
		take, give func() error
	}{
		{"disabled in the KMS", bound, w.cust.faults[0].do, w.cust.faults[0].undo},
		{"holdfast key revoke", pushBound,
			func() error {
				return w.admin(func(c pb.KeyAdminClient) error {
					_, err := c.RevokeKey(ctx, &pb.RevokeKeyRequest{Key: key, Reason: "test"})
					return err
				})
			},
			func() error {
				return w.admin(func(c pb.KeyAdminClient) error { _, err := c.ResumeKey(ctx, key); return err })
			}},
	}
	for _, way := range ways {
		var shut, back spread
		for range roundsFrom(t, 1) {
			w.l.Start()
			if err := w.l.WaitAcked(ctx, 20); err != nil {
				t.Fatal(err)
			}
			if err := pauseUpTo(w, 5*time.Second); err != nil {
				t.Fatal(err)
			}
			struck := time.Now()
			if err := way.take(); err != nil {
				t.Fatal(err)
			}
			took, err := w.waitShut(ctx, struck)
			if err != nil {
				t.Fatal(err)
			}
			if err := way.give(); err != nil {
				t.Fatal(err)
			}
			served, err := w.waitServing(ctx)
			if err != nil {
				t.Fatal(err)
			}
			shut, back = append(shut, took), append(back, served)
			if _, err := w.l.Check(ctx); err != nil {
				t.Fatal(err)
			}
		}
		show(t, way.name+", until nothing answers and Postgres is gone", shut, way.bound)
		show(t, way.name+", given back, until SQL is served", back, 10*time.Second)
	}
}
