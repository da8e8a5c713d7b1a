package keymgr_test

import (
	"errors"
	"path/filepath"
	"testing"
	"time"

	"google.golang.org/grpc"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/dekwire"
	"github.com/holdfastdb/holdfast/internal/keyring"
	"github.com/holdfastdb/holdfast/internal/rpc"
	"github.com/holdfastdb/holdfast/internal/seal"
	"github.com/holdfastdb/holdfast/keymgr"
)

// TestRingOverTheWire is the whole path: a customer's hand on the KMS, a key manager behind
// gRPC, and a node's ring.
func TestRingOverTheWire(t *testing.T) {
	f := newFixture(t)
	if err := f.srv.Close(); err != nil {
		t.Fatal(err)
	}
	srv, err := keymgr.New(keymgr.Config{Dir: f.auditDir(), BlobStore: f.bucket, Provider: f.kms,
		CheckInterval: 300 * time.Millisecond, LeaseTTL: 3 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	addr := "unix:" + filepath.Join(f.dir, "run", "k")
	l, err := rpc.Listen(addr)
	if err != nil {
		t.Fatal(err)
	}
	g := rpc.NewServer()
	pb.RegisterKeyManagerServer(g, dekwire.Server(srv))
	go func() { _ = g.Serve(l) }() // ends with Stop
	t.Cleanup(func() { g.Stop(); srv.Close() })
	conn, err := rpc.Dial(addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	client := pb.NewKeyManagerClient(conn)
	if _, err := client.CreateProject(t.Context(), &pb.CreateProjectRequest{Project: "p1", Cmk: "dev"}, grpc.WaitForReady(true)); err != nil {
		t.Fatal(err)
	}
	ring := keyring.New(dekwire.Client(client), "node1")
	t.Cleanup(ring.Close)

	c := seal.Context{Purpose: seal.PurposeWAL, Project: "p1", Branch: "b", Object: "s1"}
	k, wrapped, err := ring.Generate(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	sealed, err := seal.SealWAL(nil, k, c, 1, 2, 1, []byte("wal"))
	if err != nil {
		t.Fatal(err)
	}
	shredded := make(chan error, 1)
	ring.OnShred("p1", "b", func(err error) []string { shredded <- err; return nil })
	if err := f.kms.Disable("dev"); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	if err := <-shredded; !errors.Is(err, keyring.ErrRevoked) {
		t.Errorf("reason %v, want ErrRevoked", err)
	}
	t.Logf("disabled to shredded: %v (check interval 300ms, lease 3s)", time.Since(began))
	if _, err := seal.OpenWAL(nil, k, c, 1, 2, 1, sealed); !errors.Is(err, seal.ErrWiped) {
		t.Errorf("the key after the denial: %v, want ErrWiped", err)
	}
	if _, err := ring.Open(t.Context(), c, wrapped); !errors.Is(err, keyring.ErrRevoked) {
		t.Errorf("Open while disabled: %v", err)
	}
	if err := f.kms.Enable("dev"); err != nil {
		t.Fatal(err)
	}
	f.eventually("resumption", func() bool { k, err = ring.Open(t.Context(), c, wrapped); return err == nil })
	if plain, err := seal.OpenWAL(nil, k, c, 1, 2, 1, sealed); err != nil || string(plain) != "wal" {
		t.Errorf("after enabling: %q, %v", plain, err)
	}
}
