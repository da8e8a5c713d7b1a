package manager

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/blob"
	"github.com/holdfastdb/holdfast/internal/blob/blobtest"
	"github.com/holdfastdb/holdfast/internal/blob/dirblob"
	"github.com/holdfastdb/holdfast/internal/config"
	"github.com/holdfastdb/holdfast/internal/keyring/keyringtest"
	"github.com/holdfastdb/holdfast/internal/rpc"
)

// roles plays the key manager, the page server and a safekeeper: it keeps which branches each has something of,
// and can fail a call in both ways.
type roles struct {
	pb.UnimplementedKeyManagerServer
	pb.UnimplementedKeyAdminServer
	mu struct {
		sync.Mutex
		keys, layers map[string]bool
		calls        []string
		fail         string // the call that fails next
		applied      bool   // although it has its effect
	}
}

type fakePageserver struct {
	pb.UnimplementedPageServerServer
	r *roles
}

type fakeSafekeeper struct {
	pb.UnimplementedSafekeeperServer
	r *roles
}

var errFake = rpc.Error(codes.FailedPrecondition, nil, "this call was to fail")

// call notes a call of a branch, and does its effect unless it is to be lost.
func (r *roles) call(name string, effect func()) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.mu.calls = append(r.mu.calls, name)
	fails := r.mu.fail == name
	if fails {
		r.mu.fail = ""
	}
	if !fails || r.mu.applied {
		effect()
	}
	if fails {
		return errFake
	}
	return nil
}

func (r *roles) CreateProject(context.Context, *pb.CreateProjectRequest) (*pb.CreateProjectResponse, error) {
	return &pb.CreateProjectResponse{}, nil
}

func (r *roles) CreateBranchKey(_ context.Context, q *pb.CreateBranchKeyRequest) (*pb.CreateBranchKeyResponse, error) {
	return &pb.CreateBranchKeyResponse{}, r.call("create key", func() { r.mu.keys[q.Branch] = true })
}

func (r *roles) DestroyBranchKey(_ context.Context, q *pb.KeyRef) (*pb.DestroyBranchKeyResponse, error) {
	return &pb.DestroyBranchKeyResponse{}, r.call("destroy key", func() {
		if r.mu.layers[q.Branch] {
			r.mu.calls = append(r.mu.calls, "destroyed a key before what it seals")
		}
		delete(r.mu.keys, q.Branch)
	})
}

func (p fakePageserver) Attach(_ context.Context, q *pb.AttachRequest) (*pb.AttachResponse, error) {
	p.r.mu.Lock()
	defer p.r.mu.Unlock()
	p.r.mu.layers[q.Branch] = true // as if initdb's child had imported it
	return &pb.AttachResponse{}, nil
}

func (p fakePageserver) DeleteBranch(_ context.Context, q *pb.DeleteBranchRequest) (*pb.DeleteBranchResponse, error) {
	return &pb.DeleteBranchResponse{}, p.r.call("delete layers", func() { delete(p.r.mu.layers, q.Branch) })
}

func (s fakeSafekeeper) DeleteBranch(_ context.Context, q *pb.DeleteBranchRequest) (*pb.DeleteBranchResponse, error) {
	return &pb.DeleteBranchResponse{}, s.r.call("delete log", func() {})
}

// failNext has the next call of a name fail.
func (r *roles) failNext(name string, applied bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.mu.fail, r.mu.applied = name, applied
}

// left is what the roles have of branches other than the first.
func (r *roles) left(first string) (list []string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for b := range r.mu.keys {
		list = append(list, "key of "+b)
	}
	for b := range r.mu.layers {
		if b != first {
			list = append(list, "layers of "+b)
		}
	}
	return list
}

// bench is managers, one after another, over the same roles and the same bucket.
type bench struct {
	t     *testing.T
	dir   string
	roles *roles
	store *blobtest.Faulty
	cfg   Config
}

// agent is an executable that makes any branch, and runs any endpoint.
const agent = `#!/bin/sh
case "$*" in
*--init*) read password; [ -e %[1]s/no-initdb ] && { echo "holdfast: no initdb here" >&2; exit 1; }; exit 0;;
esac
echo '{"event":"ready","epoch":1}'
exec sleep 1000
`

func newBench(t *testing.T) *bench {
	t.Helper()
	dir, err := os.MkdirTemp("", "hfm") // t.TempDir is too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	b := &bench{t: t, dir: dir, roles: &roles{}}
	b.roles.mu.keys, b.roles.mu.layers = make(map[string]bool), make(map[string]bool)
	socket := func(role string) string { return "unix:" + filepath.Join(dir, "run", role) }
	for role, register := range map[string]func(*grpc.Server){
		"k": func(g *grpc.Server) { pb.RegisterKeyManagerServer(g, b.roles); pb.RegisterKeyAdminServer(g, b.roles) },
		"p": func(g *grpc.Server) { pb.RegisterPageServerServer(g, fakePageserver{r: b.roles}) },
		"s": func(g *grpc.Server) { pb.RegisterSafekeeperServer(g, fakeSafekeeper{r: b.roles}) },
	} {
		l, err := rpc.Listen(socket(role))
		if err != nil {
			t.Fatal(err)
		}
		g := rpc.NewServer()
		register(g)
		go g.Serve(l)
		t.Cleanup(g.Stop)
	}
	bucket := filepath.Join(dir, "bucket")
	if err := os.Mkdir(bucket, 0o700); err != nil {
		t.Fatal(err)
	}
	store, err := dirblob.Open(bucket)
	if err != nil {
		t.Fatal(err)
	}
	b.store = blobtest.NewFaulty(store, nil)
	exe := filepath.Join(dir, "agent")
	if err := os.WriteFile(exe, fmt.Appendf(nil, agent, dir), 0o700); err != nil {
		t.Fatal(err)
	}
	b.cfg = Config{Manager: config.Manager{Dir: filepath.Join(dir, "manager"), ComputeDir: filepath.Join(dir, "compute"), LogDir: dir,
		Keymgr: socket("k"), Pageserver: socket("p"), Safekeepers: []string{socket("s")}, CMK: "dev", EndpointListen: "127.0.0.1:1"},
		Store: b.store, Ring: keyringtest.New(), Executable: exe, Log: slog.New(slog.NewTextHandler(t.Output(), nil))}
	return b
}

// start starts a manager, which the test's end closes.
func (b *bench) start() *Manager {
	b.t.Helper()
	m, err := New(b.cfg)
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() {
		if err := m.Close(context.Background()); err != nil {
			b.t.Error(err)
		}
	})
	if err := m.Start(bounded(b.t)); err != nil {
		b.t.Fatal(err)
	}
	return m
}

// cluster is the document.
func (b *bench) cluster() *cluster {
	b.t.Helper()
	c, _, err := loadCluster(b.t.Context(), b.store)
	if err != nil {
		b.t.Fatal(err)
	}
	return c
}

// mustBeAsBefore fails if anything of another branch than the first is there.
func (b *bench) mustBeAsBefore(when string) {
	b.t.Helper()
	c := b.cluster()
	if len(c.Branches) != 1 || len(c.Endpoints) != 1 || len(c.Leftovers) != 0 {
		b.t.Errorf("%s: branches %v, endpoints %v, leftovers %v; want the first alone", when, c.Branches, c.Endpoints, c.Leftovers)
	}
	if left := b.roles.left(c.Branches[0].ID); len(left) > 0 {
		b.t.Errorf("%s: %v", when, left)
	}
	err := b.store.List(b.t.Context(), "projects/", func(i blob.Info) error {
		if !strings.Contains(i.Key, c.Branches[0].ID) {
			b.t.Errorf("%s: the bucket has %s", when, i.Key)
		}
		return nil
	})
	if err != nil {
		b.t.Error(err)
	}
}

func TestBranchIsMadeUsedAndDeleted(t *testing.T) {
	b := newBench(t)
	m := b.start()
	made, err := m.CreateBranch(bounded(t), &pb.MakeBranchRequest{Name: "reports", OwnKey: true})
	if err != nil {
		t.Fatal(err)
	}
	if !made.OwnKey || len(made.Endpoints) != 1 || made.Endpoints[0].State != stateRunning {
		t.Errorf("made %v, want a key of its own and a running endpoint", made)
	}
	if c, err := m.Credentials(t.Context(), &pb.EndpointRequest{Name: "reports"}); err != nil || c.Password == "" {
		t.Errorf("credentials: %v", err)
	}
	if _, err := m.CreateBranch(bounded(t), &pb.MakeBranchRequest{Name: "reports"}); status.Code(err) != codes.AlreadyExists {
		t.Errorf("made twice: %v, want AlreadyExists", err)
	}
	for _, bad := range []*pb.MakeBranchRequest{{Name: "../x"}, {Name: "x", Cmk: "dev"}, {Name: "x", Listen: "nowhere"}} {
		if _, err := m.CreateBranch(bounded(t), bad); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%v: %v, want InvalidArgument", bad, err)
		}
	}
	if _, err := m.DeleteBranch(bounded(t), &pb.RemoveBranchRequest{Name: "main"}); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("deleting the first branch: %v, want FailedPrecondition", err)
	}
	if _, err := m.DeleteBranch(bounded(t), &pb.RemoveBranchRequest{Name: "reports"}); err != nil {
		t.Fatal(err)
	}
	b.mustBeAsBefore("after the deletion")
	want := []string{"create key", "delete layers", "delete log", "destroy key"}
	if diff := cmp.Diff(want, b.roles.mu.calls); diff != "" {
		t.Errorf("calls (-want +got):\n%s", diff)
	}
	if _, err := m.DeleteBranch(bounded(t), &pb.RemoveBranchRequest{Name: "reports"}); status.Code(err) != codes.NotFound {
		t.Errorf("deleted twice: %v, want NotFound", err)
	}
	if _, err := os.Stat(filepath.Join(b.dir, "manager", "endpoint-reports.yaml")); !os.IsNotExist(err) {
		t.Errorf("the endpoint's configuration is still there: %v", err)
	}
}

// The remote effects of making and of deleting a branch.
var creation = []string{"create key", "initdb"}
var deletion = []string{"delete layers", "delete log", "destroy key"}

// Whatever a creation fails at, and whether or not the failed step had its effect, nothing is left of it.
func TestFailedCreationLeavesNothing(t *testing.T) {
	for _, step := range creation {
		for _, applied := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s,applied=%t", step, applied), func(t *testing.T) {
				b := newBench(t)
				m := b.start()
				if step == "initdb" {
					if err := os.WriteFile(filepath.Join(b.dir, "no-initdb"), nil, 0o600); err != nil {
						t.Fatal(err)
					}
				}
				b.roles.failNext(step, applied)
				if _, err := m.CreateBranch(bounded(t), &pb.MakeBranchRequest{Name: "reports", OwnKey: true}); err == nil {
					t.Fatal("it succeeded")
				}
				b.mustBeAsBefore("after the failure")
			})
		}
	}
}

// Whatever a deletion fails at: the branch is out of use, the next call or the next manager finishes it, and the key
// is not destroyed before what it seals.
func TestFailedDeletionIsFinished(t *testing.T) {
	for _, step := range deletion {
		for _, applied := range []bool{false, true} {
			for _, restart := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s,applied=%t,restart=%t", step, applied, restart), func(t *testing.T) {
					b := newBench(t)
					m := b.start()
					if _, err := m.CreateBranch(bounded(t), &pb.MakeBranchRequest{Name: "reports", OwnKey: true}); err != nil {
						t.Fatal(err)
					}
					b.roles.failNext(step, applied)
					if _, err := m.DeleteBranch(bounded(t), &pb.RemoveBranchRequest{Name: "reports"}); err == nil {
						t.Fatal("it succeeded")
					}
					if c := b.cluster(); len(c.Branches) != 1 || len(c.Leftovers) != 1 {
						t.Errorf("branches %v, leftovers %v", c.Branches, c.Leftovers)
					}
					if restart {
						<-b.start().sweepDone
					} else if _, err := m.DeleteBranch(bounded(t), &pb.RemoveBranchRequest{Name: "reports"}); err != nil {
						t.Fatal(err)
					}
					b.mustBeAsBefore("at the end")
					for _, c := range b.roles.mu.calls {
						if strings.Contains(c, "before what it seals") {
							t.Error(c)
						}
					}
				})
			}
		}
	}
}

// The document's write that makes a branch usable may be lost, or be reported so: then the branch is there whole,
// or not at all.
func TestPublishingIsAllOrNothing(t *testing.T) {
	for _, fault := range []blobtest.Fault{blobtest.Lost, blobtest.Unreported} {
		b := newBench(t)
		m := b.start()
		b.store.FailNext(blobtest.OpSwap, clusterKey, blobtest.None) // the claim
		b.store.FailNext(blobtest.OpSwap, clusterKey, fault)
		_, err := m.CreateBranch(bounded(t), &pb.MakeBranchRequest{Name: "reports", OwnKey: true})
		if fault == blobtest.Lost {
			if err == nil || !strings.Contains(err.Error(), blobtest.ErrInjected.Error()) {
				t.Errorf("a lost write: %v, want the injected error", err)
			}
			b.mustBeAsBefore("after a lost write")
			continue
		}
		if _, findErr := m.find("reports"); findErr != nil {
			t.Errorf("after an unreported write: %v; and this manager does not run its endpoint: %v", err, findErr)
		}
		c := b.cluster()
		left := b.roles.left(c.Branches[0].ID)
		if len(c.Branches) != 2 || len(c.Endpoints) != 2 || len(c.Leftovers) != 0 || len(left) != 2 {
			t.Errorf("after an unreported write: %+v, %v; want a whole branch with its key and layers", c, left)
		}
		if again := b.start(); again.mu.endpoints["reports"] == nil {
			t.Error("the next manager does not know its endpoint")
		}
	}
}

// A manager that was killed while it made a branch, or rehearsed with one, leaves it among the leftovers.
func TestNextManagerRemovesWhatTheLastOneLeft(t *testing.T) {
	b := newBench(t)
	b.start()
	left := branchDoc{ID: "00ff", Project: b.cluster().Projects[0].ID, Name: "rehearsal-00ff", OwnKey: true}
	if _, err := updateCluster(t.Context(), b.store, func(c *cluster) error { c.addLeftover(left); return nil }); err != nil {
		t.Fatal(err)
	}
	b.roles.mu.keys[left.ID], b.roles.mu.layers[left.ID] = true, true
	folder := filepath.Join(b.cfg.ComputeDir, left.Name)
	if err := os.MkdirAll(filepath.Join(folder, "scratch"), 0o700); err != nil {
		t.Fatal(err)
	}
	b.roles.failNext("delete log", false) // it tries again
	<-b.start().sweepDone
	b.mustBeAsBefore("after the next start")
	if _, err := os.Stat(folder); !os.IsNotExist(err) {
		t.Errorf("the endpoint's folder is still there: %v", err)
	}
}
