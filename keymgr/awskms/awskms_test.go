package awskms

import (
	"errors"
	"path/filepath"
	"strings"
	"testing"

	"github.com/holdfastdb/holdfast/keymgr"
	"github.com/holdfastdb/holdfast/keymgr/providertest"
	"github.com/holdfastdb/holdfast/test/kmsim"
	"github.com/holdfastdb/holdfast/test/kmsim/kmsimtest"
)

var ec = keymgr.EncryptionContext{Project: "p1", KEKVersion: 1}

// isolate keeps the SDK from this machine's own configuration.
func isolate(t *testing.T) {
	t.Helper()
	absent := filepath.Join(t.TempDir(), "absent")
	for name, value := range map[string]string{
		"AWS_ACCESS_KEY_ID": "AKIATEST", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_SESSION_TOKEN": "", "AWS_PROFILE": "", "AWS_REGION": "",
		"AWS_CONFIG_FILE": absent, "AWS_SHARED_CREDENTIALS_FILE": absent, "AWS_EC2_METADATA_DISABLED": "true", "AWS_ENDPOINT_URL": "", "AWS_CA_BUNDLE": "",
	} {
		t.Setenv(name, value)
	}
}

func open(t *testing.T, cfg Config) *Provider {
	t.Helper()
	p, err := Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestConformance(t *testing.T) {
	isolate(t)
	providertest.Run(t, func(t *testing.T) providertest.Subject {
		sim, ca := kmsimtest.Start(t)
		ref := kmsimtest.Key(t, sim, kmsim.AWS)
		s := kmsimtest.Subject(sim, ref)
		s.Provider, s.CMK = open(t, Config{Endpoint: sim.URL(), CAFile: ca}), ref
		s.Faults.DestroyOldest = nil // no such thing in AWS
		return s
	})
}

func wantOutcome(t *testing.T, what string, err error, want keymgr.Outcome) {
	t.Helper()
	var pe *keymgr.ProviderError
	if !errors.As(err, &pe) || pe.Outcome != want {
		t.Errorf("%s: %v, want outcome %v", what, err, want)
	}
}

func TestAssumedRole(t *testing.T) {
	isolate(t)
	sim, ca := kmsimtest.Start(t)
	t.Setenv("AWS_ENDPOINT_URL_STS", sim.URL())
	ref := kmsimtest.Key(t, sim, kmsim.AWS)
	const role = "arn:aws:iam::111122223333:role/customer"
	cfg := Config{Region: kmsim.Region, Endpoint: sim.URL(), CAFile: ca, RoleARN: role, ExternalID: "x"}
	if _, err := open(t, cfg).Wrap(t.Context(), ref, ec, []byte("x")); err != nil {
		t.Fatal(err)
	}
	log := sim.Log()
	if len(log) != 3 || log[0].Op != "AssumeRole" || log[1].Principal != role+"/holdfast" || log[2].Principal != role+"/holdfast" {
		t.Errorf("want AssumeRole, then Encrypt and Decrypt as the role: %+v", log)
	}
	// Who gives out credentials is not the KMS: its refusal is none of the key.
	sim.SetFault(kmsim.BadIdentity)
	_, err := open(t, cfg).Wrap(t.Context(), ref, ec, []byte("x"))
	wantOutcome(t, "the role is refused", err, keymgr.Unknown)
}

func TestOwnCredentialsAreNoDenial(t *testing.T) {
	isolate(t)
	t.Setenv("AWS_ACCESS_KEY_ID", "")
	t.Setenv("AWS_SECRET_ACCESS_KEY", "")
	sim, ca := kmsimtest.Start(t)
	_, err := open(t, Config{Endpoint: sim.URL(), CAFile: ca}).Wrap(t.Context(), kmsimtest.Key(t, sim, kmsim.AWS), ec, []byte("x"))
	wantOutcome(t, "no credentials", err, keymgr.Unknown)
	if calls := sim.Log(); len(calls) != 0 {
		t.Errorf("calls without credentials: %+v", calls)
	}
}

// TestOnlyTheKMSIsHeard: a server that another authority vouches for is not asked at all.
func TestOnlyTheKMSIsHeard(t *testing.T) {
	isolate(t)
	sim, _ := kmsimtest.Start(t)
	_, otherCA := kmsimtest.Start(t)
	ref := kmsimtest.Key(t, sim, kmsim.AWS)
	if err := sim.SetState(ref, kmsim.Disabled); err != nil {
		t.Fatal(err)
	}
	_, err := open(t, Config{Endpoint: sim.URL(), CAFile: otherCA}).Unwrap(t.Context(), ref, ec, []byte("x"))
	wantOutcome(t, "another authority", err, keymgr.Unreachable)
	if calls := sim.Log(); len(calls) != 0 {
		t.Errorf("calls over unverified TLS: %+v", calls)
	}
}

func TestKeysOfOneAnother(t *testing.T) {
	isolate(t)
	sim, ca := kmsimtest.Start(t)
	p := open(t, Config{Endpoint: sim.URL(), CAFile: ca})
	ref := kmsimtest.Key(t, sim, kmsim.AWS)
	other, err := sim.CreateKey(kmsim.AWS, "other")
	if err != nil {
		t.Fatal(err)
	}
	w, err := p.Wrap(t.Context(), ref, ec, []byte("x"))
	if err != nil {
		t.Fatal(err)
	}
	_, err = p.Unwrap(t.Context(), other, ec, w.Ciphertext)
	wantOutcome(t, "another key's ciphertext (IncorrectKeyException)", err, keymgr.Unknown)
}

// TestPendingDeletionNeedsTheState: without leave to learn the key's state, nobody can tell a pending
// deletion from a key store's failure.
func TestPendingDeletionNeedsTheState(t *testing.T) {
	for state, want := range states {
		if want == keymgr.Unknown {
			t.Errorf("state %s has no meaning", state)
		}
	}
	if _, ok := outcomes[invalidState]; ok {
		t.Errorf("%s is decided by its code alone", invalidState)
	}
}

func TestBadConfigurationsAndKeys(t *testing.T) {
	isolate(t)
	for want, cfg := range map[string]Config{
		"TLS only":       {Endpoint: "http://127.0.0.1:1"},
		"is not an ARN":  {RoleARN: "customer"},
		"no such file":   {CAFile: filepath.Join(t.TempDir(), "absent")},
		"no certificate": {CAFile: "awskms.go"},
	} {
		if _, err := Open(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: %v, want %q", cfg, err, want)
		}
	}
	for _, cmk := range []string{"", "orders", "arn:aws:kms:eu-central-1:111122223333:alias/orders", "arn:aws:s3:eu-central-1:111122223333:key/x",
		"arn:aws:kms:evil.example/:111122223333:key/x"} {
		if err := CheckKey(cmk); err == nil {
			t.Errorf("%q is taken for a key's ARN", cmk)
		}
	}
	_, err := open(t, Config{}).Unwrap(t.Context(), "orders", ec, []byte("x"))
	wantOutcome(t, "no ARN", err, keymgr.Unknown)
}
