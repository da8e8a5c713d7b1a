//go:build cgo

package pkcs11

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strings"

	"github.com/miekg/pkcs11"

	"github.com/holdfastdb/holdfast/keymgr"
	"github.com/holdfastdb/holdfast/keymgr/kmshttp"
)

// Provider is the tokens of one library. It is safe for concurrent use; calls take turns.
type Provider struct {
	lib  *pkcs11.Ctx
	cfg  Config
	turn chan struct{} // held by the call that is in the library
}

var _ keymgr.Provider = (*Provider)(nil)

// Open loads the library. No token is asked anything.
func Open(cfg Config) (keymgr.Provider, error) {
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	lib := pkcs11.New(cfg.Module)
	if lib == nil {
		return nil, fmt.Errorf("kms.pkcs11: %s cannot be loaded as a library", cfg.Module)
	}
	if err := lib.Initialize(); err != nil && !isCode(err, pkcs11.CKR_CRYPTOKI_ALREADY_INITIALIZED) {
		return nil, fmt.Errorf("kms.pkcs11: initializing %s: %w", cfg.Module, err)
	}
	return &Provider{lib: lib, cfg: cfg, turn: make(chan struct{}, 1)}, nil
}

func isCode(err error, code uint) bool {
	var e pkcs11.Error
	return errors.As(err, &e) && uint(e) == code
}

// outcomes are return values of PKCS#11 2.40 ("Function return values"). Others say nothing of
// the key, such as those of a wrong PIN and of a ciphertext that does not open, which
// some tokens give as CKR_GENERAL_ERROR.
var outcomes = map[uint]keymgr.Outcome{
	pkcs11.CKR_KEY_FUNCTION_NOT_PERMITTED: keymgr.Denied, // CKA_ENCRYPT or CKA_DECRYPT is taken away
	pkcs11.CKR_KEY_HANDLE_INVALID:         keymgr.Denied, // deleted since it was found
	pkcs11.CKR_OBJECT_HANDLE_INVALID:      keymgr.Denied,

	pkcs11.CKR_DEVICE_ERROR:           keymgr.Unreachable,
	pkcs11.CKR_DEVICE_MEMORY:          keymgr.Unreachable,
	pkcs11.CKR_DEVICE_REMOVED:         keymgr.Unreachable,
	pkcs11.CKR_TOKEN_NOT_PRESENT:      keymgr.Unreachable,
	pkcs11.CKR_TOKEN_NOT_RECOGNIZED:   keymgr.Unreachable,
	pkcs11.CKR_SESSION_HANDLE_INVALID: keymgr.Unreachable,
	pkcs11.CKR_SESSION_CLOSED:         keymgr.Unreachable,
	pkcs11.CKR_SESSION_COUNT:          keymgr.Unreachable,
	pkcs11.CKR_HOST_MEMORY:            keymgr.Unreachable,
	pkcs11.CKR_FUNCTION_FAILED:        keymgr.Unreachable,
}

var (
	errNoToken = errors.New("there is no token with this label")
	errNoKey   = errors.New("the token has no such AES key")
)

func classify(err error) keymgr.Outcome {
	var e pkcs11.Error
	switch {
	case errors.Is(err, errNoKey):
		return keymgr.Denied
	case errors.Is(err, errNoToken):
		return keymgr.Unreachable // it may be plugged in again
	case errors.As(err, &e):
		return outcomes[uint(e)]
	}
	return keymgr.Unknown
}

// session is logged in to a token. Each call has its own: closing the last one logs out, so
// that a PIN is good for one call.
type session struct {
	lib    *pkcs11.Ctx
	handle pkcs11.SessionHandle
	object string
}

// do runs fn in a session with the key's token, in its turn, as long as ctx lives.
func do[A any](ctx context.Context, p *Provider, op, cmk string, fn func(*session) (A, error)) (a A, id string, err error) {
	id = kmshttp.NewID()
	fail := func(outcome keymgr.Outcome, err error) (A, string, error) {
		var none A
		return none, id, &keymgr.ProviderError{Outcome: outcome, Op: op, CMK: cmk, RequestID: id, Err: err}
	}
	token, object, err := parseKey(cmk)
	if err != nil {
		return fail(keymgr.Unknown, err)
	}
	if ctx.Err() != nil {
		return fail(keymgr.Unreachable, ctx.Err())
	}
	select {
	case p.turn <- struct{}{}:
	case <-ctx.Done():
		return fail(keymgr.Unreachable, fmt.Errorf("waiting for another call to the token: %w", ctx.Err()))
	}
	type result struct {
		a   A
		err error
	}
	done := make(chan result, 1)
	go func() {
		defer func() { <-p.turn }()
		var r result
		r.err = p.within(token, object, func(s *session) (err error) { r.a, err = fn(s); return err })
		done <- r
	}()
	select {
	case r := <-done:
		if r.err != nil {
			return fail(classify(r.err), r.err)
		}
		return r.a, id, nil
	case <-ctx.Done():
		return fail(keymgr.Unreachable, ctx.Err())
	}
}

func (p *Provider) within(token, object string, fn func(*session) error) error {
	pin, err := os.ReadFile(p.cfg.PINFile)
	if err != nil {
		return fmt.Errorf("the PIN: %w", err)
	}
	defer clear(pin)
	slot, err := p.slot(token)
	if err != nil {
		return err
	}
	handle, err := p.lib.OpenSession(slot, pkcs11.CKF_SERIAL_SESSION)
	if err != nil {
		return fmt.Errorf("opening a session: %w", err)
	}
	defer func() { _ = p.lib.CloseSession(handle) }() // it ends with the token else
	if err := p.lib.Login(handle, pkcs11.CKU_USER, strings.TrimSpace(string(pin))); err != nil && !isCode(err, pkcs11.CKR_USER_ALREADY_LOGGED_IN) {
		return fmt.Errorf("logging in to the token: %w", err)
	}
	return fn(&session{lib: p.lib, handle: handle, object: object})
}

func (p *Provider) slot(token string) (uint, error) {
	slots, err := p.lib.GetSlotList(true)
	if err != nil {
		return 0, fmt.Errorf("listing tokens: %w", err)
	}
	for _, slot := range slots {
		info, err := p.lib.GetTokenInfo(slot)
		if err == nil && strings.TrimRight(info.Label, " \x00") == token {
			return slot, nil
		}
	}
	return 0, fmt.Errorf("%w: %q", errNoToken, token)
}

// key is an AES key of the token.
type key struct {
	handle pkcs11.ObjectHandle
	id     []byte
}

// find gives the key with an id; nil: the one that wraps now.
func (s *session) find(id []byte) (key, error) {
	template := []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY),
		pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_AES),
		pkcs11.NewAttribute(pkcs11.CKA_LABEL, s.object),
	}
	if id != nil {
		template = append(template, pkcs11.NewAttribute(pkcs11.CKA_ID, id))
	}
	if err := s.lib.FindObjectsInit(s.handle, template); err != nil {
		return key{}, fmt.Errorf("looking for the key: %w", err)
	}
	const most = 1024 // more versions than anybody makes
	handles, _, err := s.lib.FindObjects(s.handle, most)
	if err = errors.Join(err, s.lib.FindObjectsFinal(s.handle)); err != nil {
		return key{}, fmt.Errorf("looking for the key: %w", err)
	}
	var best key
	for _, h := range handles {
		attributes, err := s.lib.GetAttributeValue(s.handle, h, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_ID, nil)})
		if err != nil {
			return key{}, fmt.Errorf("reading the key's CKA_ID: %w", err)
		}
		k := key{h, attributes[0].Value}
		if len(k.id) > 0 && len(k.id) < 256 && (best.id == nil || less(best.id, k.id)) {
			best = k
		}
	}
	if best.id == nil {
		return key{}, fmt.Errorf("%w with label %q and a CKA_ID", errNoKey, s.object)
	}
	return best, nil
}

// less compares ids as numbers.
func less(a, b []byte) bool {
	a, b = bytes.TrimLeft(a, "\x00"), bytes.TrimLeft(b, "\x00")
	if len(a) != len(b) {
		return len(a) < len(b)
	}
	return bytes.Compare(a, b) < 0
}

const (
	format    = 1
	nonceSize = 12
	tagBits   = 128
)

func aad(ec keymgr.EncryptionContext, header []byte) []byte {
	return append(append([]byte("holdfast pkcs11 wrap v1\n"), header...), ec.AAD()...)
}

func headerOf(id []byte) []byte { return append([]byte{format, byte(len(id))}, id...) }

// Wrap implements keymgr.Provider.
func (p *Provider) Wrap(ctx context.Context, cmk string, ec keymgr.EncryptionContext, plain []byte) (keymgr.Wrapped, error) {
	plain = bytes.Clone(plain) // the caller's ends with this call, the library's may not
	w, id, err := do(ctx, p, "wrap", cmk, func(s *session) (keymgr.Wrapped, error) {
		defer clear(plain)
		k, err := s.find(nil)
		if err != nil {
			return keymgr.Wrapped{}, err
		}
		header, nonce := headerOf(k.id), make([]byte, nonceSize)
		rand.Read(nonce) // never fails: crypto/rand
		params := pkcs11.NewGCMParams(nonce, aad(ec, header), tagBits)
		defer params.Free()
		err = s.lib.EncryptInit(s.handle, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_GCM, params)}, k.handle)
		if err != nil {
			return keymgr.Wrapped{}, err
		}
		sealed, err := s.lib.Encrypt(s.handle, plain)
		if err != nil {
			return keymgr.Wrapped{}, err
		}
		if used := params.IV(); len(used) == nonceSize {
			nonce = used // some tokens choose it themselves
		}
		return keymgr.Wrapped{Ciphertext: append(append(header, nonce...), sealed...), Version: hex.EncodeToString(k.id)}, nil
	})
	w.RequestID = id
	if err != nil {
		return keymgr.Wrapped{}, err
	}
	return w, nil
}

func parse(b []byte) (id, nonce, sealed []byte, err error) {
	if len(b) < 2 || b[0] != format || b[1] == 0 || len(b) < 2+int(b[1])+nonceSize+tagBits/8 {
		return nil, nil, nil, fmt.Errorf("%d bytes that were not wrapped by PKCS#11", len(b))
	}
	id, rest := b[2:2+b[1]], b[2+b[1]:]
	return id, rest[:nonceSize], rest[nonceSize:], nil
}

// Unwrap implements keymgr.Provider.
func (p *Provider) Unwrap(ctx context.Context, cmk string, ec keymgr.EncryptionContext, wrapped []byte) (keymgr.Unwrapped, error) {
	wrapped = bytes.Clone(wrapped)
	u, id, err := do(ctx, p, "unwrap", cmk, func(s *session) (keymgr.Unwrapped, error) {
		keyID, nonce, sealed, err := parse(wrapped)
		if err != nil {
			return keymgr.Unwrapped{}, err
		}
		k, err := s.find(keyID)
		if err != nil {
			return keymgr.Unwrapped{}, err
		}
		params := pkcs11.NewGCMParams(nonce, aad(ec, headerOf(keyID)), tagBits)
		defer params.Free()
		err = s.lib.DecryptInit(s.handle, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_GCM, params)}, k.handle)
		if err != nil {
			return keymgr.Unwrapped{}, err
		}
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		plain, err := s.lib.Decrypt(s.handle, sealed)
		overwriteFreed()
		return keymgr.Unwrapped{Plaintext: plain}, err
	})
	if err != nil {
		return keymgr.Unwrapped{}, err
	}
	u.RequestID = id
	return u, nil
}

// CurrentVersion implements keymgr.Provider. A version is a CKA_ID in hexadecimal.
func (p *Provider) CurrentVersion(ctx context.Context, cmk string) (version, requestID string, err error) {
	k, id, err := do(ctx, p, "current version", cmk, func(s *session) (key, error) { return s.find(nil) })
	if err != nil {
		return "", id, err
	}
	return hex.EncodeToString(k.id), id, nil
}
