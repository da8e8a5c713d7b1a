package keymgr_test

import (
	"context"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/blob/blobtest"
	"github.com/holdfastdb/holdfast/internal/rpc"
)

func (f *fixture) restart(ttl, grace time.Duration) {
	f.t.Helper()
	if err := f.srv.Close(); err != nil {
		f.t.Fatal(err)
	}
	f.startWith(ttl, grace)
	f.t.Cleanup(func() { f.srv.Close() })
}

func (f *fixture) status(project string) *pb.KeyStatusResponse {
	f.t.Helper()
	st, err := f.srv.KeyStatus(f.t.Context(), &pb.KeyStatusRequest{Project: project})
	if err != nil {
		f.t.Fatal(err)
	}
	return st
}

func (f *fixture) revoke(project, reason string) *pb.KeyStatusResponse {
	f.t.Helper()
	st, err := f.srv.RevokeKey(f.t.Context(), &pb.RevokeKeyRequest{Key: &pb.KeyRef{Project: project}, Reason: reason})
	if err != nil {
		f.t.Fatal(err)
	}
	return st
}

// A hold ends leases before the call returns, whatever the KMS says, and outlives the key manager; so
// does one whose write was reported to have failed.
func TestHoldDeniesAtOnceAndForGood(t *testing.T) {
	for _, fault := range []blobtest.Fault{blobtest.None, blobtest.Lost, blobtest.Unreported} {
		f := newFixture(t)
		f.create("p1")
		id := f.mustLease("p1")
		f.faulty.FailNext(blobtest.OpSwap, "projects/p1/", fault)
		st := f.revoke("p1", "a drill")
		if st.State != "revoked" || st.ControlledBy != "holdfast key resume" || !strings.Contains(st.ProviderError, "a drill") {
			t.Errorf("fault %d: status %v", fault, st)
		}
		_, err := f.generate(id, dekContext("p1", "a"))
		wantCode(t, "under the ended lease", err, codes.FailedPrecondition, 0)
		unwraps := f.kms.unwraps.Load()
		_, err = f.lease("p1", id)
		wantCode(t, "a new lease", err, codes.PermissionDenied, pb.ErrorDetail_KEY_REVOKED)
		if err == nil || !strings.Contains(err.Error(), "a drill") || !strings.Contains(err.Error(), "holdfast key resume") {
			t.Errorf("fault %d: %v does not say what to do", fault, err)
		}
		f.restart(time.Minute, 0)
		_, err = f.lease("p1", "")
		wantCode(t, "after a restart", err, codes.PermissionDenied, pb.ErrorDetail_KEY_REVOKED)
		if n := f.kms.unwraps.Load(); n != unwraps {
			t.Errorf("a held key was unwrapped %d times", n-unwraps)
		}
		if _, err := f.srv.ResumeKey(t.Context(), &pb.KeyRef{Project: "p1"}); err != nil {
			t.Fatal(err)
		}
		f.mustLease("p1")
	}
}

// A hold that another key manager wrote is found by the next check.
func TestHoldOfAnotherKeyManagerIsFound(t *testing.T) {
	f := newFixture(t)
	f.create("p1")
	first := f.srv
	f.mustLease("p1")
	doc, _, err := f.bucket.Get(t.Context(), "projects/p1/keys.json")
	if err != nil {
		t.Fatal(err)
	}
	if err := f.bucket.Delete(t.Context(), "projects/p1/keys.json"); err != nil {
		t.Fatal(err)
	}
	blobtest.Put(t, f.bucket, "projects/p1/keys.json", strings.Replace(string(doc), `"current"`, `"revision": 7, "hold": {"since_unix_ms": 1, "reason": "elsewhere"}, "current"`, 1))
	f.eventually("the hold", func() bool { _, err = f.lease("p1", ""); return rpc.Reason(err) == pb.ErrorDetail_KEY_REVOKED })
	if first != f.srv || !strings.Contains(err.Error(), "elsewhere") {
		t.Errorf("got %v", err)
	}
}

func TestStatusTellsGraceAndWhatIsAfterIt(t *testing.T) {
	f := newFixture(t)
	f.create("p1")
	f.restart(time.Minute, time.Hour)
	id := f.mustLease("p1")
	f.kms.cut.Store(true)
	var st *pb.KeyStatusResponse
	f.eventually("grace", func() bool { st = f.status("p1"); return st.State == "grace" })
	if left := time.Until(time.UnixMilli(st.UntilUnixMs)); left < 50*time.Minute || left > time.Hour {
		t.Errorf("the grace ends in %v, want less than an hour", left)
	}
	if len(st.Holders) != 1 || st.Holders[0].LeaseId != id || st.GraceMs != time.Hour.Milliseconds() || st.BoundMs != (checkInterval+time.Minute).Milliseconds() {
		t.Errorf("status %v", st)
	}
	f.eventually("renewal in grace", func() bool { again, err := f.lease("p1", id); return err == nil && again == id })
	// An answer that says nothing ends the grace, and silence after it does not bring it back.
	f.kms.cut.Store(false)
	f.kms.vague.Store(true)
	f.eventually("no grace", func() bool { return f.status("p1").State == "unreachable" })
	f.kms.cut.Store(true)
	for range 20 {
		if _, err := f.lease("p1", id); rpc.Reason(err) != pb.ErrorDetail_KEY_UNREACHABLE {
			t.Fatalf("a lease after an answer that says nothing: %v", err)
		}
		time.Sleep(checkInterval / 4)
	}
	f.kms.cut.Store(false)
	f.kms.vague.Store(false)
	f.eventually("active", func() bool { f.mustLease("p1"); return f.status("p1").State == "active" })
	st, err := f.srv.SetGrace(t.Context(), &pb.SetGraceRequest{Key: &pb.KeyRef{Project: "p1"}, GraceMs: 0})
	if err != nil || st.GraceMs != 0 {
		t.Fatalf("SetGrace: %v, %v", st, err)
	}
	f.kms.cut.Store(true)
	f.eventually("unreachable without grace", func() bool { return f.status("p1").State == "unreachable" })
	_, err = f.srv.SetGrace(t.Context(), &pb.SetGraceRequest{Key: &pb.KeyRef{Project: "p1"}, GraceMs: -1})
	wantCode(t, "a negative grace", err, codes.InvalidArgument, 0)
}

// Nobody asks for anything, and yet the denial is found and the lease ended.
func TestKeysWithLeasesAreCheckedByThemselves(t *testing.T) {
	f := newFixture(t)
	f.create("p1")
	id := f.mustLease("p1")
	if err := f.kms.Disable("dev"); err != nil {
		t.Fatal(err)
	}
	f.eventually("the end of the lease", func() bool { _, err := f.generate(id, dekContext("p1", "a")); return err != nil })
}

// One key's KMS does not answer: others are checked, leased and listed as ever.
func TestABlackHoleDelaysNoOtherKey(t *testing.T) {
	f := newFixture(t)
	f.create("p1")
	if err := f.kms.Create("hole"); err != nil {
		t.Fatal(err)
	}
	if _, err := f.srv.CreateProject(t.Context(), &pb.CreateProjectRequest{Project: "p2", Cmk: "hole"}); err != nil {
		t.Fatal(err)
	}
	f.mustLease("p2")
	hole := "hole"
	f.kms.hole.Store(&hole)
	id := f.mustLease("p1")
	before := f.kms.unwraps.Load()
	f.eventually("checks of p1", func() bool { return f.kms.unwraps.Load() > before+20 })
	if _, err := f.generate(id, dekContext("p1", "a")); err != nil {
		t.Errorf("p1: %v", err)
	}
	if err := f.kms.Disable("dev"); err != nil {
		t.Fatal(err)
	}
	f.eventually("p1's denial", func() bool { _, err := f.generate(id, dekContext("p1", "a")); return err != nil })
}

func TestKeysAreListedAndChecked(t *testing.T) {
	f := newFixture(t)
	f.create("p1")
	f.create("p2")
	if _, err := f.srv.CreateBranchKey(t.Context(), &pb.CreateBranchKeyRequest{Project: "p1", Branch: "b1"}); err != nil {
		t.Fatal(err)
	}
	f.revoke("p2", "")
	resp, err := f.srv.ListKeys(t.Context(), &pb.ListKeysRequest{})
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, k := range resp.Keys {
		got = append(got, k.Key+" "+k.State)
	}
	if text := strings.Join(got, ", "); text != "p1/b1 active, p1 active, p2 revoked" {
		t.Errorf("keys: %s", text)
	}
	before := f.kms.unwraps.Load()
	checked, err := f.srv.CheckKeys(t.Context(), &pb.CheckKeysRequest{Cmk: "local:dev"})
	if err != nil || strings.Join(checked.Keys, " ") != "p1 p1/b1 p2" || f.kms.unwraps.Load() < before+2 {
		t.Errorf("CheckKeys: %v, %v, %d calls", checked, err, f.kms.unwraps.Load()-before)
	}
	checked, err = f.srv.CheckKeys(t.Context(), &pb.CheckKeysRequest{Cmk: "other"})
	if err != nil || len(checked.Keys) != 0 {
		t.Errorf("CheckKeys of another CMK: %v, %v", checked, err)
	}
}

// A bucket that does not answer for a while is no revocation.
func TestBucketOutageEndsNoLease(t *testing.T) {
	f := newFixture(t)
	f.create("p1")
	id := f.mustLease("p1")
	for range 10_000 {
		f.faulty.FailNext(blobtest.OpGet, "projects/p1/keys.json", blobtest.Lost)
	}
	before := f.kms.unwraps.Load()
	f.eventually("checks without the bucket", func() bool { return f.kms.unwraps.Load() > before+3 })
	f.eventually("a renewal", func() bool { again, err := f.lease("p1", id); return err == nil && again == id })
	if _, _, err := f.faulty.Get(t.Context(), "projects/p1/keys.json"); err == nil {
		t.Error("the bucket answers again: the test has shown nothing")
	}
}

// watchStream is a node's end of Watch.
type watchStream struct {
	grpc.ServerStream
	ctx     context.Context
	notices chan *pb.KeyNotice
}

func (w *watchStream) Context() context.Context { return w.ctx }

func (w *watchStream) Send(n *pb.KeyNotice) error {
	select {
	case w.notices <- n:
		return nil
	case <-w.ctx.Done():
		return w.ctx.Err()
	}
}

func (f *fixture) watch() (notices <-chan *pb.KeyNotice, ended <-chan error) {
	w := &watchStream{ctx: f.t.Context(), notices: make(chan *pb.KeyNotice)}
	done := make(chan error, 1)
	go func() { done <- f.srv.Watch(&pb.WatchRequest{Node: "n1"}, w) }()
	return w.notices, done
}

// next waits for a notice of the key in the state.
func (f *fixture) next(notices <-chan *pb.KeyNotice, key, state string) {
	f.t.Helper()
	for n := range notices {
		if n.Key == key && n.State == state {
			return
		}
	}
}

func TestWatchersHearOfRevocationAndReturn(t *testing.T) {
	f := newFixture(t)
	f.create("p1")
	f.mustLease("p1")
	notices, _ := f.watch()
	f.revoke("p1", "")
	f.next(notices, "p1", "revoked")
	late, _ := f.watch() // one that comes now hears what is
	f.next(late, "p1", "revoked")
	if _, err := f.srv.ResumeKey(t.Context(), &pb.KeyRef{Project: "p1"}); err != nil {
		t.Fatal(err)
	}
	f.next(notices, "p1", "resuming")
	f.mustLease("p1")
	f.next(notices, "p1", "active")
	if err := f.kms.Disable("dev"); err != nil {
		t.Fatal(err)
	}
	f.next(notices, "p1", "revoked")
}

// A node that does not take its notices costs the others nothing; it is dropped.
func TestSlowWatchersAreDropped(t *testing.T) {
	f := newFixture(t)
	f.create("p1")
	f.mustLease("p1")
	slow, ended := f.watch()
	f.eventually("the watcher", func() bool { return f.srv.Watchers() == 1 })
	for range 1100 { // more than wait for it; none is taken
		f.srv.Announce("p1")
	}
	if n := f.srv.Watchers(); n != 0 {
		t.Errorf("%d watchers are left", n)
	}
	notices, _ := f.watch()
	f.revoke("p1", "")
	f.next(notices, "p1", "revoked")
	for open := true; open; {
		select {
		case <-slow:
		case err := <-ended:
			wantCode(t, "the slow one", err, codes.Unavailable, 0)
			open = false
		}
	}
}

// Whoever is refused learns who can end it: its clients are told, also when the key manager is gone by then.
func TestRefusalsSayWhoCanEndThem(t *testing.T) {
	f := newFixture(t)
	f.create("p1")
	f.mustLease("p1")
	refused := func() string {
		var by string
		f.eventually("refusal", func() bool {
			_, err := f.lease("p1", "")
			by = rpc.Detail(err).GetControlledBy()
			return rpc.Reason(err) == pb.ErrorDetail_KEY_REVOKED
		})
		return by
	}
	if err := f.kms.Disable("dev"); err != nil {
		t.Fatal(err)
	}
	if by := refused(); by != "development KMS key dev" {
		t.Errorf("a disabled CMK is controlled by %q", by)
	}
	if _, err := f.srv.RevokeKey(t.Context(), &pb.RevokeKeyRequest{Key: &pb.KeyRef{Project: "p1"}}); err != nil {
		t.Fatal(err)
	}
	if by := refused(); by != "holdfast key resume" {
		t.Errorf("a held key is controlled by %q", by)
	}
}
