package main

import (
	"context"
	"crypto/ed25519"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/rpc"
	"github.com/holdfastdb/holdfast/internal/shredreport"
)

const (
	fakeProject = "aa01"
	fakeBranch  = "bb02"
)

// fakeRoles is a key manager and a manager with one project, of which branch "reports" has a key of its own and
// branch "main" has none.
type fakeRoles struct {
	pb.UnimplementedKeyManagerServer
	pb.UnimplementedKeyAdminServer
	mu struct {
		sync.Mutex
		keys     map[string]*pb.KeyStatusResponse
		receipts map[string][]*pb.Receipt
		retired  []uint32
		rewraps  []*pb.RewrapRequest
	}
	silent bool // a revocation's receipt stays incomplete
	unheld bool // no node holds a lease
	deaf   bool // a revocation has no effect
	blind  bool // receipts cannot be read
	mute   bool // whoever asks for a key's state waits for the KMS
	public ed25519.PublicKey
	sign   ed25519.PrivateKey
}

type fakeManager struct {
	pb.UnimplementedManagerServer
	uses    *pb.KeyUsesResponse
	rotated []*pb.ManagerRotateRequest
	events  []*pb.RehearseEvent
	fail    error
	// State of endpoint main, which comes to run when it was asked for so often; 0: there are no endpoints.
	runsAfter, asked int
}

func (m *fakeManager) ListEndpoints(context.Context, *pb.ListEndpointsRequest) (*pb.ListEndpointsResponse, error) {
	if m.runsAfter == 0 {
		return &pb.ListEndpointsResponse{}, nil
	}
	m.asked++
	e := &pb.Endpoint{Name: "main", Project: fakeProject, Branch: "bb01", State: "starting"}
	if m.asked >= m.runsAfter {
		e.State = "running"
	}
	reports := &pb.Endpoint{Name: "reports", Project: fakeProject, Branch: fakeBranch, State: "key revoked"} // of a key of its own
	return &pb.ListEndpointsResponse{Endpoints: []*pb.Endpoint{e, reports}}, nil
}

// serveFakes runs both below a data directory, whose --data flag it gives.
func serveFakes(t *testing.T) (*fakeRoles, *fakeManager, string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "hf") // t.TempDir is too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	k, m := &fakeRoles{}, &fakeManager{}
	if k.public, k.sign, err = ed25519.GenerateKey(nil); err != nil {
		t.Fatal(err)
	}
	k.mu.receipts = make(map[string][]*pb.Receipt)
	k.mu.keys = make(map[string]*pb.KeyStatusResponse)
	for _, id := range []string{fakeProject, fakeProject + "/" + fakeBranch} {
		k.mu.keys[id] = &pb.KeyStatusResponse{Key: id, Cmk: "dev", State: "active", SinceUnixMs: time.Now().Add(-time.Hour).UnixMilli(), KekVersion: 1,
			GraceMs: 600_000, BoundMs: 13_000, Holders: []*pb.KeyHolder{{Node: "pageserver", LeaseId: "l1", EndsUnixMs: time.Now().Add(time.Minute).UnixMilli()}}}
	}
	l := layout{dir: dir}
	for role, register := range map[string]func(*grpc.Server){
		"keymgr":  func(g *grpc.Server) { pb.RegisterKeyManagerServer(g, k); pb.RegisterKeyAdminServer(g, k) },
		"manager": func(g *grpc.Server) { pb.RegisterManagerServer(g, m) },
	} {
		lis, err := rpc.Listen(l.socket(role))
		if err != nil {
			t.Fatal(err)
		}
		g := rpc.NewServer()
		register(g)
		go g.Serve(lis)
		t.Cleanup(g.Stop)
	}
	return k, m, dir
}

func keyID(project, branch string) string {
	if branch == "" {
		return project
	}
	return project + "/" + branch
}

func (k *fakeRoles) status(project, branch string) (*pb.KeyStatusResponse, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if st := k.mu.keys[keyID(project, branch)]; st != nil {
		return proto.Clone(st).(*pb.KeyStatusResponse), nil
	}
	return nil, rpc.Error(codes.NotFound, nil, "no key %s", keyID(project, branch))
}

func (k *fakeRoles) KeyStatus(ctx context.Context, r *pb.KeyStatusRequest) (*pb.KeyStatusResponse, error) {
	if k.mute {
		<-ctx.Done()
	}
	return k.status(r.Project, r.Branch)
}

func (k *fakeRoles) ListKeys(ctx context.Context, _ *pb.ListKeysRequest) (*pb.ListKeysResponse, error) {
	if k.mute {
		<-ctx.Done()
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	out := &pb.ListKeysResponse{}
	for _, st := range k.mu.keys {
		out.Keys = append(out.Keys, st)
	}
	slices.SortFunc(out.Keys, func(a, b *pb.KeyStatusResponse) int { return strings.Compare(a.Key, b.Key) })
	return out, nil
}

func (k *fakeRoles) set(ref *pb.KeyRef, state, by string) (*pb.KeyStatusResponse, error) {
	k.mu.Lock()
	st := k.mu.keys[keyID(ref.Project, ref.Branch)]
	st.State, st.ControlledBy, st.SinceUnixMs = state, by, time.Now().UnixMilli()
	k.mu.Unlock()
	return k.status(ref.Project, ref.Branch)
}

func (k *fakeRoles) RevokeKey(_ context.Context, r *pb.RevokeKeyRequest) (*pb.KeyStatusResponse, error) {
	if k.deaf {
		return k.status(r.Key.Project, r.Key.Branch)
	}
	if k.unheld {
		return k.set(r.Key, "revoked", "holdfast key resume")
	}
	id := keyID(r.Key.Project, r.Key.Branch)
	now := time.Now().UnixMicro()
	report := &pb.ShredReport{LeaseId: "l1", Key: id, Node: "pageserver", Pid: 42, Reason: r.Reason, Keys: 7, KeysWipedUnixUs: now + 2000,
		ShreddedUnixUs: now + 15_000, Dropped: []string{"12 pages of the open layer"}}
	if err := shredreport.Sign(report, k.sign); err != nil {
		return nil, err
	}
	k.mu.Lock()
	n := len(k.mu.receipts[id])
	k.mu.receipts[id] = append(k.mu.receipts[id], &pb.Receipt{Id: fmt.Sprintf("r%d", n+1), Key: id, Cmk: "dev", Cause: "held", Detail: r.Reason, RevokedUnixUs: now + int64(n),
		Complete: !k.silent, Entries: []*pb.ReceiptEntry{{Node: "pageserver", LeaseId: "l1", PublicKey: k.public, LeaseEndUnixUs: now + 8_000_000, Report: report},
			{Node: "safekeeper2", LeaseId: "l2", LeaseEndUnixUs: now + 7_900_000}}})
	k.mu.Unlock()
	return k.set(r.Key, "revoked", "holdfast key resume")
}

func (k *fakeRoles) ResumeKey(_ context.Context, r *pb.KeyRef) (*pb.KeyStatusResponse, error) {
	return k.set(r, "active", "")
}

func (k *fakeRoles) ListReceipts(_ context.Context, r *pb.KeyRef) (*pb.ListReceiptsResponse, error) {
	if k.blind {
		return nil, rpc.Error(codes.Unavailable, nil, "test: a receipt is damaged")
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	return &pb.ListReceiptsResponse{Receipts: k.mu.receipts[keyID(r.Project, r.Branch)]}, nil
}

func (k *fakeRoles) SetGrace(_ context.Context, r *pb.SetGraceRequest) (*pb.KeyStatusResponse, error) {
	k.mu.Lock()
	k.mu.keys[keyID(r.Key.Project, r.Key.Branch)].GraceMs = r.GraceMs
	k.mu.Unlock()
	return k.status(r.Key.Project, r.Key.Branch)
}

func (k *fakeRoles) Rewrap(_ context.Context, r *pb.RewrapRequest) (*pb.KeyVersionsResponse, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.mu.rewraps = append(k.mu.rewraps, r)
	return &pb.KeyVersionsResponse{Key: keyID(r.Key.Project, r.Key.Branch), Cmk: r.Cmk, Current: 1, KmsCalls: 2,
		Keks: []*pb.KEKVersion{{Version: 1, Cmk: r.Cmk, CmkVersion: "9"}}}, nil
}

func (k *fakeRoles) RetireKEK(_ context.Context, r *pb.RetireKEKRequest) (*pb.KeyVersionsResponse, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.mu.retired = append(k.mu.retired, r.Version)
	return &pb.KeyVersionsResponse{Key: fakeProject, Cmk: "dev", Current: 2}, nil
}

func (m *fakeManager) ListBranches(context.Context, *pb.ListBranchesRequest) (*pb.ListBranchesResponse, error) {
	return &pb.ListBranchesResponse{Branches: []*pb.ManagedBranch{{Id: "bb01", Project: fakeProject, Name: "main"},
		{Id: fakeBranch, Project: fakeProject, Name: "reports", OwnKey: true}}}, nil
}

func (m *fakeManager) KeyUses(context.Context, *pb.KeyRef) (*pb.KeyUsesResponse, error) {
	return m.uses, nil
}

func (m *fakeManager) RotateKEK(_ context.Context, r *pb.ManagerRotateRequest) (*pb.KeyUsesResponse, error) {
	m.rotated = append(m.rotated, r)
	return m.uses, nil
}

func (m *fakeManager) Rehearse(_ *pb.RehearseRequest, s pb.Manager_RehearseServer) error {
	for _, e := range m.events {
		if err := s.Send(e); err != nil {
			return err
		}
	}
	return m.fail
}

// says runs a command that must succeed, and print each of want.
func says(t *testing.T, dir string, args []string, want ...string) string {
	t.Helper()
	out, err := execute(append(args, "--data", dir)...)
	if err != nil {
		t.Errorf("%v: %v", args, err)
	}
	for _, w := range want {
		if !strings.Contains(out, w) {
			t.Errorf("%v does not say %q:\n%s", args, w, out)
		}
	}
	return out
}

// refuses runs a command that must fail with an error that says each of want.
func refuses(t *testing.T, dir string, args []string, want ...string) {
	t.Helper()
	_, err := execute(append(args, "--data", dir)...)
	if err == nil {
		t.Errorf("%v succeeded", args)
		return
	}
	for _, w := range want {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("%v: %q does not say %q", args, err, w)
		}
	}
	if strings.Contains(err.Error(), "rpc error") {
		t.Errorf("%v speaks of rpc errors: %v", args, err)
	}
}

func TestKeyStatus(t *testing.T) {
	k, _, dir := serveFakes(t)
	says(t, dir, []string{"key", "status"}, "KEY", "aa01/bb02", "active since", "(1h0m0s ago)")
	says(t, dir, []string{"key", "status", "--branch", "reports"}, "aa01/bb02", "HELD BY", "pageserver", "13s", "10m0s if the KMS does not answer")
	if _, err := k.set(&pb.KeyRef{Project: fakeProject}, "grace", ""); err != nil {
		t.Fatal(err)
	}
	k.mu.keys[fakeProject].UntilUnixMs = time.Now().Add(time.Hour).UnixMilli()
	says(t, dir, []string{"key", "status", "--project", fakeProject}, "grace since", ", until", "(in 1h0m0s)")

	var list struct {
		Keys []struct {
			Key, State string
			Holders    []struct{ Node string }
		}
	}
	if err := json.Unmarshal([]byte(says(t, dir, []string{"key", "status", "--json"})), &list); err != nil {
		t.Fatal(err)
	}
	if len(list.Keys) != 2 || list.Keys[0].State != "grace" || len(list.Keys[1].Holders) != 1 {
		t.Errorf("JSON has %+v", list)
	}
	refuses(t, dir, []string{"key", "status", "--project", "zz"}, `no project "zz"`, fakeProject)
	refuses(t, dir, []string{"key", "status", "--branch", "zz"}, `no branch "zz"`, "holdfast branch list")
	refuses(t, dir, []string{"key", "status", "--keymgr", "unix:/no/such/socket"}, "--keymgr unix:/no/such/socket")
	refuses(t, t.TempDir(), []string{"key", "status"}, "no cluster is running", "holdfast up")
}

// Where a manager listens there is a cluster, and another is not to be started.
func TestAMissingKeyManagerIsNotAMissingCluster(t *testing.T) {
	dir, err := os.MkdirTemp("", "hf") // t.TempDir is too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	l := layout{dir: dir}
	if err := os.MkdirAll(l.runDir(), 0o700); err != nil {
		t.Fatal(err)
	}
	lis, err := net.Listen("unix", strings.TrimPrefix(l.socket("manager"), "unix:"))
	if err != nil {
		t.Fatal(err)
	}
	defer lis.Close()
	refuses(t, dir, []string{"key", "status"}, "a role of the cluster", "does not answer", "keymgr")
}

// A branch without a key of its own is under the project's: to revoke that for it would shut every branch.
func TestRevokeOfABranchWithoutAKeyIsRefused(t *testing.T) {
	k, _, dir := serveFakes(t)
	refuses(t, dir, []string{"key", "revoke", "--branch", "main"}, "no key of its own", "leave --branch out")
	for id, st := range k.mu.keys {
		if st.State != "active" {
			t.Errorf("key %s is %s", id, st.State)
		}
	}
}

func TestRevokeWaitsForItsReceiptAndPrintsIt(t *testing.T) {
	k, _, dir := serveFakes(t)
	says(t, dir, []string{"key", "revoke", "--branch", "reports", "--reason", "lost"}, "key aa01/bb02 is held back from now on", "receipt r1", "held: lost",
		"pageserver (pid 42)", "2ms", "15ms", "12 pages of the open layer", "safekeeper2", "no report", "7.9s", "complete")
	if k.mu.keys[fakeProject].State != "active" {
		t.Error("the project's key was revoked, too")
	}
	// A second one shows its own receipt, not the first's.
	says(t, dir, []string{"key", "revoke", "--branch", "reports"}, "receipt r2")
	says(t, dir, []string{"key", "receipts", "--branch", "reports"}, "r1", "r2", "held", "15ms", "yes")
	says(t, dir, []string{"key", "receipts", "r2", "--verify"}, "receipt r2", "verified: 1 signed reports of 1 receipts")
	refuses(t, dir, []string{"key", "receipts", "r9"}, `no receipt "r9"`)
	says(t, dir, []string{"key", "resume", "--branch", "reports"}, "active since")

	k.silent = true
	refuses(t, dir, []string{"key", "revoke", "--wait", "100ms"}, "held back", "holdfast key receipts r1")
	var r struct{ ID, Cause string }
	if err := json.Unmarshal([]byte(says(t, dir, []string{"key", "revoke", "--wait", "100ms", "--json"})), &r); err != nil || r.ID != "r2" || r.Cause != "held" {
		t.Errorf("JSON: %+v, %v", r, err)
	}
}

// Nothing that only serves to show what a revocation did keeps it from being done: not receipts that cannot be read, and
// not a KMS that does not answer.
func TestRevokeNeedsNoReceiptsAndNoKMS(t *testing.T) {
	k, _, dir := serveFakes(t)
	k.blind, k.mute = true, true
	begun := time.Now()
	refuses(t, dir, []string{"key", "revoke"}, "the key is held back", "receipts cannot be read", "damaged")
	if st := k.mu.keys[fakeProject]; st.State != "revoked" || time.Since(begun) > 5*time.Second {
		t.Errorf("the key is %s after %v", st.State, time.Since(begun))
	}
	refuses(t, dir, []string{"key", "revoke", "--branch", "reports"}, "the key is held back")
	refuses(t, dir, []string{"key", "revoke", "--wait", "1ms", "--branch", "main", "--keymgr", "unix:/no/such/socket"}, "unix:/no/such/socket")
}

func TestARevocationWithoutEffectIsNoSuccess(t *testing.T) {
	k, _, dir := serveFakes(t)
	k.deaf = true
	refuses(t, dir, []string{"key", "revoke"}, "it is active", "disable its CMK")
}

// The key is back when its endpoints are: those of other keys do not count.
func TestResumeWaitsForEndpoints(t *testing.T) {
	_, m, dir := serveFakes(t)
	m.runsAfter = 3
	begun := time.Now()
	says(t, dir, []string{"key", "resume"}, "active since")
	if m.asked != 3 || time.Since(begun) > resumeLimit {
		t.Errorf("endpoints were looked at %d times in %v, want until they ran, the third time", m.asked, time.Since(begun))
	}
}

func TestReceiptsThatWereChangedDoNotVerify(t *testing.T) {
	for name, change := range map[string]func(*pb.ReceiptEntry){
		"earlier":       func(e *pb.ReceiptEntry) { e.Report.ShreddedUnixUs -= 1000 },
		"another lease": func(e *pb.ReceiptEntry) { e.LeaseId = "l9" },
		"another node":  func(e *pb.ReceiptEntry) { e.Node = "safekeeper1" },
		"another key":   func(e *pb.ReceiptEntry) { e.PublicKey = make([]byte, ed25519.PublicKeySize) },
		"no signature":  func(e *pb.ReceiptEntry) { e.Report.Signature = nil },
	} {
		t.Run(name, func(t *testing.T) {
			k, _, dir := serveFakes(t)
			says(t, dir, []string{"key", "revoke"})
			change(k.mu.receipts[fakeProject][0].Entries[0])
			refuses(t, dir, []string{"key", "receipts", "--verify"}, "receipt r1")
		})
	}
}

func TestNothingToShredIsSaid(t *testing.T) {
	k, _, dir := serveFakes(t)
	k.unheld = true
	says(t, dir, []string{"key", "revoke", "--wait", "10ms"}, "nothing to shred")
}

func TestGrace(t *testing.T) {
	k, _, dir := serveFakes(t)
	says(t, dir, []string{"key", "grace"}, "aa01", "10m0s")
	says(t, dir, []string{"key", "grace", "0"}, "none")
	says(t, dir, []string{"key", "grace", "90s"}, "1m30s")
	if ms := k.mu.keys[fakeProject].GraceMs; ms != 90_000 {
		t.Errorf("grace %d ms", ms)
	}
	for _, bad := range []string{"10", "x"} {
		refuses(t, dir, []string{"key", "grace", bad}, "no grace")
	}
}

func uses() *pb.KeyUsesResponse {
	return &pb.KeyUsesResponse{Versions: &pb.KeyVersionsResponse{Key: fakeProject, Cmk: "dev", Current: 3, Keks: []*pb.KEKVersion{
		{Version: 1, Cmk: "dev", CmkVersion: "4"}, {Version: 2, Cmk: "dev", CmkVersion: "4"}, {Version: 3, Cmk: "dev", CmkVersion: "5"}}},
		Uses: []*pb.KeyUse{{Branch: "bb01", What: "layers", KekVersion: 2, Deks: 5}, {Branch: "bb03", What: "layers", KekVersion: 2, Deks: 6},
			{Branch: "bb01", What: "WAL", KekVersion: 3, Deks: 2}}, MayBeRetired: []uint32{1}, Rewrapped: 8, BytesWritten: 4096}
}

func TestVersionsSayWhatIsNeededByWhat(t *testing.T) {
	k, m, dir := serveFakes(t)
	m.uses = uses()
	says(t, dir, []string{"key", "versions"}, "11 DEKs of layers", "new DEKs, 2 DEKs of WAL", "nothing needs version 1", "holdfast key retire 1", "dev version 4, dev version 5")
	says(t, dir, []string{"key", "rotate"}, "wrapped again: 8 DEKs; 4096 bytes of documents were written, none of data")
	says(t, dir, []string{"key", "rotate", "--finish"})
	if len(m.rotated) != 2 || m.rotated[0].FinishOnly || !m.rotated[1].FinishOnly {
		t.Errorf("rotations %v", m.rotated)
	}
	refuses(t, dir, []string{"key", "retire", "2"}, "11 DEKs of layers", "--finish")
	refuses(t, dir, []string{"key", "retire", "3"}, "current one")
	refuses(t, dir, []string{"key", "retire", "7"}, "no such version")
	refuses(t, dir, []string{"key", "retire", "x"}, "no version")
	m.uses.Errors = []string{"safekeeper at x: does not answer"}
	m.uses.MayBeRetired = nil
	refuses(t, dir, []string{"key", "retire", "1"}, "not known", "safekeeper at x")
	says(t, dir, []string{"key", "versions"}, "not known: safekeeper at x")
	if len(k.mu.retired) != 0 {
		t.Errorf("versions %v were retired", k.mu.retired)
	}
	m.uses = uses()
	says(t, dir, []string{"key", "retire", "1"})
	if !slices.Equal(k.mu.retired, []uint32{1}) {
		t.Errorf("versions %v were retired, want 1", k.mu.retired)
	}
}

func TestRotationAndChangeOfTheCMK(t *testing.T) {
	k, _, dir := serveFakes(t)
	says(t, dir, []string{"key", "rotate-cmk"}, "calls of the KMS: 2")
	says(t, dir, []string{"key", "change", "--cmk", "vault:transit/keys/x", "--branch", "reports"}, "vault:transit/keys/x", "9")
	refuses(t, dir, []string{"key", "change"}, "cmk")
	if len(k.mu.rewraps) != 2 || k.mu.rewraps[0].Cmk != "" || k.mu.rewraps[1].Key.Branch != fakeBranch {
		t.Errorf("asked for %v", k.mu.rewraps)
	}
}

func TestRehearsalIsTold(t *testing.T) {
	_, m, dir := serveFakes(t)
	m.events = []*pb.RehearseEvent{{Step: "making branch x"}, {Measure: "revoke to all connections ended", TookUs: 213_000}}
	says(t, dir, []string{"key", "rehearse"}, "making branch x", "213ms", "revoke to all connections ended")
	var doc struct {
		Events []struct {
			Measure string
			TookUS  string `json:"took_us"`
		}
	}
	if err := json.Unmarshal([]byte(says(t, dir, []string{"key", "rehearse", "--json"})), &doc); err != nil || len(doc.Events) != 2 || doc.Events[1].TookUS != "213000" {
		t.Errorf("JSON: %+v, %v", doc, err)
	}
	refuses(t, dir, []string{"key", "rehearse", "--branch", "reports"}, "leave --branch out")
	m.fail = rpc.Error(codes.Unavailable, nil, "the rehearsal failed: 1 of 2 connections outlived the bound")
	refuses(t, dir, []string{"key", "rehearse"}, "outlived the bound")
}

func TestCompletionOffersBranchesAndReceipts(t *testing.T) {
	_, _, dir := serveFakes(t)
	says(t, dir, []string{"key", "revoke", "--branch", "reports"})
	for _, tc := range []struct {
		words []string
		want  string
	}{
		{[]string{"key", "revoke", "--branch", ""}, "reports"},
		{[]string{"key", "revoke", "--project", ""}, fakeProject},
		{[]string{"key", "receipts", "--branch", "reports", ""}, "r1"},
	} {
		out, err := execute(append([]string{"__complete", "--data", dir}, tc.words...)...)
		if err != nil || !strings.Contains(out, tc.want) {
			t.Errorf("%v offers %q (%v), want %s", tc.words, out, err, tc.want)
		}
	}
}
