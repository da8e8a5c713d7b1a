package oracle

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

const binDir = "/usr/lib/postgresql/15/bin"

// A server is a data directory and, while it runs, its postmaster.
type server struct {
	t    *testing.T
	dir  string
	cred *syscall.Credential // of the unprivileged user, nil if we are one
	cmd  *exec.Cmd
}

// newServer prepares an empty directory that the server's user owns.
func newServer(t *testing.T, name string) *server {
	t.Helper()
	if _, err := os.Stat(binDir + "/postgres"); err != nil {
		t.Skipf("PostgreSQL 15 is not installed (package postgresql-15): %v", err)
	}
	root, err := os.MkdirTemp("", "holdfast-oracle-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(root) })
	s := &server{t: t, dir: filepath.Join(root, name)}
	if os.Getuid() == 0 {
		u, err := user.Lookup("postgres")
		if err != nil {
			t.Skipf("running as root, and there is no user postgres to run PostgreSQL as: %v", err)
		}
		uid, _ := strconv.Atoi(u.Uid)
		gid, _ := strconv.Atoi(u.Gid)
		s.cred = &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}
	}
	if err := os.Mkdir(s.dir, 0o700); err != nil {
		t.Fatal(err)
	}
	s.own(root)
	return s
}

// own gives everything below root to the server's user.
func (s *server) own(root string) {
	if s.cred == nil {
		return
	}
	err := filepath.WalkDir(root, func(p string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		return os.Lchown(p, int(s.cred.Uid), int(s.cred.Gid))
	})
	if err != nil {
		s.t.Fatal(err)
	}
}

func (s *server) command(name string, args ...string) *exec.Cmd {
	cmd := exec.Command(filepath.Join(binDir, name), args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: s.cred}
	cmd.Dir = filepath.Dir(s.dir)
	return cmd
}

// run runs one of PostgreSQL's programs to its end.
func (s *server) run(name string, args ...string) {
	s.t.Helper()
	if out, err := s.command(name, args...).CombinedOutput(); err != nil {
		s.t.Fatalf("%s: %v\n%s", name, err, out)
	}
}

// configure appends settings to postgresql.conf.
func (s *server) configure(settings map[string]string) {
	s.t.Helper()
	f, err := os.OpenFile(filepath.Join(s.dir, "postgresql.conf"), os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		s.t.Fatal(err)
	}
	defer f.Close()
	for k, v := range settings {
		fmt.Fprintf(f, "%s = '%s'\n", k, v)
	}
}

// start starts the postmaster without waiting for it.
func (s *server) start() {
	s.t.Helper()
	s.cmd = s.command("postgres", "-D", s.dir)
	log, err := os.OpenFile(s.logFile(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		s.t.Fatal(err)
	}
	defer log.Close()
	s.cmd.Stdout, s.cmd.Stderr = log, log
	if err := s.cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	cmd := s.cmd
	s.t.Cleanup(func() {
		if cmd.ProcessState == nil {
			cmd.Process.Signal(syscall.SIGQUIT)
			cmd.Wait()
		}
	})
}

func (s *server) logFile() string { return s.dir + ".log" }

// wait waits for the postmaster's end and gives its exit code.
func (s *server) wait() int {
	s.t.Helper()
	stuck := time.AfterFunc(2*time.Minute, func() { s.cmd.Process.Signal(syscall.SIGQUIT) })
	defer stuck.Stop()
	s.cmd.Wait()
	return s.cmd.ProcessState.ExitCode()
}

// stop shuts the server down with the signal that means "fast" (SIGINT) or "immediate"
// (SIGQUIT) to a postmaster.
func (s *server) stop(sig syscall.Signal) {
	s.t.Helper()
	s.cmd.Process.Signal(sig)
	if code := s.wait(); code != 0 && sig == syscall.SIGINT {
		s.t.Fatalf("the server ended with code %d:\n%s", code, s.log())
	}
}

// log is the end of the server's log.
func (s *server) log() string {
	b, _ := os.ReadFile(s.logFile())
	return string(b[max(0, len(b)-8000):])
}

// connect opens a session, waiting for the server to accept it.
func (s *server) connect(database string) *session {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	conf, err := pgx.ParseConfig(fmt.Sprintf("host=%s port=5432 user=postgres dbname=%s default_query_exec_mode=simple_protocol",
		filepath.Dir(s.dir), database))
	if err != nil {
		s.t.Fatal(err)
	}
	for {
		c, err := pgx.ConnectConfig(ctx, conf)
		if err == nil {
			return &session{s.t, c}
		}
		if ctx.Err() != nil {
			s.t.Fatalf("connecting: %v\n%s", err, s.log())
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// A session is one connection.
type session struct {
	t *testing.T
	c *pgx.Conn
}

// exec runs statements, each alone, so that those that cannot run in a transaction can.
func (c *session) exec(statements ...string) {
	c.t.Helper()
	for _, q := range statements {
		if err := c.try(q); err != nil {
			c.t.Errorf("%s: %v", q, err)
		}
	}
}

func (c *session) try(q string) error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	_, err := c.c.PgConn().Exec(ctx, q).ReadAll()
	return err
}

// copyIn runs COPY … FROM STDIN.
func (c *session) copyIn(q, data string) {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if _, err := c.c.PgConn().CopyFrom(ctx, strings.NewReader(data), q); err != nil {
		c.t.Errorf("%s: %v", q, err)
	}
}

func (c *session) close() { c.c.Close(context.Background()) }

// rows runs a query and gives its rows as text.
func (c *session) rows(q string) [][]string {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	results, err := c.c.PgConn().Exec(ctx, q).ReadAll()
	if err != nil {
		c.t.Fatalf("%s: %v", q, err)
	}
	var list [][]string
	for _, r := range results {
		for _, row := range r.Rows {
			var texts []string
			for _, v := range row {
				texts = append(texts, string(v))
			}
			list = append(list, texts)
		}
	}
	return list
}

// copyTree copies a data directory.
func copyTree(t *testing.T, from, to string) {
	t.Helper()
	if err := os.CopyFS(to, os.DirFS(from)); err != nil {
		t.Fatal(err)
	}
	err := filepath.WalkDir(to, func(p string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			err = os.Chmod(p, 0o700)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}
