package keymgr_test

import (
	"bytes"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/blob/blobtest"
)

// leaseOf takes out a lease on the key that a branch uses and tells which that is.
func (f *fixture) leaseOf(project, branch string) (id, key string) {
	f.t.Helper()
	f.eventually("lease on "+project+"/"+branch, func() bool {
		resp, err := f.srv.Lease(f.t.Context(), &pb.LeaseRequest{Project: project, Branch: branch, Node: "n1"})
		if err != nil && status.Code(err) != codes.Unavailable {
			f.t.Fatal(err)
		}
		id, key = resp.GetLeaseId(), resp.GetKey()
		return err == nil
	})
	return id, key
}

func branchContext(branch string) *pb.DEKContext {
	return &pb.DEKContext{Purpose: "layer", Project: "p1", Branch: branch, Object: "a"}
}

func TestBranchWithAKeyOfItsOwn(t *testing.T) {
	f := newFixture(t)
	f.create("p1")
	if err := f.kms.Create("theirs"); err != nil {
		t.Fatal(err)
	}
	for range 2 { // idempotent
		resp, err := f.srv.CreateBranchKey(t.Context(), &pb.CreateBranchKeyRequest{Project: "p1", Branch: "own", Cmk: "theirs"})
		if err != nil || resp.KekVersion != 1 {
			t.Fatalf("CreateBranchKey: %v, %v", resp, err)
		}
	}
	own, key := f.leaseOf("p1", "own")
	if key != "p1/own" {
		t.Errorf("the lease is of key %q, want p1/own", key)
	}
	shared, key := f.leaseOf("p1", "plain")
	if key != "p1" {
		t.Errorf("the lease is of key %q, want p1", key)
	}
	deks, err := f.generate(own, branchContext("own"))
	if err != nil {
		t.Fatal(err)
	}
	if raw, err := f.unwrap(own, branchContext("own"), deks[0].Wrapped); err != nil || !bytes.Equal(raw, deks[0].Plaintext) {
		t.Errorf("under its own lease: %v", err)
	}
	_, err = f.unwrap(shared, branchContext("own"), deks[0].Wrapped)
	wantCode(t, "under the project's lease", err, codes.PermissionDenied, 0)
	_, err = f.generate(own, branchContext("plain"))
	wantCode(t, "another branch under the branch's lease", err, codes.PermissionDenied, 0)
	// Its CMK alone decides over it.
	if err := f.kms.Disable("theirs"); err != nil {
		t.Fatal(err)
	}
	f.eventually("refusal", func() bool {
		_, err := f.srv.Lease(t.Context(), &pb.LeaseRequest{Project: "p1", Branch: "own", Node: "n1"})
		return err != nil && strings.Contains(err.Error(), "denied")
	})
	if _, err := f.generate(shared, branchContext("plain")); err != nil {
		t.Errorf("the project's key was not denied: %v", err)
	}
	st, err := f.srv.KeyStatus(t.Context(), &pb.KeyStatusRequest{Project: "p1", Branch: "own"})
	if err != nil || st.State != "revoked" || st.Key != "p1/own" || st.Cmk != "theirs" {
		t.Errorf("KeyStatus: %v, %v", st, err)
	}
}

// A branch's KEK under the project's CMK, moved to another branch or to the project, does not open.
func TestMovedBranchKeysAreRefused(t *testing.T) {
	f := newFixture(t)
	f.create("p1")
	if _, err := f.srv.CreateBranchKey(t.Context(), &pb.CreateBranchKeyRequest{Project: "p1", Branch: "b1"}); err != nil {
		t.Fatal(err)
	}
	doc, _, err := f.bucket.Get(t.Context(), "projects/p1/branches/b1/keys.json")
	if err != nil {
		t.Fatal(err)
	}
	moved := strings.ReplaceAll(string(doc), `"branch": "b1"`, `"branch": "b2"`)
	if moved == string(doc) {
		t.Fatal("the test does not know the document's form")
	}
	blobtest.Put(t, f.bucket, "projects/p1/branches/b2/keys.json", moved)
	blobtest.Put(t, f.bucket, "projects/p2/keys.json", strings.ReplaceAll(strings.ReplaceAll(string(doc), `"branch": "b1",`, ""), `"p1"`, `"p2"`))
	for _, req := range []*pb.LeaseRequest{{Project: "p1", Branch: "b2", Node: "n"}, {Project: "p2", Node: "n"}} {
		if _, err := f.srv.Lease(t.Context(), req); err == nil {
			t.Errorf("a lease on a KEK that was moved to %s/%s", req.Project, req.Branch)
		}
	}
	f.leaseOf("p1", "b1")
}

func TestBranchKeysNeedAProjectAndABranch(t *testing.T) {
	f := newFixture(t)
	f.create("p1")
	_, err := f.srv.CreateBranchKey(t.Context(), &pb.CreateBranchKeyRequest{Project: "p9", Branch: "b1"})
	wantCode(t, "an unknown project", err, codes.NotFound, 0)
	for _, branch := range []string{"", "../x", "B"} {
		_, err = f.srv.CreateBranchKey(t.Context(), &pb.CreateBranchKeyRequest{Project: "p1", Branch: branch})
		wantCode(t, "branch "+branch, err, codes.InvalidArgument, 0)
	}
}
