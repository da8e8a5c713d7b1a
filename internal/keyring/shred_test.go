package keyring

import (
	"crypto/ed25519"
	"errors"
	"slices"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/boottime"
	"github.com/holdfastdb/holdfast/internal/rpc"
	"github.com/holdfastdb/holdfast/internal/seal"
	"github.com/holdfastdb/holdfast/internal/shredreport"
)

// await waits for what happens on other goroutines; the test's own limit bounds it.
func await(t *testing.T, what string, fn func() bool) {
	t.Helper()
	for !fn() {
		select {
		case <-t.Context().Done():
			t.Fatalf("waiting for %s", what)
		case <-time.After(time.Millisecond):
		}
	}
}

func reportsOf(f *fakeManager) (list []*pb.ShredReport) {
	f.set(func(f *fakeManager) { list = slices.Clone(f.reports) })
	return list
}

// A report goes out when all functions have returned, and again while it is not known to have come.
func TestReportIsSignedAndRepeated(t *testing.T) {
	f := newFake(t)
	f.key, f.lose = "p/b", 2
	r := newRing(t, f)
	mustGenerate(t, r, 1)
	kept, _ := mustGenerate(t, r, 2)
	hold := make(chan struct{})
	r.OnShred("p", "b", func(error) []string { <-hold; return []string{"slow"} })
	r.OnShred("p", "b", func(error) []string { return []string{"fast"} })
	f.fail(rpc.Error(codes.PermissionDenied, &pb.ErrorDetail{Reason: pb.ErrorDetail_KEY_REVOKED, ControlledBy: "the customer"}, "no"))
	f.notices <- &pb.KeyNotice{Key: "p/b"}
	await(t, "the key to be wiped", func() bool { return wiped(kept) })
	if n := len(reportsOf(f)); n != 0 {
		t.Errorf("%d reports before all was dropped", n)
	}
	close(hold)
	await(t, "three reports", func() bool { return len(reportsOf(f)) == 3 })
	got := reportsOf(f)[2]
	var public ed25519.PublicKey
	f.set(func(f *fakeManager) { public = f.requests[0].PublicKey })
	if err := shredreport.Verify(got); err != nil || !public.Equal(ed25519.PublicKey(got.PublicKey)) {
		t.Errorf("signed by another than who asked for the lease, or not: %v", err)
	}
	if got.Key != "p/b" || got.Branch != "b" || got.Node != "node" || got.LeaseId != "lease1" || got.Keys < 1 ||
		got.KeysWipedUnixUs == 0 || got.ShreddedUnixUs < got.KeysWipedUnixUs || !slices.Equal(got.Dropped, []string{"fast", "slow"}) {
		t.Errorf("report %v", got)
	}
	err := r.Live("p", "b")
	if !errors.Is(err, ErrRevoked) || ControlledBy(err) != "the customer" {
		t.Errorf("Live: %v, controlled by %q", err, ControlledBy(err))
	}
}

// Close gives a report its time; nobody reports a lease that was only let go.
func TestCloseWaitsForReports(t *testing.T) {
	f := newFake(t)
	r := newRing(t, f)
	mustGenerate(t, r, 1)
	f.fail(revoked)
	f.notices <- &pb.KeyNotice{Key: "p"}
	await(t, "the end", func() bool { return r.Live("p", "b") != nil })
	r.Close()
	if n := len(reportsOf(f)); n != 1 {
		t.Errorf("%d reports when Close returned, want 1", n)
	}
	f2 := newFake(t)
	r2 := newRing(t, f2)
	mustGenerate(t, r2, 1)
	r2.Close()
	if n := len(reportsOf(f2)); n != 0 {
		t.Errorf("%d reports of a lease that was let go", n)
	}
}

// A lease that ran out is over for Live, for keys and for what is bound to its term, before anybody
// woke to wipe.
func TestPastTheEndNothingIsOfUse(t *testing.T) {
	f := newFake(t)
	r := newRing(t, f)
	if err := r.Live("p", "b"); !errors.Is(err, ErrUnreachable) {
		t.Errorf("Live without a lease: %v", err)
	}
	if r.Term("p", "b").Live() {
		t.Error("a term without a lease lasts")
	}
	k, _ := mustGenerate(t, r, 1)
	box, err := seal.NewBox(r.Term("p", "b"))
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Live("p", "b"); err != nil || wiped(k) {
		t.Errorf("with a lease: %v", err)
	}
	// The machine slept: the end is past, and the keeper, which looks once a second, does not know.
	p, err := r.(*ring).scope("p", "b")
	if err != nil {
		t.Fatal(err)
	}
	p.mu.Lock()
	p.mu.end = boottime.Now() - 1
	p.mu.bound = boundTo(p.mu.bound, p.mu.end)
	p.mu.Unlock()
	if err := r.Live("p", "b"); !errors.Is(err, ErrUnreachable) {
		t.Errorf("Live past the end: %v", err)
	}
	if !wiped(k) {
		t.Error("a key is of use past the lease's end")
	}
	if _, tag := box.Seal(nil, 1, []byte("x")); !tag.IsZero() {
		t.Error("the box is of use past the lease's end")
	}
}

// boundTo moves a term's end back, as time does.
func boundTo(t *seal.Term, end time.Duration) *seal.Term {
	t.Extend(end)
	return t
}

// Each branch has a lease of its own: one may be denied while the other goes on.
func TestBranchesHaveTheirOwnLeases(t *testing.T) {
	f := newFake(t)
	r := newRing(t, f)
	k, _ := mustGenerate(t, r, 1)
	other := object(1)
	other.Branch = "c"
	k2, _, err := r.Generate(t.Context(), other)
	if err != nil {
		t.Fatal(err)
	}
	f.set(func(f *fakeManager) {
		if got := []string{f.requests[0].Branch, f.requests[1].Branch}; !slices.Equal(got, []string{"b", "c"}) {
			t.Errorf("leases asked for: %v", got)
		}
	})
	p, err := r.(*ring).scope("p", "b")
	if err != nil {
		t.Fatal(err)
	}
	p.end(p.currentTerm(), ErrRevoked)
	if !wiped(k) || wiped(k2) {
		t.Errorf("wiped: %v and %v, want the first alone", wiped(k), wiped(k2))
	}
	if err := r.Live("p", "c"); err != nil {
		t.Error(err)
	}
}

// News wakes who waits for a revoked key, and the stream is opened again when it broke.
func TestNoticesAreNews(t *testing.T) {
	f := newFake(t)
	r := newRing(t, f)
	mustGenerate(t, r, 1)
	f.notices <- nil // the stream breaks, and comes again
	p, err := r.(*ring).scope("p", "b")
	if err != nil {
		t.Fatal(err)
	}
	p.end(p.currentTerm(), ErrRevoked)
	news := r.News("p", "b")
	f.notices <- &pb.KeyNotice{Key: "other"}
	f.notices <- &pb.KeyNotice{Key: "p/c"}
	select {
	case <-news:
		t.Error("another key's notice is news")
	default:
	}
	f.notices <- &pb.KeyNotice{Key: "p"}
	<-news
	if f.streams != 2 {
		t.Errorf("%d streams, want 2", f.streams)
	}
}

// A ring that held a key when it was taken away holds it again when it is back, without being asked.
func TestKeyThatIsBackIsTakenUpAgain(t *testing.T) {
	f := newFake(t)
	r := newRing(t, f)
	mustGenerate(t, r, 1)
	f.fail(revoked)
	f.notices <- &pb.KeyNotice{Key: "p", State: "revoked"}
	await(t, "the end", func() bool { return errors.Is(r.Live("p", "b"), ErrRevoked) })
	f.fail(nil)
	f.notices <- &pb.KeyNotice{Key: "p", State: "resuming"}
	await(t, "a lease", func() bool { return r.Live("p", "b") == nil })
}

// A notice that comes while a renewal is asked for may be newer than the answer: it is asked again.
func TestNoticeDuringARenewal(t *testing.T) {
	k := &keeper{p: newScope(&ring{}, scopeName{"p", "b"}), asking: true, again: true, renewAt: boottime.Now() + time.Hour}
	k.answered(renewal{resp: &pb.LeaseResponse{LeaseId: "l", TtlMs: 1000}, end: boottime.Now() + time.Second})
	if k.again || k.renewAt > boottime.Now() {
		t.Error("it is not asked again at once")
	}
}

// recorder is a Guard.
type recorder struct {
	mu   sync.Mutex
	list []time.Duration
}

func (g *recorder) Publish(earliest time.Duration) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.list = append(g.list, earliest)
}

func (g *recorder) last() time.Duration {
	g.mu.Lock()
	defer g.mu.Unlock()
	if len(g.list) == 0 {
		return 0
	}
	return g.list[len(g.list)-1]
}

// The guard knows of the end from before a key is given out until all under it is dropped.
func TestGuardKnowsUntilWhen(t *testing.T) {
	f, g := newFake(t), &recorder{}
	r := Open(Config{Client: f, Node: "node", Guard: g})
	t.Cleanup(r.Close)
	before := boottime.Now()
	mustGenerate(t, r, 1)
	// Shredding begins somewhat before the lease's end.
	if got, ttl := g.last(), f.ttl-headroom(f.ttl); got < before+ttl || got > boottime.Now()+ttl {
		t.Errorf("the guard was told %v, want about %v", got, before+ttl)
	}
	hold := make(chan struct{})
	r.OnShred("p", "b", func(error) []string { <-hold; return nil })
	end := g.last()
	p, err := r.(*ring).scope("p", "b")
	if err != nil {
		t.Fatal(err)
	}
	p.end(p.currentTerm(), ErrRevoked)
	if got := g.last(); got != end {
		t.Errorf("with the shredding under way the guard was told %v, want %v still", got, end)
	}
	close(hold)
	await(t, "the guard to be told", func() bool { return g.last() == 0 })
}

// A lease that nobody uses is let go; one whose end somebody waits for is not.
func TestIdleLeasesAreLetGo(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	f.ttl = 1500 * time.Millisecond
	r := newRing(t, f)
	r.(*ring).idle = time.Millisecond
	cancel := r.OnShred("p", "b", func(err error) []string { t.Errorf("shredded: %v", err); return nil })
	k, _ := mustGenerate(t, r, 1)
	for n := 0; n < 3; time.Sleep(time.Millisecond) { // it is renewed
		f.set(func(f *fakeManager) { n = f.asked })
	}
	if wiped(k) {
		t.Fatal("a lease was let go whose end somebody waits for")
	}
	cancel()
	await(t, "the lease to be let go", func() bool { return wiped(k) })
	if err := r.Live("p", "b"); !errors.Is(err, ErrUnreachable) || !errors.Is(err, errIdle) {
		t.Errorf("Live: %v", err)
	}
	if k, _ := mustGenerate(t, r, 2); wiped(k) { // who wants it has it again
		t.Error("a new lease's key is wiped")
	}
}
