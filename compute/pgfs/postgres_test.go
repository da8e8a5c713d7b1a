package pgfs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfastdb/holdfast/compute/scratch"
	"github.com/holdfastdb/holdfast/internal/seal"
)

const pgBin = "/usr/lib/postgresql/15/bin"

// needPostgres skips the test unless a stock PostgreSQL can be run on a mount here.
func needPostgres(t testing.TB) *syscall.Credential {
	t.Helper()
	needMount(t)
	if _, err := os.Stat(pgBin + "/postgres"); err != nil {
		t.Skip("PostgreSQL 15 is not installed")
	}
	u, err := user.Lookup("postgres")
	if err != nil {
		t.Skip("there is no user postgres")
	}
	uid, _ := strconv.ParseUint(u.Uid, 10, 32)
	gid, _ := strconv.ParseUint(u.Gid, 10, 32)
	return &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}
}

func needMount(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounting for another user needs root")
	}
	if _, err := os.Stat("/dev/fuse"); err != nil {
		t.Skip("there is no /dev/fuse")
	}
}

// openDir is a temporary directory that every user may enter.
func openDir(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	for _, d := range []string{dir, filepath.Dir(dir)} {
		if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func newFS(t testing.TB, cfg Config) *FS {
	t.Helper()
	if cfg.Scratch == nil {
		store, err := scratch.Open(t.TempDir(), seal.Endless())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = store.Wipe() })
		cfg.Scratch = store
	}
	fs, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := fs.Unmount(); err != nil {
			t.Error(err)
		}
	})
	return fs
}

func mounted(t testing.TB, cfg Config) *FS {
	t.Helper()
	needMount(t)
	if cfg.Mountpoint == "" {
		cfg.Mountpoint = filepath.Join(openDir(t), "mnt")
	}
	fs := newFS(t, cfg)
	if cfg.WAL != nil {
		for _, dir := range Dirs() {
			if err := fs.MkdirAll(dir); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := fs.Mount(); err != nil {
		t.Fatal(err)
	}
	for _, v := range fs.mount.mounted() {
		calmPoller(t, v.point)
	}
	return fs
}

// calmPoller lets this process open files on its own mount: Go's poller would ask the kernel
// about them, which asks us, with the poller's lock held. The kernel asks no more once it
// was told that we do not know; the FUSE library does that for a file of this name.
func calmPoller(t testing.TB, point string) {
	t.Helper()
	fd, err := unix.Open(filepath.Join(point, ".go-fuse-epoll-hack"), unix.O_RDONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	_, _ = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
}

// server is a stock Postgres on a data directory.
type server struct {
	t    testing.TB
	cred *syscall.Credential
	dir  string
	sock string
	port string
	cmd  *exec.Cmd
	log  bytes.Buffer
}

func newServer(t testing.TB, cred *syscall.Credential, dir string) *server {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	sock := openDir(t)
	if err := os.Chown(sock, int(cred.Uid), int(cred.Gid)); err != nil {
		t.Fatal(err)
	}
	s := &server{t: t, cred: cred, dir: dir, sock: sock, port: strconv.Itoa(l.Addr().(*net.TCPAddr).Port)}
	s.run("initdb", "-D", dir, "-A", "trust", "--no-instructions", "-N")
	return s
}

func (s *server) command(name string, args ...string) *exec.Cmd {
	cmd := exec.Command(filepath.Join(pgBin, name), args...)
	cmd.Dir = "/"
	cmd.Env = append(os.Environ(), "PGHOST="+s.sock, "PGPORT="+s.port, "PGDATABASE=postgres", "PGUSER=postgres", "LC_ALL=C.UTF-8")
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: s.cred}
	return cmd
}

func (s *server) run(name string, args ...string) string {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	cmd := s.command(name, args...)
	stop := context.AfterFunc(ctx, func() { _ = cmd.Process.Kill() })
	defer stop()
	out, err := cmd.CombinedOutput()
	if err != nil {
		s.t.Fatalf("%s %s: %v\n%s\nserver log:\n%s", name, strings.Join(args, " "), err, out, s.log.String())
	}
	return string(out)
}

func (s *server) sql(lines ...string) string {
	s.t.Helper()
	return strings.TrimSpace(s.run("psql", "-XAtq", "-v", "ON_ERROR_STOP=1", "-c", strings.Join(lines, "")))
}

func (s *server) start(settings ...string) {
	s.t.Helper()
	args := []string{"-D", s.dir, "-k", s.sock, "-p", s.port, "-h", "",
		"-c", "full_page_writes=off", "-c", "wal_init_zero=off", "-c", "wal_recycle=off", "-c", "shared_buffers=32MB",
		"-c", "wal_sync_method=fdatasync", "-c", "work_mem=1MB", "-c", "jit=off",
		"-c", "backend_flush_after=0", "-c", "bgwriter_flush_after=0", "-c", "checkpoint_flush_after=0"}
	for _, set := range settings {
		args = append(args, "-c", set)
	}
	s.cmd = s.command("postgres", args...)
	s.cmd.Stdout, s.cmd.Stderr = &s.log, &s.log
	if err := s.cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { s.stop(syscall.SIGQUIT) })
	for range 600 {
		if s.command("pg_isready", "-q").Run() == nil {
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
	s.t.Fatalf("Postgres did not start:\n%s", s.log.String())
}

func (s *server) stop(sig syscall.Signal) {
	s.t.Helper()
	if s.cmd == nil {
		return
	}
	_ = s.cmd.Process.Signal(sig)
	err := s.cmd.Wait()
	s.cmd = nil
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		s.t.Error(err)
	}
}

// crash kills the postmaster; its children notice within a moment.
func (s *server) crash() {
	s.t.Helper()
	s.stop(syscall.SIGKILL)
	pidFile := filepath.Join(s.dir, "postmaster.pid")
	for range 200 {
		// The shared memory segment named in the file is in use until the last child is gone.
		if out, err := exec.Command("fuser", "-m", s.dir).CombinedOutput(); err != nil && len(bytes.TrimSpace(out)) == 0 {
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	if err := os.Remove(pidFile); err != nil {
		s.t.Error(err)
	}
}

// scanBackingFile looks for strings that Postgres wrote in every way in the file under the
// mount (K1).
func scanBackingFile(t *testing.T, fs *FS, s *server) {
	t.Helper()
	canary := "canary-" + strconv.Itoa(os.Getpid()) + "-5b1e"
	s.sql("create table c as select '"+canary+"'::text v; create index on c(v); create unlogged table cu as select * from c;",
		"create temp table ct as select * from c; select v from c, generate_series(1, 100000) order by 1, random() offset 99999")
	s.sql("begin; insert into c select '" + canary + "' from generate_series(1, 100); rollback")
	s.sql("checkpoint")
	if p, err := fs.ReadFile(s.sql("select pg_relation_filepath('c')")); err != nil || !bytes.Contains(p, []byte(canary)) {
		t.Fatalf("the canary is not even in its table's file (%v): the scan would prove nothing", err)
	}
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	scanned := 0
	for _, fd := range fds {
		path := "/proc/self/fd/" + fd.Name()
		if to, err := os.Readlink(path); err != nil || !strings.HasSuffix(to, "(deleted)") || strings.HasPrefix(to, "/proc") {
			continue
		}
		raw, err := os.ReadFile(path)
		if err != nil {
			continue
		}
		scanned += len(raw)
		if bytes.Contains(raw, []byte(canary)) {
			t.Errorf("%s holds plaintext", path)
		}
	}
	if scanned < 32<<20 {
		t.Errorf("only %d bytes were scanned", scanned)
	}
}

// The whole of a stock PostgreSQL on the mount, everything local: what it reads back is
// what it wrote, through a crash and its recovery.
func TestStockPostgres(t *testing.T) {
	cred := needPostgres(t)
	fs := mounted(t, Config{UID: cred.Uid, GID: cred.Gid})
	s := newServer(t, cred, fs.cfg.Mountpoint)
	s.start()
	s.run("pgbench", "-i", "-q", "-s", "2")
	s.run("pgbench", "-n", "-c", "4", "-j", "2", "-T", "1")
	s.sql("create unlogged table u as select g from generate_series(1, 1000) g")
	s.sql("create table big as select g, repeat(md5(g::text), 3) v from generate_series(1, 50000) g; create index on big(v)")
	if got := s.sql("select count(*) from (select v from big order by v desc, g offset 10) q"); got != "49990" {
		t.Errorf("a sort that spills gave %s rows, want 49990", got)
	}
	if got := s.sql("create temp table tt as select * from big; select sum(g) from tt"); got != "1250025000" {
		t.Errorf("a temporary table gave %s", got)
	}
	s.sql("create database copy1 template postgres strategy file_copy")
	s.sql("create database copy2 template postgres strategy wal_log")
	s.sql("vacuum full big")
	s.sql("delete from big where g % 2 = 0")
	s.sql("vacuum big")
	want := s.sql("select sum(abalance), count(*) from pgbench_accounts")
	s.crash()
	s.start()
	if got := s.sql("select sum(abalance), count(*) from pgbench_accounts"); got != want {
		t.Errorf("after a crash: %s, want %s", got, want)
	}
	if got := s.sql("select count(*) from u"); got != "0" {
		t.Errorf("an unlogged table has %s rows after a crash, want 0", got)
	}
	if got := s.sql("select count(*), sum(g) from big"); got != "25000|625000000" {
		t.Errorf("after a crash: %s", got)
	}
	s.run("pg_amcheck", "--all", "--install-missing", "--heapallindexed", "--parent-check")
	scanBackingFile(t, fs, s)
	s.sql("drop database copy1")
	dir := openDir(t)
	if err := os.Chown(dir, int(cred.Uid), int(cred.Gid)); err != nil {
		t.Fatal(err)
	}
	out, err := s.command("psql", "-Xc", fmt.Sprintf("create tablespace elsewhere location '%s'", dir)).CombinedOutput()
	if err == nil || !strings.Contains(string(out), "Operation not supported") {
		t.Errorf("CREATE TABLESPACE: %v\n%s", err, out)
	}
	s.stop(syscall.SIGINT)
	if strings.Contains(s.log.String(), "PANIC") {
		t.Errorf("Postgres panicked:\n%s", s.log.String())
	}
}
