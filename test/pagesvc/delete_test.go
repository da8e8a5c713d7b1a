package pagesvc

import (
	"os"
	"path/filepath"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/blob"
)

// A branch is deleted although its key is revoked; what is left of it is nothing, here and in the bucket, and the
// name can be used again.
func TestADeletedBranchLeavesNothing(t *testing.T) {
	w := imported(t)
	w.ring.Revoke()
	for range 2 { // as if the first answer was lost
		if _, err := w.client.DeleteBranch(t.Context(), &pb.DeleteBranchRequest{Project: project, Branch: branch}); err != nil {
			t.Fatal(err)
		}
	}
	err := w.store.List(t.Context(), "projects/"+project+"/branches/"+branch+"/", func(i blob.Info) error {
		t.Errorf("the bucket still has %s", i.Key)
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(filepath.Join(w.config.Dir, project, branch)); !os.IsNotExist(err) {
		t.Errorf("the local layers are still there: %v", err)
	}
	w.ring.Restore()
	attach := &pb.AttachRequest{Project: project, Branch: branch}
	if _, err := w.client.Attach(t.Context(), attach); status.Code(err) != codes.NotFound {
		t.Errorf("Attach of a deleted branch: %v, want NotFound", err)
	}
	if _, err := w.importDir(base.dir); err != nil {
		t.Fatal(err)
	}
	w.attach()
}
