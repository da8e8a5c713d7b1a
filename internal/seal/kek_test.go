package seal

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"testing"
)

func testKEK(t testing.TB) *KEK {
	t.Helper()
	k, err := NewKEK(rawKey())
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func TestGoldenWrappedKey(t *testing.T) {
	wrapped := golden(t, "dek.hex")
	got, err := testKEK(t).Unwrap(testContext, wrapped)
	if err != nil || string(got) != "a data key of thirty-two bytes.." {
		t.Errorf("unwrapped %q, %v", got, err)
	}
	if v, err := KEKVersion(wrapped); err != nil || v != 3 {
		t.Errorf("KEK version %d, %v; want 3", v, err)
	}
}

func TestWrappedKeyOpensOnlyForItsContext(t *testing.T) {
	k, dek := testKEK(t), pattern(KeySize)
	wrapped, err := k.Wrap(7, testContext, dek)
	if err != nil || len(wrapped) != WrappedSize {
		t.Fatalf("%d bytes, %v", len(wrapped), err)
	}
	if got, err := k.Unwrap(testContext, wrapped); err != nil || !bytes.Equal(got, dek) {
		t.Errorf("Unwrap: %v", err)
	}
	for i := range wrapped {
		changed := bytes.Clone(wrapped)
		changed[i] ^= 1
		if _, err := k.Unwrap(testContext, changed); !errors.Is(err, ErrDamaged) {
			t.Errorf("byte %d was changed: %s: %v, want ErrDamaged", i, hex.EncodeToString(changed), err)
		}
		if _, err := k.Unwrap(testContext, wrapped[:i]); !errors.Is(err, ErrDamaged) {
			t.Errorf("cut to %d bytes: %v", i, err)
		}
	}
	for _, c := range []Context{
		{PurposeWAL, "p1", "b1", "000-fff"}, {PurposeLayer, "p2", "b1", "000-fff"},
		{PurposeLayer, "p1", "b2", "000-fff"}, {PurposeLayer, "p1", "b1", "x"},
	} {
		if _, err := k.Unwrap(c, wrapped); !errors.Is(err, ErrDamaged) {
			t.Errorf("unwrapped for %s: %v", c, err)
		}
	}
	again, err := k.Wrap(7, testContext, dek)
	if err != nil || bytes.Equal(again[5:wrapHeader], wrapped[5:wrapHeader]) {
		t.Errorf("two wraps share a nonce, %v", err)
	}
	k.Wipe()
	if _, err := k.Unwrap(testContext, wrapped); !errors.Is(err, ErrWiped) {
		t.Errorf("Unwrap after Wipe: %v", err)
	}
	if _, err := k.Wrap(7, testContext, dek); !errors.Is(err, ErrWiped) {
		t.Errorf("Wrap after Wipe: %v", err)
	}
}

func FuzzUnwrap(f *testing.F) {
	k := testKEK(f)
	wrapped, err := k.Wrap(1, testContext, pattern(KeySize))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(wrapped)
	f.Fuzz(func(t *testing.T, b []byte) {
		if _, err := k.Unwrap(testContext, b); err == nil && (len(b) != WrappedSize || binary.LittleEndian.Uint32(b[1:]) != 1) {
			t.Errorf("unwrapped %x", b)
		}
	})
}
