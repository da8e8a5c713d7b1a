package rotation

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/holdfastdb/holdfast/internal/config"
	"github.com/holdfastdb/holdfast/test/cluster"
	"github.com/holdfastdb/holdfast/test/kmsim"
	"github.com/holdfastdb/holdfast/test/kmsim/kmsimtest"
	"github.com/holdfastdb/holdfast/test/ledger"
	"github.com/holdfastdb/holdfast/test/testenv"
)

// world is a cluster that writes all the time, and its customer's keys.
type world struct {
	t      *testing.T
	ctx    context.Context
	c      *cluster.Cluster
	sim    *kmsim.Server
	ledger *ledger.Ledger
}

// kek is one version of the KEK.
type kek struct {
	Version    uint32 `json:"version"`
	CMK        string `json:"cmk"`
	CMKVersion string `json:"cmk_version"`
}

// versions is what `holdfast key versions --json` prints, as far as it is looked at.
type versions struct {
	Versions struct {
		CMK     string `json:"cmk"`
		Current uint32 `json:"current"`
		KEKs    []kek  `json:"keks"`
	} `json:"versions"`
	Uses []struct {
		What       string `json:"what"`
		KEKVersion uint32 `json:"kek_version"`
		DEKs       string `json:"deks"`
	} `json:"uses"`
	Errors       []string `json:"errors"`
	MayBeRetired []uint32 `json:"may_be_retired"`
}

func newWorld(t *testing.T) (w *world, arn string) {
	testenv.NeedPostgres(t)
	testenv.NeedFUSE(t)
	if testing.Short() {
		t.Skip("runs a cluster")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 15*time.Minute)
	t.Cleanup(cancel)
	for name, value := range map[string]string{"AWS_ACCESS_KEY_ID": "AKIAHOLDFAST", "AWS_SECRET_ACCESS_KEY": "secret",
		"AWS_EC2_METADATA_DISABLED": "true", "GOOGLE_APPLICATION_CREDENTIALS": serviceAccount(t)} {
		t.Setenv(name, value)
	}
	sim, ca := kmsimtest.Start(t)
	arn = kmsimtest.Key(t, sim, kmsim.AWS)
	c := cluster.ForTest(t, cluster.Options{Dir: testenv.TempDir(t), Separate: true, CMK: "aws-kms:" + arn,
		KMS: config.KMS{AWS: &config.AWSKMS{Endpoint: sim.URL(), CAFile: ca}, Google: &config.GoogleKMS{Endpoint: sim.Addr, CAFile: ca}}})
	if err := c.Start(ctx); err != nil {
		t.Fatal(err)
	}
	l, err := ledger.New(ctx, ledger.Config{Target: c.Target(), Connections: 2, Pause: 5 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	l.Start()
	return &world{t, ctx, c, sim, l}, arn
}

// serviceAccount makes a Google credential. The simulated service asks for its shape only.
func serviceAccount(t *testing.T) (file string) {
	t.Helper()
	private, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	data, err := json.Marshal(map[string]string{"type": "service_account", "project_id": "demo", "private_key_id": "1",
		"client_email": "keymgr@demo.iam.gserviceaccount.com", "client_id": "1", "token_uri": "https://127.0.0.1:1/token",
		"private_key": string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))})
	if err != nil {
		t.Fatal(err)
	}
	file = filepath.Join(t.TempDir(), "account.json")
	if err := os.WriteFile(file, data, 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// goesOn sees that the workload still commits.
func (w *world) goesOn(after string) {
	w.t.Helper()
	if err := w.ledger.WaitAcked(w.ctx, 20); err != nil {
		w.t.Fatalf("after %s: %v\n%s", after, err, w.c.Logs())
	}
}

// key runs a command of `holdfast key` until it works: a part that was killed may be on its way back.
func (w *world) key(args ...string) string {
	w.t.Helper()
	out, err := w.tryKey(args...)
	for err != nil && w.ctx.Err() == nil {
		w.t.Logf("%v", err)
		time.Sleep(time.Second)
		out, err = w.tryKey(args...)
	}
	if err != nil {
		w.t.Fatalf("%v\n%s", err, w.c.Logs())
	}
	return out
}

func (w *world) tryKey(args ...string) (string, error) {
	return w.c.CLI(w.ctx, append([]string{"key"}, args...)...)
}

// step runs a command while the workload does.
func (w *world) step(args ...string) {
	w.t.Helper()
	began := time.Now()
	out := w.key(args...)
	w.t.Logf("SHOW: key %s: %.1fs\n%s", strings.Join(args, " "), time.Since(began).Seconds(), out)
	w.goesOn(strings.Join(args, " "))
}

// interrupted runs a command and kills a role, with SIGKILL, a moment after it has begun.
func (w *world) interrupted(role string, after time.Duration, args ...string) {
	w.t.Helper()
	done := make(chan error, 1)
	go func() { _, err := w.tryKey(args...); done <- err }()
	time.Sleep(after)
	if err := errors.Join(w.c.Kill(role), w.c.StartRole(role)); err != nil {
		w.t.Fatal(err)
	}
	w.t.Logf("SHOW: key %s, %s killed %v after: %v", strings.Join(args, " "), role, after, <-done)
	w.goesOn("a kill of " + role)
}

func (w *world) versions() (v versions) {
	w.t.Helper()
	if err := json.Unmarshal([]byte(w.key("versions", "--json")), &v); err != nil {
		w.t.Fatal(err)
	}
	return v
}

// waitUnder waits until every version of the KEK is under a CMK.
func (w *world) waitUnder(cmk string) {
	w.t.Helper()
	for {
		v := w.versions()
		all := v.Versions.CMK == cmk
		for _, k := range v.Versions.KEKs {
			all = all && k.CMK == cmk
		}
		if all {
			return
		}
		if w.ctx.Err() != nil {
			w.t.Fatalf("not under %s: %+v", cmk, v.Versions)
		}
		time.Sleep(200 * time.Millisecond)
	}
}

// retire destroys a version of the KEK once nothing needs it.
func (w *world) retire(version uint32) {
	w.t.Helper()
	for {
		_, err := w.tryKey("retire", fmt.Sprint(version))
		if err == nil {
			return
		}
		if w.ctx.Err() != nil {
			w.t.Fatalf("retiring version %d: %v", version, err)
		}
		time.Sleep(2 * time.Second)
	}
}

func (w *world) check(when string) {
	w.t.Helper()
	w.ledger.Pause()
	if _, err := w.c.Target().WaitConnect(w.ctx); err != nil {
		w.t.Fatalf("%s: %v\n%s", when, err, w.c.Logs())
	}
	report, err := w.ledger.Check(w.ctx)
	if err != nil {
		w.t.Fatalf("%s: %v", when, err)
	}
	w.t.Logf("SHOW: %s: %v", when, report)
}

// TestKeysChangeUnderAWorkload takes a project through every change of its keys, interrupted by kills, and
// then destroys every key that it came by: what is left is enough.
func TestKeysChangeUnderAWorkload(t *testing.T) {
	w, first := newWorld(t)
	w.goesOn("the start")

	if err := w.sim.Rotate(first); err != nil {
		t.Fatal(err)
	}
	w.step("rotate-cmk")

	second, err := w.sim.CreateKey(kmsim.AWS, "second")
	if err != nil {
		t.Fatal(err)
	}
	w.interrupted(cluster.Keymgr, 30*time.Millisecond, "change", "--cmk", "aws-kms:"+second)
	w.step("change", "--cmk", "aws-kms:"+second)
	w.waitUnder("aws-kms:" + second)
	if err := w.sim.SetState(first, kmsim.Destroyed); err != nil {
		t.Fatal(err)
	}

	w.step("rotate")
	google := "gcp-kms:" + kmsimtest.Key(t, w.sim, kmsim.Google)
	w.step("change", "--cmk", google)
	w.waitUnder(google)
	// The command takes some 20 ms to be on its way, and some 50 to be done.
	for _, after := range []time.Duration{25 * time.Millisecond, 40 * time.Millisecond, 60 * time.Millisecond} {
		leader, err := w.c.Leader(w.ctx)
		if err != nil {
			t.Fatal(err)
		}
		for _, role := range []string{cluster.Pageserver, leader, cluster.Keymgr} {
			w.interrupted(role, after, "rotate")
		}
	}
	w.step("rotate", "--finish")

	w.step("change", "--cmk", "aws-kms:"+second)
	w.waitUnder("aws-kms:" + second)
	if err := w.sim.SetState(strings.TrimPrefix(google, "gcp-kms:"), kmsim.Destroyed); err != nil {
		t.Fatal(err)
	}
	w.goesOn("the destruction of the former keys")

	current := w.versions().Versions.Current
	if current < 3 {
		t.Errorf("version %d of the KEK is current after that many rotations", current)
	}
	for v := uint32(1); v < current; v++ {
		w.retire(v)
	}
	w.goesOn("the old KEKs were retired")
	if v := w.versions(); len(v.Versions.KEKs) != 1 || len(v.Errors) > 0 || v.Versions.KEKs[0].Version != current {
		t.Errorf("left: %+v", v)
	}
	w.check("with one KEK and one CMK left")

	if err := w.c.KillAll(); err != nil {
		t.Fatal(err)
	}
	if err := w.c.Start(w.ctx); err != nil {
		t.Fatal(err)
	}
	w.check("after a restart of everything")
	w.ledger.Start()
	w.goesOn("the restart")
	w.check("at the end")
	w.password()
}

// password sees that what the manager keeps sealed opens still.
func (w *world) password() {
	w.t.Helper()
	if out, err := w.c.CLI(w.ctx, "psql", "--", "-Atc", "SELECT 40 + 2"); err != nil || strings.TrimSpace(out) != "42" {
		w.t.Errorf("psql with the sealed password: %q, %v", out, err)
	}
}
