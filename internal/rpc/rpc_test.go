package rpc

import (
	"fmt"
	"net"
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

// A folder that others may enter, or own, is refused and left as it is.
func TestFolderOfSocketsIsPrivate(t *testing.T) {
	dir := t.TempDir()
	mine := filepath.Join(dir, "mine")
	for path, mode := range map[string]os.FileMode{mine: 0o700, filepath.Join(dir, "open"): 0o755, filepath.Join(dir, "shared"): 0o777 | os.ModeSticky} {
		if err := os.Mkdir(path, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink(mine, filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	refused := []string{"open", "shared", "link"}
	if os.Geteuid() == 0 {
		const nobody = 65534
		if err := os.Mkdir(filepath.Join(dir, "theirs"), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.Chown(filepath.Join(dir, "theirs"), nobody, nobody); err != nil {
			t.Fatal(err)
		}
		refused = append(refused, "theirs")
	}
	for _, name := range refused {
		path := filepath.Join(dir, name)
		before, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if l, err := Listen("unix:" + filepath.Join(path, "s")); err == nil || !strings.Contains(err.Error(), "mode 700") {
			t.Errorf("%s: %v, want an error that says which folder is wanted", name, err)
			if err == nil {
				l.Close()
			}
		}
		after, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if before.Mode() != after.Mode() {
			t.Errorf("%s: its mode was changed from %v to %v", name, before.Mode(), after.Mode())
		}
	}
	l, err := Listen("unix:" + filepath.Join(mine, "s"))
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
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

// A process reaches its own listeners through memory, others through the socket, and a
// listener that was closed through neither.
func TestConnectionsWithinTheProcessUseMemory(t *testing.T) {
	addr := "unix:" + filepath.Join(t.TempDir(), "run", "s")
	l, err := Listen(addr)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for network, dial := range map[string]func() (net.Conn, error){
		"bufconn": func() (net.Conn, error) { return connect(t.Context(), addr) },
		"unix":    func() (net.Conn, error) { return net.Dial("unix", strings.TrimPrefix(addr, "unix:")) },
	} {
		client, err := dial()
		if err != nil {
			t.Fatal(err)
		}
		defer client.Close()
		server, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer server.Close()
		if got := server.LocalAddr().Network(); got != network {
			t.Errorf("the connection is of kind %q, want %q", got, network)
		}
		if _, err := client.Write([]byte("x")); err != nil {
			t.Error(err)
		}
		var b [1]byte
		if _, err := server.Read(b[:]); err != nil || b[0] != 'x' {
			t.Errorf("read %q, %v", b, err)
		}
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	if c, err := connect(t.Context(), addr); err == nil {
		c.Close()
		t.Error("a closed listener took a connection")
	}
}
