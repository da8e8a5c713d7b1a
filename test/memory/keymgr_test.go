// Package memory looks into the memory of a key manager: what is there while a key may be used, and
// what is left once it may not (invariants K1, K2). test/revocation looks into a cluster's.
package memory

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/config"
	"github.com/holdfastdb/holdfast/internal/dekwire"
	"github.com/holdfastdb/holdfast/internal/keyring"
	"github.com/holdfastdb/holdfast/internal/rpc"
	"github.com/holdfastdb/holdfast/internal/seal"
	"github.com/holdfastdb/holdfast/keymgr/kmsopen"
	"github.com/holdfastdb/holdfast/test/cluster"
	"github.com/holdfastdb/holdfast/test/kmsim"
	"github.com/holdfastdb/holdfast/test/kmsim/kmsimtest"
	"github.com/holdfastdb/holdfast/test/memscan"
	"github.com/holdfastdb/holdfast/test/proc"
	"github.com/holdfastdb/holdfast/test/testenv"
)

// startKeymgr runs the program's key manager over a KMS; this process is its only node.
func startKeymgr(t *testing.T, s kmsimtest.Service) (dir string, client pb.KeyManagerClient) {
	t.Helper()
	bin, err := cluster.Binary()
	if err != nil {
		t.Fatal(err)
	}
	dir = testenv.TempDir(t)
	if err := os.Chmod(dir, 0o700); err != nil { // sockets are for this user alone
		t.Fatal(err)
	}
	cfg := &config.Keymgr{Listen: "unix:" + filepath.Join(dir, "s"), Dir: filepath.Join(dir, "keymgr"), Bucket: filepath.Join(dir, "bucket"), KMS: s.KMS}
	file := filepath.Join(dir, "keymgr.yaml")
	if err := config.Save(file, cfg); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(bin, "keymgr", "--config", file)
	cmd.Dir, cmd.Stderr = dir, os.Stderr
	if err := proc.Start(cmd); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	conn, err := rpc.Dial(cfg.Listen)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return dir, pb.NewKeyManagerClient(conn)
}

// TestKeyManagerForgets: for each KMS through its own client, a KEK is in the key manager's memory while
// it may be used, and neither it nor a DEK is there, in any form, once it may not.
func TestKeyManagerForgets(t *testing.T) {
	testenv.NeedRoot(t)
	for name, start := range kmsimtest.Services {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
			defer cancel()
			s := start(t)
			dir, client := startKeymgr(t, s)
			useKeys(t, ctx, client, s.CMK)
			set := keysOf(t, ctx, dir, s)
			before := scanIn(t, set, dir)
			if before.Found()["KEK 1 of project p"] == 0 {
				t.Errorf("while the key may be used the scan does not find its KEK: %v", before.Hits)
			}
			if err := s.Sim.SetState(s.Ref, kmsim.Disabled); err != nil {
				t.Fatal(err)
			}
			waitRevoked(t, ctx, client)
			var after *memscan.Scanner
			// The scrub runs beside what was told.
			for range 20 {
				if after = scanIn(t, set, dir); len(after.Hits) == 0 {
					break
				}
				time.Sleep(200 * time.Millisecond)
			}
			for _, h := range after.Hits {
				t.Errorf("after the key was disabled: %v", h)
			}
			t.Logf("SHOW: %d hits before, %d after", len(before.Hits), len(after.Hits))
		})
	}
}

// useKeys has keys made and opened, many times over.
func useKeys(t *testing.T, ctx context.Context, client pb.KeyManagerClient, cmk string) {
	t.Helper()
	for {
		_, err := client.CreateProject(ctx, &pb.CreateProjectRequest{Project: "p", Cmk: cmk})
		if err == nil {
			break
		}
		if ctx.Err() != nil || !strings.Contains(err.Error(), "connect") {
			t.Fatal(err)
		}
		time.Sleep(50 * time.Millisecond)
	}
	ring := keyring.New(dekwire.Client(client), "n")
	defer ring.Close()
	for i := range 20 {
		c := seal.Context{Purpose: seal.PurposeLayer, Project: "p", Branch: "b", Object: "o" + string(rune('a'+i))}
		_, wrapped, err := ring.Generate(ctx, c)
		if err == nil {
			_, err = ring.Open(ctx, c, wrapped)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

func keysOf(t *testing.T, ctx context.Context, dir string, s kmsimtest.Service) *memscan.Set {
	t.Helper()
	provider, err := kmsopen.Open(ctx, "", s.KMS)
	if err != nil {
		t.Fatal(err)
	}
	keys, err := memscan.Find(ctx, dir, filepath.Join(dir, "bucket"), provider)
	if err != nil {
		t.Fatal(err)
	}
	set := &memscan.Set{}
	if err := keys.AddTo(set); err != nil {
		t.Fatal(err)
	}
	return set
}

func scanIn(t *testing.T, set *memscan.Set, dir string) *memscan.Scanner {
	t.Helper()
	s := &memscan.Scanner{Set: set}
	if err := s.ScanAll(memscan.Processes(dir)); err != nil {
		t.Fatal(err)
	}
	if s.Processes == 0 || len(s.Unread) > 0 {
		t.Fatalf("%d processes searched, not searched: %v", s.Processes, s.Unread)
	}
	return s
}

func waitRevoked(t *testing.T, ctx context.Context, client pb.KeyManagerClient) {
	t.Helper()
	for {
		st, err := client.KeyStatus(ctx, &pb.KeyStatusRequest{Project: "p"})
		if err != nil {
			t.Fatal(err)
		}
		if st.State == "revoked" {
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
}
