package keymgr_test

import (
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/keymgr"
	"github.com/holdfastdb/holdfast/keymgr/hook"
)

// No check is due for an hour, and nobody asks: the notice alone has the denial found. A notice
// of a key that is as it should be changes nothing.
func TestANoticeHasTheKeyChecked(t *testing.T) {
	const cmk = "aws-kms:arn:aws:kms:us-west-2:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab"
	f := newFixture(t)
	if err := f.srv.Close(); err != nil {
		t.Fatal(err)
	}
	srv, err := keymgr.New(keymgr.Config{Dir: f.auditDir(), BlobStore: f.bucket, Provider: f.kms, CheckInterval: time.Hour, LeaseTTL: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { srv.Close() })
	f.srv = srv
	if err := f.kms.Create(cmk); err != nil {
		t.Fatal(err)
	}
	if _, err := srv.CreateProject(t.Context(), &pb.CreateProjectRequest{Project: "p1", Cmk: cmk}); err != nil {
		t.Fatal(err)
	}
	id := f.mustLease("p1")
	const token = "a token of some length"
	file := filepath.Join(f.dir, "token")
	if err := os.WriteFile(file, []byte(token), 0o600); err != nil {
		t.Fatal(err)
	}
	h, err := hook.Start(hook.Config{Listen: "127.0.0.1:0", TokenFile: file, Checker: srv, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.Close() })
	notify := func() {
		t.Helper()
		body := `{"source": "aws.kms", "detail-type": "AWS API Call via CloudTrail", "detail": {"eventName": "DisableKey",
			"requestParameters": {"keyId": "1234abcd-12ab-34cd-56ef-1234567890ab"}}}`
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "http://"+h.Addr().String()+"/", strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Authorization", "Bearer "+token)
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != http.StatusAccepted {
			t.Fatal(resp.Status)
		}
	}
	before := f.kms.unwraps.Load()
	notify()
	f.eventually("a check", func() bool { return f.kms.unwraps.Load() > before })
	if _, err := f.generate(id, dekContext("p1", "a")); err != nil {
		t.Errorf("a notice of a key that is enabled ended a lease: %v", err)
	}
	if err := f.kms.Disable(cmk); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	notify()
	f.eventually("the denial", func() bool { _, err := f.generate(id, dekContext("p1", "b")); return err != nil })
	t.Logf("notice to the end of leases: %v", time.Since(began))
	if !strings.Contains(f.audit(), `"event":"kms.notice"`) {
		t.Error("the audit log lacks the notice")
	}
}
