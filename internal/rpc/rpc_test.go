package rpc

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"

	"github.com/holdfastdb/holdfast/internal/api/pb"
)

func TestAddressesOffThisMachineAreRefused(t *testing.T) {
	for _, addr := range []string{"0.0.0.0:1", "10.0.0.1:7", "example.org:1", ":5", "nonsense"} {
		if l, err := Listen(addr); err == nil {
			l.Close()
			t.Errorf("Listen(%q) succeeded", addr)
		}
		if c, err := Dial(addr); err == nil {
			c.Close()
			t.Errorf("Dial(%q) succeeded", addr)
		}
	}
}

func TestSocketIsPrivateAndReplacedOnlyWhenStale(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "run")
	addr := "unix:" + filepath.Join(dir, "s")
	l, err := Listen(addr)
	if err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]os.FileMode{dir: 0o700, filepath.Join(dir, "s"): 0o600} {
		st, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if st.Mode().Perm() != want {
			t.Errorf("%s has mode %o, want %o", path, st.Mode().Perm(), want)
		}
	}
	if _, err := Listen(addr); err == nil || !strings.Contains(err.Error(), "in use") {
		t.Errorf("second Listen: %v, want 'in use'", err)
	}
	l.Close()
	if err := os.WriteFile(filepath.Join(dir, "s"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	l, err = Listen(addr)
	if err != nil {
		t.Fatalf("a stale socket file was not replaced: %v", err)
	}
	l.Close()
	if _, err := Listen("unix:/" + strings.Repeat("x", 200)); err == nil || !strings.Contains(err.Error(), "shorter") {
		t.Errorf("long path: %v", err)
	}
}

func TestDetailTravelsInAnError(t *testing.T) {
	err := Error(codes.FailedPrecondition, &pb.ErrorDetail{Reason: pb.ErrorDetail_FENCED}, "branch %s", "b")
	if got := Reason(fmt.Errorf("appending: %w", err)); got != pb.ErrorDetail_FENCED {
		t.Errorf("reason %v, want FENCED", got)
	}
	if got := Reason(Error(codes.Internal, nil, "x")); got != pb.ErrorDetail_UNSPECIFIED {
		t.Errorf("reason %v, want none", got)
	}
}
