package main

import (
	"bytes"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParseSize(t *testing.T) {
	for in, want := range map[string]int64{"": 0, "1": 1, "8192B": 8192, "64kB": 64 << 10, "512MB": 512 << 20, "4GB": 4 << 30, "1 TB": 1 << 40} {
		if got, err := parseSize(in); err != nil || got != want {
			t.Errorf("parseSize(%q) = %d, %v; want %d", in, got, err, want)
		}
	}
	for _, in := range []string{"0", "-1", "GB", "4gb", "4 GB GB", "1e9", "9223372036854775807kB", "99999999999999999999"} {
		if got, err := parseSize(in); err == nil {
			t.Errorf("parseSize(%q) = %d, want an error", in, got)
		}
	}
}

func TestParseSettings(t *testing.T) {
	got, err := parseSettings([]string{"work_mem=64MB", " search_path = a, b ", "x=", "e=a=b"})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(map[string]string{"work_mem": "64MB", "search_path": "a, b", "x": "", "e": "a=b"}, got); diff != "" {
		t.Error(diff)
	}
	for _, in := range []string{"work_mem", "=1", " =1"} {
		if _, err := parseSettings([]string{in}); err == nil {
			t.Errorf("parseSettings(%q) succeeded", in)
		}
	}
}

// execute runs the command line in this process.
func execute(args ...string) (string, error) {
	root := newRoot()
	var out bytes.Buffer
	root.SetOut(&out)
	root.SetErr(&out)
	root.SetArgs(args)
	err := root.Execute()
	return out.String(), err
}

func TestGroupsRefuseUnknownWords(t *testing.T) {
	for _, tc := range []struct {
		want string
		args []string
	}{
		{`endpoint does not know "strat"`, []string{"endpoint", "strat"}},
		{"kms needs one of: ", []string{"kms"}},
		{"accepts at most 1 arg", []string{"endpoint", "start", "a", "b"}},
		{"takes one endpoint's name", []string{"psql", "a", "b"}},
	} {
		if _, err := execute(tc.args...); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%v: %v, want %q", tc.args, err, tc.want)
		}
	}
}

func TestKMSIsItsOwnConsole(t *testing.T) {
	data := t.TempDir()
	if _, err := execute("kms", "list", "--data", data); err == nil || !strings.Contains(err.Error(), "holdfast up") {
		t.Errorf("without a KMS: %v, want a word on how to make one", err)
	}
	for _, step := range []struct {
		args []string
		want string
	}{
		{[]string{"kms", "create", "dev"}, "enabled"},
		{[]string{"kms", "disable"}, "disabled"},
		{[]string{"kms", "enable"}, "enabled"},
		{[]string{"kms", "rotate", "dev"}, "2"},
		{[]string{"kms", "list"}, "dev"},
	} {
		out, err := execute(append(step.args, "--data", data)...)
		if err != nil || !strings.Contains(out, step.want) {
			t.Errorf("%v: %q, %v; want %q", step.args, out, err, step.want)
		}
	}
}

// With its keys gone a cluster cannot be read; a fresh key would hide that until it hurts.
func TestNoFreshKeysForOldData(t *testing.T) {
	l := layout{dir: t.TempDir()}
	if err := os.MkdirAll(filepath.Join(l.bucket(), "objects"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := makeLocalKey(l); err == nil || !strings.Contains(err.Error(), "put the file back") {
		t.Errorf("makeLocalKey: %v, want a refusal", err)
	}
}

func TestOneClusterAFolder(t *testing.T) {
	dir := t.TempDir()
	unlock, err := lockDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := lockDir(dir); err == nil || !strings.Contains(err.Error(), "in use") {
		t.Errorf("a second lock: %v, want 'in use'", err)
	}
	unlock()
	if unlock, err = lockDir(dir); err != nil {
		t.Fatalf("after the first ended: %v", err)
	}
	unlock()
}

func TestTakenAddressIsToldEarly(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().String()
	if err := checkListen(addr); err == nil || !strings.Contains(err.Error(), addr) {
		t.Errorf("checkListen: %v", err)
	}
	l.Close()
	if err := checkListen(addr); err != nil {
		t.Error(err)
	}
}

func TestLongPathsGetAnotherFolderForSockets(t *testing.T) {
	near := layout{dir: "/data"}
	if got := near.runDir(); got != "/data/run" {
		t.Errorf("runDir %q, want it in the data directory", got)
	}
	far := layout{dir: "/" + strings.Repeat("d", 200)}
	if got := far.runDir(); len(got) > maxRunDir || got != far.runDir() {
		t.Errorf("runDir %q is too long for sockets, or not always the same", got)
	}
}

// As root below a folder like /root, Postgres's user could not reach its data directory.
func TestComputeDirIsOneThatPostgresReaches(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root runs Postgres as another user")
	}
	open, err := os.MkdirTemp("", "hf-open-") // t.TempDir is for this user alone
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(open)
	if err := os.Chmod(open, 0o711); err != nil {
		t.Fatal(err)
	}
	closed := filepath.Join(open, "closed")
	l := layout{dir: filepath.Join(closed, "data")}
	if err := os.MkdirAll(l.dir, 0o711); err != nil {
		t.Fatal(err)
	}
	if dir, why := l.computeDir(); dir != l.path("compute") || why != "" {
		t.Errorf("below an open folder: %s (%s)", dir, why)
	}
	if err := os.Chmod(closed, 0o700); err != nil {
		t.Fatal(err)
	}
	dir, why := l.computeDir()
	if filepath.Dir(dir) != elsewhere || !strings.Contains(why, closed) {
		t.Errorf("below a closed folder: %s (%s)", dir, why)
	}
	second := layout{dir: l.dir + "2"}
	if err := os.Mkdir(second.dir, 0o711); err != nil {
		t.Fatal(err)
	}
	if other, _ := second.computeDir(); other == dir || filepath.Dir(other) != elsewhere {
		t.Errorf("two data directories share a folder: %s, %s", dir, other)
	}
}
