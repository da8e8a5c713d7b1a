// Package azurekv wraps under RSA keys of Azure Key Vault, named by their URLs. RSA-OAEP-256 binds
// no context, and anybody who has the public half can make what unwraps: so what is wrapped is
// signed by the same key, with its context, and nothing is unwrapped for use that was not:
//
//	{1} {length} VERSION {length, 2 bytes little-endian} SIGNATURE CIPHERTEXT
//
// PS256 signs a digest of context, key's URL and ciphertext. Credentials are those of
// azidentity's default chain. The client's retries are off: an answer is an answer.
package azurekv

import (
	"context"
	"crypto"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"math/big"
	"net/http"
	"net/url"
	"regexp"
	"strings"
	"sync"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/to"
	"github.com/Azure/azure-sdk-for-go/sdk/azidentity"
	"github.com/Azure/azure-sdk-for-go/sdk/security/keyvault/azkeys"

	"github.com/holdfastdb/holdfast/keymgr"
	"github.com/holdfastdb/holdfast/keymgr/kmshttp"
)

// Config says how vaults are reached. All of it may be left out.
type Config struct {
	CAFile string // the only authorities to trust; empty: the system's
	// PrivateCloud is for vaults and logins outside Microsoft's public clouds: it is not checked that
	// a vault's name lies in the domain that tokens are for.
	PrivateCloud bool
}

// Provider is Azure Key Vault. It is safe for concurrent use.
type Provider struct {
	cfg        Config
	options    azcore.ClientOptions
	credential azcore.TokenCredential

	mu struct {
		sync.Mutex
		vaults  map[string]*azkeys.Client
		publics map[string]*rsa.PublicKey // by the key's URL with its version, which never changes
	}
}

var _ keymgr.Provider = (*Provider)(nil)

// Open prepares a provider; no call is made.
func Open(cfg Config) (*Provider, error) {
	client, err := kmshttp.Client(cfg.CAFile)
	if err != nil {
		return nil, fmt.Errorf("kms.azure: %w", err)
	}
	options := azcore.ClientOptions{Transport: client, Retry: policy.RetryOptions{MaxRetries: -1}}
	credential, err := azidentity.NewDefaultAzureCredential(&azidentity.DefaultAzureCredentialOptions{ClientOptions: options, DisableInstanceDiscovery: cfg.PrivateCloud})
	if err != nil {
		return nil, fmt.Errorf("kms.azure: credentials: %w", err)
	}
	p := &Provider{cfg: cfg, options: options, credential: credential}
	p.mu.vaults, p.mu.publics = make(map[string]*azkeys.Client), make(map[string]*rsa.PublicKey)
	return p, nil
}

var keyPath = regexp.MustCompile(`^/keys/([A-Za-z0-9-]+)$`)

func parseKey(cmk string) (vault, name string, err error) {
	err = kmshttp.CheckURL("key", cmk)
	var u *url.URL
	if err == nil {
		u, err = url.Parse(cmk)
	}
	if err != nil {
		return "", "", err
	}
	m := keyPath.FindStringSubmatch(u.Path)
	if m == nil {
		return "", "", fmt.Errorf("%.200q is not the URL of a key: want https://VAULT/keys/NAME, without a version", cmk)
	}
	return "https://" + u.Host, m[1], nil
}

// CheckKey tells whether cmk is a key's URL.
func CheckKey(cmk string) error {
	_, _, err := parseKey(cmk)
	return err
}

// call is one operation under way: what it asks, and what Azure called its requests.
type call struct {
	client        *azkeys.Client
	op, cmk, name string
	ids           []string
}

func (c *call) fail(outcome keymgr.Outcome, err error) error {
	return &keymgr.ProviderError{Outcome: outcome, Op: c.op, CMK: c.cmk, RequestID: c.requestID(), Err: err}
}

func (c *call) requestID() string { return strings.Join(c.ids, " ") }

func (p *Provider) begin(op, cmk string) (*call, error) {
	c := &call{op: op, cmk: cmk}
	vault, name, err := parseKey(cmk)
	if err != nil {
		return nil, c.fail(keymgr.Unknown, err)
	}
	c.name = name
	p.mu.Lock()
	defer p.mu.Unlock()
	if c.client = p.mu.vaults[vault]; c.client != nil {
		return c, nil
	}
	c.client, err = azkeys.NewClient(vault, p.credential, &azkeys.ClientOptions{ClientOptions: p.options, DisableChallengeResourceVerification: p.cfg.PrivateCloud})
	if err != nil {
		return nil, c.fail(keymgr.Unknown, err)
	}
	p.mu.vaults[vault] = c.client
	return c, nil
}

// ask makes one call and notes its request id.
func ask[A any](ctx context.Context, c *call, do func(context.Context) (A, error)) (A, error) {
	var resp *http.Response
	a, err := do(policy.WithCaptureResponse(ctx, &resp))
	if resp != nil && resp.Header.Get(requestIDHeader) != "" {
		c.ids = append(c.ids, resp.Header.Get(requestIDHeader))
	}
	if err != nil {
		return a, c.refused(err)
	}
	return a, nil
}

// versionOf is the version that an answer names, of the key that was asked for.
func (c *call) versionOf(id *azkeys.ID) (string, error) {
	if id == nil || !strings.HasPrefix(string(*id), c.cmk+"/") || id.Version() == "" || len(id.Version()) > 255 {
		return "", c.fail(keymgr.Unknown, errors.New("the answer does not name a version of this key"))
	}
	return id.Version(), nil
}

// digest is what is signed.
func (c *call) digest(ec keymgr.EncryptionContext, version string, ciphertext []byte) []byte {
	h := sha256.New()
	for _, part := range [][]byte{[]byte("holdfast azure wrap v1"), ec.AAD(), []byte(c.cmk), []byte(version), ciphertext} {
		var length [4]byte
		binary.LittleEndian.PutUint32(length[:], uint32(len(part)))
		h.Write(length[:])
		h.Write(part)
	}
	return h.Sum(nil)
}

// Wrap implements keymgr.Provider.
func (p *Provider) Wrap(ctx context.Context, cmk string, ec keymgr.EncryptionContext, plain []byte) (keymgr.Wrapped, error) {
	c, err := p.begin("wrap", cmk)
	if err != nil {
		return keymgr.Wrapped{}, err
	}
	version, err := p.current(ctx, c)
	if err != nil {
		return keymgr.Wrapped{}, err
	}
	out, err := ask(ctx, c, func(ctx context.Context) (azkeys.WrapKeyResponse, error) {
		return c.client.WrapKey(ctx, c.name, version, azkeys.KeyOperationParameters{Algorithm: to.Ptr(azkeys.EncryptionAlgorithmRSAOAEP256), Value: plain}, nil)
	})
	if err != nil {
		return keymgr.Wrapped{}, err
	}
	digest := c.digest(ec, version, out.Result)
	signed, err := ask(ctx, c, func(ctx context.Context) (azkeys.SignResponse, error) {
		return c.client.Sign(ctx, c.name, version, azkeys.SignParameters{Algorithm: to.Ptr(azkeys.SignatureAlgorithmPS256), Value: digest}, nil)
	})
	if err != nil {
		return keymgr.Wrapped{}, err
	}
	if err := p.verify(ctx, c, version, digest, signed.Result); err != nil {
		return keymgr.Wrapped{}, err
	}
	return keymgr.Wrapped{Ciphertext: envelope{version, signed.Result, out.Result}.marshal(), Version: version, RequestID: c.requestID()}, nil
}

// Unwrap implements keymgr.Provider. The vault is asked before the signature is looked at:
// its answer is what a lease rests on.
func (p *Provider) Unwrap(ctx context.Context, cmk string, ec keymgr.EncryptionContext, wrapped []byte) (keymgr.Unwrapped, error) {
	c, err := p.begin("unwrap", cmk)
	if err != nil {
		return keymgr.Unwrapped{}, err
	}
	e, err := parseEnvelope(wrapped)
	if err != nil {
		return keymgr.Unwrapped{}, c.fail(keymgr.Unknown, err)
	}
	out, err := ask(ctx, c, func(ctx context.Context) (azkeys.UnwrapKeyResponse, error) {
		return c.client.UnwrapKey(ctx, c.name, e.version, azkeys.KeyOperationParameters{Algorithm: to.Ptr(azkeys.EncryptionAlgorithmRSAOAEP256), Value: e.ciphertext}, nil)
	})
	if err != nil {
		return keymgr.Unwrapped{}, err
	}
	if err := p.verify(ctx, c, e.version, c.digest(ec, e.version, e.ciphertext), e.signature); err != nil {
		clear(out.Result)
		return keymgr.Unwrapped{}, err
	}
	return keymgr.Unwrapped{Plaintext: out.Result, RequestID: c.requestID()}, nil
}

func (p *Provider) verify(ctx context.Context, c *call, version string, digest, signature []byte) error {
	kid := c.cmk + "/" + version
	p.mu.Lock()
	public := p.mu.publics[kid]
	p.mu.Unlock()
	if public == nil {
		key, err := c.key(ctx, version)
		if err != nil {
			return err
		}
		if public, err = publicKey(key); err != nil {
			return c.fail(keymgr.Unknown, err)
		}
		p.remember(kid, public)
	}
	if err := rsa.VerifyPSS(public, crypto.SHA256, digest, signature, &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash}); err != nil {
		return c.fail(keymgr.Unknown, errors.New("what is wrapped was not signed by the key for this project and KEK: it is damaged, was moved, or was made by somebody else"))
	}
	return nil
}

func (p *Provider) remember(kid string, public *rsa.PublicKey) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.mu.publics[kid] = public
}

// key asks for a version's public half; an empty version is the current one.
func (c *call) key(ctx context.Context, version string) (*azkeys.JSONWebKey, error) {
	out, err := ask(ctx, c, func(ctx context.Context) (azkeys.GetKeyResponse, error) {
		return c.client.GetKey(ctx, c.name, version, nil)
	})
	return out.Key, err
}

// current asks which version wraps now.
func (p *Provider) current(ctx context.Context, c *call) (version string, err error) {
	key, err := c.key(ctx, "")
	if err != nil {
		return "", err
	}
	public, err := publicKey(key)
	if err != nil {
		return "", c.fail(keymgr.Unknown, err)
	}
	if version, err = c.versionOf(key.KID); err != nil {
		return "", err
	}
	p.remember(c.cmk+"/"+version, public)
	return version, nil
}

func publicKey(k *azkeys.JSONWebKey) (*rsa.PublicKey, error) {
	if k == nil || len(k.N) == 0 || len(k.E) == 0 || len(k.E) > 4 {
		return nil, errors.New("the key is not an RSA key")
	}
	return &rsa.PublicKey{N: new(big.Int).SetBytes(k.N), E: int(new(big.Int).SetBytes(k.E).Int64())}, nil
}

// CurrentVersion implements keymgr.Provider.
func (p *Provider) CurrentVersion(ctx context.Context, cmk string) (version, requestID string, err error) {
	c, err := p.begin("current version", cmk)
	if err != nil {
		return "", "", err
	}
	version, err = p.current(ctx, c)
	return version, c.requestID(), err
}
