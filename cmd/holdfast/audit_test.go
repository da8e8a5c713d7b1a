package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/blob/dirblob"
	"github.com/holdfastdb/holdfast/keymgr"
	"github.com/holdfastdb/holdfast/keymgr/localkms"
)

// audited makes an audit log by what a key manager does with a key of this name.
func audited(t *testing.T, cmk string) (dir string) {
	t.Helper()
	dir = t.TempDir()
	kms, err := localkms.Open(filepath.Join(t.TempDir(), "keys.json"))
	if err != nil {
		t.Fatal(err)
	}
	if err := kms.Create(cmk); err != nil {
		t.Fatal(err)
	}
	bucket, err := dirblob.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	srv, err := keymgr.New(keymgr.Config{Dir: dir, BlobStore: bucket, Provider: kms})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := srv.CreateProject(t.Context(), &pb.CreateProjectRequest{Project: "p", Cmk: cmk}); err != nil {
		t.Fatal(err)
	}
	if _, err := srv.Lease(t.Context(), &pb.LeaseRequest{Project: "p", Node: "n"}); err != nil {
		t.Fatal(err)
	}
	if err := srv.Close(); err != nil {
		t.Fatal(err)
	}
	return dir
}

// holdfast runs the program in this process.
func holdfast(args ...string) (out string, status int, err error) {
	var b bytes.Buffer
	root := newRoot()
	root.SetArgs(args)
	root.SetOut(&b)
	err = root.Execute()
	var exit *exitError
	switch {
	case errors.As(err, &exit):
		status = exit.status
	case err != nil:
		status = 1
	}
	return b.String(), status, err
}

func TestAuditVerify(t *testing.T) {
	dir := audited(t, "dev")
	file := filepath.Join(dir, "audit-000000000001.jsonl")
	whole, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	out, status, err := holdfast("audit", "verify", dir)
	head := regexp.MustCompile(`(?m)^head (\d+:[0-9a-f]{64})$`).FindStringSubmatch(out)
	if status != 0 || head == nil || !strings.Contains(out, "lease.granted") || !strings.Contains(out, "by 1 key managers") {
		t.Fatalf("verify: %q, %v", out, err)
	}
	if out, status, err := holdfast("audit", "verify", "--expect-head", head[1], file); status != 0 {
		t.Errorf("with its own head: %q, %v", out, err)
	}
	lines := bytes.SplitAfter(whole, []byte("\n"))
	cut := bytes.Join(lines[:len(lines)-2], nil)
	anew := strings.Replace(head[1], ":", ":00", 1)[:len(head[1])]
	for name, tc := range map[string]struct {
		text []byte
		args []string
		want string
	}{
		"cut off":       {cut, []string{"--expect-head", head[1]}, "was cut off"},
		"written anew":  {whole, []string{"--expect-head", anew}, "written anew"},
		"a changed one": {bytes.Replace(whole, []byte(`"node":"n"`), []byte(`"node":"m"`), 1), nil, "audit-000000000001.jsonl, line"},
		"no log":        {nil, nil, ""},
	} {
		if err := os.WriteFile(file, tc.text, 0o600); err != nil {
			t.Fatal(err)
		}
		_, status, err := holdfast(append([]string{"audit", "verify", dir}, tc.args...)...)
		if want := map[bool]int{true: 2, false: 0}[tc.want != ""]; status != want || tc.want != "" && !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: status %d, %v; want %d and %q", name, status, err, want, tc.want)
		}
	}
	for _, args := range [][]string{{"verify", filepath.Join(dir, "absent")}, {"verify", "--expect-head", "7", dir}, {"verify", t.TempDir()}} {
		if _, status, err := holdfast(append([]string{"audit"}, args...)...); err == nil || status == 0 {
			t.Errorf("%v: no error", args)
		}
	}
}

func TestAuditReconcile(t *testing.T) {
	const cmk = "vault:transit/keys/orders" // which the development KMS plays
	dir := audited(t, cmk)
	log := filepath.Join(t.TempDir(), "log.json")
	type call map[string]string
	write := func(calls ...call) {
		t.Helper()
		data, err := json.Marshal(calls)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(log, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	var calls []call
	if _, err := keymgr.ReadAudit([]string{dir}, nil, func(e keymgr.Event) error {
		if e.RequestID != "" {
			calls = append(calls, call{"time": e.Time.Format(time.RFC3339Nano), "request_id": e.RequestID, "op": e.Event, "key": "transit/keys/orders", "outcome": "ok"})
		}
		return nil
	}); err != nil || len(calls) != 2 {
		t.Fatalf("%d calls in the audit log, %v", len(calls), err)
	}
	foreign := call{"time": calls[0]["time"], "request_id": "x", "op": "decrypt", "key": "transit/keys/orders", "principal": "mallory", "outcome": "ok"}
	denied := call{"time": calls[1]["time"], "request_id": calls[1]["request_id"], "key": "transit/keys/orders", "outcome": "403"}
	for name, tc := range map[string]struct {
		calls  []call
		status int
		want   string
	}{
		"agree":            {calls, 0, "2 calls are in both logs"},
		"theirs was cut":   {calls[:1], 3, "only in the audit log"},
		"another's use":    {append([]call{foreign}, calls...), 3, "by mallory"},
		"differing result": {[]call{calls[0], denied}, 3, "the outcome differs"},
	} {
		write(tc.calls...)
		out, status, err := holdfast("audit", "reconcile", "--log", log, "--format", "kmsim", "--since", "2020-01-01T00:00:00Z", dir)
		if status != tc.status || !strings.Contains(out, tc.want) {
			t.Errorf("%s: status %d, want %d; %q, want %q; %v", name, status, tc.status, out, tc.want, err)
		}
	}
	for _, args := range [][]string{{"--format", "splunk"}, {"--format", "kmsim", "--since", "today"}, {"--format", "vault", "--log", dir}} {
		if _, status, err := holdfast(append([]string{"audit", "reconcile", "--log", log, dir}, args...)...); status != 1 {
			t.Errorf("%v: status %d, %v", args, status, err)
		}
	}
}
