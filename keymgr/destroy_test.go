package keymgr_test

import (
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/blob"
	"github.com/holdfastdb/holdfast/internal/blob/blobtest"
)

// objects lists what the bucket has of a branch's key.
func (f *fixture) objects(branch string) (list []string) {
	f.t.Helper()
	for _, prefix := range []string{"projects/p1/branches/" + branch + "/", "keyindex/p1/branches/" + branch} {
		if err := f.faulty.List(f.t.Context(), prefix, func(i blob.Info) error { list = append(list, i.Key); return nil }); err != nil {
			f.t.Fatal(err)
		}
	}
	return list
}

// A destroyed key is gone at once, its leases with it, although its CMK is disabled; the project's goes on.
func TestDestroyedBranchKeyIsGone(t *testing.T) {
	f := newFixture(t)
	f.create("p1")
	ref := &pb.KeyRef{Project: "p1", Branch: "own"}
	for _, fail := range []struct {
		prefix string
		fault  blobtest.Fault
	}{{"projects/", blobtest.Lost}, {"projects/", blobtest.Unreported}, {"keyindex/", blobtest.Lost}, {"keyindex/", blobtest.Unreported}} {
		if _, err := f.srv.CreateBranchKey(t.Context(), &pb.CreateBranchKeyRequest{Project: "p1", Branch: "own"}); err != nil {
			t.Fatal(err)
		}
		id, _ := f.leaseOf("p1", "own")
		deks, err := f.generate(id, branchContext("own"))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.srv.RevokeKey(t.Context(), &pb.RevokeKeyRequest{Key: ref}); err != nil {
			t.Fatal(err)
		}
		f.faulty.FailNext(blobtest.OpDelete, fail.prefix, fail.fault)
		if _, err := f.srv.DestroyBranchKey(t.Context(), ref); err == nil {
			t.Errorf("%v: it succeeded", fail)
		}
		for range 2 { // idempotent
			if _, err := f.srv.DestroyBranchKey(t.Context(), ref); err != nil {
				t.Fatal(err)
			}
		}
		if left := f.objects("own"); len(left) > 0 {
			t.Errorf("%v: the bucket still has %v", fail, left)
		}
		if _, err := f.unwrap(id, branchContext("own"), deks[0].Wrapped); err == nil {
			t.Error("a DEK under a destroyed key was opened")
		}
		if _, err := f.srv.Lease(t.Context(), &pb.LeaseRequest{Project: "p1", Branch: "own", Node: "n1"}); status.Code(err) != codes.NotFound {
			t.Errorf("lease on a destroyed key: %v, want NotFound", err)
		}
	}
	if _, key := f.leaseOf("p1", "plain"); key != "p1" {
		t.Errorf("the project's key is %q", key)
	}
	list, err := f.srv.ListKeys(t.Context(), &pb.ListKeysRequest{})
	if err != nil || len(list.Keys) != 1 {
		t.Errorf("keys: %v, %v; want the project's alone", list.GetKeys(), err)
	}
	if _, err := f.srv.DestroyBranchKey(t.Context(), &pb.KeyRef{Project: "p1"}); err == nil || !strings.Contains(err.Error(), "branch is missing") {
		t.Errorf("destroying a project's key: %v, want a refusal", err)
	}
}
