package auxfile

import (
	"context"
	"encoding/binary"
	"testing"

	"github.com/holdfastdb/holdfast/internal/keyring/keyringtest"
)

func message(prefix string, content []byte) []byte {
	b := make([]byte, atText)
	binary.LittleEndian.PutUint64(b[atPrefixSize:], uint64(len(prefix)+1))
	binary.LittleEndian.PutUint64(b[atMessageSize:], uint64(len(content)))
	return append(append(append(b, prefix...), 0), content...)
}

func TestRoundTrip(t *testing.T) {
	ctx := context.Background()
	ring := keyringtest.New()
	sealed, err := Seal(ctx, ring, "p", "b", "postgresql.auto.conf", []byte("work_mem = '5MB'\n"))
	if err != nil {
		t.Fatal(err)
	}
	got, ok := Message(message(Prefix, sealed))
	if !ok {
		t.Fatal("the message was not recognized")
	}
	value, err := Open(ctx, ring.Open, "p", "b", got)
	if err != nil {
		t.Fatal(err)
	}
	name, content, err := Parse(value)
	if err != nil || name != "postgresql.auto.conf" || string(content) != "work_mem = '5MB'\n" {
		t.Fatalf("%q, %q, %v", name, content, err)
	}
	if _, err := Open(ctx, ring.Open, "p", "other", got); err == nil {
		t.Error("it opened for another branch")
	}
	for i := range got { // whoever forges cannot seal
		forged := append([]byte(nil), got...)
		forged[i] ^= 1
		if _, err := Open(ctx, ring.Open, "p", "b", forged); err == nil {
			t.Fatalf("it opened with byte %d changed", i)
		}
	}
	other, err := Seal(ctx, ring, "p", "b", "pg_hba.conf", nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Open(ctx, ring.Open, "p", "b", other); err == nil {
		t.Error("a file that the log does not carry was accepted")
	}
}

func TestMessage(t *testing.T) {
	good := message(Prefix, []byte("abc"))
	for n := range good {
		if _, ok := Message(good[:n]); ok {
			t.Errorf("a message cut to %d bytes was recognized", n)
		}
	}
	if _, ok := Message(message("holdfast.auxx", []byte("abc"))); ok {
		t.Error("another prefix was recognized")
	}
	if _, ok := Message(message("", nil)); ok {
		t.Error("an empty prefix was recognized")
	}
}
