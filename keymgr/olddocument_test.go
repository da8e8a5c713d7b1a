package keymgr_test

import (
	"context"
	"testing"

	"google.golang.org/grpc/codes"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/blob/blobtest"
	"github.com/holdfastdb/holdfast/keymgr"
)

// putBack makes the bucket have an older form of the key's document.
func (r *rotating) putBack(old []byte) {
	r.t.Helper()
	if err := r.bucket.Delete(r.t.Context(), "projects/p1/keys.json"); err != nil {
		r.t.Fatal(err)
	}
	blobtest.Put(r.t, r.bucket, "projects/p1/keys.json", string(old))
}

func (r *rotating) object() []byte {
	r.t.Helper()
	data, _, err := r.bucket.Get(r.t.Context(), "projects/p1/keys.json")
	if err != nil {
		r.t.Fatal(err)
	}
	return data
}

// Somebody who can write to the bucket puts an older document back: a hold is in force all the same, the KEKs that the older
// one lacks are kept, and the end of a hold is its end.
func TestAnOlderDocumentThatIsPutBack(t *testing.T) {
	r := newRotating(t)
	old := r.object()
	r.rotate()
	r.rotate()
	id := r.mustLease("p1")
	r.putBack(old)
	if st := r.revoke("p1", "a drill"); st.State != "revoked" || len(st.Holders) != 0 {
		t.Fatalf("revoked under an older document: %v", st)
	}
	_, err := r.lease("p1", id)
	wantCode(t, "the lease of before", err, codes.PermissionDenied, pb.ErrorDetail_KEY_REVOKED)
	r.restart(nil)
	_, err = r.lease("p1", "")
	wantCode(t, "after a restart", err, codes.PermissionDenied, pb.ErrorDetail_KEY_REVOKED)
	held := r.object()
	if _, err := r.srv.ResumeKey(t.Context(), p1); err != nil {
		t.Fatal(err)
	}
	r.mustLease("p1")
	r.putBack(held) // the hold that is over
	if st := r.revoke("p1", "another"); st.State != "revoked" {
		t.Errorf("revoked under an older document that was held: %v", st)
	}
	if _, err := r.srv.ResumeKey(t.Context(), p1); err != nil {
		t.Fatal(err)
	}
	r.putBack(old)
	if v := r.rotate(); v.Current != 4 || len(v.Keks) != 4 {
		t.Errorf("rotated over an older document: %v, want version 4 beside the three that were", v)
	}
}

// whileWrapping runs something once, in the midst of a call.
type whileWrapping struct {
	keymgr.Provider
	run func()
}

func (w *whileWrapping) Wrap(ctx context.Context, cmk string, ec keymgr.EncryptionContext, plain []byte) (keymgr.Wrapped, error) {
	if run := w.run; run != nil {
		w.run = nil
		run()
	}
	return w.Provider.Wrap(ctx, cmk, ec, plain)
}

// A key that is held back while a rotation is under way is not rotated, and nothing of it stays in memory.
func TestHeldBackWhileItIsRotated(t *testing.T) {
	r := newRotating(t)
	r.mustLease("p1")
	kms := &whileWrapping{Provider: r.kms2.Provider, run: func() { r.revoke("p1", "now") }}
	r.kms2.Provider = kms
	_, err := r.srv.RotateKEK(t.Context(), p1)
	wantCode(t, "the rotation", err, codes.PermissionDenied, pb.ErrorDetail_KEY_REVOKED)
	if n := r.srv.KEKs("p1"); n != 0 {
		t.Errorf("%d versions of a key that is held back are in memory", n)
	}
	v, err := r.srv.KeyVersions(t.Context(), p1)
	if err != nil || v.Current != 1 {
		t.Errorf("versions %v, %v", v, err)
	}
}
