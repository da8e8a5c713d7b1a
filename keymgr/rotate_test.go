package keymgr_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/blob"
	"github.com/holdfastdb/holdfast/internal/blob/blobtest"
	"github.com/holdfastdb/holdfast/keymgr"
)

// brokenKMS fails one call, counted over both kinds from the moment that it is armed.
type brokenKMS struct {
	keymgr.Provider
	wraps, unwraps atomic.Int64
	failAt         atomic.Int64 // the call that fails; 0: none
	calls          atomic.Int64
}

func (k *brokenKMS) fails(cmk string) error {
	if k.calls.Add(1) == k.failAt.Load() {
		return &keymgr.ProviderError{Outcome: keymgr.Unreachable, Op: "call", CMK: cmk, Err: errors.New("test: no answer")}
	}
	return nil
}

func (k *brokenKMS) Wrap(ctx context.Context, cmk string, ec keymgr.EncryptionContext, plain []byte) (keymgr.Wrapped, error) {
	k.wraps.Add(1)
	if err := k.fails(cmk); err != nil {
		return keymgr.Wrapped{}, err
	}
	return k.Provider.Wrap(ctx, cmk, ec, plain)
}

func (k *brokenKMS) Unwrap(ctx context.Context, cmk string, ec keymgr.EncryptionContext, w []byte) (keymgr.Unwrapped, error) {
	k.unwraps.Add(1)
	if err := k.fails(cmk); err != nil {
		return keymgr.Unwrapped{}, err
	}
	return k.Provider.Unwrap(ctx, cmk, ec, w)
}

// rotating is a fixture with a second CMK and a KMS that can be broken.
type rotating struct {
	*fixture
	kms2 *brokenKMS
}

func newRotating(t *testing.T) *rotating {
	f := newFixture(t)
	if err := f.kms.Create("other"); err != nil {
		t.Fatal(err)
	}
	f.create("p1")
	r := &rotating{f, &brokenKMS{Provider: f.kms}}
	r.restart(nil)
	return r
}

// restart starts another key manager over a bucket with these faults.
func (r *rotating) restart(decide func(blobtest.Op, string) blobtest.Fault) {
	r.t.Helper()
	if err := r.srv.Close(); err != nil {
		r.t.Fatal(err)
	}
	r.faulty = blobtest.NewFaulty(r.bucket, decide)
	srv, err := keymgr.New(keymgr.Config{Dir: r.auditDir(), BlobStore: r.faulty, Provider: r.kms2, CheckInterval: checkInterval, LeaseTTL: time.Minute})
	if err != nil {
		r.t.Fatal(err)
	}
	r.srv = srv
}

var p1 = &pb.KeyRef{Project: "p1"}

func (r *rotating) rotate() *pb.KeyVersionsResponse {
	r.t.Helper()
	v, err := r.srv.RotateKEK(r.t.Context(), p1)
	if err != nil {
		r.t.Fatal(err)
	}
	return v
}

// onlyCMK is the one CMK that the key needs; empty: it needs several, or a re-wrapping is under way.
func (r *rotating) onlyCMK() string {
	r.t.Helper()
	data, _, err := r.bucket.Get(r.t.Context(), "projects/p1/keys.json")
	if err != nil {
		r.t.Fatal(err)
	}
	var doc struct {
		CMK    string
		Rewrap any
		KEKs   []struct{ CMK string }
	}
	if err := json.Unmarshal(data, &doc); err != nil {
		r.t.Fatal(err)
	}
	for _, k := range doc.KEKs {
		if k.CMK != doc.CMK || doc.Rewrap != nil {
			return ""
		}
	}
	return doc.CMK
}

// underCMK waits until all that the key needs is one CMK.
func (r *rotating) underCMK(cmk string) {
	r.t.Helper()
	r.eventually("the key under "+cmk+" alone", func() bool { return r.onlyCMK() == cmk })
}

func (r *rotating) rewrapDEKs(lease string, list ...*pb.WrappedDEK) (*pb.RewrapDEKsResponse, error) {
	return r.srv.RewrapDEKs(r.t.Context(), &pb.UnwrapDEKsRequest{LeaseId: lease, Deks: list})
}

func TestRotationOfTheKEK(t *testing.T) {
	r := newRotating(t)
	id := r.mustLease("p1")
	c := dekContext("p1", "a")
	deks, err := r.generate(id, c)
	if err != nil {
		t.Fatal(err)
	}
	old := &pb.WrappedDEK{Context: c, Wrapped: deks[0].Wrapped}
	if resp, err := r.rewrapDEKs(id, old); err != nil || resp.KekVersion != 1 || !bytes.Equal(resp.Wrapped[0], old.Wrapped) {
		t.Errorf("with nothing to do: %v, %v", resp, err)
	}
	if v := r.rotate(); v.Current != 2 || len(v.Keks) != 2 || v.KmsCalls != 2 {
		t.Errorf("RotateKEK: %v", v)
	}
	if raw, err := r.unwrap(id, c, old.Wrapped); err != nil || !bytes.Equal(raw, deks[0].Plaintext) {
		t.Errorf("the old form after the rotation: %v", err)
	}
	resp, err := r.rewrapDEKs(id, old)
	if err != nil || resp.KekVersion != 2 || bytes.Equal(resp.Wrapped[0], old.Wrapped) {
		t.Fatalf("RewrapDEKs: %v, %v", resp, err)
	}
	_, err = r.rewrapDEKs(id, &pb.WrappedDEK{Context: dekContext("p1", "b"), Wrapped: old.Wrapped})
	wantCode(t, "re-wrapping under another object's name", err, codes.DataLoss, 0)
	_, err = r.rewrapDEKs("no lease", old)
	wantCode(t, "re-wrapping without a lease", err, codes.FailedPrecondition, 0)
	_, err = r.srv.RetireKEK(t.Context(), &pb.RetireKEKRequest{Key: p1, Version: 2})
	wantCode(t, "retiring the current version", err, codes.FailedPrecondition, 0)
	_, err = r.srv.RetireKEK(t.Context(), &pb.RetireKEKRequest{Key: p1, Version: 7})
	wantCode(t, "retiring what is not there", err, codes.FailedPrecondition, 0)
	r.eventually("retiring", func() bool {
		v, err := r.srv.RetireKEK(t.Context(), &pb.RetireKEKRequest{Key: p1, Version: 1})
		if err != nil && !strings.Contains(err.Error(), "try again then") {
			t.Fatal(err)
		}
		return err == nil && len(v.Keks) == 1
	})
	if _, err := r.srv.RetireKEK(t.Context(), &pb.RetireKEKRequest{Key: p1, Version: 1}); err != nil {
		t.Errorf("retiring again: %v", err)
	}
	_, err = r.unwrap(id, c, old.Wrapped)
	wantCode(t, "the old form after its version was retired", err, codes.OutOfRange, 0)
	for range 2 {
		if raw, err := r.unwrap(r.mustLease("p1"), c, resp.Wrapped[0]); err != nil || !bytes.Equal(raw, deks[0].Plaintext) {
			t.Errorf("the new form: %v", err)
		}
		r.restart(nil)
	}
	text := r.audit()
	for _, want := range []string{`"event":"kek.rotated"`, `"event":"dek.rewrapped"`, `"event":"kek.retired"`} {
		if !strings.Contains(text, want) {
			t.Errorf("the audit log lacks %s", want)
		}
	}
}

func TestRetiringWaitsForWhatIsUnderWay(t *testing.T) {
	f := newFixture(t)
	f.create("p1")
	if err := f.srv.Close(); err != nil {
		t.Fatal(err)
	}
	var err error
	f.srv, err = keymgr.New(keymgr.Config{Dir: f.auditDir(), BlobStore: f.faulty, Provider: f.kms, CheckInterval: time.Hour, LeaseTTL: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.srv.RotateKEK(t.Context(), p1); err != nil {
		t.Fatal(err)
	}
	_, err = f.srv.RetireKEK(t.Context(), &pb.RetireKEKRequest{Key: p1, Version: 1})
	wantCode(t, "retiring right after a rotation", err, codes.FailedPrecondition, 0)
}

// TestChangeOfTheCMK counts: whatever the number of DEKs, each KEK is unwrapped once and wrapped once.
func TestChangeOfTheCMK(t *testing.T) {
	r := newRotating(t)
	deks, err := r.generate(r.mustLease("p1"), dekContext("p1", "a"))
	if err != nil {
		t.Fatal(err)
	}
	r.rotate()
	r.rotate()
	for _, cmk := range []string{"other", "dev", "other"} { // and back
		w := r.kms2.wraps.Load()
		v, err := r.srv.Rewrap(t.Context(), &pb.RewrapRequest{Key: p1, Cmk: cmk})
		if err != nil || v.Cmk != cmk || len(v.Keks) != 3 {
			t.Fatalf("Rewrap: %v, %v", v, err)
		}
		// The regular checks unwrap as well, so calls to unwrap are taken from the answer.
		if wraps := r.kms2.wraps.Load() - w; wraps != 3+1 || v.KmsCalls != 3*2+2 {
			t.Errorf("%d calls to wrap and %d in all, want one for each of 3 KEKs, beside one for the test of the CMK, and 8", wraps, v.KmsCalls)
		}
		r.underCMK(cmk)
	}
	if v, err := r.srv.Rewrap(t.Context(), &pb.RewrapRequest{Key: p1}); err != nil || v.Cmk != "other" {
		t.Errorf("under its own CMK again: %v, %v", v, err)
	}
	if err := r.kms.Disable("dev"); err != nil {
		t.Fatal(err)
	}
	r.restart(nil)
	raw, err := r.unwrap(r.mustLease("p1"), dekContext("p1", "a"), deks[0].Wrapped)
	if err != nil || !bytes.Equal(raw, deks[0].Plaintext) {
		t.Errorf("without the former CMK: %v", err)
	}
	if err := r.kms.Disable("other"); err != nil {
		t.Fatal(err)
	}
	r.eventually("the new CMK's denial", func() bool {
		_, err := r.lease("p1", "")
		return status.Code(err) == codes.PermissionDenied
	})
}

// TestNewVersionOfTheCMK leaves nothing under the former one.
func TestNewVersionOfTheCMK(t *testing.T) {
	r := newRotating(t)
	r.rotate()
	if err := r.kms.Rotate("dev"); err != nil {
		t.Fatal(err)
	}
	v, err := r.srv.Rewrap(t.Context(), &pb.RewrapRequest{Key: p1})
	if err != nil {
		t.Fatal(err)
	}
	for _, k := range v.Keks {
		if k.CmkVersion != "2" {
			t.Errorf("version %d of the KEK is under version %s of the CMK, want 2", k.Version, k.CmkVersion)
		}
	}
}

func TestChangeToACMKThatCannotBeUsed(t *testing.T) {
	r := newRotating(t)
	if err := r.kms.Disable("other"); err != nil {
		t.Fatal(err)
	}
	for _, cmk := range []string{"other", "none", strings.Repeat("x", 3000)} {
		if _, err := r.srv.Rewrap(t.Context(), &pb.RewrapRequest{Key: p1, Cmk: cmk}); err == nil {
			t.Errorf("changed to %.20s", cmk)
		}
	}
	r.underCMK("dev") // nothing was begun
	if _, err := r.lease("p1", ""); err != nil && !strings.Contains(err.Error(), "took longer") {
		t.Errorf("a lease under the CMK that stays: %v", err)
	}
	if err := r.srv.Close(); err != nil {
		t.Fatal(err)
	}
	srv, err := keymgr.New(keymgr.Config{Dir: r.auditDir(), BlobStore: r.bucket, Provider: r.kms, CheckInterval: checkInterval, CMKs: []string{"dev"}})
	if err != nil {
		t.Fatal(err)
	}
	r.srv = srv
	_, err = srv.Rewrap(t.Context(), &pb.RewrapRequest{Key: p1, Cmk: "other"})
	wantCode(t, "a CMK that the configuration does not list", err, codes.PermissionDenied, 0)
}

// TestChangeOfTheCMKSurvivesACrashAtEachWrite: the key manager dies at the n-th write to the bucket, which may
// have taken effect or not. Another one finishes, with nobody asking, and every DEK opens at each point.
func TestChangeOfTheCMKSurvivesACrashAtEachWrite(t *testing.T) {
	for _, fault := range []blobtest.Fault{blobtest.Lost, blobtest.Unreported} {
		for n := int64(1); ; n++ {
			r := newRotating(t)
			lease := r.mustLease("p1")
			deks, err := r.generate(lease, dekContext("p1", "a"))
			if err != nil {
				t.Fatal(err)
			}
			r.rotate()
			var writes int64
			r.restart(func(op blobtest.Op, _ string) blobtest.Fault {
				if op != blobtest.OpCreate && op != blobtest.OpSwap && op != blobtest.OpDelete {
					return blobtest.None
				}
				writes++
				switch {
				case writes < n:
					return blobtest.None
				case writes == n:
					return fault
				}
				return blobtest.Lost // it is dead
			})
			ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
			_, err = r.srv.Rewrap(ctx, &pb.RewrapRequest{Key: p1, Cmk: "other"})
			cancel()
			r.restart(nil)
			r.eventually("nothing left to finish", func() bool {
				left := 0
				if err := r.bucket.List(t.Context(), "rewrapping/", func(blob.Info) error { left++; return nil }); err != nil {
					t.Fatal(err)
				}
				return left == 0
			})
			if r.onlyCMK() == "" {
				t.Fatalf("write %d, fault %d: the change is neither done nor undone, and nobody goes on with it", n, fault)
			}
			if raw, err := r.unwrap(r.mustLease("p1"), dekContext("p1", "a"), deks[0].Wrapped); err != nil || !bytes.Equal(raw, deks[0].Plaintext) {
				t.Fatalf("write %d, fault %d: %v", n, fault, err)
			}
			if err == nil {
				r.underCMK("other")
				if n < 4 {
					t.Errorf("a change made %d writes: too few to be all", n)
				}
				break
			}
		}
	}
}

// TestChangeOfTheCMKGoesOnAfterTheKMSFailed at each of its calls.
func TestChangeOfTheCMKGoesOnAfterTheKMSFailed(t *testing.T) {
	for n := int64(1); n <= 6; n++ {
		r := newRotating(t)
		r.rotate()
		r.kms2.failAt.Store(r.kms2.calls.Load() + n)
		if _, err := r.srv.Rewrap(t.Context(), &pb.RewrapRequest{Key: p1, Cmk: "other"}); err == nil {
			t.Logf("call %d was another's", n)
		} else if n <= 2 {
			r.underCMK("dev") // the CMK could not be tried: nothing was begun
			continue
		}
		r.underCMK("other")
	}
}
