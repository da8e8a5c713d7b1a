package gcpkms

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/holdfastdb/holdfast/keymgr"
	"github.com/holdfastdb/holdfast/keymgr/providertest"
	"github.com/holdfastdb/holdfast/test/kmsim"
	"github.com/holdfastdb/holdfast/test/kmsim/kmsimtest"
)

const account = "keymgr@demo.iam.gserviceaccount.com"

// useAccount makes a service account that the client finds as it would find a real one.
func useAccount(t *testing.T) {
	t.Helper()
	private, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	data, err := json.Marshal(map[string]string{"type": "service_account", "project_id": "demo", "private_key_id": "1", "client_email": account,
		"client_id": "1", "token_uri": "https://127.0.0.1:1/token", "private_key": string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))})
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "account.json")
	if err := os.WriteFile(file, data, 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("GOOGLE_APPLICATION_CREDENTIALS", file)
}

func open(t *testing.T, cfg Config) *Provider {
	t.Helper()
	p, err := Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = p.client.Close() })
	return p
}

func TestConformance(t *testing.T) {
	useAccount(t)
	providertest.Run(t, func(t *testing.T) providertest.Subject {
		sim, ca := kmsimtest.Start(t)
		ref := kmsimtest.Key(t, sim, kmsim.Google)
		s := kmsimtest.Subject(sim, ref)
		s.Provider, s.CMK = open(t, Config{Endpoint: sim.Addr, CAFile: ca}), ref
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

func TestWhoIsAskedAndWhoAsks(t *testing.T) {
	useAccount(t)
	sim, ca := kmsimtest.Start(t)
	_, otherCA := kmsimtest.Start(t)
	ref := kmsimtest.Key(t, sim, kmsim.Google)
	_, _, err := open(t, Config{Endpoint: sim.Addr, CAFile: otherCA}).CurrentVersion(t.Context(), ref)
	wantOutcome(t, "another authority", err, keymgr.Unreachable)
	if calls := sim.Log(); len(calls) != 0 {
		t.Errorf("calls over unverified TLS: %+v", calls)
	}
	if _, _, err := open(t, Config{Endpoint: sim.Addr, CAFile: ca}).CurrentVersion(t.Context(), ref); err != nil {
		t.Fatal(err)
	}
	if log := sim.Log(); len(log) != 1 || log[0].Principal != account {
		t.Errorf("the call was not made as the account: %+v", log)
	}
}

// TestDenialsAreOfTheKey: that the caller's own project is set up badly is no denial.
func TestDenialsAreOfTheKey(t *testing.T) {
	for reason, want := range map[string]keymgr.Outcome{"IAM_PERMISSION_DENIED": keymgr.Denied, "SERVICE_DISABLED": keymgr.Unknown, "BILLING_DISABLED": keymgr.Unknown} {
		st, err := status.New(codes.PermissionDenied, "no").WithDetails(&errdetails.ErrorInfo{Reason: reason})
		if err != nil {
			t.Fatal(err)
		}
		if got := classify(&refusal{err: st.Err(), isAnswer: true}); got != want {
			t.Errorf("%s: %v, want %v", reason, got, want)
		}
		if got := classify(&refusal{err: st.Err()}); got != keymgr.Unknown {
			t.Errorf("%s from somebody else: %v, want unknown", reason, got)
		}
	}
}

func TestBadConfigurationsAndKeys(t *testing.T) {
	useAccount(t)
	for _, cfg := range []Config{{Endpoint: "https://kms"}, {CAFile: filepath.Join(t.TempDir(), "absent")}} {
		if _, err := Open(t.Context(), cfg); err == nil {
			t.Errorf("%+v: no error", cfg)
		}
	}
	for _, cmk := range []string{"", "orders", "projects/p/locations/l/keyRings/r/cryptoKeys/k/cryptoKeyVersions/1", "projects/p/locations/l/keyRings/r/cryptoKeys/"} {
		if CheckKey(cmk) == nil {
			t.Errorf("%q is taken for a key", cmk)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte("\x01\x0212ciphertext"))
	f.Add([]byte("\x01\xff"))
	f.Fuzz(func(t *testing.T, b []byte) {
		version, ciphertext, err := parse(b)
		if err != nil {
			return
		}
		if back := append(append([]byte{format, byte(len(version))}, version...), ciphertext...); string(back) != string(b) {
			t.Errorf("parse(%q) does not round trip: %q", b, back)
		}
	})
}
