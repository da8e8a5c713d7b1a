package pagesvc

import (
	"testing"

	"google.golang.org/grpc/codes"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/auxfile"
)

// uses is what a branch needs of a version of the KEK.
func (w *world) uses(version uint32) (deks int64) {
	w.t.Helper()
	r, err := w.client.KeyUse(w.t.Context(), &pb.KeyUseRequest{Project: project, Branch: branch})
	if err != nil {
		w.t.Fatal(err)
	}
	for _, u := range r.Uses {
		if u.KekVersion == version {
			deks += u.Deks
		}
	}
	return deks
}

// A message of aux files is under a DEK of its own that is wrapped inside of the WAL. As long as that WAL
// may be read again, the version of the KEK is in use; if it were retired, the file would be lost.
func TestMessagesKeepAnOldVersionOfTheKEK(t *testing.T) {
	w := imported(t)
	w.say(auxfile.Change{Path: auxfile.Settings, Content: []byte("said before")})
	if got := w.settings(); got != "said before" {
		t.Fatalf("the settings are %q", got)
	}
	if n := w.uses(1); n != 2 {
		t.Errorf("version 1 has %d uses, want the import's layer and the message", n)
	}
	w.ring.RotateKEK()
	w.say(auxfile.Change{Path: auxfile.Slots + "/none/state", Removed: true})
	w.wait(w.log.end)
	before := w.uses(1)
	r, err := w.client.RewrapBranch(t.Context(), &pb.RewrapBranchRequest{Project: project, Branch: branch})
	if err != nil || r.Rewrapped != 1 || r.KekVersion != 2 || r.BytesWritten == 0 {
		t.Fatalf("RewrapBranch: %v, %v", r, err)
	}
	if n := w.uses(1); before != 2 || n != 0 || w.uses(2) == 0 {
		t.Errorf("version 1 had %d uses and has %d", before, n)
	}
	w.ring.RetireKEK(1)
	w.end()
	w.begin()
	w.attach()
	if got := w.settings(); got != "said before" {
		t.Errorf("after the version was retired, the settings are %q", got)
	}
	_, err = w.client.KeyUse(t.Context(), &pb.KeyUseRequest{Project: project, Branch: "none"})
	wantCode(t, err, codes.NotFound, 0)
	_, err = w.client.RewrapBranch(t.Context(), &pb.RewrapBranchRequest{Project: project, Branch: "none"})
	wantCode(t, err, codes.NotFound, 0)
}

// Under a key that cannot be used, what uses it is still told.
func TestKeyUseNeedsNoKey(t *testing.T) {
	w := imported(t)
	w.ring.Revoke()
	if n := w.uses(1); n != 1 {
		t.Errorf("version 1 has %d uses, want 1", n)
	}
	_, err := w.client.RewrapBranch(t.Context(), &pb.RewrapBranchRequest{Project: project, Branch: branch})
	wantCode(t, err, codes.PermissionDenied, pb.ErrorDetail_KEY_REVOKED)
}
