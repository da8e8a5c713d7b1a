// Package transit wraps under keys of the transit engine of Vault and OpenBao, which speak the
// same protocol. A key is MOUNT/keys/NAME and must be of a type that authenticates associated
// data: what an asymmetric key encrypts, anybody who has its public half could have made.
//
// Transit knows no disabled keys. A customer denies a key by withdrawing the policy or the
// key itself, or a version by min_decryption_version. A token that has run out is refused with
// the same 403 as a withdrawn policy, so a refused token is asked about itself: only one
// that lives was denied the key.
package transit

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/openbao/openbao/api/v2"

	"github.com/holdfastdb/holdfast/keymgr"
	"github.com/holdfastdb/holdfast/keymgr/kmshttp"
)

// Config says how the service is reached.
type Config struct {
	Address   string // https URL; empty: VAULT_ADDR or BAO_ADDR
	CAFile    string // the only authorities to trust; empty: the system's
	Namespace string
	TokenFile string // read for each call, since an agent renews it; empty: VAULT_TOKEN or BAO_TOKEN
}

// Provider is one Vault or OpenBao. It is safe for concurrent use.
type Provider struct {
	client *api.Client
	cfg    Config
}

var _ keymgr.Provider = (*Provider)(nil)

// Open prepares a provider; no call is made.
func Open(cfg Config) (*Provider, error) {
	for _, name := range []string{"BAO_ADDR", "VAULT_ADDR"} {
		if cfg.Address == "" {
			cfg.Address = os.Getenv(name)
		}
	}
	client, err := kmshttp.Client(cfg.CAFile)
	if err == nil {
		err = kmshttp.CheckURL("address", cfg.Address)
	}
	if err != nil {
		return nil, fmt.Errorf("kms.vault: %w", err)
	}
	// The environment would bring retries, other authorities, and TLS that is not verified.
	conf := &api.Config{Address: cfg.Address, HttpClient: client, DisableRedirects: true, DisableEnvironment: true}
	c, err := api.NewClient(conf)
	if err != nil {
		return nil, fmt.Errorf("kms.vault: %w", err)
	}
	c.SetMaxRetries(0)
	if cfg.Namespace != "" {
		c.SetNamespace(cfg.Namespace)
	}
	return &Provider{client: c, cfg: cfg}, nil
}

func (p *Provider) token() (string, error) {
	if p.cfg.TokenFile != "" {
		b, err := os.ReadFile(p.cfg.TokenFile)
		if err != nil {
			return "", fmt.Errorf("the token: %w", err)
		}
		return strings.TrimSpace(string(b)), nil
	}
	for _, name := range []string{"BAO_TOKEN", "VAULT_TOKEN"} {
		if token := os.Getenv(name); token != "" {
			return token, nil
		}
	}
	return "", errors.New("no token: want token_file, or VAULT_TOKEN or BAO_TOKEN in the environment")
}

var keyForm = regexp.MustCompile(`^([A-Za-z0-9_.-]+(?:/[A-Za-z0-9_.-]+)*)/keys/([A-Za-z0-9_.-]+)$`)

// CheckKey tells whether cmk is a key's path.
func CheckKey(cmk string) error {
	if m := keyForm.FindStringSubmatch(cmk); m == nil || slices.Contains(strings.Split(cmk, "/"), "..") {
		return fmt.Errorf("%.200q is not the path of a transit key: want MOUNT/keys/NAME", cmk)
	}
	return nil
}

// call is one operation under way: a client of its own, with its name for the service's log.
type call struct {
	client           *api.Client
	op, cmk          string
	mount, name, own string
	ids              []string
}

func (p *Provider) begin(op, cmk string) (*call, error) {
	c := &call{op: op, cmk: cmk, own: kmshttp.NewID()}
	if err := CheckKey(cmk); err != nil {
		return nil, c.fail(keymgr.Unknown, err)
	}
	m := keyForm.FindStringSubmatch(cmk)
	c.mount, c.name = m[1], m[2]
	token, err := p.token()
	if err == nil {
		c.client, err = p.client.CloneWithHeaders()
	}
	if err != nil {
		return nil, c.fail(keymgr.Unknown, err)
	}
	c.client.SetToken(token)
	c.client.AddHeader("X-Correlation-Id", c.own)
	return c, nil
}

// requestID is the service's ids of the calls that it answered, or, since its errors have
// none, the id that it was sent.
func (c *call) requestID() string {
	if len(c.ids) == 0 {
		return c.own
	}
	return strings.Join(c.ids, " ")
}

func (c *call) fail(outcome keymgr.Outcome, err error) error {
	id := c.own
	if len(c.ids) > 0 {
		id = c.requestID() + " " + id
	}
	return &keymgr.ProviderError{Outcome: outcome, Op: c.op, CMK: c.cmk, RequestID: id, Err: err}
}

func (c *call) ask(ctx context.Context, op string, data map[string]any) (map[string]any, error) {
	path := c.mount + "/" + op + "/" + c.name
	var s *api.Secret
	var err error
	if data == nil {
		s, err = c.read(ctx, path)
	} else {
		s, err = c.client.Logical().WriteWithContext(ctx, path, data)
	}
	if err != nil {
		return nil, err
	}
	if s == nil {
		return nil, errors.New("the answer is empty")
	}
	if s.RequestID != "" {
		c.ids = append(c.ids, s.RequestID)
	}
	return s.Data, nil
}

// read is the client's own, but that this one tells an empty 404, which anybody may give, from
// the service's, whose list of errors is empty.
func (c *call) read(ctx context.Context, path string) (*api.Secret, error) {
	// The client's own context, which ends after a minute, would keep the connection's buffers till then.
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	resp, err := c.client.Logical().ReadRawWithContext(ctx, path)
	if resp != nil {
		defer resp.Body.Close()
	}
	if err != nil {
		return nil, err
	}
	return api.ParseSecret(resp.Body)
}

// key is what the service tells of a key.
type key struct{ latest, oldest int }

// authenticated are the types of keys whose ciphertext nobody else can make.
var authenticated = []string{"aes128-gcm96", "aes256-gcm96", "chacha20-poly1305", "xchacha20-poly1305"}

func (c *call) describe(ctx context.Context) (key, error) {
	data, err := c.ask(ctx, "keys", nil)
	if err != nil {
		return key{}, err
	}
	kind, _ := data["type"].(string)
	if !slices.Contains(authenticated, kind) {
		return key{}, fmt.Errorf("the key is of type %.40q: want one of %s", kind, strings.Join(authenticated, ", "))
	}
	latest, err := number(data, "latest_version")
	if err != nil {
		return key{}, err
	}
	oldest, err := number(data, "min_decryption_version")
	return key{latest, oldest}, err
}

func number(data map[string]any, name string) (int, error) {
	n, ok := data[name].(json.Number)
	if !ok {
		return 0, fmt.Errorf("the answer has no number %s", name)
	}
	return strconv.Atoi(n.String())
}

// Wrap implements keymgr.Provider. It looks at the key first: where the policy allows "create",
// encryption would make a key that is not there.
func (p *Provider) Wrap(ctx context.Context, cmk string, ec keymgr.EncryptionContext, plain []byte) (keymgr.Wrapped, error) {
	c, err := p.begin("wrap", cmk)
	if err != nil {
		return keymgr.Wrapped{}, err
	}
	if _, err := c.describe(ctx); err != nil {
		return keymgr.Wrapped{}, c.refused(ctx, err)
	}
	data, err := c.ask(ctx, "encrypt", map[string]any{"plaintext": base64.StdEncoding.EncodeToString(plain), "associated_data": base64.StdEncoding.EncodeToString(ec.AAD())})
	if err != nil {
		return keymgr.Wrapped{}, c.refused(ctx, err)
	}
	ciphertext, _ := data["ciphertext"].(string)
	n := versionOf(ciphertext)
	if n == 0 {
		return keymgr.Wrapped{}, c.fail(keymgr.Unknown, errors.New("the answer has no ciphertext"))
	}
	return keymgr.Wrapped{Ciphertext: []byte(ciphertext), Version: strconv.Itoa(n), RequestID: c.requestID()}, nil
}

// versionOf is the version that a ciphertext, PREFIX:vN:DATA, was made under; 0: it is none.
func versionOf(ciphertext string) int {
	parts := strings.Split(ciphertext, ":")
	if len(parts) != 3 || !strings.HasPrefix(parts[1], "v") {
		return 0
	}
	n, err := strconv.Atoi(parts[1][1:])
	if err != nil || n < 1 {
		return 0
	}
	return n
}

// Unwrap implements keymgr.Provider.
func (p *Provider) Unwrap(ctx context.Context, cmk string, ec keymgr.EncryptionContext, wrapped []byte) (keymgr.Unwrapped, error) {
	c, err := p.begin("unwrap", cmk)
	if err != nil {
		return keymgr.Unwrapped{}, err
	}
	n := versionOf(string(wrapped))
	if n == 0 {
		return keymgr.Unwrapped{}, c.fail(keymgr.Unknown, fmt.Errorf("%d bytes that transit has not wrapped", len(wrapped)))
	}
	data, err := c.ask(ctx, "decrypt", map[string]any{"ciphertext": string(wrapped), "associated_data": base64.StdEncoding.EncodeToString(ec.AAD())})
	if answered(err) == http.StatusBadRequest {
		return keymgr.Unwrapped{}, c.refusedVersion(ctx, n, err)
	}
	if err != nil {
		return keymgr.Unwrapped{}, c.refused(ctx, err)
	}
	encoded, _ := data["plaintext"].(string)
	plain, err := base64.StdEncoding.DecodeString(encoded)
	if err != nil || encoded == "" {
		return keymgr.Unwrapped{}, c.fail(keymgr.Unknown, errors.New("the answer has no plaintext"))
	}
	return keymgr.Unwrapped{Plaintext: plain, RequestID: c.requestID()}, nil
}

// CurrentVersion implements keymgr.Provider.
func (p *Provider) CurrentVersion(ctx context.Context, cmk string) (version, requestID string, err error) {
	c, err := p.begin("current version", cmk)
	if err != nil {
		return "", "", err
	}
	k, err := c.describe(ctx)
	if err != nil {
		return "", c.requestID(), c.refused(ctx, err)
	}
	return strconv.Itoa(k.latest), c.requestID(), nil
}

// answered is the status of an answer that the service itself gave, which is JSON with a list
// of errors; 0: it gave none.
func answered(err error) int {
	var re *api.ResponseError
	if errors.As(err, &re) && !re.RawError && re.Errors != nil {
		return re.StatusCode
	}
	return 0
}

// refused says what an error means, by the status codes of Vault's API documentation ("HTTP
// Status Codes"): 403 is a denial if the token lives; 404 is a key, or an engine, that is not
// there; 412, 429, 472, 473 and 5xx (503: sealed) ask to come again.
func (c *call) refused(ctx context.Context, err error) error {
	var re *api.ResponseError
	switch status := answered(err); {
	case status == http.StatusNotFound:
		return c.fail(keymgr.Denied, err)
	case status == http.StatusForbidden:
		if _, lookErr := c.client.Auth().Token().LookupSelfWithContext(ctx); lookErr != nil {
			return c.fail(keymgr.Unknown, fmt.Errorf("%w; and the token is refused as well (auth/token/lookup-self): %w", err, lookErr))
		}
		return c.fail(keymgr.Denied, err)
	case status >= 500 || slices.Contains([]int{412, 429, 472, 473}, status):
		return c.fail(keymgr.Unreachable, err)
	case errors.As(err, &re):
		return c.fail(keymgr.Unknown, err)
	case len(c.ids) > 0 && ctx.Err() == nil:
		return c.fail(keymgr.Unknown, err) // an answer that made no sense
	}
	return c.fail(keymgr.Unreachable, err)
}

// refusedVersion looks why a decryption is a bad request: no such key, a version that the
// customer no longer lets be used, or a ciphertext that is none.
func (c *call) refusedVersion(ctx context.Context, version int, err error) error {
	k, describeErr := c.describe(ctx)
	switch {
	case answered(describeErr) == http.StatusNotFound:
		return c.fail(keymgr.Denied, err)
	case describeErr != nil:
		return c.fail(keymgr.Unknown, fmt.Errorf("%w; and the key cannot be read: %w", err, describeErr))
	case version < k.oldest:
		return c.fail(keymgr.Denied, fmt.Errorf("%w: version %d, the oldest that is let be used is %d", err, version, k.oldest))
	}
	return c.fail(keymgr.Unknown, err)
}
