package kmsopen

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/holdfastdb/holdfast/internal/config"
	"github.com/holdfastdb/holdfast/keymgr"
	"github.com/holdfastdb/holdfast/keymgr/localkms"
	"github.com/holdfastdb/holdfast/keymgr/providertest"
)

func open(t *testing.T, cfg config.KMS) (*Providers, *localkms.KMS, string) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "keys.json")
	console, err := localkms.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := console.Create("dev"); err != nil {
		t.Fatal(err)
	}
	p, err := Open(t.Context(), file, cfg)
	if err != nil {
		t.Fatal(err)
	}
	return p, console, file
}

// TestConformance: the registry changes nothing of what its services do.
func TestConformance(t *testing.T) {
	for _, cmk := range []string{"dev", "local:dev"} {
		t.Run(cmk, func(t *testing.T) {
			providertest.Run(t, func(t *testing.T) providertest.Subject {
				p, console, file := open(t, config.KMS{})
				must := func(t *testing.T, err error) {
					if err != nil {
						t.Fatal(err)
					}
				}
				return providertest.Subject{
					Provider: p, CMK: cmk, BindsAAD: true,
					Disable: func(t *testing.T) { must(t, console.Disable("dev")) },
					Enable:  func(t *testing.T) { must(t, console.Enable("dev")) },
					Rotate:  func(t *testing.T) { must(t, console.Rotate("dev")) },
					Cut:     func(t *testing.T) { must(t, os.Rename(file, file+".away")) },
				}
			})
		})
	}
}

func TestReferences(t *testing.T) {
	p, _, _ := open(t, config.KMS{AWS: &config.AWSKMS{}})
	for _, cmk := range []string{"dev", "local:dev", "aws-kms:arn:aws:kms:eu-central-1:111122223333:key/x"} {
		if err := p.CheckKey(cmk); err != nil {
			t.Errorf("%s: %v", cmk, err)
		}
	}
	for cmk, want := range map[string]string{
		"":                "no name",
		"local:":          "no name",
		"s3:bucket":       "want one of local:",
		"aws-kms:orders":  "is not the ARN",
		"vault:orders":    "configures no kms.vault",
		"gcp-kms:orders":  "configures no kms.gcp",
		"azure-kv:orders": "configures no kms.azure",
		"arn:aws:kms:x:y": "want one of",
	} {
		err := p.CheckKey(cmk)
		if !errors.Is(err, keymgr.ErrBadCMK) || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", cmk, err, want)
		}
	}
	onlyLocal, _, _ := open(t, config.KMS{})
	_, err := onlyLocal.Wrap(t.Context(), "aws-kms:arn:aws:kms:eu-central-1:111122223333:key/x", keymgr.EncryptionContext{}, nil)
	var pe *keymgr.ProviderError
	if !errors.As(err, &pe) || pe.Outcome != keymgr.Unknown || !strings.Contains(err.Error(), "configures no kms.aws") {
		t.Errorf("a service that is not configured: %v", err)
	}
}
