package shredreport

import (
	"crypto/ed25519"
	"encoding/hex"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/holdfastdb/holdfast/internal/api/pb"
)

func report() *pb.ShredReport {
	return &pb.ShredReport{LeaseId: "l1", Key: "p1/b1", Branch: "b1", Node: "pageserver", Pid: 7, Reason: "denied", Keys: 3,
		KeysWipedUnixUs: 1_000_000, ShreddedUnixUs: 1_000_250, Dropped: []string{"12 pages of the open layer", "3 block caches"}}
}

// testKey is the same in every run, as is a signature by it.
var testKey = ed25519.NewKeyFromSeed([]byte(strings.Repeat("k", ed25519.SeedSize)))

func TestSignedBytesAreFixed(t *testing.T) {
	b, err := signed(report())
	if err != nil {
		t.Fatal(err)
	}
	// "holdfast shred report v1\n", then fields 1 to 10 in order.
	want := hex.EncodeToString([]byte(header)) +
		"0a026c31" + // lease_id
		"120570312f6231" + // key
		"1a026231" + // branch
		"220a70616765736572766572" + // node
		"2807" + // pid
		"320664656e696564" + // reason
		"3803" + // keys
		"40c0843d" + // keys_wiped_unix_us
		"48ba863d" + // shredded_unix_us
		"521a" + hex.EncodeToString([]byte("12 pages of the open layer")) +
		"520e" + hex.EncodeToString([]byte("3 block caches"))
	if got := hex.EncodeToString(b); got != want {
		t.Errorf("signed bytes\n%s, want\n%s", got, want)
	}
}

func TestEveryFieldIsSigned(t *testing.T) {
	r := report()
	if err := Sign(r, testKey); err != nil {
		t.Fatal(err)
	}
	if err := VerifyBy(r, testKey.Public().(ed25519.PublicKey)); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*pb.ShredReport){
		"lease":      func(r *pb.ShredReport) { r.LeaseId = "l2" },
		"key":        func(r *pb.ShredReport) { r.Key = "p1" },
		"branch":     func(r *pb.ShredReport) { r.Branch = "" },
		"node":       func(r *pb.ShredReport) { r.Node = "other" },
		"pid":        func(r *pb.ShredReport) { r.Pid++ },
		"reason":     func(r *pb.ShredReport) { r.Reason = "" },
		"keys":       func(r *pb.ShredReport) { r.Keys++ },
		"wiped":      func(r *pb.ShredReport) { r.KeysWipedUnixUs-- },
		"shredded":   func(r *pb.ShredReport) { r.ShreddedUnixUs++ },
		"dropped":    func(r *pb.ShredReport) { r.Dropped = r.Dropped[:1] },
		"public key": func(r *pb.ShredReport) { r.PublicKey[0] ^= 1 },
		"signature":  func(r *pb.ShredReport) { r.Signature[0] ^= 1 },
		"unknown":    func(r *pb.ShredReport) { r.ProtoReflect().SetUnknown([]byte{0xf8, 0x07, 1}) },
	} {
		c := proto.CloneOf(r)
		change(c)
		if err := Verify(c); err == nil {
			t.Errorf("%s was changed, and the report verifies", name)
		}
	}
	other := ed25519.NewKeyFromSeed([]byte(strings.Repeat("o", ed25519.SeedSize)))
	if err := VerifyBy(r, other.Public().(ed25519.PublicKey)); err == nil {
		t.Error("a report by another key was taken")
	}
}

func TestImpossibleReportsAreRefused(t *testing.T) {
	for name, change := range map[string]func(*pb.ShredReport){
		"no lease":           func(r *pb.ShredReport) { r.LeaseId = "" },
		"shredded too early": func(r *pb.ShredReport) { r.ShreddedUnixUs = 5 },
		"negative":           func(r *pb.ShredReport) { r.Keys = -1 },
		"long":               func(r *pb.ShredReport) { r.Reason = strings.Repeat("x", maxText+1) },
		"many lines":         func(r *pb.ShredReport) { r.Dropped = make([]string, maxDropped+1) },
	} {
		r := report()
		change(r)
		if err := Sign(r, testKey); err != nil {
			t.Fatal(err)
		}
		if err := Verify(r); err == nil {
			t.Errorf("%s: it verifies", name)
		}
	}
}
