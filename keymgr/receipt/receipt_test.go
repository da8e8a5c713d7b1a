package receipt

import (
	"crypto/ed25519"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/shredreport"
)

func key(name string) ed25519.PrivateKey {
	return ed25519.NewKeyFromSeed([]byte(strings.Repeat(name, ed25519.SeedSize)))
}

func signed(t *testing.T, lease, node, by string) *pb.ShredReport {
	t.Helper()
	r := &pb.ShredReport{LeaseId: lease, Key: "p", Node: node, Reason: "denied", KeysWipedUnixUs: 5, ShreddedUnixUs: 6}
	if err := shredreport.Sign(r, key(by)); err != nil {
		t.Fatal(err)
	}
	return r
}

func opened() *pb.Receipt {
	return &pb.Receipt{Id: "r", Key: "p", RevokedUnixUs: 4, Entries: []*pb.ReceiptEntry{
		{Node: "n", LeaseId: "l", PublicKey: key("n").Public().(ed25519.PublicKey), LeaseEndUnixUs: 9}}}
}

// Whoever writes the bucket must neither keep a process's own report out of a receipt nor close it.
func TestWhatTheBucketMadeUpIsNotTaken(t *testing.T) {
	for name, planted := range map[string]*pb.ShredReport{
		"by another key": signed(t, "l", "n", "x"),
		"of a node":      signed(t, "l", "m", "n"),
		"unsigned":       {LeaseId: "l", Key: "p", Node: "n"},
	} {
		r, other := opened(), opened()
		other.Entries[0].Report, other.Complete = planted, true
		Merge(r, other)
		if diff := cmp.Diff(opened(), r, protocmp.Transform()); diff != "" {
			t.Errorf("a report %s was taken: %s", name, diff)
		}
		if changed, err := Add(r, signed(t, "l", "n", "n")); err != nil || !changed {
			t.Errorf("after a report %s: the process's own: %v %v", name, changed, err)
		}
	}
	r, other := opened(), opened()
	other.Entries = append(other.Entries, &pb.ReceiptEntry{Node: "z", LeaseId: "z", Report: &pb.ShredReport{LeaseId: "z", Key: "p", Node: "z"}})
	if Merge(r, other); len(r.Entries) != 1 {
		t.Errorf("an entry with an unsigned report was taken: %v", r.Entries)
	}
}

func TestMergeTakesWhatTheOtherHas(t *testing.T) {
	other := opened()
	other.Entries[0].Report = signed(t, "l", "n", "n")
	other.Entries = append(other.Entries, &pb.ReceiptEntry{Node: "m", LeaseId: "k", Report: signed(t, "k", "m", "m")})
	r := opened()
	Merge(r, proto.CloneOf(other))
	if diff := cmp.Diff(other, r, protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
	if err := Verify(r); err != nil {
		t.Error(err)
	}
}

func TestMarshalIsUndoneByParse(t *testing.T) {
	r := opened()
	r.Entries[0].Report = signed(t, "l", "n", "n")
	data, err := Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	back, err := Parse(data)
	if err != nil {
		t.Fatal(err)
	}
	again, err := Marshal(back)
	if err != nil || string(again) != string(data) {
		t.Errorf("once more: %v\n%s\nwant\n%s", err, again, data)
	}
}
