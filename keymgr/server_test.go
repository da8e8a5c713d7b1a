package keymgr_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/blob"
	"github.com/holdfastdb/holdfast/internal/blob/blobtest"
	"github.com/holdfastdb/holdfast/internal/blob/dirblob"
	"github.com/holdfastdb/holdfast/internal/rpc"
	"github.com/holdfastdb/holdfast/internal/seal"
	"github.com/holdfastdb/holdfast/keymgr"
	"github.com/holdfastdb/holdfast/keymgr/localkms"
)

// countingKMS counts calls and can be cut off.
type countingKMS struct {
	*localkms.KMS
	unwraps atomic.Int64
	cut     atomic.Bool
	vague   atomic.Bool            // answers, but says nothing
	hole    atomic.Pointer[string] // calls for this CMK are never answered
}

func (k *countingKMS) Unwrap(ctx context.Context, cmk string, ec keymgr.EncryptionContext, w []byte) (keymgr.Unwrapped, error) {
	k.unwraps.Add(1)
	if k.cut.Load() {
		return keymgr.Unwrapped{}, &keymgr.ProviderError{Outcome: keymgr.Unreachable, Op: "unwrap", CMK: cmk, Err: errors.New("no route to host")}
	}
	if k.vague.Load() {
		return keymgr.Unwrapped{}, &keymgr.ProviderError{Outcome: keymgr.Unknown, Op: "unwrap", CMK: cmk, Err: errors.New("our credentials have run out")}
	}
	if hole := k.hole.Load(); hole != nil && *hole == cmk {
		<-ctx.Done()
		return keymgr.Unwrapped{}, &keymgr.ProviderError{Outcome: keymgr.Unreachable, Op: "unwrap", CMK: cmk, Err: ctx.Err()}
	}
	return k.KMS.Unwrap(ctx, cmk, ec, w)
}

type fixture struct {
	t      *testing.T
	dir    string
	kms    *countingKMS
	bucket blob.Store
	faulty *blobtest.Faulty
	srv    *keymgr.Server
}

const checkInterval = 40 * time.Millisecond

func newFixture(t *testing.T) *fixture {
	t.Helper()
	dir := t.TempDir()
	kms, err := localkms.Open(filepath.Join(dir, "keys.json"))
	if err != nil {
		t.Fatal(err)
	}
	if err := kms.Create("dev"); err != nil {
		t.Fatal(err)
	}
	bucket, err := dirblob.Open(filepath.Join(dir, "bucket"))
	if err != nil {
		t.Fatal(err)
	}
	f := &fixture{t: t, dir: dir, kms: &countingKMS{KMS: kms}, bucket: bucket, faulty: blobtest.NewFaulty(bucket, nil)}
	if err := os.Mkdir(f.auditDir(), 0o700); err != nil {
		t.Fatal(err)
	}
	f.start()
	t.Cleanup(func() { f.srv.Close() })
	return f
}

func (f *fixture) auditDir() string { return filepath.Join(f.dir, "audit") }

func (f *fixture) start() { f.t.Helper(); f.startWith(time.Minute, 0) }

// startWith starts the key manager with leases, and a grace, of their own lengths.
func (f *fixture) startWith(ttl, grace time.Duration) {
	f.t.Helper()
	srv, err := keymgr.New(keymgr.Config{Dir: f.auditDir(), BlobStore: f.faulty, Provider: f.kms, CheckInterval: checkInterval, LeaseTTL: ttl, Grace: &grace})
	if err != nil {
		f.t.Fatal(err)
	}
	f.srv = srv
}

func (f *fixture) create(project string) {
	f.t.Helper()
	resp, err := f.srv.CreateProject(f.t.Context(), &pb.CreateProjectRequest{Project: project, Cmk: "dev"})
	if err != nil || resp.KekVersion != 1 {
		f.t.Fatalf("CreateProject: %v, %v", resp, err)
	}
}

func (f *fixture) lease(project, id string) (string, error) {
	resp, err := f.srv.Lease(f.t.Context(), &pb.LeaseRequest{Project: project, Node: "n1", LeaseId: id})
	return resp.GetLeaseId(), err
}

// tryLease puts up with a busy machine, on which a check may take longer than the tests'
// short check interval, and with a failed check that is not repeated at once.
func (f *fixture) tryLease(project, node string) (string, bool) {
	resp, err := f.srv.Lease(f.t.Context(), &pb.LeaseRequest{Project: project, Node: node})
	if err != nil && status.Code(err) != codes.Unavailable {
		f.t.Error(err)
	}
	return resp.GetLeaseId(), err == nil
}

func (f *fixture) mustLease(project string) string {
	f.t.Helper()
	var id string
	f.eventually("lease on "+project, func() (ok bool) { id, ok = f.tryLease(project, "n1"); return ok })
	return id
}

func dekContext(project, object string) *pb.DEKContext {
	return &pb.DEKContext{Purpose: "layer", Project: project, Branch: "b", Object: object}
}

func (f *fixture) generate(lease string, contexts ...*pb.DEKContext) ([]*pb.DEK, error) {
	resp, err := f.srv.GenerateDEKs(f.t.Context(), &pb.GenerateDEKsRequest{LeaseId: lease, Contexts: contexts})
	return resp.GetDeks(), err
}

func (f *fixture) unwrap(lease string, c *pb.DEKContext, wrapped []byte) ([]byte, error) {
	resp, err := f.srv.UnwrapDEKs(f.t.Context(), &pb.UnwrapDEKsRequest{LeaseId: lease, Deks: []*pb.WrappedDEK{{Context: c, Wrapped: wrapped}}})
	if err != nil {
		return nil, err
	}
	return resp.Plaintexts[0], nil
}

func wantCode(t *testing.T, what string, err error, code codes.Code, reason pb.ErrorDetail_Reason) {
	t.Helper()
	if status.Code(err) != code || rpc.Reason(err) != reason {
		t.Errorf("%s: %v (reason %v), want %v and reason %v", what, err, rpc.Reason(err), code, reason)
	}
}

func (f *fixture) audit() string {
	f.t.Helper()
	if _, err := keymgr.VerifyAudit(f.auditDir()); err != nil {
		f.t.Fatal(err)
	}
	files, err := filepath.Glob(filepath.Join(f.auditDir(), "audit-*.jsonl"))
	if err != nil {
		f.t.Fatal(err)
	}
	var all []byte
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			f.t.Fatal(err)
		}
		all = append(all, text...)
	}
	return string(all)
}

func TestDEKsAreMadeAndOpened(t *testing.T) {
	f := newFixture(t)
	f.create("p1")
	id := f.mustLease("p1")
	deks, err := f.generate(id, dekContext("p1", "a"), dekContext("p1", "b"))
	if err != nil || len(deks) != 2 || bytes.Equal(deks[0].Plaintext, deks[1].Plaintext) || len(deks[0].Plaintext) != seal.KeySize {
		t.Fatalf("GenerateDEKs: %d, %v", len(deks), err)
	}
	for i, object := range []string{"a", "b"} {
		raw, err := f.unwrap(id, dekContext("p1", object), deks[i].Wrapped)
		if err != nil || !bytes.Equal(raw, deks[i].Plaintext) {
			t.Errorf("UnwrapDEKs of %s: %v", object, err)
		}
	}
	_, err = f.unwrap(id, dekContext("p1", "b"), deks[0].Wrapped)
	wantCode(t, "another object's DEK", err, codes.DataLoss, 0)
	text := f.audit()
	for _, want := range []string{`"event":"cmk.wrap"`, `"event":"lease.granted"`, `"objects":["layer/b/a","layer/b/b"]`, `"request_id":"local-`,
		`"event":"dek.unwrapped","outcome":"failed"`} {
		if !strings.Contains(text, want) {
			t.Errorf("the audit log lacks %s", want)
		}
	}
}

func TestNothingIsInTheClear(t *testing.T) {
	f := newFixture(t)
	f.create("p1")
	deks, err := f.generate(f.mustLease("p1"), dekContext("p1", "a"))
	if err != nil {
		t.Fatal(err)
	}
	doc, _, err := f.bucket.Get(t.Context(), "projects/p1/keys.json")
	if err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{string(doc), f.audit()} {
		for _, form := range []string{"%s", "%x", "%X"} {
			if strings.Contains(text, fmt.Sprintf(form, deks[0].Plaintext)) {
				t.Error("a DEK is in the clear")
			}
		}
	}
}

func TestLeasesGuardTheirProject(t *testing.T) {
	f := newFixture(t)
	f.create("p1")
	f.create("p2")
	id := f.mustLease("p1")
	_, err := f.generate(id, dekContext("p2", "a"))
	wantCode(t, "another project's context", err, codes.PermissionDenied, 0)
	_, err = f.generate("nonsense", dekContext("p1", "a"))
	wantCode(t, "no lease", err, codes.FailedPrecondition, 0)
	_, err = f.generate(id)
	wantCode(t, "no contexts", err, codes.InvalidArgument, 0)
	_, err = f.generate(id, make([]*pb.DEKContext, 2000)...)
	wantCode(t, "too many", err, codes.InvalidArgument, 0)
	_, err = f.generate(id, nil)
	wantCode(t, "a missing context", err, codes.InvalidArgument, 0)
	_, err = f.lease("absent", "")
	wantCode(t, "an absent project", err, codes.NotFound, 0)
	_, err = f.lease("../p1", "")
	wantCode(t, "a hostile project", err, codes.InvalidArgument, 0)
	deks, err := f.generate(id, dekContext("p1", "a"))
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.unwrap(f.mustLease("p2"), dekContext("p2", "a"), deks[0].Wrapped)
	wantCode(t, "moved to another tenant", err, codes.DataLoss, 0)
	_, err = f.unwrap(id, dekContext("p1", "a"), []byte("x"))
	wantCode(t, "no wrapped DEK", err, codes.DataLoss, 0)
	for i := range deks[0].Wrapped[:6] { // format version, KEK version, nonce: permanent, whatever was changed
		changed := bytes.Clone(deks[0].Wrapped)
		changed[i] ^= 0x80
		_, err = f.unwrap(id, dekContext("p1", "a"), changed)
		wantCode(t, fmt.Sprintf("wrapped DEK with byte %d changed", i), err, codes.DataLoss, 0)
	}
}

// eventually renews until what is wanted comes: the check interval must pass.
func (f *fixture) eventually(what string, done func() bool) {
	f.t.Helper()
	for end := time.Now().Add(2 * time.Minute); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if done() {
			return
		}
	}
	f.t.Fatalf("%s: did not happen", what)
}

func TestDisabledKeyEndsLeasesAndEnabledResumes(t *testing.T) {
	f := newFixture(t)
	f.create("p1")
	id := f.mustLease("p1")
	deks, err := f.generate(id, dekContext("p1", "a"))
	if err != nil {
		t.Fatal(err)
	}
	if err := f.kms.Disable("dev"); err != nil {
		t.Fatal(err)
	}
	// On a busy machine an answer may be older than the short check interval when it comes.
	f.eventually("revocation", func() bool { _, err = f.lease("p1", id); return rpc.Reason(err) == pb.ErrorDetail_KEY_REVOKED })
	wantCode(t, "renewal", err, codes.PermissionDenied, pb.ErrorDetail_KEY_REVOKED)
	_, err = f.unwrap(id, dekContext("p1", "a"), deks[0].Wrapped)
	wantCode(t, "unwrap under the ended lease", err, codes.FailedPrecondition, 0)
	st, err := f.srv.KeyStatus(t.Context(), &pb.KeyStatusRequest{Project: "p1"})
	if err != nil || st.State != "revoked" || st.Cmk != "dev" || st.KekVersion != 1 || !strings.Contains(st.ProviderError, "disabled") || st.CheckedUnixMs == 0 {
		t.Errorf("KeyStatus = %v, %v", st, err)
	}
	if err := f.kms.Enable("dev"); err != nil {
		t.Fatal(err)
	}
	f.eventually("resumption", func() bool { id, err = f.lease("p1", id); return err == nil })
	if raw, err := f.unwrap(id, dekContext("p1", "a"), deks[0].Wrapped); err != nil || !bytes.Equal(raw, deks[0].Plaintext) {
		t.Errorf("after enabling: %v", err)
	}
	text := f.audit()
	for _, want := range []string{`"event":"lease.revoked"`, `"event":"kek.forgotten"`, `"event":"cmk.unwrap","outcome":"denied"`, `"event":"lease.refused","outcome":"denied"`} {
		if !strings.Contains(text, want) {
			t.Errorf("the audit log lacks %s", want)
		}
	}
}

func TestUnreachableKMSEndsNoLease(t *testing.T) {
	f := newFixture(t)
	f.create("p1")
	id := f.mustLease("p1")
	f.kms.cut.Store(true)
	var err error
	f.eventually("refusal", func() bool { _, err = f.lease("p1", id); return err != nil })
	wantCode(t, "renewal", err, codes.Unavailable, pb.ErrorDetail_KEY_UNREACHABLE)
	if _, err := f.generate(id, dekContext("p1", "a")); err != nil {
		t.Errorf("the lease lives, and the KEK is in memory: %v", err)
	}
	f.kms.cut.Store(false)
	var again string
	f.eventually("renewal", func() bool { again, err = f.lease("p1", id); return err == nil })
	if again != id {
		t.Error("the lease was lost")
	}
}

func TestOneCheckServesManyNodes(t *testing.T) {
	f := newFixture(t)
	f.create("p1")
	var wg sync.WaitGroup
	began := time.Now()
	for i := range 50 {
		wg.Go(func() {
			for ok := false; !ok; _, ok = f.tryLease("p1", fmt.Sprint("n", i)) {
			}
		})
	}
	wg.Wait()
	if n, most := f.kms.unwraps.Load(), 1+int64(time.Since(began)/checkInterval); n > most {
		t.Errorf("%d calls to the KMS, want at most %d", n, most)
	}
}

func TestCreateProjectIsIdempotentAlsoWhenAReplyIsLost(t *testing.T) {
	for _, fault := range []blobtest.Fault{blobtest.None, blobtest.Lost, blobtest.Unreported} {
		f := newFixture(t)
		f.faulty.FailNext(blobtest.OpCreate, "projects/p1/", fault)
		req := &pb.CreateProjectRequest{Project: "p1", Cmk: "dev"}
		_, err := f.srv.CreateProject(t.Context(), req)
		if wantErr := fault == blobtest.Lost; (err != nil) != wantErr {
			t.Errorf("fault %d: %v", fault, err)
		}
		f.create("p1")
		before, _, err := f.bucket.Get(t.Context(), "projects/p1/keys.json")
		if err != nil {
			t.Fatal(err)
		}
		deks, err := f.generate(f.mustLease("p1"), dekContext("p1", "a"))
		if err != nil {
			t.Fatal(err)
		}
		f.create("p1")
		after, _, err := f.bucket.Get(t.Context(), "projects/p1/keys.json")
		if err != nil || !bytes.Equal(before, after) {
			t.Errorf("fault %d: a second CreateProject changed the keys, %v", fault, err)
		}
		_, err = f.srv.CreateProject(t.Context(), &pb.CreateProjectRequest{Project: "p1", Cmk: "other"})
		wantCode(t, "another CMK", err, codes.FailedPrecondition, 0)
		// A restart loses leases and nothing else.
		if err := f.srv.Close(); err != nil {
			t.Fatal(err)
		}
		f.start()
		id := f.mustLease("p1")
		if raw, err := f.unwrap(id, dekContext("p1", "a"), deks[0].Wrapped); err != nil || !bytes.Equal(raw, deks[0].Plaintext) {
			t.Errorf("fault %d, after a restart: %v", fault, err)
		}
		f.srv.Close()
	}
}

func TestRotatedCMKStillOpens(t *testing.T) {
	f := newFixture(t)
	f.create("p1")
	if err := f.kms.Rotate("dev"); err != nil {
		t.Fatal(err)
	}
	f.mustLease("p1")
}

func TestKeysOfAnotherProjectAreRefused(t *testing.T) {
	f := newFixture(t)
	f.create("p1")
	doc, _, err := f.bucket.Get(t.Context(), "projects/p1/keys.json")
	if err != nil {
		t.Fatal(err)
	}
	// Moved as it is, and moved with its name changed.
	for i, moved := range []string{string(doc), strings.ReplaceAll(string(doc), `"p1"`, `"q1"`), "{", "null", `{"format":1,"project":"q3","cmk":"x","current":9}`} {
		project := fmt.Sprint("q", i)
		blobtest.Put(t, f.bucket, "projects/"+project+"/keys.json", moved)
		if _, err := f.lease(project, ""); err == nil {
			t.Errorf("case %d: a lease on moved keys", i)
		}
	}
}

func TestFailsClosedWithoutAuditLog(t *testing.T) {
	f := newFixture(t)
	f.create("p1")
	id := f.mustLease("p1")
	deks, err := f.generate(id, dekContext("p1", "a"))
	if err != nil {
		t.Fatal(err)
	}
	mend := keymgr.BreakAudit(t, f.srv)
	_, err = f.generate(id, dekContext("p1", "b"))
	wantCode(t, "GenerateDEKs", err, codes.Unavailable, 0)
	_, err = f.unwrap(id, dekContext("p1", "a"), deks[0].Wrapped)
	wantCode(t, "UnwrapDEKs", err, codes.Unavailable, 0)
	_, err = f.lease("p1", "")
	if err == nil {
		t.Error("a lease was granted")
	}
	_, err = f.srv.CreateProject(t.Context(), &pb.CreateProjectRequest{Project: "p2", Cmk: "dev"})
	wantCode(t, "CreateProject", err, codes.Unavailable, 0)
	mend()
	f.eventually("service", func() bool { id, err = f.lease("p1", id); return err == nil })
	if _, err := f.unwrap(id, dekContext("p1", "a"), deks[0].Wrapped); err != nil {
		t.Error(err)
	}
	f.audit()
}

// Who can write to the bucket puts a project under a key of their own, with a KEK that they know.
func TestSwappedCMKIsRefused(t *testing.T) {
	f := newFixture(t)
	f.create("p1")
	const key = "projects/p1/keys.json"
	ours, _, err := f.bucket.Get(t.Context(), key)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.srv.Close(); err != nil {
		t.Fatal(err)
	}
	if err := f.kms.Create("theirs"); err != nil {
		t.Fatal(err)
	}
	ec := keymgr.EncryptionContext{Project: "p1", KEKVersion: 1}
	sum := sha256.Sum256(ec.AAD())
	known := bytes.Repeat([]byte{7}, 32)
	w, err := f.kms.Wrap(t.Context(), "theirs", ec, slices.Concat([]byte{1}, sum[:], known))
	if err != nil {
		t.Fatal(err)
	}
	forged, err := json.Marshal(map[string]any{"format": 1, "project": "p1", "cmk": "theirs", "current": 1,
		"keks": []any{map[string]any{"version": 1, "wrapped": w.Ciphertext, "cmk_version": "1"}}})
	if err != nil {
		t.Fatal(err)
	}
	put := func(data []byte) {
		t.Helper()
		if err := f.bucket.Delete(t.Context(), key); err != nil {
			t.Fatal(err)
		}
		blobtest.Put(t, f.bucket, key, string(data))
	}
	f.srv, err = keymgr.New(keymgr.Config{Dir: f.auditDir(), BlobStore: f.bucket, Provider: f.kms, CMKs: []string{"dev"}, CheckInterval: checkInterval, LeaseTTL: time.Minute, Grace: new(time.Duration)})
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.srv.CreateProject(t.Context(), &pb.CreateProjectRequest{Project: "p2", Cmk: "theirs"})
	wantCode(t, "a project under another CMK", err, codes.PermissionDenied, 0)
	f.mustLease("p1")
	put(forged) // under a key manager that runs: noticed at the next check
	f.eventually("refusal", func() bool {
		_, err = f.lease("p1", "")
		return status.Code(err) == codes.PermissionDenied && strings.Contains(err.Error(), "theirs")
	})
	wantCode(t, "the CMK was swapped", err, codes.PermissionDenied, 0)
	put(ours)
	f.mustLease("p1")
}

func TestBadConfig(t *testing.T) {
	if _, err := keymgr.New(keymgr.Config{}); err == nil {
		t.Error("an empty Config was taken")
	}
	if _, err := keymgr.New(keymgr.Config{Dir: filepath.Join(t.TempDir(), "absent"), BlobStore: blobtest.NewFaulty(nil, nil), Provider: &localkms.KMS{}}); err == nil {
		t.Error("an absent folder was taken")
	}
}
