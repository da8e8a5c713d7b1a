package badinput

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/holdfastdb/holdfast/test/cluster"
	"github.com/holdfastdb/holdfast/test/testenv"
)

// run runs the binary and returns all it said; it must end by itself.
func run(t *testing.T, args ...string) (string, error) {
	t.Helper()
	bin, err := cluster.Binary()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, bin, args...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err = cmd.Run()
	if ctx.Err() != nil {
		t.Fatalf("holdfast %v did not end; it said:\n%s", args, out.String())
	}
	return out.String(), err
}

func mustRefuse(t *testing.T, want string, args ...string) {
	t.Helper()
	out, err := run(t, args...)
	var exit *exec.ExitError
	if !errors.As(err, &exit) {
		t.Errorf("holdfast %v ended with %v; it said:\n%s", args, err, out)
		return
	}
	if !strings.Contains(out, want) {
		t.Errorf("holdfast %v said:\n%swant %q", args, out, want)
	}
	if strings.Contains(out, "panic:") || strings.Contains(out, "goroutine ") {
		t.Errorf("holdfast %v panicked:\n%s", args, out)
	}
}

func TestWrongWordsAreNamed(t *testing.T) {
	testenv.NeedFUSE(t)
	data := filepath.Join(testenv.TempDir(t), "data")
	busy, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer busy.Close()
	for _, tc := range []struct {
		want string
		args []string
	}{
		{`unknown command "upp"`, []string{"upp"}},
		{"unknown flag: --lissten", []string{"up", "--lissten", "x"}},
		{`--listen "nonsense": want HOST:PORT`, []string{"up", "--data", data, "--listen", "nonsense"}},
		{"address already in use", []string{"up", "--data", data, "--listen", busy.Addr().String()}},
		{"want NAME=VALUE", []string{"up", "--data", data, "--set", "work_mem"}},
		{"--cache-size", []string{"up", "--data", data, "--cache-size", "plenty"}},
		{"/no/such/file", []string{"up", "--data", data, "--listen", "127.0.0.1:0", "--password-file", "/no/such/file"}},
		{`unknown command "x" for "holdfast up"`, []string{"up", "x"}},
		{"not a directory", []string{"up", "--data", "/dev/null/data"}},
		{"no cluster is running over /no/such/data", []string{"status", "--data", "/no/such/data"}},
		{"no cluster is running", []string{"psql", "--data", "/no/such/data"}},
		{`endpoint does not know "strat"`, []string{"endpoint", "strat"}},
		{"endpoint needs one of: ", []string{"endpoint"}},
		{`kms does not know "disabel"`, []string{"kms", "disabel"}},
		{"there is no development KMS in /no/such/data", []string{"kms", "list", "--data", "/no/such/data"}},
		{`required flag(s) "config" not set`, []string{"safekeeper"}},
		{"/no/such/file", []string{"pageserver", "--config", "/no/such/file"}},
	} {
		mustRefuse(t, tc.want, tc.args...)
	}
}

func TestWrongConfigurationsAreNamed(t *testing.T) {
	dir := testenv.TempDir(t)
	file := filepath.Join(dir, "role.yaml")
	sock := func(n string) string { return "unix:" + filepath.Join(dir, n) }
	peers := fmt.Sprintf("{1: %q, 2: %q, 3: %q}", sock("1"), sock("2"), sock("3"))
	for _, tc := range []struct{ role, yaml, want string }{
		{"keymgr", "", "is empty"},
		{"keymgr", "listen: [", "yaml"},
		{"keymgr", "listen: unix:/x\ndirr: /y\n", "field dirr not found"},
		{"keymgr", "listen: unix:/x\ndir: /y\nbucket: /z\n", "kms is missing"},
		{"keymgr", fmt.Sprintf("listen: %s\ndir: %s/keymgr\nbucket: %s/b\nkms: {aws: {endpoint: 'http://x'}}\n", sock("k"), dir, dir), "TLS only"},
		{"keymgr", fmt.Sprintf("listen: %s\ndir: %s/keymgr\nbucket: %s/b\nkms: {aws: {}}\ncmks: [dev]\n", sock("k"), dir, dir), "configures no local_kms"},
		{"keymgr", fmt.Sprintf("listen: %s\ndir: %s/keymgr\nbucket: %s/b\nlocal_kms: %s/no/keys.json\n", sock("k"), dir, dir, dir), "keys.json"},
		{"safekeeper", "id: one", "cannot unmarshal"},
		{"safekeeper", fmt.Sprintf("id: 4\nlisten: %s\ndir: %s\nbucket: %s\nkeymgr: %s\npeers: %s\n", sock("4"), dir, dir, sock("k"), peers), "own id 4"},
		{"safekeeper", fmt.Sprintf("id: 1\nlisten: 0.0.0.0:7777\ndir: %s/s\nbucket: %s/b\nkeymgr: %s\npeers: %s\n", dir, dir, sock("k"), peers), "not on loopback"},
		{"pageserver", fmt.Sprintf("node: p\nlisten: %s\ndir: %s\nbucket: %s\nkeymgr: %s\n", sock("p"), dir, dir, sock("k")), "safekeepers is missing"},
		{"pageserver", fmt.Sprintf("node: p\nlisten: %s\ndir: /dev/null/p\nbucket: %s/b\nkeymgr: %s\nsafekeepers: [%s]\n", sock("p"), dir, sock("k"), sock("1")), "/dev/null"},
		{"manager", "listen: unix:/m\n", "missing"},
		{"compute", "project: p\n", "missing"},
	} {
		if err := os.WriteFile(file, []byte(tc.yaml), 0o600); err != nil {
			t.Fatal(err)
		}
		mustRefuse(t, tc.want, tc.role, "--config", file)
	}
}

// What only a running cluster can tell.
func TestWrongWordsToARunningCluster(t *testing.T) {
	needCluster(t)
	ctx, cancel := context.WithTimeout(t.Context(), caseTimeout)
	defer cancel()
	c := cluster.ForTest(t, cluster.Options{Dir: testenv.TempDir(t)})
	if err := c.Start(ctx); err != nil {
		t.Fatal(err)
	}
	mustRefuse(t, "is in use by another", "up", "--data", c.Data, "--listen", "127.0.0.1:0")
	mustRefuse(t, `no endpoint "other"`, "endpoint", "start", "other", "--data", c.Data)
	mustRefuse(t, `no endpoint "other"`, "psql", "other", "--data", c.Data)
	mustRefuse(t, `nokey`, "kms", "disable", "nokey", "--data", c.Data)
	if out, err := c.CLI(ctx, "psql", "--", "-Atc", "SELECT 40 + 2"); err != nil || strings.TrimSpace(out) != "42" {
		t.Errorf("psql: %q, %v", out, err)
	}
	if _, err := c.CLI(ctx, "psql", "--", "-c", "SELECT nonsense", "-v", "ON_ERROR_STOP=1"); err == nil {
		t.Error("psql's failure is not that of `holdfast psql`")
	}
	if out, err := c.CLI(ctx, "endpoint", "list"); err != nil || !strings.Contains(out, "main") || !strings.Contains(out, "running") {
		t.Errorf("endpoint list: %q, %v", out, err)
	}
	if out, err := c.CLI(ctx, "status"); err != nil || !strings.Contains(out, "SAFEKEEPER") || strings.Contains(out, "not answering") {
		t.Errorf("status: %q, %v", out, err)
	}
	if _, err := c.CLI(ctx, "endpoint", "stop"); err != nil {
		t.Fatal(err)
	}
	mustRefuse(t, "endpoint main is stopped", "psql", "--data", c.Data)
	if _, err := c.CLI(ctx, "endpoint", "start"); err != nil {
		t.Fatal(err)
	}
	if err := c.Target().Exec(ctx, "SELECT 1"); err != nil {
		t.Error(err)
	}
	if err := c.Target().Exec(ctx, "CREATE TABLESPACE elsewhere LOCATION '/tmp'"); err == nil {
		t.Error("a tablespace outside the data directory was made: what is in it would be plaintext, and lost")
	}
	if err := c.Stop(); err != nil {
		t.Fatal(err)
	}
	// A setting that PostgreSQL refuses is told to the user, not tried in silence.
	if err := c.Launch("--set", "no_such_setting=1"); err != nil {
		t.Fatal(err)
	}
	for !strings.Contains(c.Log(), "no_such_setting") {
		select {
		case <-ctx.Done():
			t.Fatalf("nobody said that PostgreSQL refuses the setting:\n%s", c.Logs())
		case <-time.After(50 * time.Millisecond):
		}
	}
}
