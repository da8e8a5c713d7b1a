package keymgr_test

import (
	"crypto/ed25519"
	"crypto/sha256"
	"fmt"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/blob/blobtest"
	"github.com/holdfastdb/holdfast/internal/rpc"
	"github.com/holdfastdb/holdfast/internal/shredreport"
	"github.com/holdfastdb/holdfast/keymgr/receipt"
)

// node is a process that holds leases.
type node struct {
	f    *fixture
	name string
	key  ed25519.PrivateKey
	id   string
}

func (f *fixture) node(name string) *node {
	f.t.Helper()
	_, key, err := ed25519.GenerateKey(nil)
	if err != nil {
		f.t.Fatal(err)
	}
	n := &node{f: f, name: name, key: key}
	f.eventually("lease of "+name, func() bool {
		resp, err := f.srv.Lease(f.t.Context(), &pb.LeaseRequest{Project: "p1", Node: name, PublicKey: key.Public().(ed25519.PublicKey)})
		n.id = resp.GetLeaseId()
		return err == nil
	})
	return n
}

func (n *node) signed(change func(*pb.ShredReport)) *pb.ShredReport {
	n.f.t.Helper()
	now := time.Now().UnixMicro()
	r := &pb.ShredReport{LeaseId: n.id, Key: "p1", Node: n.name, Pid: 1, Reason: "denied", Keys: 2, KeysWipedUnixUs: now, ShreddedUnixUs: now}
	if change != nil {
		change(r)
	}
	if err := shredreport.Sign(r, n.key); err != nil {
		n.f.t.Fatal(err)
	}
	return r
}

func (n *node) report() error {
	_, err := n.f.srv.ReportShred(n.f.t.Context(), n.signed(nil))
	return err
}

func (f *fixture) receiptsOf() []*pb.Receipt {
	f.t.Helper()
	resp, err := f.srv.ListReceipts(f.t.Context(), &pb.KeyRef{Project: "p1"})
	if err != nil {
		f.t.Fatal(err)
	}
	for _, r := range resp.Receipts {
		if err := receipt.Verify(r); err != nil {
			f.t.Error(err)
		}
	}
	return resp.Receipts
}

func TestReceiptOfARevocation(t *testing.T) {
	f := newFixture(t)
	f.create("p1")
	f.restart(2*time.Second, 0)
	quick, silent := f.node("quick"), f.node("silent")
	if err := f.kms.Disable("dev"); err != nil {
		t.Fatal(err)
	}
	f.eventually("denial", func() bool { _, err := f.lease("p1", ""); return rpc.Reason(err) == pb.ErrorDetail_KEY_REVOKED })
	for range 2 { // again: its answer was lost
		if err := quick.report(); err != nil {
			t.Fatal(err)
		}
	}
	var got []*pb.Receipt
	f.eventually("a complete receipt", func() bool { got = f.receiptsOf(); return len(got) == 1 && got[0].Complete })
	r := got[0]
	if r.Cause != "denied" || r.Cmk != "dev" || r.RequestId == "" || r.AuditSeq == 0 || !strings.Contains(r.Detail, "disabled") {
		t.Errorf("receipt %v", r)
	}
	if e := receipt.Entry(r, quick.id); e == nil || e.Report == nil {
		t.Errorf("the report is missing: %v", e)
	}
	e := receipt.Entry(r, silent.id)
	if e == nil || e.Report != nil || time.Now().UnixMicro() < e.LeaseEndUnixUs {
		t.Errorf("who did not answer: %v", e)
	}
	// A process that was stopped goes on, and reports late: also to another life of the key manager.
	f.restart(2*time.Second, 0)
	if err := silent.report(); err != nil {
		t.Fatal(err)
	}
	r = f.receiptsOf()[0]
	if e := receipt.Entry(r, silent.id); e.Report == nil || receipt.Unproven(r)[silent.id] != "" {
		t.Errorf("a late report: %v", e)
	}
	text := f.audit()
	data, _, err := f.bucket.Get(t.Context(), "projects/p1/receipts/"+r.Id+".json")
	if err != nil {
		t.Fatal(err)
	}
	if i := strings.LastIndex(text, "receipt.completed"); i < 0 || !strings.Contains(text[i:], fmt.Sprintf("SHA-256 %x", sha256.Sum256(data))) {
		t.Error("the audit log's last word on the receipt is not of what the bucket has")
	}
	for _, want := range []string{`"event":"receipt.opened","outcome":"denied"`, `"event":"receipt.completed"`, `"event":"shred.reported"`} {
		if !strings.Contains(text, want) {
			t.Errorf("the audit log lacks %s", want)
		}
	}
}

func TestForgedReportsAreRefused(t *testing.T) {
	f := newFixture(t)
	f.create("p1")
	victim := f.node("victim")
	f.revoke("p1", "drill")
	thief := &node{f: f, name: "victim", id: victim.id, key: ed25519.NewKeyFromSeed(make([]byte, ed25519.SeedSize))}
	wantCode(t, "signed with another key", thief.report(), codes.InvalidArgument, 0)
	forged := victim.signed(nil)
	forged.ShreddedUnixUs++
	_, err := f.srv.ReportShred(t.Context(), forged)
	wantCode(t, "changed", err, codes.InvalidArgument, 0)
	_, err = f.srv.ReportShred(t.Context(), victim.signed(func(r *pb.ShredReport) { r.Node = "other" }))
	wantCode(t, "of another node", err, codes.InvalidArgument, 0)
	_, err = f.srv.ReportShred(t.Context(), victim.signed(func(r *pb.ShredReport) { r.Key = "p9" }))
	wantCode(t, "of a key that there is not", err, codes.NotFound, 0)
	if err := victim.report(); err != nil {
		t.Error(err)
	}
}

// The receipt's writes are lost, or applied and reported lost.
func TestReceiptsSurviveUncertainWrites(t *testing.T) {
	for _, fault := range []blobtest.Fault{blobtest.Lost, blobtest.Unreported} {
		f := newFixture(t)
		f.create("p1")
		n := f.node("n")
		f.faulty.FailNext(blobtest.OpCreate, "projects/p1/receipts/", fault)
		f.faulty.FailNext(blobtest.OpSwap, "projects/p1/receipts/", fault)
		f.revoke("p1", "drill")
		f.eventually("a receipt", func() bool { return len(f.receiptsOf()) == 1 })
		if err := n.report(); err != nil {
			t.Fatal(err)
		}
		f.eventually("completion", func() bool { got := f.receiptsOf(); return len(got) == 1 && got[0].Complete })
	}
}

// Without an answer of the KMS leases run out, and a receipt says so; if it answers in time there is none.
func TestReceiptForWantOfAnAnswer(t *testing.T) {
	f := newFixture(t)
	f.create("p1")
	f.restart(time.Minute, 0)
	id := f.node("n").id
	f.kms.cut.Store(true)
	f.eventually("unreachable", func() bool { return f.status("p1").State == "unreachable" })
	f.kms.cut.Store(false)
	f.eventually("active", func() bool { return f.status("p1").State == "active" })
	if _, err := f.generate(id, dekContext("p1", "a")); err != nil {
		t.Errorf("the lease did not live on: %v", err)
	}
	if got := f.receiptsOf(); len(got) != 0 {
		t.Errorf("nothing was revoked, and there is a receipt: %v", got)
	}
	f.restart(300*time.Millisecond, 0)
	f.node("n")
	f.kms.cut.Store(true)
	var got []*pb.Receipt
	f.eventually("a complete receipt", func() bool { got = f.receiptsOf(); return len(got) == 1 && got[0].Complete })
	if got[0].Cause != "unreachable" || len(got[0].Entries) != 1 {
		t.Errorf("receipt %v", got[0])
	}
}

// The key manager restarted and knows no lease from before: the receipt says so, and takes the reports.
func TestReceiptAfterARestartIsHonest(t *testing.T) {
	f := newFixture(t)
	f.create("p1")
	old := f.node("old")
	f.restart(time.Minute, 0)
	f.node("new")
	f.revoke("p1", "drill")
	if err := old.report(); err != nil {
		t.Fatal(err)
	}
	var r *pb.Receipt
	f.eventually("a receipt", func() bool { got := f.receiptsOf(); r = got[0]; return len(r.Entries) == 2 })
	if !strings.Contains(r.Detail, "not listed") {
		t.Errorf("detail %q does not speak of the leases from before", r.Detail)
	}
	if why := receipt.Unproven(r)[old.id]; !strings.Contains(why, "no key") {
		t.Errorf("the old lease's report counts as proof: %q", why)
	}
}

func TestVerifyFindsWhatWasChanged(t *testing.T) {
	f := newFixture(t)
	f.create("p1")
	n := f.node("n")
	f.revoke("p1", "drill")
	if err := n.report(); err != nil {
		t.Fatal(err)
	}
	var r *pb.Receipt
	f.eventually("completion", func() bool { got := f.receiptsOf(); r = got[0]; return r.Complete })
	data, err := receipt.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	if again, err := receipt.Parse(data); err != nil || !proto.Equal(r, again) {
		t.Errorf("a receipt is not what it was: %v", err)
	}
	for name, change := range map[string]func(*pb.Receipt){
		"another key":      func(r *pb.Receipt) { r.Key = "p2" },
		"a report's time":  func(r *pb.Receipt) { r.Entries[0].Report.ShreddedUnixUs++ },
		"a lease's key":    func(r *pb.Receipt) { r.Entries[0].PublicKey = make([]byte, ed25519.PublicKeySize) },
		"a lease's id":     func(r *pb.Receipt) { r.Entries[0].LeaseId = "x" },
		"an entry doubled": func(r *pb.Receipt) { r.Entries = append(r.Entries, r.Entries[0]) },
		"no time":          func(r *pb.Receipt) { r.RevokedUnixUs = 0 },
	} {
		c := proto.CloneOf(r)
		change(c)
		if receipt.Verify(c) == nil {
			t.Errorf("%s was changed, and the receipt verifies", name)
		}
	}
}
