// Package kmsopen opens the key management services that a key manager may ask, and sends
// each call to the one that its CMK names. A CMK is KIND:KEY, where KEY is what the service
// itself calls the key:
//
//	aws-kms:arn:aws:kms:REGION:ACCOUNT:key/ID
//	gcp-kms:projects/P/locations/L/keyRings/R/cryptoKeys/K
//	azure-kv:https://VAULT/keys/NAME
//	pkcs11:token=LABEL;object=LABEL (RFC 7512)
//	vault:MOUNT/keys/NAME       transit of Vault or OpenBao
//	local:NAME, or just NAME    the development KMS
package kmsopen

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/holdfastdb/holdfast/internal/config"
	"github.com/holdfastdb/holdfast/keymgr"
	"github.com/holdfastdb/holdfast/keymgr/awskms"
	"github.com/holdfastdb/holdfast/keymgr/azurekv"
	"github.com/holdfastdb/holdfast/keymgr/gcpkms"
	"github.com/holdfastdb/holdfast/keymgr/localkms"
	"github.com/holdfastdb/holdfast/keymgr/pkcs11"
	"github.com/holdfastdb/holdfast/keymgr/transit"
)

// kind is a kind of service: how its CMKs are told apart and what they look like.
type kind struct {
	name   string
	option string // in the key manager's configuration
	check  func(key string) error
}

const local = "local"

var kinds = []kind{
	{local, "local_kms", checkLocal},
	{"aws-kms", "kms.aws", awskms.CheckKey},
	{"gcp-kms", "kms.gcp", gcpkms.CheckKey},
	{"azure-kv", "kms.azure", azurekv.CheckKey},
	{"pkcs11", "kms.pkcs11", pkcs11.CheckKey},
	{"vault", "kms.vault", transit.CheckKey},
}

func checkLocal(key string) error {
	if key == "" {
		return errors.New("a key of the development KMS has no name")
	}
	return nil
}

// Providers are the services that are configured, as one.
type Providers struct{ byKind map[string]keymgr.Provider }

var _ keymgr.Provider = (*Providers)(nil)

// Open prepares the services; none is asked anything. localFile is the development KMS's;
// empty: none.
func Open(ctx context.Context, localFile string, cfg config.KMS) (*Providers, error) {
	p := &Providers{byKind: make(map[string]keymgr.Provider)}
	if localFile != "" {
		k, err := localkms.Open(localFile)
		if err != nil {
			return nil, err
		}
		p.byKind[local] = k
	}
	if c := cfg.AWS; c != nil {
		k, err := awskms.Open(ctx, awskms.Config(*c))
		if err != nil {
			return nil, err
		}
		p.byKind["aws-kms"] = k
	}
	if c := cfg.Google; c != nil {
		k, err := gcpkms.Open(ctx, gcpkms.Config(*c))
		if err != nil {
			return nil, err
		}
		p.byKind["gcp-kms"] = k
	}
	if c := cfg.Azure; c != nil {
		k, err := azurekv.Open(azurekv.Config(*c))
		if err != nil {
			return nil, err
		}
		p.byKind["azure-kv"] = k
	}
	if c := cfg.PKCS11; c != nil {
		k, err := pkcs11.Open(pkcs11.Config(*c))
		if err != nil {
			return nil, err
		}
		p.byKind["pkcs11"] = k
	}
	if c := cfg.Transit; c != nil {
		k, err := transit.Open(transit.Config(*c))
		if err != nil {
			return nil, err
		}
		p.byKind["vault"] = k
	}
	return p, nil
}

// CheckKey tells whether a CMK is one that a configured service can have.
func (p *Providers) CheckKey(cmk string) error {
	_, _, err := p.find(cmk)
	return err
}

// find divides a CMK into its service and the service's own name for it.
func (p *Providers) find(cmk string) (keymgr.Provider, string, error) {
	name, key, ok := strings.Cut(cmk, ":")
	if !ok {
		name, key = local, cmk
	}
	i := slices.IndexFunc(kinds, func(k kind) bool { return k.name == name })
	if i < 0 {
		return nil, "", fmt.Errorf("CMK %.200q: %w as %.40q: want one of %s", cmk, keymgr.ErrBadCMK, name, strings.Join(kindNames(), ", "))
	}
	provider := p.byKind[name]
	if provider == nil {
		return nil, "", fmt.Errorf("CMK %.200q: %w here: this key manager configures no %s", cmk, keymgr.ErrBadCMK, kinds[i].option)
	}
	if err := kinds[i].check(key); err != nil {
		return nil, "", fmt.Errorf("CMK %.200q: %w: %w", cmk, keymgr.ErrBadCMK, err)
	}
	return provider, key, nil
}

func kindNames() []string {
	names := make([]string, len(kinds))
	for i, k := range kinds {
		names[i] = k.name + ":"
	}
	return names
}

// named gives an error the CMK's whole name.
func named(err error, cmk string) error {
	var pe *keymgr.ProviderError
	if errors.As(err, &pe) {
		pe.CMK = cmk
	}
	return err
}

func bad(op, cmk string, err error) error { return &keymgr.ProviderError{Op: op, CMK: cmk, Err: err} }

// Wrap implements keymgr.Provider.
func (p *Providers) Wrap(ctx context.Context, cmk string, ec keymgr.EncryptionContext, plain []byte) (keymgr.Wrapped, error) {
	provider, key, err := p.find(cmk)
	if err != nil {
		return keymgr.Wrapped{}, bad("wrap", cmk, err)
	}
	w, err := provider.Wrap(ctx, key, ec, plain)
	return w, named(err, cmk)
}

// Unwrap implements keymgr.Provider.
func (p *Providers) Unwrap(ctx context.Context, cmk string, ec keymgr.EncryptionContext, wrapped []byte) (keymgr.Unwrapped, error) {
	provider, key, err := p.find(cmk)
	if err != nil {
		return keymgr.Unwrapped{}, bad("unwrap", cmk, err)
	}
	u, err := provider.Unwrap(ctx, key, ec, wrapped)
	return u, named(err, cmk)
}

// CurrentVersion implements keymgr.Provider.
func (p *Providers) CurrentVersion(ctx context.Context, cmk string) (version, requestID string, err error) {
	provider, key, err := p.find(cmk)
	if err != nil {
		return "", "", bad("current version", cmk, err)
	}
	version, requestID, err = provider.CurrentVersion(ctx, key)
	return version, requestID, named(err, cmk)
}
