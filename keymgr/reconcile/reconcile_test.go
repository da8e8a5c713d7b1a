package reconcile_test

import (
	"bytes"
	"context"
	"encoding/json"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/blob/dirblob"
	"github.com/holdfastdb/holdfast/keymgr"
	"github.com/holdfastdb/holdfast/keymgr/kmsopen"
	"github.com/holdfastdb/holdfast/keymgr/reconcile"
	"github.com/holdfastdb/holdfast/test/kmsim"
	"github.com/holdfastdb/holdfast/test/kmsim/kmsimtest"
)

// work has a key manager do all that it does with the KMS: wrap, unwrap, be denied, be throttled.
func work(t *testing.T, s kmsimtest.Service) (events []keymgr.Event, provider keymgr.Provider) {
	t.Helper()
	provider, err := kmsopen.Open(t.Context(), "", s.KMS)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	bucket, err := dirblob.Open(filepath.Join(dir, "bucket"))
	if err != nil {
		t.Fatal(err)
	}
	srv, err := keymgr.New(keymgr.Config{Dir: dir, BlobStore: bucket, Provider: provider, CheckInterval: time.Nanosecond})
	if err != nil {
		t.Fatal(err)
	}
	defer srv.Close()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if _, err := srv.CreateProject(ctx, &pb.CreateProjectRequest{Project: "p", Cmk: s.CMK}); err != nil {
		t.Fatal(err)
	}
	ask := func() { _, _ = srv.Lease(ctx, &pb.LeaseRequest{Project: "p", Node: "n"}) } // what comes of it is in the log
	ask()
	s.Sim.SetFault(kmsim.Throttle)
	ask()
	s.Sim.SetFault(kmsim.NoFault)
	if err := s.Sim.SetState(s.Ref, kmsim.Disabled); err != nil {
		t.Fatal(err)
	}
	ask()
	if err := s.Sim.SetState(s.Ref, kmsim.Enabled); err != nil {
		t.Fatal(err)
	}
	ask()
	if err := srv.Close(); err != nil {
		t.Fatal(err)
	}
	_, err = keymgr.ReadAudit([]string{dir}, nil, func(e keymgr.Event) error { events = append(events, e); return nil })
	if err != nil {
		t.Fatal(err)
	}
	return events, provider
}

func export(t *testing.T, sim *kmsim.Server) []reconcile.Call {
	t.Helper()
	data, err := json.MarshalIndent(sim.Log(), "", " ")
	if err != nil {
		t.Fatal(err)
	}
	calls, err := reconcile.Read("kmsim", bytes.NewReader(data))
	if err != nil {
		t.Fatal(err)
	}
	return calls
}

// outcomes of our own events that the work must have made.
func wantOutcomes(t *testing.T, events []keymgr.Event) {
	t.Helper()
	have := make(map[string]bool)
	for _, e := range events {
		have[e.Event+" "+e.Outcome] = true
		if strings.HasPrefix(e.Event, "cmk.") && e.RequestID == "" {
			t.Errorf("event %d, %s %s: no request id, and the KMS answered", e.Seq, e.Event, e.Outcome)
		}
	}
	for _, want := range []string{"cmk.wrap ok", "cmk.unwrap ok", "cmk.unwrap denied", "cmk.unwrap unreachable"} {
		if !have[want] {
			t.Errorf("the audit log has no %s: %v", want, have)
		}
	}
}

func TestEachServicesLogAgrees(t *testing.T) {
	always := reconcile.Window{Since: time.Unix(0, 1)}
	for name, start := range kmsimtest.Services {
		t.Run(name, func(t *testing.T) {
			s := start(t)
			events, provider := work(t, s)
			wantOutcomes(t, events)
			calls := export(t, s.Sim)
			r := reconcile.Compare(events, calls, reconcile.Window{})
			if !r.Clean() || r.Matched < 4 || len(r.Lost) > 0 {
				t.Fatalf("nothing was left out, and yet: %+v", r)
			}
			// Any line that is cut out of the KMS's log is missed, unless it is of what the key manager
			// did not have to tell apart: a failed call's further looks, or a login.
			missed := 0
			for i := range calls {
				if r := reconcile.Compare(events, slices.Delete(slices.Clone(calls), i, i+1), always); !r.Clean() {
					missed++
				} else if calls[i].Failure == "" && !strings.Contains(calls[i].Op, "escribe") && !isLook(calls[i].Op) {
					t.Errorf("without %v in the KMS's log the logs agree", calls[i])
				}
			}
			if missed < 3 {
				t.Errorf("only %d cuts of %d calls were found", missed, len(calls))
			}
			wantOursMissed(t, events, calls, always)
			// Somebody else uses the key.
			if _, err := provider.Wrap(t.Context(), s.CMK, keymgr.EncryptionContext{Project: "other", KEKVersion: 1}, []byte("x")); err != nil {
				t.Fatal(err)
			}
			if r := reconcile.Compare(events, export(t, s.Sim), always); len(r.OnlyTheirs) == 0 {
				t.Errorf("somebody else's use of the key was not found: %+v", r)
			}
		})
	}
}

// isLook tells operations that only look at a key.
func isLook(op string) bool {
	return op == "get" || op == "token" || strings.HasPrefix(op, "GET ") || strings.Contains(op, "Get") || strings.Contains(op, "lookup-self")
}

// wantOursMissed cuts each successful use out of our log, and turns each outcome around.
func wantOursMissed(t *testing.T, events []keymgr.Event, calls []reconcile.Call, w reconcile.Window) {
	t.Helper()
	for i, e := range events {
		if !strings.HasPrefix(e.Event, "cmk.") || e.Outcome != "ok" && e.Outcome != "denied" {
			continue
		}
		if e.Outcome == "ok" {
			// Without a call that got no answer in its neighbourhood, which might be the same.
			cut := slices.DeleteFunc(slices.Delete(slices.Clone(events), i, i+1), func(e keymgr.Event) bool { return e.Outcome == "unreachable" })
			if r := reconcile.Compare(cut, calls, w); len(r.OnlyTheirs) == 0 {
				t.Errorf("event %d cut out of our log was not missed: %+v", e.Seq, r)
			}
		}
		lie := slices.Clone(events)
		lie[i].Outcome = map[string]string{"ok": "denied", "denied": "ok"}[e.Outcome]
		if r := reconcile.Compare(lie, calls, w); len(r.Differ) == 0 {
			t.Errorf("event %d with outcome %s instead of %s: %+v", e.Seq, lie[i].Outcome, e.Outcome, r)
		}
	}
}

// An answer that was lost leaves a call in the KMS's log and none with its id in ours: it is told
// apart from a use by somebody else, by the time.
func TestALostAnswerIsNoFinding(t *testing.T) {
	at := time.Date(2026, 5, 1, 12, 0, 0, 0, time.UTC)
	const key = "arn:aws:kms:eu-central-1:111122223333:key/a"
	events := []keymgr.Event{
		{Seq: 1, Time: at, Event: "cmk.unwrap", Outcome: "ok", CMK: "aws-kms:" + key, RequestID: "1"},
		{Seq: 2, Time: at.Add(time.Minute), Event: "cmk.unwrap", Outcome: "unreachable", CMK: "aws-kms:" + key},
	}
	calls := []reconcile.Call{
		{Time: at, IDs: []string{"1"}, Key: key, Op: "Decrypt"},
		{Time: at.Add(58 * time.Second), IDs: []string{"2"}, Key: key, Op: "Decrypt"},
		{Time: at.Add(70 * time.Second), IDs: []string{"3"}, Key: "arn:aws:kms:eu-central-1:111122223333:key/other", Op: "Decrypt"},
	}
	if r := reconcile.Compare(events, calls, reconcile.Window{}); !r.Clean() || len(r.Lost) != 1 || r.Unanswered != 1 || r.Matched != 1 {
		t.Errorf("%+v", r)
	}
	calls[1].Time = at.Add(10 * time.Minute)
	if r := reconcile.Compare(events, calls, reconcile.Window{}); len(r.OnlyTheirs) != 1 {
		t.Errorf("ten minutes later it is no lost answer: %+v", r)
	}
	if r := reconcile.Compare(events, calls, reconcile.Window{Since: at, Until: at.Add(time.Minute)}); !r.Clean() || r.Outside != 1 {
		t.Errorf("outside the window: %+v", r)
	}
}
