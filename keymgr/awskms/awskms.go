// Package awskms wraps under keys of AWS KMS. A key is named by its ARN, never by an
// alias, which can be pointed elsewhere; the ARN tells the region that is asked.
//
// Credentials come from where the AWS SDK looks for them, and a role may be assumed with them.
// The SDK's retries are off: an answer is an answer, and the caller asks again in its own time.
package awskms

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"regexp"
	"strings"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/aws/arn"
	awsmiddleware "github.com/aws/aws-sdk-go-v2/aws/middleware"
	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/credentials/stscreds"
	"github.com/aws/aws-sdk-go-v2/service/kms"
	"github.com/aws/aws-sdk-go-v2/service/kms/types"
	"github.com/aws/aws-sdk-go-v2/service/sts"
	"github.com/aws/smithy-go/middleware"

	"github.com/holdfastdb/holdfast/keymgr"
	"github.com/holdfastdb/holdfast/keymgr/kmshttp"
)

// Config says how AWS is reached. All of it may be left out.
type Config struct {
	Region     string // where a role is assumed; empty: as the SDK finds it
	Endpoint   string // https URL in place of AWS's own for the key's region
	CAFile     string // the only authorities to trust; empty: those of AWS_CA_BUNDLE, or the system's
	RoleARN    string // a role to assume, such as one in the customer's account
	ExternalID string // that the role's trust policy asks for
}

// Provider is AWS KMS. It is safe for concurrent use.
type Provider struct {
	client      *kms.Client
	credentials aws.CredentialsProvider
}

var _ keymgr.Provider = (*Provider)(nil)

// Open prepares a provider; no call is made.
func Open(ctx context.Context, cfg Config) (*Provider, error) {
	if cfg.CAFile == "" {
		cfg.CAFile = os.Getenv("AWS_CA_BUNDLE") // the SDK's own way to say it
	}
	client, err := kmshttp.Client(cfg.CAFile)
	if err == nil && cfg.Endpoint != "" {
		err = kmshttp.CheckURL("endpoint", cfg.Endpoint)
	}
	if err == nil && cfg.RoleARN != "" && !arn.IsARN(cfg.RoleARN) {
		err = fmt.Errorf("role %q is not an ARN", cfg.RoleARN)
	}
	if err != nil {
		return nil, fmt.Errorf("kms.aws: %w", err)
	}
	options := []func(*config.LoadOptions) error{
		config.WithRetryer(func() aws.Retryer { return aws.NopRetryer{} }),
	}
	if cfg.Region != "" {
		options = append(options, config.WithRegion(cfg.Region))
	}
	c, err := config.LoadDefaultConfig(ctx, options...)
	if err != nil {
		return nil, fmt.Errorf("kms.aws: the SDK's configuration: %w", err)
	}
	c.HTTPClient = client // for KMS and the role; credentials are looked for as the SDK does
	if cfg.RoleARN != "" {
		role := stscreds.NewAssumeRoleProvider(sts.NewFromConfig(c), cfg.RoleARN, func(o *stscreds.AssumeRoleOptions) {
			o.RoleSessionName = "holdfast"
			if cfg.ExternalID != "" {
				o.ExternalID = aws.String(cfg.ExternalID)
			}
		})
		c.Credentials = aws.NewCredentialsCache(role)
	}
	k := kms.NewFromConfig(c, func(o *kms.Options) {
		if cfg.Endpoint != "" {
			o.BaseEndpoint = aws.String(cfg.Endpoint)
		}
	})
	return &Provider{client: k, credentials: c.Credentials}, nil
}

// region keeps what is no region out of the name of the host that is asked.
var region = regexp.MustCompile(`^[a-z0-9-]{1,32}$`)

// CheckKey tells whether cmk is a key's ARN.
func CheckKey(cmk string) error {
	a, err := arn.Parse(cmk)
	if err != nil || a.Service != "kms" || !strings.HasPrefix(a.Resource, "key/") || !region.MatchString(a.Region) {
		return fmt.Errorf("%.200q is not the ARN of an AWS KMS key: want arn:aws:kms:REGION:ACCOUNT:key/ID", cmk)
	}
	return nil
}

// call is one operation under way: what it asks, and what AWS called its requests.
type call struct {
	op, cmk, region string
	ids             []string
}

func (p *Provider) begin(ctx context.Context, op, cmk string) (*call, error) {
	c := &call{op: op, cmk: cmk}
	if err := CheckKey(cmk); err != nil {
		return c, c.fail(keymgr.Unknown, err)
	}
	c.region = strings.Split(cmk, ":")[3]
	// Credentials are asked for on their own: that they cannot be had says nothing of the key.
	if _, err := p.credentials.Retrieve(ctx); err != nil {
		if ctx.Err() != nil {
			return c, c.fail(keymgr.Unreachable, err)
		}
		return c, c.fail(keymgr.Unknown, fmt.Errorf("no credentials for AWS: %w", err))
	}
	return c, nil
}

func (c *call) fail(outcome keymgr.Outcome, err error) error {
	return &keymgr.ProviderError{Outcome: outcome, Op: c.op, CMK: c.cmk, RequestID: c.requestID(), Err: err}
}

func (c *call) requestID() string { return strings.Join(c.ids, " ") }

func (c *call) in(o *kms.Options) { o.Region = c.region }

func (c *call) answered(m middleware.Metadata) {
	if id, ok := awsmiddleware.GetRequestIDMetadata(m); ok {
		c.ids = append(c.ids, id)
	}
}

// Wrap implements keymgr.Provider. Encrypt does not say which key material it used, so what it gave
// is decrypted at once, which also proves that it can be.
func (p *Provider) Wrap(ctx context.Context, cmk string, ec keymgr.EncryptionContext, plain []byte) (keymgr.Wrapped, error) {
	c, err := p.begin(ctx, "wrap", cmk)
	if err != nil {
		return keymgr.Wrapped{}, err
	}
	out, err := p.client.Encrypt(ctx, &kms.EncryptInput{KeyId: &cmk, Plaintext: plain, EncryptionContext: ec.Map(),
		EncryptionAlgorithm: types.EncryptionAlgorithmSpecSymmetricDefault}, c.in)
	if err != nil {
		return keymgr.Wrapped{}, p.refused(ctx, c, err)
	}
	c.answered(out.ResultMetadata)
	back, err := p.decrypt(ctx, c, ec, out.CiphertextBlob)
	if err != nil {
		return keymgr.Wrapped{}, err
	}
	defer clear(back.Plaintext)
	if !bytes.Equal(back.Plaintext, plain) {
		return keymgr.Wrapped{}, c.fail(keymgr.Unknown, errors.New("what was encrypted does not decrypt to the same"))
	}
	return keymgr.Wrapped{Ciphertext: out.CiphertextBlob, Version: aws.ToString(back.KeyMaterialId), RequestID: c.requestID()}, nil
}

// Unwrap implements keymgr.Provider.
func (p *Provider) Unwrap(ctx context.Context, cmk string, ec keymgr.EncryptionContext, wrapped []byte) (keymgr.Unwrapped, error) {
	c, err := p.begin(ctx, "unwrap", cmk)
	if err != nil {
		return keymgr.Unwrapped{}, err
	}
	out, err := p.decrypt(ctx, c, ec, wrapped)
	if err != nil {
		return keymgr.Unwrapped{}, err
	}
	return keymgr.Unwrapped{Plaintext: out.Plaintext, RequestID: c.requestID()}, nil
}

func (p *Provider) decrypt(ctx context.Context, c *call, ec keymgr.EncryptionContext, wrapped []byte) (*kms.DecryptOutput, error) {
	if len(wrapped) == 0 {
		return nil, c.fail(keymgr.Unknown, errors.New("nothing to unwrap"))
	}
	out, err := p.client.Decrypt(ctx, &kms.DecryptInput{KeyId: &c.cmk, CiphertextBlob: wrapped, EncryptionContext: ec.Map(),
		EncryptionAlgorithm: types.EncryptionAlgorithmSpecSymmetricDefault}, c.in)
	if err != nil {
		return nil, p.refused(ctx, c, err)
	}
	c.answered(out.ResultMetadata)
	return out, nil
}

// CurrentVersion implements keymgr.Provider. A version is AWS's id of key material.
func (p *Provider) CurrentVersion(ctx context.Context, cmk string) (version, requestID string, err error) {
	c, err := p.begin(ctx, "current version", cmk)
	if err != nil {
		return "", "", err
	}
	meta, err := p.describe(ctx, c)
	if err != nil {
		return "", c.requestID(), c.fail(classify(err), err)
	}
	return aws.ToString(meta.CurrentKeyMaterialId), c.requestID(), nil
}

func (p *Provider) describe(ctx context.Context, c *call) (*types.KeyMetadata, error) {
	out, err := p.client.DescribeKey(ctx, &kms.DescribeKeyInput{KeyId: &c.cmk}, c.in)
	if err != nil {
		c.ids = append(c.ids, requestIDOf(err)...)
		return nil, err
	}
	c.answered(out.ResultMetadata)
	return out.KeyMetadata, nil
}
