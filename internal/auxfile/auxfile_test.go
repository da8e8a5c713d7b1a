package auxfile

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/holdfastdb/holdfast/internal/keyring"
	"github.com/holdfastdb/holdfast/internal/keyring/keyringtest"
	"github.com/holdfastdb/holdfast/internal/seal"
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
	want := []Change{{Path: Settings, Content: []byte("work_mem = '5MB'\n")}, {Path: "pg_logical/snapshots/0-15D1B28.snap", Content: []byte{}, Removed: true},
		{Path: "pg_replslot/s/state", Content: bytes.Repeat([]byte{7}, 200)}}
	sealed, err := Seal(ctx, ring, "p", "b", want)
	if err != nil {
		t.Fatal(err)
	}
	for name, data := range map[string][]byte{"Postgres's": message(Prefix, sealed), "ours": Record(sealed)} {
		got, ok := Message(data)
		if !ok {
			t.Fatalf("%s message was not recognized", name)
		}
		changes, err := Open(ctx, ring.Open, "p", "b", got)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, changes); diff != "" {
			t.Errorf("%s message (-want +got):\n%s", name, diff)
		}
	}
	if _, err := Open(ctx, ring.Open, "p", "other", sealed); !errors.Is(err, seal.ErrDamaged) {
		t.Errorf("opened for another branch: %v, want %v", err, seal.ErrDamaged)
	}
	for i := range sealed { // whoever forges cannot seal
		forged := append([]byte(nil), sealed...)
		forged[i] ^= 1
		_, err := Open(ctx, ring.Open, "p", "b", forged)
		// In the bytes that say which KEK it is, a change names one that is not there.
		if refused := errors.Is(err, seal.ErrDamaged) || errors.Is(err, keyring.ErrRetired); !refused || errors.Is(err, ErrUnreadable) {
			t.Fatalf("opened with byte %d changed: %v, want %v", i, err, seal.ErrDamaged)
		}
	}
	other, err := Seal(ctx, ring, "p", "b", []Change{{Path: "pg_hba.conf"}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Open(ctx, ring.Open, "p", "b", other); !errors.Is(err, ErrUnreadable) || errors.Is(err, seal.ErrDamaged) {
		t.Errorf("a file that the log does not carry: %v, want %v", err, ErrUnreadable)
	}
}

func TestChangesThatAreCut(t *testing.T) {
	whole := marshalChanges([]Change{{Path: Settings, Content: []byte("abc")}, {Path: Stats, Content: []byte("defg")}})
	first := len(marshalChanges([]Change{{Path: Settings, Content: []byte("abc")}}))
	for n := range whole {
		if _, err := parseChanges(whole[:n]); (err == nil) != (n == 0 || n == first) {
			t.Errorf("cut to %d of %d bytes: %v", n, len(whole), err)
		}
	}
	for _, kind := range []byte{0, 3} {
		whole[0] = kind
		if _, err := parseChanges(whole); err == nil {
			t.Errorf("a change of kind %d was accepted", kind)
		}
	}
}

func TestCarried(t *testing.T) {
	for name, want := range map[string]bool{
		"postgresql.auto.conf": true, "postgresql.auto.conf.tmp": false, "postgresql.conf": false,
		"pg_stat/pgstat.stat": true, "pg_stat/pgstat.tmp": false,
		"pg_replslot/s/state": true, "pg_replslot/s/state.tmp": false, "pg_replslot/s.tmp/state": false, "pg_replslot/state": false,
		"pg_replslot//state": false, "pg_replslot/a/b/state": false,
		"pg_logical/snapshots/0-15D1B28.snap": true, "pg_logical/snapshots/0-15D1B28.snap.77.tmp": false,
		"pg_logical/mappings/map-4-4eb-0_15D1B28-2f1-2f2": true, "pg_logical/replorigin_checkpoint": false,
	} {
		if got := Carried(name); got != want {
			t.Errorf("Carried(%q) = %v, want %v", name, got, want)
		}
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
