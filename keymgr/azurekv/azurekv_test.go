package azurekv

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"errors"
	"strings"
	"testing"

	"github.com/holdfastdb/holdfast/keymgr"
	"github.com/holdfastdb/holdfast/keymgr/providertest"
	"github.com/holdfastdb/holdfast/test/kmsim"
	"github.com/holdfastdb/holdfast/test/kmsim/kmsimtest"
)

var ec = keymgr.EncryptionContext{Project: "p1", KEKVersion: 1}

// start runs a vault and an application that may log in to it.
func start(t *testing.T) (sim *kmsim.Server, ca, cmk string) {
	t.Helper()
	sim, ca = kmsimtest.Start(t)
	for name, value := range map[string]string{"AZURE_TENANT_ID": kmsim.Tenant, "AZURE_CLIENT_ID": "holdfast", "AZURE_CLIENT_SECRET": "secret",
		"AZURE_AUTHORITY_HOST": sim.URL(), "AZURE_TOKEN_CREDENTIALS": "EnvironmentCredential"} {
		t.Setenv(name, value)
	}
	return sim, ca, sim.URL() + "/" + kmsimtest.Key(t, sim, kmsim.Azure)
}

func open(t *testing.T, cfg Config) *Provider {
	t.Helper()
	p, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestConformance(t *testing.T) {
	providertest.Run(t, func(t *testing.T) providertest.Subject {
		sim, ca, cmk := start(t)
		s := kmsimtest.Subject(sim, strings.TrimPrefix(cmk, sim.URL()+"/"))
		s.Provider, s.CMK = open(t, Config{CAFile: ca, PrivateCloud: true}), cmk
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

// TestAForgedWrapIsRefused: who has the public half of the key, and may write to the bucket,
// must not choose the KEK.
func TestAForgedWrapIsRefused(t *testing.T) {
	_, ca, cmk := start(t)
	p := open(t, Config{CAFile: ca, PrivateCloud: true})
	w, err := p.Wrap(t.Context(), cmk, ec, []byte("the true KEK"))
	if err != nil {
		t.Fatal(err)
	}
	e, err := parseEnvelope(w.Ciphertext)
	if err != nil {
		t.Fatal(err)
	}
	c, err := p.begin("test", cmk)
	if err != nil {
		t.Fatal(err)
	}
	key, err := c.key(t.Context(), e.version)
	if err != nil {
		t.Fatal(err)
	}
	public, err := publicKey(key)
	if err != nil {
		t.Fatal(err)
	}
	if e.ciphertext, err = rsa.EncryptOAEP(sha256.New(), rand.Reader, public, []byte("a KEK of mine"), nil); err != nil {
		t.Fatal(err)
	}
	u, err := p.Unwrap(t.Context(), cmk, ec, e.marshal())
	wantOutcome(t, "a forged wrap", err, keymgr.Unknown)
	if u.Plaintext != nil {
		t.Error("a forged wrap was unwrapped")
	}
}

func TestLoginAndNetworkAreNoDenial(t *testing.T) {
	sim, ca, cmk := start(t)
	_, otherCA := kmsimtest.Start(t)
	_, _, err := open(t, Config{CAFile: otherCA, PrivateCloud: true}).CurrentVersion(t.Context(), cmk)
	wantOutcome(t, "another authority", err, keymgr.Unreachable)
	if calls := sim.Log(); len(calls) != 0 {
		t.Errorf("calls over unverified TLS: %+v", calls)
	}
	sim.SetFault(kmsim.BadIdentity)
	_, _, err = open(t, Config{CAFile: ca, PrivateCloud: true}).CurrentVersion(t.Context(), cmk)
	wantOutcome(t, "the login refuses", err, keymgr.Unknown)
	sim.SetFault(kmsim.NoFault)
	if _, _, err := open(t, Config{CAFile: ca, PrivateCloud: true}).CurrentVersion(t.Context(), cmk); err != nil {
		t.Fatal(err)
	}
	if log := sim.Log(); log[len(log)-1].Principal != "holdfast" {
		t.Errorf("the call was not made as the application: %+v", log)
	}
	// A token for Azure's vaults goes to no other server.
	before := len(sim.Log())
	_, _, err = open(t, Config{CAFile: ca}).CurrentVersion(t.Context(), cmk)
	wantOutcome(t, "a vault outside Azure's domain", err, keymgr.Unreachable)
	for _, e := range sim.Log()[before:] {
		if e.Op != "challenge" {
			t.Errorf("a vault outside Azure's domain was sent %+v", e)
		}
	}
}

func TestBadKeys(t *testing.T) {
	for _, cmk := range []string{"", "orders", "http://vault/keys/orders", "https://vault/keys/orders/1", "https://vault/secrets/x", "https://u@vault/keys/x"} {
		if CheckKey(cmk) == nil {
			t.Errorf("%q is taken for a key's URL", cmk)
		}
	}
}

func FuzzParseEnvelope(f *testing.F) {
	f.Add(envelope{"a1", []byte("signature"), []byte("ciphertext")}.marshal())
	f.Add([]byte{format, 255})
	f.Fuzz(func(t *testing.T, b []byte) {
		if e, err := parseEnvelope(b); err == nil && string(e.marshal()) != string(b) {
			t.Errorf("%q does not round trip: %q", b, e.marshal())
		}
	})
}
