// Package localkms is a key management service in a file, for development: keys may be
// made, rotated, disabled and enabled by any process that may write the file, as a
// customer would in their own console. The file holds the keys in the clear: who can read it
// can read everything. It stands in for a KMS and protects nothing.
//
// The file is JSON, replaced whole (write, fsync, rename, fsync of the folder) under a lock (flock) on
// FILE.lock. Each call reads it anew, so a change made by one process is there in all.
package localkms

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"

	"github.com/holdfastdb/holdfast/keymgr"
)

// State is whether a key may be used.
type State string

// The states.
const (
	Enabled  State = "enabled"
	Disabled State = "disabled"
)

// KeyInfo describes a key.
type KeyInfo struct {
	Name    string
	State   State
	Version string // the current one
}

// KMS is the service in one file. It is safe for concurrent use.
type KMS struct{ file string }

var _ keymgr.Provider = (*KMS)(nil)

// Open opens the KMS in file. A file that is absent is a KMS without keys; Create makes it.
func Open(file string) (*KMS, error) {
	k := &KMS{file: file}
	if _, err := k.load(); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	return k, nil
}

// List describes the keys, in order of their names.
func (k *KMS) List() ([]KeyInfo, error) {
	doc, err := k.load()
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	infos := make([]KeyInfo, 0, len(doc.Keys))
	for _, key := range doc.Keys {
		state := Enabled
		if key.Disabled {
			state = Disabled
		}
		infos = append(infos, KeyInfo{Name: key.Name, State: state, Version: fmt.Sprint(key.current().Version)})
	}
	return infos, nil
}

// Create makes a key, enabled.
func (k *KMS) Create(name string) error {
	if name == "" || len(name) > 256 {
		return fmt.Errorf("key name %.40q has %d bytes, want 1..256", name, len(name))
	}
	return k.change(func(doc *document) error {
		if doc.find(name) != nil {
			return fmt.Errorf("there is a key %q already", name)
		}
		doc.Keys = append(doc.Keys, &key{Name: name, Versions: []version{newVersion(1)}})
		return nil
	})
}

// Disable makes every use of a key fail.
func (k *KMS) Disable(name string) error {
	return k.changeKey(name, func(key *key) { key.Disabled = true })
}

// Enable undoes Disable.
func (k *KMS) Enable(name string) error {
	return k.changeKey(name, func(key *key) { key.Disabled = false })
}

// Rotate gives a key a new version, which wraps from now on; the older ones still unwrap.
func (k *KMS) Rotate(name string) error {
	return k.changeKey(name, func(key *key) {
		key.Versions = append(key.Versions, newVersion(key.current().Version+1))
	})
}

func (k *KMS) changeKey(name string, change func(*key)) error {
	return k.change(func(doc *document) error {
		key := doc.find(name)
		if key == nil {
			return fmt.Errorf("there is no key %q in %s", name, k.file)
		}
		change(key)
		return nil
	})
}

func newVersion(n uint32) version {
	raw := make([]byte, 32)
	rand.Read(raw) // never fails: crypto/rand
	return version{Version: n, Key: raw}
}

// usable gives a key if it may be used, and an id for the call.
func (k *KMS) usable(ctx context.Context, op, name string) (*key, string, error) {
	id := make([]byte, 8)
	rand.Read(id)
	requestID := "local-" + hex.EncodeToString(id)
	fail := func(outcome keymgr.Outcome, err error) (*key, string, error) {
		return nil, requestID, &keymgr.ProviderError{Outcome: outcome, Op: op, CMK: name, RequestID: requestID, Err: err}
	}
	if err := ctx.Err(); err != nil {
		return fail(keymgr.Unreachable, err)
	}
	doc, err := k.load()
	if err != nil {
		return fail(keymgr.Unreachable, err)
	}
	key := doc.find(name)
	if key == nil {
		return fail(keymgr.Denied, errors.New("there is no such key"))
	}
	if key.Disabled {
		return fail(keymgr.Denied, errors.New("the key is disabled"))
	}
	return key, requestID, nil
}

const (
	wrapFormat = 1
	wrapHeader = 1 + 4 // format, version of the key (little-endian); then nonce, ciphertext, tag
)

func aad(name string, header []byte, ec keymgr.EncryptionContext) []byte {
	b := append([]byte("holdfast localkms v1\n"), header...)
	b = binary.LittleEndian.AppendUint16(b, uint16(len(name)))
	b = append(b, name...)
	return append(b, ec.AAD()...)
}

// Wrap implements keymgr.Provider.
func (k *KMS) Wrap(ctx context.Context, cmk string, ec keymgr.EncryptionContext, plain []byte) (keymgr.Wrapped, error) {
	key, id, err := k.usable(ctx, "wrap", cmk)
	if err != nil {
		return keymgr.Wrapped{}, err
	}
	v := key.current()
	aead, err := newAEAD(v.Key)
	if err == nil && len(plain) > keymgr.MaxWrapPlain {
		err = fmt.Errorf("%d bytes to wrap, the most is %d", len(plain), keymgr.MaxWrapPlain)
	}
	if err != nil {
		return keymgr.Wrapped{}, &keymgr.ProviderError{Op: "wrap", CMK: cmk, RequestID: id, Err: err}
	}
	b := binary.LittleEndian.AppendUint32([]byte{wrapFormat}, v.Version)
	bound := aad(cmk, b, ec)
	nonce := make([]byte, aead.NonceSize())
	rand.Read(nonce)
	b = aead.Seal(append(b, nonce...), nonce, plain, bound)
	return keymgr.Wrapped{Ciphertext: b, Version: fmt.Sprint(v.Version), RequestID: id}, nil
}

// Unwrap implements keymgr.Provider.
func (k *KMS) Unwrap(ctx context.Context, cmk string, ec keymgr.EncryptionContext, wrapped []byte) (keymgr.Unwrapped, error) {
	key, id, err := k.usable(ctx, "unwrap", cmk)
	if err != nil {
		return keymgr.Unwrapped{}, err
	}
	plain, err := key.open(cmk, ec, wrapped)
	if err != nil {
		return keymgr.Unwrapped{}, &keymgr.ProviderError{Op: "unwrap", CMK: cmk, RequestID: id, Err: err}
	}
	return keymgr.Unwrapped{Plaintext: plain, RequestID: id}, nil
}

func (k *key) open(name string, ec keymgr.EncryptionContext, wrapped []byte) ([]byte, error) {
	if len(wrapped) < wrapHeader || wrapped[0] != wrapFormat {
		return nil, fmt.Errorf("%d bytes that this service has not wrapped", len(wrapped))
	}
	header, rest := wrapped[:wrapHeader], wrapped[wrapHeader:]
	n := binary.LittleEndian.Uint32(header[1:])
	for _, v := range k.Versions {
		if v.Version != n {
			continue
		}
		aead, err := newAEAD(v.Key)
		if err != nil {
			return nil, err
		}
		if len(rest) < aead.NonceSize() {
			return nil, fmt.Errorf("%d bytes that this service has not wrapped", len(wrapped))
		}
		plain, err := aead.Open(nil, rest[:aead.NonceSize()], rest[aead.NonceSize():], aad(name, header, ec))
		if err != nil {
			return nil, errors.New("the ciphertext is damaged, or was wrapped under another key or context")
		}
		return plain, nil
	}
	return nil, fmt.Errorf("wrapped under version %d, which the key does not have", n)
}

// CurrentVersion implements keymgr.Provider.
func (k *KMS) CurrentVersion(ctx context.Context, cmk string) (version, requestID string, err error) {
	key, id, err := k.usable(ctx, "current version", cmk)
	if err != nil {
		return "", id, err
	}
	return fmt.Sprint(key.current().Version), id, nil
}

func newAEAD(raw []byte) (cipher.AEAD, error) {
	block, err := aes.NewCipher(raw)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCM(block)
}
