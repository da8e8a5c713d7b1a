// Package gcpkms wraps under keys of Google's Cloud KMS, named by their resource names. What it
// gives out says which version of the key wrapped it, since only the versions have states:
//
//	{1} {length of the version's number} NUMBER CIPHERTEXT
//
// Credentials are Google's application default credentials. The client's retries are off: an answer
// is an answer. Cloud KMS gives no request ids; each call is given a reason of ours, which
// Cloud Audit Logs keep.
package gcpkms

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"net"
	"path"
	"regexp"
	"strings"
	"time"

	kms "cloud.google.com/go/kms/apiv1"
	"cloud.google.com/go/kms/apiv1/kmspb"
	"github.com/googleapis/gax-go/v2"
	"google.golang.org/api/option"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/holdfastdb/holdfast/keymgr"
	"github.com/holdfastdb/holdfast/keymgr/kmshttp"
)

// Config says how Cloud KMS is reached. All of it may be left out.
type Config struct {
	Endpoint string // HOST:PORT in place of Google's own
	CAFile   string // the only authorities to trust; empty: the system's
}

// Provider is Cloud KMS. It is safe for concurrent use.
type Provider struct{ client *kms.KeyManagementClient }

var _ keymgr.Provider = (*Provider)(nil)

// maxRedial bounds the time between attempts to connect: when Google can be reached again,
// databases open within it.
const maxRedial = 2 * time.Second

// Open prepares a provider; no call is made. It fails if there are no credentials.
func Open(ctx context.Context, cfg Config) (*Provider, error) {
	redial := backoff.DefaultConfig
	redial.MaxDelay = maxRedial
	options := []option.ClientOption{
		option.WithGRPCDialOption(grpc.WithDisableRetry()),
		option.WithGRPCDialOption(grpc.WithContextDialer(kmshttp.Dial)),
		option.WithGRPCDialOption(grpc.WithConnectParams(grpc.ConnectParams{Backoff: redial, MinConnectTimeout: maxRedial})),
	}
	if cfg.CAFile != "" {
		conf, err := kmshttp.TLS(cfg.CAFile)
		if err != nil {
			return nil, fmt.Errorf("kms.gcp: %w", err)
		}
		options = append(options, option.WithGRPCDialOption(grpc.WithTransportCredentials(credentials.NewTLS(conf))))
	}
	if cfg.Endpoint != "" {
		if _, port, err := net.SplitHostPort(cfg.Endpoint); err != nil || strings.Contains(port, "/") {
			return nil, fmt.Errorf("kms.gcp: endpoint %q: want HOST:PORT", cfg.Endpoint)
		}
		options = append(options, option.WithEndpoint(cfg.Endpoint))
	}
	client, err := kms.NewKeyManagementClient(ctx, options...)
	if err != nil {
		return nil, fmt.Errorf("kms.gcp: %w", err)
	}
	client.CallOptions = &kms.KeyManagementCallOptions{} // without the retries that it comes with
	return &Provider{client: client}, nil
}

var keyForm = regexp.MustCompile(`^projects/[A-Za-z0-9.:_-]+/locations/[a-z0-9-]+/keyRings/[A-Za-z0-9_-]+/cryptoKeys/[A-Za-z0-9_-]+$`)

// CheckKey tells whether cmk is a key's resource name.
func CheckKey(cmk string) error {
	if !keyForm.MatchString(cmk) {
		return fmt.Errorf("%.200q is not the resource name of a Cloud KMS key: want projects/P/locations/L/keyRings/R/cryptoKeys/K", cmk)
	}
	return nil
}

// call is one operation under way, under a name of ours.
type call struct{ op, cmk, id string }

func begin(op, cmk string) (*call, error) {
	c := &call{op: op, cmk: cmk, id: kmshttp.NewID()}
	if err := CheckKey(cmk); err != nil {
		return nil, c.fail(keymgr.Unknown, err)
	}
	return c, nil
}

func (c *call) fail(outcome keymgr.Outcome, err error) error {
	return &keymgr.ProviderError{Outcome: outcome, Op: c.op, CMK: c.cmk, RequestID: c.id, Err: err}
}

// ask makes one call and keeps what came with its answer.
func ask[Q, A any](ctx context.Context, c *call, do func(context.Context, Q, ...gax.CallOption) (A, error), q Q) (A, error) {
	var header, trailer metadata.MD
	ctx = metadata.AppendToOutgoingContext(ctx, "x-goog-request-reason", c.id)
	a, err := do(ctx, q, gax.WithGRPCOptions(grpc.Header(&header), grpc.Trailer(&trailer)))
	if err != nil {
		// An answer of gRPC says so; a proxy's page does not, though it becomes a gRPC error here.
		err = &refusal{err: err, isAnswer: len(header.Get("content-type"))+len(trailer.Get("content-type")) > 0}
	}
	return a, err
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func checksum(b []byte) *wrapperspb.Int64Value {
	return wrapperspb.Int64(int64(crc32.Checksum(b, castagnoli)))
}

var errChecksum = errors.New("a checksum does not match: the call or its answer was damaged on the way")

// Wrap implements keymgr.Provider.
func (p *Provider) Wrap(ctx context.Context, cmk string, ec keymgr.EncryptionContext, plain []byte) (keymgr.Wrapped, error) {
	c, err := begin("wrap", cmk)
	if err != nil {
		return keymgr.Wrapped{}, err
	}
	aad := ec.AAD()
	out, err := ask(ctx, c, p.client.Encrypt, &kmspb.EncryptRequest{Name: cmk, Plaintext: plain, PlaintextCrc32C: checksum(plain),
		AdditionalAuthenticatedData: aad, AdditionalAuthenticatedDataCrc32C: checksum(aad)})
	if err != nil {
		return keymgr.Wrapped{}, p.refused(ctx, c, "", err)
	}
	if !out.VerifiedPlaintextCrc32C || !out.VerifiedAdditionalAuthenticatedDataCrc32C || out.CiphertextCrc32C.GetValue() != checksum(out.Ciphertext).Value {
		return keymgr.Wrapped{}, c.fail(keymgr.Unknown, errChecksum)
	}
	version := path.Base(out.Name)
	if !strings.HasPrefix(out.Name, cmk+"/") || len(version) > 255 {
		return keymgr.Wrapped{}, c.fail(keymgr.Unknown, fmt.Errorf("the answer is of version %.300q, which is not of this key", out.Name))
	}
	wrapped := append([]byte{format, byte(len(version))}, version...)
	return keymgr.Wrapped{Ciphertext: append(wrapped, out.Ciphertext...), Version: version, RequestID: c.id}, nil
}

const format = 1

func parse(wrapped []byte) (version string, ciphertext []byte, err error) {
	if len(wrapped) < 2 || wrapped[0] != format || len(wrapped) < 2+int(wrapped[1]) {
		return "", nil, fmt.Errorf("%d bytes that were not wrapped for Cloud KMS", len(wrapped))
	}
	version, ciphertext = string(wrapped[2:2+wrapped[1]]), wrapped[2+wrapped[1]:]
	if version == "" || strings.Trim(version, "0123456789") != "" {
		return "", nil, fmt.Errorf("version %q of the wrapping key is no number", version)
	}
	return version, bytes.Clone(ciphertext), nil
}

// Unwrap implements keymgr.Provider.
func (p *Provider) Unwrap(ctx context.Context, cmk string, ec keymgr.EncryptionContext, wrapped []byte) (keymgr.Unwrapped, error) {
	c, err := begin("unwrap", cmk)
	if err != nil {
		return keymgr.Unwrapped{}, err
	}
	version, ciphertext, err := parse(wrapped)
	if err != nil {
		return keymgr.Unwrapped{}, c.fail(keymgr.Unknown, err)
	}
	aad := ec.AAD()
	out, err := ask(ctx, c, p.client.Decrypt, &kmspb.DecryptRequest{Name: cmk, Ciphertext: ciphertext, CiphertextCrc32C: checksum(ciphertext),
		AdditionalAuthenticatedData: aad, AdditionalAuthenticatedDataCrc32C: checksum(aad)})
	if err != nil {
		return keymgr.Unwrapped{}, p.refused(ctx, c, version, err)
	}
	if out.PlaintextCrc32C.GetValue() != checksum(out.Plaintext).Value {
		clear(out.Plaintext)
		return keymgr.Unwrapped{}, c.fail(keymgr.Unknown, errChecksum)
	}
	return keymgr.Unwrapped{Plaintext: out.Plaintext, RequestID: c.id}, nil
}

// CurrentVersion implements keymgr.Provider.
func (p *Provider) CurrentVersion(ctx context.Context, cmk string) (version, requestID string, err error) {
	c, err := begin("current version", cmk)
	if err != nil {
		return "", "", err
	}
	k, err := ask(ctx, c, p.client.GetCryptoKey, &kmspb.GetCryptoKeyRequest{Name: cmk})
	if err != nil {
		return "", c.id, c.fail(classify(err), err)
	}
	if k.Primary == nil {
		return "", c.id, c.fail(keymgr.Unknown, errors.New("the key has no primary version: it is not for symmetric encryption"))
	}
	return path.Base(k.Primary.Name), c.id, nil
}
