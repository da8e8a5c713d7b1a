package kmsimtest

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
	"github.com/holdfastdb/holdfast/test/kmsim"
)

// Service is a simulated KMS, a key in it, and how a key manager reaches it.
type Service struct {
	Sim *kmsim.Server
	Ref string // the key, as the simulator calls it
	CMK string // the key, as a key manager calls it
	KMS config.KMS
}

func setenv(t testing.TB, values map[string]string) {
	t.Helper()
	for name, value := range values {
		t.Setenv(name, value)
	}
}

// Services start one of each kind, with the environment by which its client finds credentials.
var Services = map[string]func(t testing.TB) Service{
	"aws": func(t testing.TB) Service {
		setenv(t, map[string]string{"AWS_ACCESS_KEY_ID": "AKIATEST", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_EC2_METADATA_DISABLED": "true"})
		sim, ca := Start(t)
		ref := Key(t, sim, kmsim.AWS)
		return Service{sim, ref, "aws-kms:" + ref, config.KMS{AWS: &config.AWSKMS{Endpoint: sim.URL(), CAFile: ca}}}
	},
	"azure": func(t testing.TB) Service {
		sim, ca := Start(t)
		setenv(t, map[string]string{"AZURE_TENANT_ID": kmsim.Tenant, "AZURE_CLIENT_ID": "holdfast", "AZURE_CLIENT_SECRET": "secret",
			"AZURE_AUTHORITY_HOST": sim.URL(), "AZURE_TOKEN_CREDENTIALS": "EnvironmentCredential"})
		ref := Key(t, sim, kmsim.Azure)
		return Service{sim, ref, "azure-kv:" + sim.URL() + "/" + ref, config.KMS{Azure: &config.AzureKMS{CAFile: ca, PrivateCloud: true}}}
	},
	"google": func(t testing.TB) Service {
		t.Setenv("GOOGLE_APPLICATION_CREDENTIALS", account(t))
		sim, ca := Start(t)
		ref := Key(t, sim, kmsim.Google)
		return Service{sim, ref, "gcp-kms:" + ref, config.KMS{Google: &config.GoogleKMS{Endpoint: sim.Addr, CAFile: ca}}}
	},
	"transit": func(t testing.TB) Service {
		setenv(t, map[string]string{"VAULT_TOKEN": "hvs.test", "BAO_TOKEN": ""})
		sim, ca := Start(t)
		ref := Key(t, sim, kmsim.Transit)
		return Service{sim, ref, "vault:" + ref, config.KMS{Transit: &config.TransitKMS{Address: sim.URL(), CAFile: ca}}}
	},
}

func account(t testing.TB) (file string) {
	t.Helper()
	private, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	data, err := json.Marshal(map[string]string{"type": "service_account", "project_id": "demo", "private_key_id": "1", "client_email": "keymgr@demo.iam.gserviceaccount.com",
		"client_id": "1", "token_uri": "https://127.0.0.1:1/token", "private_key": string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))})
	if err != nil {
		t.Fatal(err)
	}
	file = filepath.Join(t.TempDir(), "account.json")
	if err := os.WriteFile(file, data, 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}
