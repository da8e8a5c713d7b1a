package keyringtest

import (
	"bytes"
	"errors"
	"testing"

	"github.com/holdfastdb/holdfast/internal/keyring"
	"github.com/holdfastdb/holdfast/internal/seal"
)

func TestRevokeAndRestore(t *testing.T) {
	r := New()
	c := seal.Context{Purpose: seal.PurposeLayer, Project: "p", Branch: "b", Object: "o"}
	var reasons []error
	r.OnShred("p", "b", func(err error) []string { reasons = append(reasons, err); return nil })
	r.OnShred("p", "b", func(error) []string { t.Error("a cancelled function was called"); return nil })()
	k, wrapped, err := r.Generate(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	var file bytes.Buffer
	w, err := seal.NewWriter(&file, k, wrapped, c)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Finish(); err != nil {
		t.Fatal(err)
	}
	read := func() error {
		_, err := seal.NewReader(t.Context(), bytes.NewReader(file.Bytes()), int64(file.Len()), c, r.Open)
		return err
	}
	if err := read(); err != nil {
		t.Error(err)
	}
	r.Revoke()
	if len(reasons) != 1 || !errors.Is(reasons[0], keyring.ErrRevoked) {
		t.Errorf("reasons %v, want ErrRevoked once", reasons)
	}
	if err := read(); !errors.Is(err, keyring.ErrRevoked) {
		t.Errorf("while revoked: %v", err)
	}
	if _, err := seal.SealWAL(nil, k, c, 1, 2, 1, nil); !errors.Is(err, seal.ErrWiped) {
		t.Errorf("a key given out before: %v, want ErrWiped", err)
	}
	r.Restore()
	if err := read(); err != nil {
		t.Errorf("restored: %v", err)
	}
	if _, err := New().Open(t.Context(), c, wrapped); err == nil {
		t.Error("another ring opened the key")
	}
}
