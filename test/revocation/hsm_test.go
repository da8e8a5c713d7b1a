//go:build cgo

package revocation

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/miekg/pkcs11"

	"github.com/holdfastdb/holdfast/internal/config"
	"github.com/holdfastdb/holdfast/test/testenv"
)

const tokenLabel, keyLabel, pin = "holdfast", "orders", "1234"

// withToken is a customer with a token of SoftHSM, which the key manager reaches from its process and
// the customer from this one.
func withToken(t *testing.T) *customer {
	t.Helper()
	module := testenv.NeedSoftHSM(t)
	dir := testenv.TempDir(t) // no character that SoftHSM cannot read in its configuration
	conf, pinFile := filepath.Join(dir, "softhsm2.conf"), filepath.Join(dir, "pin")
	err := errors.Join(os.Mkdir(filepath.Join(dir, "tokens"), 0o700),
		os.WriteFile(conf, []byte("directories.tokendir = "+filepath.Join(dir, "tokens")+"\nobjectstore.backend = file\nlog.level = ERROR\n"), 0o600),
		os.WriteFile(pinFile, []byte(pin+"\n"), 0o600))
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("SOFTHSM2_CONF", conf)
	out, err := exec.Command("softhsm2-util", "--init-token", "--free", "--label", tokenLabel, "--pin", pin, "--so-pin", pin).CombinedOutput()
	if err != nil {
		t.Fatalf("softhsm2-util: %v\n%s", err, out)
	}
	permit, err := makeTokenKey(t, module)
	if err != nil {
		t.Fatal(err)
	}
	away := pinFile + ".away"
	return &customer{kind: "PKCS#11", cmk: "pkcs11:token=" + tokenLabel + ";object=" + keyLabel,
		kms: config.KMS{PKCS11: &config.PKCS11KMS{Module: module, PINFile: pinFile}},
		faults: []fault{
			{name: "disabled", do: func() error { return permit(false) }, undo: func() error { return permit(true) }},
			{name: "PIN withdrawn", silent: true, do: func() error { return os.Rename(pinFile, away) }, undo: func() error { return os.Rename(away, pinFile) }},
		},
		destroy: func() error { return os.RemoveAll(filepath.Join(dir, "tokens")) },
	}
}

// makeTokenKey makes a key that cannot be taken out of the token, and gives the customer's hand on it.
func makeTokenKey(t *testing.T, module string) (permit func(use bool) error, err error) {
	lib := pkcs11.New(module)
	if lib == nil {
		return nil, fmt.Errorf("%s is no PKCS#11 library", module)
	}
	if err := lib.Initialize(); err != nil {
		return nil, fmt.Errorf("initializing %s: %w", module, err)
	}
	t.Cleanup(func() { _ = lib.Finalize(); lib.Destroy() })
	slots, err := lib.GetSlotList(true)
	if err != nil {
		return nil, err
	}
	session, err := lib.OpenSession(slots[0], pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
	if err != nil {
		return nil, err
	}
	if err := lib.Login(session, pkcs11.CKU_USER, pin); err != nil {
		return nil, err
	}
	key, err := lib.GenerateKey(session, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_KEY_GEN, nil)}, []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true), pkcs11.NewAttribute(pkcs11.CKA_LABEL, keyLabel),
		pkcs11.NewAttribute(pkcs11.CKA_ID, []byte{1}), pkcs11.NewAttribute(pkcs11.CKA_VALUE_LEN, 32),
		pkcs11.NewAttribute(pkcs11.CKA_ENCRYPT, true), pkcs11.NewAttribute(pkcs11.CKA_DECRYPT, true),
		pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, true), pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, false),
	})
	if err != nil {
		return nil, err
	}
	return func(use bool) error {
		return lib.SetAttributeValue(session, key, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_ENCRYPT, use), pkcs11.NewAttribute(pkcs11.CKA_DECRYPT, use)})
	}, nil
}
