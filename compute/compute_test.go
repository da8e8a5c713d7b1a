package compute

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/holdfastdb/holdfast/compute/boot"
	"github.com/holdfastdb/holdfast/compute/pgfs"
	"github.com/holdfastdb/holdfast/compute/pgproc"
	"github.com/holdfastdb/holdfast/compute/scratch"
	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/keyring"
	"github.com/holdfastdb/holdfast/internal/seal"
	"github.com/holdfastdb/holdfast/test/testenv"
)

func TestConfig(t *testing.T) {
	good := Config{Project: "p", Branch: "b", Name: "main", Dir: "/x", Listen: "127.0.0.1:1", Safekeepers: []string{"a"}, PageServer: "a", KeyManager: "a"}
	if err := good.Validate(); err != nil {
		t.Fatal(err)
	}
	for name, spoil := range map[string]func(*Config){
		"project": func(c *Config) { c.Project = "" }, "dir": func(c *Config) { c.Dir = "x" }, "listen": func(c *Config) { c.Listen = "1" },
		"safekeepers": func(c *Config) { c.Safekeepers = nil }, "cache": func(c *Config) { c.CacheBytes = -1 },
	} {
		c := good
		spoil(&c)
		if err := c.Validate(); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

// TestFolder: what an earlier agent left is gone, and the socket's folder is Postgres's.
func TestFolder(t *testing.T) {
	user, err := pgproc.FindUser()
	if err != nil {
		t.Skip(err)
	}
	root := filepath.Join(testenv.TempDir(t), "a", strings.Repeat("long", 20))
	for range 2 {
		if err := os.MkdirAll(filepath.Join(root, "left", "over"), 0o755); err != nil {
			t.Fatal(err)
		}
		f, err := OpenFolder(root, user)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(filepath.Join(root, "left")); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("what was left is still there: %v", err)
		}
		if len(f.Socket) > maxSocketDir {
			t.Errorf("socket folder %s is too long for a socket", f.Socket)
		}
		st, err := os.Stat(f.Socket)
		if err != nil || st.Mode().Perm() != 0o700 {
			t.Errorf("socket folder: %v, %v", st, err)
		}
		if err := f.Remove(); err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(f.Socket); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the socket folder is still there: %v", err)
		}
	}
}

// TestAwaitAddress waits for whoever still has the address.
func TestAwaitAddress(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	result := make(chan error)
	go func() { result <- awaitAddress(ctx, addr) }()
	select {
	case err := <-result:
		t.Fatalf("did not wait: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	l.Close()
	if err := <-result; err != nil {
		t.Fatal(err)
	}
	cancel()
	if err := awaitAddress(context.Background(), "192.0.2.1:1"); err == nil {
		t.Error("an address of another machine was accepted")
	}
}

// local starts Postgres on a mount that has all its data itself, made by a start that failed
// first: with the settings given.
func local(t *testing.T, extra map[string]string) (*postgres, *pgfs.FS) {
	testenv.NeedPostgres(t)
	testenv.NeedFUSE(t)
	user, err := pgproc.FindUser()
	if err != nil {
		t.Skip(err)
	}
	folder, err := OpenFolder(filepath.Join(testenv.TempDir(t), "e"), user)
	if err != nil {
		t.Fatal(err)
	}
	store, err := scratch.Open(folder.Scratch, seal.Endless())
	if err != nil {
		t.Fatal(err)
	}
	fs, err := pgfs.New(pgfs.Config{Mountpoint: folder.Mount, Scratch: store, UID: user.UID, GID: user.GID})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(fs.Wipe(), fs.Unmount(), folder.Remove()); err != nil {
			t.Error(err)
		}
	})
	if err := fs.Mount(); err != nil {
		t.Fatal(err)
	}
	path, err := pgproc.Binary("initdb")
	if err != nil {
		t.Fatal(err)
	}
	var out pgproc.Log
	p, err := pgproc.Start(pgproc.Command{Path: path, Args: []string{"-D", folder.Mount, "-U", boot.Superuser, "-N", "--locale=C.UTF-8", "-A", "reject"},
		User: user, Stdout: &out, Stderr: &out, Mount: folder.Mount})
	if err != nil {
		t.Fatal(err)
	}
	if <-p.Done(); p.Err() != nil {
		t.Fatalf("%v: %s", p.Err(), out.Startup())
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	name, err := agentUser()
	if err != nil {
		t.Fatal(err)
	}
	settings := &boot.Settings{Listen: l.Addr().String(), SocketDir: folder.Socket, AgentUser: name, PrivateShm: pgproc.Isolated(), Extra: extra}
	if err := settings.Validate(); err != nil {
		t.Fatal(err)
	}
	for _, f := range settings.Files() {
		if err := fs.WriteFile(f.Path, f.Data); err != nil {
			t.Fatal(err)
		}
	}
	pg, err := startPostgres(t.Context(), folder.Mount, user, settings, testLog(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if !pg.kill() {
			t.Error("Postgres outlived SIGKILL")
		}
	})
	return pg, fs
}

// TestPostgres: the agent's own connection, the poll, and a stop in order.
func TestPostgres(t *testing.T) {
	pg, fs := local(t, nil)
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := pg.awaitReady(ctx); err != nil {
		t.Fatal(err)
	}
	conn, stay, err := pg.open(ctx)
	if err != nil || !stay {
		t.Fatal(stay, err)
	}
	if err := pollOnce(ctx, conn, fs); err != nil {
		t.Fatal(err)
	}
	other, err := pg.connect(ctx, "template1")
	if err != nil {
		t.Fatal(err)
	}
	closeConn(conn)
	for range 100 { // the connection is gone a little later
		if err = other.Exec(ctx, "DROP DATABASE postgres").Close(); err == nil {
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	if err != nil {
		t.Fatal(err)
	}
	closeConn(other)
	if conn, stay, err = pg.open(ctx); err != nil || stay {
		t.Fatal(stay, err)
	}
	if err := pollOnce(ctx, conn, fs); err != nil {
		t.Fatal(err)
	}
	closeConn(conn)
	pg.stop(nil)
	if err := pg.inOrder(fs); err != nil {
		t.Errorf("a stop in order ended with %v", err)
	}
}

// TestImmediateShutdown ends with success, and is none in order.
func TestImmediateShutdown(t *testing.T) {
	pg, fs := local(t, nil)
	if err := pg.awaitReady(t.Context()); err != nil {
		t.Fatal(err)
	}
	pg.Signal(syscall.SIGQUIT)
	<-pg.Done()
	if err := pg.Err(); err != nil {
		t.Fatalf("it ended with %v", err)
	}
	if pg.inOrder(fs) == nil {
		t.Error("it is taken for a shutdown in order")
	}
}

// TestWrongSetting: what Postgres says before it takes connections is told.
func TestWrongSetting(t *testing.T) {
	pg, _ := local(t, map[string]string{"work_mem": "much"})
	err := pg.awaitReady(context.Background())
	if err == nil || !strings.Contains(err.Error(), "work_mem") {
		t.Fatalf("error %v does not name the setting", err)
	}
}

// TestLogOfARunningServer: nothing of it is told, though the setting keeps Postgres from saying
// that it takes connections.
func TestLogOfARunningServer(t *testing.T) {
	pg, _ := local(t, map[string]string{"log_min_messages": "fatal"})
	if err := pg.awaitReady(t.Context()); err != nil {
		t.Fatal(err)
	}
	const secret = "a_name_that_users_sent"
	if _, err := pg.connect(t.Context(), secret); err == nil {
		t.Fatal("there is such a database")
	}
	if !pg.kill() {
		t.Fatal("Postgres outlived SIGKILL")
	}
	if text, _ := pg.log.Tail(); !strings.Contains(string(text), secret) {
		t.Fatalf("the log does not hold what the test is about: %s", text)
	}
	if err := pg.ended(); strings.Contains(err.Error(), secret) {
		t.Errorf("the end is told with the server's log: %v", err)
	}
}

func testLog(t *testing.T) *slog.Logger { return slog.New(slog.NewTextHandler(t.Output(), nil)) }

// A role or a library that users took away keeps the agent out, or does not; it is not left to time.
func TestWhatUsersDoToTheAgentsOwnLogin(t *testing.T) {
	pg, _ := local(t, nil)
	if err := pg.awaitReady(t.Context()); err != nil {
		t.Fatal(err)
	}
	conn, err := pg.connect(t.Context(), "postgres")
	if err != nil {
		t.Fatal(err)
	}
	defer closeConn(conn)
	exec := func(sql string) {
		t.Helper()
		if _, err := conn.Exec(t.Context(), sql).ReadAll(); err != nil {
			t.Fatal(err)
		}
	}
	exec("ALTER ROLE postgres SET session_preload_libraries = 'nonsense'")
	if err := pg.awaitReady(t.Context()); err != nil {
		t.Errorf("with a library that does not exist: %v", err)
	}
	exec("ALTER ROLE postgres NOLOGIN")
	if err := pg.awaitReady(t.Context()); !errors.Is(err, errNoRole) || !strings.Contains(err.Error(), "not permitted to log in") {
		t.Errorf("without the right to log in: %v, want that it is named", err)
	}
}

// noteClients knows which clients are encrypted, and by their addresses which are not.
func TestWhichClientsArePlain(t *testing.T) {
	pg, _ := local(t, nil)
	if err := pg.awaitReady(t.Context()); err != nil {
		t.Fatal(err)
	}
	at := netip.MustParseAddrPort("127.0.0.1:1")
	if pg.isPlain(at) {
		t.Error("plain before Postgres was asked")
	}
	conn, err := pg.connect(t.Context(), "postgres")
	if err != nil {
		t.Fatal(err)
	}
	defer closeConn(conn)
	if err := pg.noteClients(t.Context(), conn); err != nil {
		t.Fatal(err)
	}
	if !pg.isPlain(at) {
		t.Error("encrypted, though ssl is off")
	}
}

// What the key manager said, and the reason for which the lease ended, make one story.
func TestLostAgreesWithTheReason(t *testing.T) {
	revoked := fmt.Errorf("the lease has ended: %w", keyring.ErrRevoked)
	for _, tc := range []struct {
		name   string
		st     *pb.KeyStatusResponse
		reason error
		want   string
	}{
		{"asked now", &pb.KeyStatusResponse{State: "revoked"}, revoked, "revoked"},
		{"asked before", &pb.KeyStatusResponse{State: "active", Cmk: "dev"}, revoked, "revoked"},
		{"asked before, cut off", &pb.KeyStatusResponse{State: "grace", Cmk: "dev"}, keyring.ErrUnreachable, "unreachable"},
		{"never asked", nil, revoked, "revoked"},
	} {
		if got := lost(tc.st, tc.reason); got.State != tc.want {
			t.Errorf("%s: state %s, want %s", tc.name, got.State, tc.want)
		}
		if tc.st != nil && tc.st.State == "active" && lost(tc.st, tc.reason) == tc.st {
			t.Errorf("%s: the status that others hold was changed", tc.name)
		}
	}
}
