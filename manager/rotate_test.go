package manager

import (
	"bytes"
	"context"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/blob/blobtest"
	"github.com/holdfastdb/holdfast/internal/blob/dirblob"
	"github.com/holdfastdb/holdfast/internal/keyring/keyringtest"
	"github.com/holdfastdb/holdfast/internal/rpc"
	"github.com/holdfastdb/holdfast/internal/seal"
)

func TestWhatMayBeRetired(t *testing.T) {
	versions := &pb.KeyVersionsResponse{Current: 4, Keks: []*pb.KEKVersion{{Version: 1}, {Version: 2}, {Version: 4}}}
	use := func(versions ...uint32) (list []*pb.KeyUse) {
		for _, v := range versions {
			list = append(list, &pb.KeyUse{KekVersion: v, Deks: 1})
		}
		return list
	}
	for name, test := range map[string]struct {
		uses   []*pb.KeyUse
		errors []string
		want   []uint32
	}{
		"nothing is used":           {want: []uint32{1, 2}},
		"an old one is":             {uses: use(4, 2), want: []uint32{1}},
		"a part did not answer":     {uses: use(4), errors: []string{"pageserver: no answer"}},
		"a version is not known":    {uses: use(4, 0)},
		"one that is there no more": {uses: use(3), want: []uint32{1, 2}},
	} {
		got := retirable(&pb.KeyUsesResponse{Versions: versions, Uses: test.uses, Errors: test.errors})
		if diff := cmp.Diff(test.want, got); diff != "" {
			t.Errorf("%s: %s", name, diff)
		}
	}
}

func TestWhenARotationIsDue(t *testing.T) {
	now := time.UnixMilli(10_000_000)
	key := func(rule, age time.Duration) *pb.KeyVersionsResponse {
		return &pb.KeyVersionsResponse{Current: 2, RotateEveryMs: rule.Milliseconds(),
			Keks: []*pb.KEKVersion{{Version: 1, CreatedUnixMs: 1}, {Version: 2, CreatedUnixMs: now.Add(-age).UnixMilli()}}}
	}
	for name, test := range map[string]struct {
		key       *pb.KeyVersionsResponse
		byDefault time.Duration
		want      bool
	}{
		"no rule":                        {key(0, time.Hour), 0, false},
		"by default, young":              {key(0, time.Minute), time.Hour, false},
		"by default, old":                {key(0, time.Hour), time.Hour, true},
		"by its own rule, before others": {key(time.Minute, time.Minute), time.Hour, true},
		"by its own rule, after others":  {key(2*time.Hour, time.Hour), time.Minute, false},
		"of an age that is not known":    {&pb.KeyVersionsResponse{Current: 1, Keks: []*pb.KEKVersion{{Version: 1}}}, time.Minute, false},
	} {
		if got := due(test.key, test.byDefault, now); got != test.want {
			t.Errorf("%s: due %t, want %t", name, got, test.want)
		}
	}
}

// TestThePasswordIsWrappedAgain: its DEK alone; what is sealed stays, byte for byte. The write is failed both ways.
func TestThePasswordIsWrappedAgain(t *testing.T) {
	bucket, err := dirblob.Open(filepath.Join(t.TempDir(), "bucket"))
	if err != nil {
		t.Fatal(err)
	}
	faulty := blobtest.NewFaulty(bucket, nil)
	ring := keyringtest.New()
	m := &Manager{cfg: Config{Store: faulty, Ring: ring}}
	b := branchDoc{ID: "b1", Project: "p1", Name: "main"}
	ctx := context.Background()
	if r, err := m.rewrapPassword(ctx, b); err != nil || r.GetRewrapped() != 0 {
		t.Errorf("of a branch that has none: %v, %v", r, err)
	}
	if err := m.sealPassword(ctx, b, "open sesame"); err != nil {
		t.Fatal(err)
	}
	before, _, _ := bucket.Get(ctx, passwordKey("p1", "b1"))
	for _, fault := range []blobtest.Fault{blobtest.None, blobtest.Lost, blobtest.Unreported} {
		version := ring.RotateKEK()
		if fault != blobtest.None {
			faulty.FailNext(blobtest.OpSwap, "", fault)
			if _, err := m.rewrapPassword(ctx, b); err == nil {
				t.Errorf("fault %d was not told", fault)
			}
		}
		if _, err := m.rewrapPassword(ctx, b); err != nil {
			t.Fatal(err)
		}
		uses, err := m.usesOfPassword(ctx, b)
		if err != nil || len(uses) != 1 || uses[0].KekVersion != version {
			t.Errorf("after fault %d: uses %v, %v; want version %d", fault, uses, err, version)
		}
		ring.RetireKEK(version - 1)
		if got, err := m.openPassword(ctx, "p1", "b1"); err != nil || got != "open sesame" {
			t.Errorf("after fault %d: %q, %v", fault, got, err)
		}
	}
	after, _, _ := bucket.Get(ctx, passwordKey("p1", "b1"))
	header := len(after) - len("open sesame") - seal.TagSize
	if len(before) != len(after) || bytes.Equal(before, after) || !bytes.Equal(before[header:], after[header:]) {
		t.Error("more than the wrapped DEK was changed, or nothing")
	}
}

// heldKeys is a key manager whose only key is held back, and deniedPages a page server that needs it.
type heldKeys struct {
	pb.KeyManagerClient
	pb.KeyAdminClient
}

func (heldKeys) KeyStatus(context.Context, *pb.KeyStatusRequest, ...grpc.CallOption) (*pb.KeyStatusResponse, error) {
	return &pb.KeyStatusResponse{Key: "p1", State: "revoked", ControlledBy: "holdfast key resume"}, nil
}

func (heldKeys) KeyVersions(context.Context, *pb.KeyRef, ...grpc.CallOption) (*pb.KeyVersionsResponse, error) {
	return &pb.KeyVersionsResponse{Key: "p1", Current: 2, Keks: []*pb.KEKVersion{{Version: 1}, {Version: 2}}}, nil
}

type deniedPages struct{ pb.PageServerClient }

func (deniedPages) RewrapBranch(context.Context, *pb.RewrapBranchRequest, ...grpc.CallOption) (*pb.RewrapBranchResponse, error) {
	return nil, rpc.Error(codes.PermissionDenied, nil, "test: no key")
}

// A rotation that is to be finished waits for parts that do not answer, but for none that lacks a revoked key: branches
// cannot be made meanwhile.
func TestARotationIsNotFinishedUnderARevokedKey(t *testing.T) {
	bucket, err := dirblob.Open(filepath.Join(t.TempDir(), "bucket"))
	if err != nil {
		t.Fatal(err)
	}
	blobtest.Put(t, bucket, clusterKey, `{"version": 1, "projects": [{"id": "p1"}], "branches": [{"id": "b1", "project": "p1", "name": "main"}]}`)
	m := &Manager{cfg: Config{Store: bucket, Ring: keyringtest.New()}, keymgr: heldKeys{}, keyAdmin: heldKeys{}, pageserver: deniedPages{}}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	_, err = m.finishRotation(ctx, &pb.KeyRef{Project: "p1"})
	if status.Code(err) != codes.PermissionDenied || rpc.Reason(err) != pb.ErrorDetail_KEY_REVOKED {
		t.Errorf("got %v, want what keeps the key back", err)
	}
}
