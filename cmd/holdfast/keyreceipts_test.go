package main

import (
	"io"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/blob/dirblob"
	"github.com/holdfastdb/holdfast/keymgr"
	"github.com/holdfastdb/holdfast/keymgr/localkms"
)

// revoked gives the complete receipt of a real key manager, of two leases that ran out, and its audit log.
func revoked(t *testing.T) (r *pb.Receipt, audit string) {
	t.Helper()
	audit = t.TempDir()
	kms, err := localkms.Open(filepath.Join(t.TempDir(), "keys.json"))
	if err != nil {
		t.Fatal(err)
	}
	if err := kms.Create("dev"); err != nil {
		t.Fatal(err)
	}
	bucket, err := dirblob.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	srv, err := keymgr.New(keymgr.Config{Dir: audit, BlobStore: bucket, Provider: kms, LeaseTTL: 500 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	defer srv.Close()
	ctx := t.Context()
	if _, err := srv.CreateProject(ctx, &pb.CreateProjectRequest{Project: "p", Cmk: "dev"}); err != nil {
		t.Fatal(err)
	}
	for _, node := range []string{"pageserver", "safekeeper1"} {
		if _, err := srv.Lease(ctx, &pb.LeaseRequest{Project: "p", Node: node}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := srv.RevokeKey(ctx, &pb.RevokeKeyRequest{Key: &pb.KeyRef{Project: "p"}}); err != nil {
		t.Fatal(err)
	}
	for {
		list, err := srv.ListReceipts(ctx, &pb.KeyRef{Project: "p"})
		if err != nil {
			t.Fatal(err)
		}
		if len(list.Receipts) == 1 && list.Receipts[0].Complete {
			if sums, err := auditedReceipts(audit); err != nil {
				t.Fatal(err)
			} else if sums[list.Receipts[0].Id] != "" { // it follows the receipt
				return list.Receipts[0], audit
			}
		}
		select {
		case <-ctx.Done():
			t.Fatal("the receipt is not complete")
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// The bucket is not trusted: a receipt from which a process that did not answer was taken out hangs together, and is
// not the one that the audit log tells of.
func TestReceiptsAreComparedWithTheAuditLog(t *testing.T) {
	r, audit := revoked(t)
	if err := verifyReceipts(io.Discard, []*pb.Receipt{r}, audit); err != nil {
		t.Errorf("as it was made: %v", err)
	}
	cut := proto.CloneOf(r)
	cut.Entries = cut.Entries[:1]
	if err := verifyReceipts(io.Discard, []*pb.Receipt{cut}, ""); err != nil {
		t.Errorf("a receipt with an entry less should hang together: %v", err)
	}
	if err := verifyReceipts(io.Discard, []*pb.Receipt{cut}, audit); err == nil || !strings.Contains(err.Error(), "it was changed") {
		t.Errorf("an entry less: %v", err)
	}
	other := proto.CloneOf(r)
	other.Id += "0"
	if err := verifyReceipts(io.Discard, []*pb.Receipt{other}, audit); err == nil || !strings.Contains(err.Error(), "does not have it") {
		t.Errorf("made up: %v", err)
	}
}
