package transit

import (
	"encoding/pem"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/holdfastdb/holdfast/keymgr"
	"github.com/holdfastdb/holdfast/keymgr/providertest"
	"github.com/holdfastdb/holdfast/test/kmsim"
	"github.com/holdfastdb/holdfast/test/kmsim/kmsimtest"
)

func open(t *testing.T, cfg Config) *Provider {
	t.Helper()
	p, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func tokenFile(t *testing.T) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(file, []byte("hvs.test\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

func TestConformance(t *testing.T) {
	// What the environment says must not weaken the configuration.
	t.Setenv("VAULT_SKIP_VERIFY", "true")
	t.Setenv("VAULT_MAX_RETRIES", "5")
	providertest.Run(t, func(t *testing.T) providertest.Subject {
		sim, ca := kmsimtest.Start(t)
		ref := kmsimtest.Key(t, sim, kmsim.Transit)
		s := kmsimtest.Subject(sim, ref)
		s.Provider, s.CMK = open(t, Config{Address: sim.URL(), CAFile: ca, TokenFile: tokenFile(t)}), ref
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

func TestTheTokenIsReadAnew(t *testing.T) {
	t.Setenv("VAULT_TOKEN", "")
	t.Setenv("BAO_TOKEN", "")
	sim, ca := kmsimtest.Start(t)
	ref := kmsimtest.Key(t, sim, kmsim.Transit)
	_, _, err := open(t, Config{Address: sim.URL(), CAFile: ca}).CurrentVersion(t.Context(), ref)
	wantOutcome(t, "no token", err, keymgr.Unknown)
	file := tokenFile(t)
	p := open(t, Config{Address: sim.URL(), CAFile: ca, TokenFile: file})
	for _, token := range []string{"first", "second"} {
		if err := os.WriteFile(file, []byte(token), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, _, err := p.CurrentVersion(t.Context(), ref); err != nil {
			t.Fatal(err)
		}
		if log := sim.Log(); log[len(log)-1].Principal != token {
			t.Errorf("the call was made with %q, want %q", log[len(log)-1].Principal, token)
		}
	}
}

func TestOnlyTheServiceIsHeard(t *testing.T) {
	t.Setenv("VAULT_SKIP_VERIFY", "true")
	sim, _ := kmsimtest.Start(t)
	_, otherCA := kmsimtest.Start(t)
	ref := kmsimtest.Key(t, sim, kmsim.Transit)
	_, _, err := open(t, Config{Address: sim.URL(), CAFile: otherCA, TokenFile: tokenFile(t)}).CurrentVersion(t.Context(), ref)
	wantOutcome(t, "another authority", err, keymgr.Unreachable)
	if calls := sim.Log(); len(calls) != 0 {
		t.Errorf("calls over unverified TLS: %+v", calls)
	}
}

// TestNotFoundBySomebodyElse: only the service's own list of errors, empty as it is, says that there
// is no key; a proxy that does not know where to send the call does not.
func TestNotFoundBySomebodyElse(t *testing.T) {
	for body, isDenial := range map[string]bool{"": false, "<html>no such host</html>": false, "{}": false, `{"errors":[]}`: true} {
		srv := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(http.StatusNotFound)
			_, _ = io.WriteString(w, body)
		}))
		ca := filepath.Join(t.TempDir(), "ca.pem")
		if err := os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw}), 0o600); err != nil {
			t.Fatal(err)
		}
		p := open(t, Config{Address: srv.URL, CAFile: ca, TokenFile: tokenFile(t)})
		ec := keymgr.EncryptionContext{Project: "p1", KEKVersion: 1}
		_, wrapErr := p.Wrap(t.Context(), "transit/keys/orders", ec, []byte("x"))
		_, unwrapErr := p.Unwrap(t.Context(), "transit/keys/orders", ec, []byte("vault:v1:AAAA"))
		for _, err := range []error{wrapErr, unwrapErr} {
			var pe *keymgr.ProviderError
			if !errors.As(err, &pe) || (pe.Outcome == keymgr.Denied) != isDenial {
				t.Errorf("404 with body %q: %v, a denial: %v", body, err, isDenial)
			}
		}
		srv.Close()
	}
}

func TestBadConfigurationsAndKeys(t *testing.T) {
	t.Setenv("VAULT_ADDR", "")
	t.Setenv("BAO_ADDR", "")
	for _, cfg := range []Config{{}, {Address: "http://127.0.0.1:8200"}} {
		if _, err := Open(cfg); err == nil || !strings.Contains(err.Error(), "TLS only") {
			t.Errorf("%+v: %v, want TLS only", cfg, err)
		}
	}
	for _, cmk := range []string{"", "orders", "keys/orders", "transit/keys/", "transit/keys/a/b", "transit/../sys/keys/a", "transit/keys/a?b"} {
		if CheckKey(cmk) == nil {
			t.Errorf("%q is taken for a key's path", cmk)
		}
	}
	for ciphertext, want := range map[string]int{"vault:v3:AA==": 3, "bao:v12:x": 12, "": 0, "vault:v0:x": 0, "vault:3:x": 0, "vault:v3": 0} {
		if n := versionOf(ciphertext); n != want {
			t.Errorf("version of %q: %d, want %d", ciphertext, n, want)
		}
	}
}
