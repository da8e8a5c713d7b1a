package revocation

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"os"
	"path/filepath"
	"testing"

	"github.com/holdfastdb/holdfast/internal/config"
	"github.com/holdfastdb/holdfast/keymgr/localkms"
	"github.com/holdfastdb/holdfast/test/kmsim"
	"github.com/holdfastdb/holdfast/test/kmsim/kmsimtest"
)

// fault is one way in which a key cannot be used, and the way back.
type fault struct {
	name string
	// silent: the KMS does not say no, so that it takes the end of the grace and of the leases.
	silent   bool
	do, undo func() error
}

// customer is who holds the CMK, in one kind of KMS.
type customer struct {
	kind   string
	cmk    string // as Holdfast names it; empty: "dev", in the cluster's own development KMS
	kms    config.KMS
	faults []fault
	// destroy takes the key away for good; nil: this customer cannot.
	destroy func() error
}

// kinds are the providers, and how a customer comes to a key with each.
var kinds = []struct {
	name string
	make func(*testing.T) *customer
}{
	{"AWS", func(t *testing.T) *customer {
		setenv(t, map[string]string{"AWS_ACCESS_KEY_ID": "AKIAHOLDFAST", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_EC2_METADATA_DISABLED": "true"})
		return inCloud(t, kmsim.AWS, func(s *kmsim.Server, ca, ref string) (string, config.KMS) {
			return "aws-kms:" + ref, config.KMS{AWS: &config.AWSKMS{Endpoint: s.URL(), CAFile: ca}}
		})
	}},
	{"Google", func(t *testing.T) *customer {
		setenv(t, map[string]string{"GOOGLE_APPLICATION_CREDENTIALS": serviceAccount(t)})
		return inCloud(t, kmsim.Google, func(s *kmsim.Server, ca, ref string) (string, config.KMS) {
			return "gcp-kms:" + ref, config.KMS{Google: &config.GoogleKMS{Endpoint: s.Addr, CAFile: ca}}
		})
	}},
	{"Azure", func(t *testing.T) *customer {
		return inCloud(t, kmsim.Azure, func(s *kmsim.Server, ca, ref string) (string, config.KMS) {
			setenv(t, map[string]string{"AZURE_TENANT_ID": kmsim.Tenant, "AZURE_CLIENT_ID": "holdfast", "AZURE_CLIENT_SECRET": "secret",
				"AZURE_AUTHORITY_HOST": s.URL(), "AZURE_TOKEN_CREDENTIALS": "EnvironmentCredential"})
			return "azure-kv:" + s.URL() + "/" + ref, config.KMS{Azure: &config.AzureKMS{CAFile: ca, PrivateCloud: true}}
		})
	}},
	{"transit", func(t *testing.T) *customer {
		token := filepath.Join(t.TempDir(), "token")
		if err := os.WriteFile(token, []byte("hvs.test\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		return inCloud(t, kmsim.Transit, func(s *kmsim.Server, ca, ref string) (string, config.KMS) {
			return "vault:" + ref, config.KMS{Transit: &config.TransitKMS{Address: s.URL(), CAFile: ca, TokenFile: token}}
		})
	}},
	{"PKCS#11", withToken},
	{"local", func(*testing.T) *customer { return &customer{kind: "local"} }}, // its faults come with the cluster
}

func setenv(t *testing.T, values map[string]string) {
	for name, value := range values {
		t.Setenv(name, value)
	}
}

// serviceAccount makes the file by which Google's client knows who it is.
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

// inCloud is a customer of a simulated cloud.
func inCloud(t *testing.T, p kmsim.Protocol, reach func(s *kmsim.Server, ca, ref string) (cmk string, kms config.KMS)) *customer {
	t.Helper()
	s, ca := kmsimtest.Start(t)
	ref := kmsimtest.Key(t, s, p)
	c := &customer{kind: string(p), destroy: func() error { return s.SetState(ref, kmsim.Destroyed) }}
	c.cmk, c.kms = reach(s, ca, ref)
	state := func(st kmsim.State) func() error { return func() error { return s.SetState(ref, st) } }
	withdraw := func(revoked bool) func() error { return func() error { return s.Revoke(ref, revoked) } }
	general := func(f kmsim.Fault) func() error { return func() error { s.SetFault(f); return nil } }
	c.faults = []fault{
		{name: "disabled", do: state(kmsim.Disabled), undo: state(kmsim.Enabled)},
		{name: "access denied", do: withdraw(true), undo: withdraw(false)},
		{name: "scheduled for deletion", do: state(kmsim.PendingDeletion), undo: state(kmsim.Enabled)},
		{name: "version destroyed", do: func() error { return s.DestroyVersion(ref, 1) }, undo: func() error { return s.RestoreVersion(ref, 1) }},
		{name: "black-holed", silent: true, do: general(kmsim.BlackHole), undo: general(kmsim.NoFault)},
		{name: "throttled", silent: true, do: general(kmsim.Throttle), undo: general(kmsim.NoFault)},
	}
	return c
}

// ownKMS gives the customer of the development KMS their hand on it, once its file is there.
func (c *customer) ownKMS(file string) error {
	if c.cmk != "" {
		return nil
	}
	kms, err := localkms.Open(file)
	if err != nil {
		return err
	}
	away := file + ".away"
	c.faults = []fault{
		{name: "disabled", do: func() error { return kms.Disable("dev") }, undo: func() error { return kms.Enable("dev") }},
		{name: "file gone", silent: true, do: func() error { return os.Rename(file, away) }, undo: func() error { return os.Rename(away, file) }},
	}
	c.destroy = func() error { return os.Remove(file) }
	return nil
}
