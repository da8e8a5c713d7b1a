// Package config is the configuration file of each role: YAML, one struct a role, every
// field known. A field that is not known, a value that cannot be, or a missing address is
// an error that names the file and, where the parser knows it, the line.
package config

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"gopkg.in/yaml.v3"
)

// Keymgr configures a key manager.
type Keymgr struct {
	Listen        string        `yaml:"listen"`         // address, see internal/rpc
	Dir           string        `yaml:"dir"`            // the audit log's folder
	Bucket        string        `yaml:"bucket"`         // folder of the directory bucket
	LocalKMS      string        `yaml:"local_kms"`      // file of the development KMS; empty: none
	KMS           KMS           `yaml:"kms,omitempty"`  // the customers' services
	CMKs          []string      `yaml:"cmks"`           // the only keys of the KMS that projects may have; empty: any
	CheckInterval time.Duration `yaml:"check_interval"` // how often the CMK is tried; 0: 5s
	LeaseTTL      time.Duration `yaml:"lease_ttl"`      // how long a node may hold DEKs unrenewed; 0: 8s
	// Grace is for how long keys without a grace of their own may be used after their KMS stopped
	// answering; absent: 10m. 0s is no grace.
	Grace *time.Duration `yaml:"grace,omitempty"`
	Hook  *KeyHook       `yaml:"hook,omitempty"` // absent: none
}

// KeyHook is where the clouds' event services tell, over HTTP, that something was done to a key. A
// notice is a hint: it has the key checked at once.
type KeyHook struct {
	Listen    string `yaml:"listen"`              // HOST:PORT, or unix:/path
	TokenFile string `yaml:"token_file"`          // with the token that notices bear
	CertFile  string `yaml:"cert_file,omitempty"` // TLS; may be absent on loopback and unix sockets only
	KeyFile   string `yaml:"key_file,omitempty"`
	CAFile    string `yaml:"ca_file,omitempty"` // authorities of clients' certificates, which are then wanted; empty: none
}

// Validate says what is missing or cannot be.
func (h *KeyHook) Validate() error {
	if (h.CertFile == "") != (h.KeyFile == "") {
		return errors.New("hook: want both of cert_file and key_file, or neither")
	}
	if h.CAFile != "" && h.CertFile == "" {
		return errors.New("hook: ca_file is for TLS: cert_file is missing")
	}
	return required(field{"hook.listen", h.Listen}, field{"hook.token_file", h.TokenFile})
}

// KMS says which key management services a key manager asks, by kind; nil: not that one.
// Credentials are never here: they come from where the service's own client looks for them.
type KMS struct {
	AWS     *AWSKMS     `yaml:"aws,omitempty"`
	Google  *GoogleKMS  `yaml:"gcp,omitempty"`
	Azure   *AzureKMS   `yaml:"azure,omitempty"`
	PKCS11  *PKCS11KMS  `yaml:"pkcs11,omitempty"`
	Transit *TransitKMS `yaml:"vault,omitempty"`
}

// Any tells whether there is one.
func (k *KMS) Any() bool { return *k != KMS{} }

// AWSKMS is how AWS KMS is reached; all of it may be left out (aws: {}).
type AWSKMS struct {
	Region     string `yaml:"region,omitempty"`      // where role_arn is assumed; empty: as the SDK finds it. A key's ARN tells the key's
	Endpoint   string `yaml:"endpoint,omitempty"`    // https URL in place of AWS's own
	CAFile     string `yaml:"ca_file,omitempty"`     // the only authorities to trust; empty: the system's
	RoleARN    string `yaml:"role_arn,omitempty"`    // a role to assume
	ExternalID string `yaml:"external_id,omitempty"` // that the role's trust policy asks for
}

// GoogleKMS is how Google's Cloud KMS is reached; all of it may be left out (gcp: {}).
type GoogleKMS struct {
	Endpoint string `yaml:"endpoint,omitempty"` // HOST:PORT in place of Google's own
	CAFile   string `yaml:"ca_file,omitempty"`  // the only authorities to trust; empty: the system's
}

// AzureKMS is how Azure Key Vault is reached; all of it may be left out (azure: {}).
type AzureKMS struct {
	CAFile string `yaml:"ca_file,omitempty"` // the only authorities to trust; empty: the system's
	// PrivateCloud is for vaults and logins outside Microsoft's public clouds: names are not checked.
	PrivateCloud bool `yaml:"private_cloud,omitempty"`
}

// PKCS11KMS is how the tokens of a PKCS#11 library are reached.
type PKCS11KMS struct {
	Module  string `yaml:"module"`   // the library's file
	PINFile string `yaml:"pin_file"` // with the user's PIN, read for each call
}

// TransitKMS is how the transit engine of a Vault or OpenBao is reached.
type TransitKMS struct {
	Address   string `yaml:"address,omitempty"`    // https URL; empty: VAULT_ADDR or BAO_ADDR
	CAFile    string `yaml:"ca_file,omitempty"`    // the only authorities to trust; empty: the system's
	Namespace string `yaml:"namespace,omitempty"`  // empty: none
	TokenFile string `yaml:"token_file,omitempty"` // with the token, read for each call, as an agent renews it; empty: VAULT_TOKEN or BAO_TOKEN
}

// Safekeeper configures one replica.
type Safekeeper struct {
	ID     uint64            `yaml:"id"` // 1 and up, unique among the peers
	Listen string            `yaml:"listen"`
	Dir    string            `yaml:"dir"`
	Bucket string            `yaml:"bucket"`
	Keymgr string            `yaml:"keymgr"`
	Peers  map[uint64]string `yaml:"peers"` // every replica's address by id, this one's too
}

// Pageserver configures a page server.
type Pageserver struct {
	Node        string   `yaml:"node"` // a name, for leases and the audit log
	Listen      string   `yaml:"listen"`
	Dir         string   `yaml:"dir"`
	Bucket      string   `yaml:"bucket"`
	Keymgr      string   `yaml:"keymgr"`
	Safekeepers []string `yaml:"safekeepers"`
	// HistoryBytes of WAL, counted back from what is in layers, are those of which pages can still
	// be read as they were; 0: the default.
	HistoryBytes int64 `yaml:"history_bytes"`
	VerifyRedo   bool  `yaml:"verify_redo"` // compare pages with the images of wal_consistency_checking; slow, for tests
}

// Manager configures the manager, which runs the endpoints as its children.
type Manager struct {
	Listen         string            `yaml:"listen"`
	Dir            string            `yaml:"dir"`         // configuration files of the endpoints
	ComputeDir     string            `yaml:"compute_dir"` // folders of the endpoints; nothing in them is durable
	LogDir         string            `yaml:"log_dir"`     // the agents' logs; empty: dir
	Bucket         string            `yaml:"bucket"`
	Keymgr         string            `yaml:"keymgr"`
	Safekeepers    []string          `yaml:"safekeepers"`
	Pageserver     string            `yaml:"pageserver"`
	CMK            string            `yaml:"cmk"`             // the customer's key for the first project
	EndpointListen string            `yaml:"endpoint_listen"` // where the first endpoint's Postgres listens
	PasswordFile   string            `yaml:"password_file"`   // the superuser's first password; empty: a random one
	Settings       map[string]string `yaml:"settings"`        // postgresql.conf settings of endpoints
	CacheBytes     int64             `yaml:"cache_bytes"`     // of an endpoint's local sealed store; 0: the default
	VerifyPages    bool              `yaml:"verify_pages"`    // endpoints compare what they wrote with the page server; slow, for tests
	RotateEvery    time.Duration     `yaml:"rotate_every"`    // age at which a KEK is replaced by a new version; 0: by command alone
}

// Compute configures one endpoint's agent.
type Compute struct {
	Project     string            `yaml:"project"`
	Branch      string            `yaml:"branch"`
	Name        string            `yaml:"name"`
	Dir         string            `yaml:"dir"`
	Listen      string            `yaml:"listen"`
	Keymgr      string            `yaml:"keymgr"`
	Safekeepers []string          `yaml:"safekeepers"`
	Pageserver  string            `yaml:"pageserver"`
	Settings    map[string]string `yaml:"settings"`
	CacheBytes  int64             `yaml:"cache_bytes"`
	VerifyPages bool              `yaml:"verify_pages"`
}

// Load reads the file into out, a pointer to one of this package's structs, and validates
// it.
func Load(file string, out interface{ Validate() error }) error {
	data, err := os.ReadFile(file)
	if err != nil {
		return fmt.Errorf("reading the configuration: %w", err)
	}
	dec := yaml.NewDecoder(bytes.NewReader(data))
	dec.KnownFields(true)
	if err := dec.Decode(out); err != nil {
		if errors.Is(err, io.EOF) {
			return fmt.Errorf("configuration %s is empty", file)
		}
		return fmt.Errorf("configuration %s: %w", file, err)
	}
	if err := out.Validate(); err != nil {
		return fmt.Errorf("configuration %s: %w", file, err)
	}
	return nil
}

// Save writes a configuration for a role that is started from a file.
func Save(file string, cfg any) error {
	data, err := yaml.Marshal(cfg)
	if err != nil {
		return err
	}
	return os.WriteFile(file, data, 0o600)
}

type field struct {
	name  string
	value string
}

func required(fields ...field) error {
	for _, f := range fields {
		if f.value == "" {
			return fmt.Errorf("%s is missing", f.name)
		}
	}
	return nil
}

// Validate says what is missing or cannot be.
func (c *Keymgr) Validate() error {
	if c.CheckInterval < 0 || c.LeaseTTL < 0 {
		return errors.New("check_interval and lease_ttl cannot be negative")
	}
	if c.Grace != nil && *c.Grace < 0 {
		return errors.New("grace cannot be negative")
	}
	if c.Hook != nil {
		if err := c.Hook.Validate(); err != nil {
			return err
		}
	}
	if c.LocalKMS == "" && !c.KMS.Any() {
		return errors.New("kms is missing: want a service to ask, such as aws, or local_kms, the development KMS's file")
	}
	return required(field{"listen", c.Listen}, field{"dir", c.Dir}, field{"bucket", c.Bucket})
}

// Validate says what is missing or cannot be.
func (c *Safekeeper) Validate() error {
	if c.ID == 0 {
		return errors.New("id is missing: want a number from 1 up")
	}
	if _, ok := c.Peers[c.ID]; !ok {
		return fmt.Errorf("peers has no entry for this replica's own id %d", c.ID)
	}
	return required(field{"listen", c.Listen}, field{"dir", c.Dir}, field{"bucket", c.Bucket}, field{"keymgr", c.Keymgr})
}

// Validate says what is missing or cannot be.
func (c *Pageserver) Validate() error {
	if len(c.Safekeepers) == 0 {
		return errors.New("safekeepers is missing")
	}
	if c.HistoryBytes < 0 {
		return fmt.Errorf("history_bytes is %d: it cannot be negative", c.HistoryBytes)
	}
	return required(field{"node", c.Node}, field{"listen", c.Listen}, field{"dir", c.Dir}, field{"bucket", c.Bucket}, field{"keymgr", c.Keymgr})
}

// Validate says what is missing or cannot be.
func (c *Manager) Validate() error {
	if len(c.Safekeepers) == 0 {
		return errors.New("safekeepers is missing")
	}
	return required(field{"listen", c.Listen}, field{"dir", c.Dir}, field{"compute_dir", c.ComputeDir}, field{"bucket", c.Bucket},
		field{"keymgr", c.Keymgr}, field{"pageserver", c.Pageserver}, field{"cmk", c.CMK}, field{"endpoint_listen", c.EndpointListen})
}

// Validate says what is missing or cannot be.
func (c *Compute) Validate() error {
	if len(c.Safekeepers) == 0 {
		return errors.New("safekeepers is missing")
	}
	return required(field{"project", c.Project}, field{"branch", c.Branch}, field{"name", c.Name}, field{"dir", c.Dir},
		field{"listen", c.Listen}, field{"keymgr", c.Keymgr}, field{"pageserver", c.Pageserver})
}
