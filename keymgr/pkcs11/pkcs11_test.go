//go:build cgo

package pkcs11

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/miekg/pkcs11"

	"github.com/holdfastdb/holdfast/keymgr"
	"github.com/holdfastdb/holdfast/keymgr/providertest"
	"github.com/holdfastdb/holdfast/test/testenv"
)

const label, pin = "holdfast", "1234"

var ec = keymgr.EncryptionContext{Project: "p1", KEKVersion: 1}

// hsm is SoftHSM with one token. A process initializes a library once, so all tests share it
// and each makes keys of its own.
var hsm struct {
	sync.Once
	dir string
	err error
}

func TestMain(m *testing.M) {
	status := m.Run()
	if hsm.dir != "" {
		os.RemoveAll(hsm.dir)
	}
	os.Exit(status)
}

func makeToken() error {
	var err error
	if hsm.dir, err = os.MkdirTemp("", "softhsm-"); err != nil {
		return err
	}
	conf := filepath.Join(hsm.dir, "softhsm2.conf")
	err = errors.Join(os.Mkdir(filepath.Join(hsm.dir, "tokens"), 0o700),
		os.WriteFile(conf, []byte("directories.tokendir = "+filepath.Join(hsm.dir, "tokens")+"\nobjectstore.backend = file\nlog.level = ERROR\n"), 0o600),
		os.WriteFile(pinFile(), []byte(pin+"\n"), 0o600), os.Setenv("SOFTHSM2_CONF", conf))
	if err != nil {
		return err
	}
	out, err := exec.Command("softhsm2-util", "--init-token", "--free", "--label", label, "--pin", pin, "--so-pin", pin).CombinedOutput()
	if err != nil {
		return fmt.Errorf("softhsm2-util: %w\n%s", err, out)
	}
	return nil
}

func pinFile() string { return filepath.Join(hsm.dir, "pin") }

// open gives a provider, and the customer's own session for working on keys.
func open(t *testing.T) (*Provider, *console) {
	t.Helper()
	module := testenv.NeedSoftHSM(t)
	hsm.Do(func() { hsm.err = makeToken() })
	if hsm.err != nil {
		t.Fatal(hsm.err)
	}
	provider, err := Open(Config{Module: module, PINFile: pinFile()})
	if err != nil {
		t.Fatal(err)
	}
	p := provider.(*Provider)
	slot, err := p.slot(label)
	if err != nil {
		t.Fatal(err)
	}
	s, err := p.lib.OpenSession(slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = p.lib.CloseSession(s) })
	if err := p.lib.Login(s, pkcs11.CKU_USER, pin); err != nil && !isCode(err, pkcs11.CKR_USER_ALREADY_LOGGED_IN) {
		t.Fatal(err)
	}
	return p, &console{lib: p.lib, session: s, object: strings.ReplaceAll(t.Name(), "/", " ")}
}

// console is the customer at their token.
type console struct {
	lib     *pkcs11.Ctx
	session pkcs11.SessionHandle
	object  string
	keys    []pkcs11.ObjectHandle
}

func (c *console) cmk() string {
	return "token=" + label + ";object=" + strings.ReplaceAll(c.object, " ", "%20")
}

// make makes a key that cannot be taken out of the token; its id is the next number.
func (c *console) make(t *testing.T) {
	t.Helper()
	handle, err := c.lib.GenerateKey(c.session, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_KEY_GEN, nil)}, []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true), pkcs11.NewAttribute(pkcs11.CKA_LABEL, c.object),
		pkcs11.NewAttribute(pkcs11.CKA_ID, []byte{0, byte(len(c.keys) + 1)}), pkcs11.NewAttribute(pkcs11.CKA_VALUE_LEN, 32),
		pkcs11.NewAttribute(pkcs11.CKA_ENCRYPT, true), pkcs11.NewAttribute(pkcs11.CKA_DECRYPT, true),
		pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, true), pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, false),
	})
	if err != nil {
		t.Fatal(err)
	}
	c.keys = append(c.keys, handle)
}

func (c *console) permit(t *testing.T, use bool) {
	t.Helper()
	for _, k := range c.keys {
		if err := c.lib.SetAttributeValue(c.session, k, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_ENCRYPT, use), pkcs11.NewAttribute(pkcs11.CKA_DECRYPT, use)}); err != nil {
			t.Fatal(err)
		}
	}
}

func TestConformance(t *testing.T) {
	providertest.Run(t, func(t *testing.T) providertest.Subject {
		p, c := open(t)
		c.make(t)
		return providertest.Subject{
			Provider: p, CMK: c.cmk(), BindsAAD: true,
			Disable: func(t *testing.T) { c.permit(t, false) },
			Enable:  func(t *testing.T) { c.permit(t, true) },
			Rotate:  c.make,
		}
	})
}

func wantOutcome(t *testing.T, what string, err error, want keymgr.Outcome) {
	t.Helper()
	var pe *keymgr.ProviderError
	if !errors.As(err, &pe) || pe.Outcome != want {
		t.Errorf("%s: %v, want outcome %v", what, err, want)
	}
}

func TestWhatIsGoneFromTheToken(t *testing.T) {
	p, c := open(t)
	c.make(t)
	old, err := p.Wrap(t.Context(), c.cmk(), ec, []byte("x"))
	if err != nil {
		t.Fatal(err)
	}
	c.make(t)
	if err := c.lib.DestroyObject(c.session, c.keys[0]); err != nil {
		t.Fatal(err)
	}
	_, err = p.Unwrap(t.Context(), c.cmk(), ec, old.Ciphertext)
	wantOutcome(t, "a version that was destroyed", err, keymgr.Denied)
	if _, err := p.Wrap(t.Context(), c.cmk(), ec, []byte("x")); err != nil {
		t.Errorf("the version that is left: %v", err)
	}
	_, err = p.Unwrap(t.Context(), "token=other;object=x", ec, old.Ciphertext)
	wantOutcome(t, "a token that is not there", err, keymgr.Unreachable)
}

// TestAHangingLibrary: a call that waits for one that hangs ends with its own context.
func TestAHangingLibrary(t *testing.T) {
	p, c := open(t)
	c.make(t)
	p.turn <- struct{}{} // the call that hangs
	ctx, cancel := context.WithCancel(t.Context())
	result := make(chan error, 1)
	go func() {
		_, _, err := p.CurrentVersion(ctx, c.cmk())
		result <- err
	}()
	cancel()
	wantOutcome(t, "behind a call that hangs", <-result, keymgr.Unreachable)
	<-p.turn
	if _, _, err := p.CurrentVersion(t.Context(), c.cmk()); err != nil {
		t.Error(err)
	}
}

func TestBadConfigurationsAndKeys(t *testing.T) {
	for _, cfg := range []Config{{}, {Module: "x"}, {Module: "/no/such.so", PINFile: "x"}} {
		if _, err := Open(cfg); err == nil {
			t.Errorf("%+v: no error", cfg)
		}
	}
	for _, cmk := range []string{"", "orders", "token=t", "token=t;object=", "token=t;object=o;pin-value=1", "token=t;token=u;object=o", "token=%zz;object=o"} {
		if CheckKey(cmk) == nil {
			t.Errorf("%q is taken for a key", cmk)
		}
	}
}

func TestIDsAreNumbers(t *testing.T) {
	for _, tc := range []struct {
		a, b []byte
		want bool
	}{{[]byte{1}, []byte{2}, true}, {[]byte{2}, []byte{1}, false}, {[]byte{9}, []byte{1, 0}, true}, {[]byte{0, 9}, []byte{8}, false}} {
		if got := less(tc.a, tc.b); got != tc.want {
			t.Errorf("less(%v, %v) = %v", tc.a, tc.b, got)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add(append(headerOf([]byte{0, 1}), make([]byte, 40)...))
	f.Add([]byte{format, 255})
	f.Fuzz(func(t *testing.T, b []byte) {
		id, nonce, sealed, err := parse(b)
		if err == nil && string(append(append(headerOf(id), nonce...), sealed...)) != string(b) {
			t.Errorf("%q does not round trip", b)
		}
	})
}
