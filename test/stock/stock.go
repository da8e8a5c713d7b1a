// Package stock runs ordinary PostgreSQL servers, alone or as a primary with synchronous
// standbys: what Holdfast is measured against, and what proves that the tests themselves
// find what they look for.
package stock

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/test/pgtools"
	"github.com/holdfastdb/holdfast/test/proc"
)

// Password is the superuser's.
const Password = "stock-password"

// Server is one PostgreSQL server over a directory.
type Server struct {
	Dir  string // the data directory
	Port int

	bin  string
	cred *syscall.Credential // whom the server runs as; nil: this user
	cmd  *exec.Cmd
	done chan struct{}
}

// New makes a data directory below dir with the settings given.
func New(ctx context.Context, dir, name string, settings map[string]string) (*Server, error) {
	s, err := prepare(dir, name)
	if err != nil {
		return nil, err
	}
	pw := filepath.Join(dir, name+".password")
	if err := os.WriteFile(pw, []byte(Password+"\n"), 0o644); err != nil {
		return nil, err
	}
	defer os.Remove(pw)
	err = s.run(ctx, "initdb", "--no-sync", "--pgdata", s.Dir, "--username", "postgres", "--pwfile", pw,
		"--auth", "scram-sha-256", "--encoding", "UTF8", "--locale", "C")
	if err != nil {
		return nil, err
	}
	return s, s.Configure(settings)
}

func prepare(dir, name string) (*Server, error) {
	s := &Server{Dir: filepath.Join(dir, name)}
	if err := os.MkdirAll(s.Dir, 0o700); err != nil {
		return nil, err
	}
	return s, s.adopt()
}

// Open is a server over a data directory that exists, whose files it makes its own.
func Open(dir string) (*Server, error) {
	s := &Server{Dir: dir}
	if err := s.adopt(); err != nil {
		return nil, err
	}
	if s.cred == nil {
		return s, nil
	}
	return s, filepath.WalkDir(dir, func(p string, _ fs.DirEntry, err error) error {
		return errors.Join(err, os.Lchown(p, int(s.cred.Uid), int(s.cred.Gid)))
	})
}

// adopt finds out who runs the server, with what programs, and gives it its folder.
func (s *Server) adopt() (err error) {
	if s.bin, err = pgtools.Dir(); err != nil {
		return err
	}
	if s.Port, err = pgtools.FreePort(); err != nil {
		return err
	}
	if os.Getuid() == 0 {
		u, err := user.Lookup("postgres")
		if err != nil {
			return fmt.Errorf("PostgreSQL refuses to run as root: %w", err)
		}
		uid, err := strconv.ParseUint(u.Uid, 10, 32)
		if err != nil {
			return err
		}
		gid, err := strconv.ParseUint(u.Gid, 10, 32)
		if err != nil {
			return err
		}
		s.cred = &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}
	}
	if err := openPath(filepath.Dir(s.Dir)); err != nil {
		return err
	}
	if err := os.Chmod(s.Dir, 0o700); err != nil { // which PostgreSQL insists on
		return err
	}
	if s.cred != nil {
		return os.Chown(s.Dir, int(s.cred.Uid), int(s.cred.Gid))
	}
	return nil
}

// Copy copies the directory of a server that does not run. The copy gets a port of its own.
func (s *Server) Copy(dir, name string) (*Server, error) {
	c, err := prepare(dir, name)
	if err != nil {
		return nil, err
	}
	if err := copyAll(s.Dir, c.Dir); err != nil {
		return nil, err
	}
	return c, c.Configure(nil)
}

// CopyWAL gives the server, which does not run, the WAL of another.
func (s *Server) CopyWAL(from *Server) error {
	return copyAll(filepath.Join(from.Dir, "pg_wal"), filepath.Join(s.Dir, "pg_wal"))
}

// copyAll copies what is in a folder, with its owners.
func copyAll(from, to string) error {
	if out, err := exec.Command("cp", "-a", from+"/.", to).CombinedOutput(); err != nil {
		return fmt.Errorf("copying %s: %w\n%s", from, err, out)
	}
	return nil
}

// openPath lets the server's user pass through the folders above its own, as far as these
// are ours: those of tests are closed.
func openPath(dir string) error {
	for d := dir; len(d) > len(os.TempDir()) && strings.HasPrefix(d, os.TempDir()); d = filepath.Dir(d) {
		st, err := os.Stat(d)
		if err != nil {
			return err
		}
		if err := os.Chmod(d, st.Mode().Perm()|0o011); err != nil {
			return err
		}
	}
	return nil
}

// Configure appends settings to postgresql.conf.
func (s *Server) Configure(settings map[string]string) error {
	names := make([]string, 0, len(settings))
	for n := range settings {
		names = append(names, n)
	}
	sort.Strings(names)
	var b strings.Builder
	fmt.Fprintf(&b, "\nport = %d\nlisten_addresses = '127.0.0.1'\nunix_socket_directories = ''\n", s.Port)
	for _, n := range names {
		fmt.Fprintf(&b, "%s = '%s'\n", n, strings.ReplaceAll(settings[n], "'", "''"))
	}
	f, err := os.OpenFile(filepath.Join(s.Dir, "postgresql.conf"), os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(b.String())
	return errors.Join(err, f.Close())
}

func (s *Server) run(ctx context.Context, program string, args ...string) error {
	cmd := exec.CommandContext(ctx, filepath.Join(s.bin, program), args...)
	s.prepareCommand(cmd)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := proc.Start(cmd); err != nil {
		return err
	}
	if err := cmd.Wait(); err != nil {
		return fmt.Errorf("%s: %w\n%s", program, err, out.String())
	}
	return nil
}

func (s *Server) prepareCommand(cmd *exec.Cmd) {
	cmd.Env = append(os.Environ(), "LC_ALL=C", "PGPASSWORD="+Password)
	cmd.Dir = "/"
	if s.cred != nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: s.cred}
	}
}

// Target is how to reach the server.
func (s *Server) Target() pgtools.Target {
	return pgtools.Target{Host: "127.0.0.1", Port: s.Port, User: "postgres", Password: Password, Database: "postgres"}
}

// Log is the file the server's messages go to. Like Holdfast's it is part of what rests.
func (s *Server) Log() string { return filepath.Join(s.Dir, "server.log") }

// Start starts the server and waits until it takes connections.
func (s *Server) Start(ctx context.Context) error {
	log, err := os.OpenFile(s.Log(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	if s.cred != nil { // pg_basebackup reads it like any other file there
		if err := log.Chown(int(s.cred.Uid), int(s.cred.Gid)); err != nil {
			return err
		}
	}
	s.cmd = exec.Command(filepath.Join(s.bin, "postgres"), "-D", s.Dir)
	s.prepareCommand(s.cmd)
	s.cmd.Stdout, s.cmd.Stderr = log, log
	if err := proc.Start(s.cmd); err != nil {
		return err
	}
	s.done = make(chan struct{})
	go func(cmd *exec.Cmd, done chan struct{}) { _ = cmd.Wait(); close(done) }(s.cmd, s.done)
	conn, err := s.Target().WaitConnect(ctx)
	if err != nil {
		return fmt.Errorf("starting stock PostgreSQL, whose log is %s: %w", s.Log(), err)
	}
	return conn.Close(ctx)
}

// Recover lets the server, which must not run, recover WAL from an archive, a folder of
// segment files, up to a checkpoint record at target, that record included, and end there.
func (s *Server) Recover(ctx context.Context, archive string, target pg.LSN) error {
	err := s.Configure(map[string]string{"restore_command": fmt.Sprintf("cp %s/%%f %%p", archive), "recovery_target_lsn": target.String(),
		"recovery_target_action": "shutdown", "hot_standby": "off"})
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(s.Dir, "recovery.signal"), nil, 0o644); err != nil {
		return err
	}
	log, err := os.OpenFile(s.Log(), os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.Command(filepath.Join(s.bin, "postgres"), "-D", s.Dir)
	s.prepareCommand(cmd)
	cmd.Stdout, cmd.Stderr = log, log
	if err := proc.Start(cmd); err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { _ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) })
	defer stop()
	_ = cmd.Wait() // a server that ends at its target says that it failed: pg_control tells where it ended
	return errors.Join(ctx.Err(), proc.WaitNone(s.Dir, 20*time.Second))
}

// Stop shuts the server down in order ("fast").
func (s *Server) Stop() error { return s.end(syscall.SIGINT) }

// Kill kills the server and every one of its processes with SIGKILL.
func (s *Server) Kill() error {
	if s.cmd == nil {
		return nil
	}
	// The whole process group, before a backend can learn that the postmaster is gone.
	_ = syscall.Kill(-s.cmd.Process.Pid, syscall.SIGKILL)
	return s.end(syscall.SIGKILL)
}

func (s *Server) end(sig syscall.Signal) error {
	if s.cmd == nil {
		return nil
	}
	_ = s.cmd.Process.Signal(sig) // it may be gone already: done tells
	select {
	case <-s.done:
	case <-time.After(time.Minute):
		return fmt.Errorf("stock PostgreSQL %d did not end within a minute", s.cmd.Process.Pid)
	}
	s.cmd = nil
	return proc.WaitNone(s.Dir, 20*time.Second)
}

// PID is the postmaster's.
func (s *Server) PID() int { return s.cmd.Process.Pid }

// NewStandby copies a running primary into a streaming standby called name. The primary
// must be given the name in synchronous_standby_names to wait for it.
func (s *Server) NewStandby(ctx context.Context, dir, name string, settings map[string]string) (*Server, error) {
	b, err := prepare(dir, name)
	if err != nil {
		return nil, err
	}
	err = b.run(ctx, "pg_basebackup", "--no-sync", "--checkpoint=fast", "--write-recovery-conf", "--wal-method=stream", "--pgdata", b.Dir,
		"--dbname", fmt.Sprintf("host=127.0.0.1 port=%d user=postgres application_name=%s", s.Port, name))
	if err != nil {
		return nil, err
	}
	all := map[string]string{"primary_conninfo": fmt.Sprintf("host=127.0.0.1 port=%d user=postgres password=%s application_name=%s", s.Port, Password, name),
		"synchronous_standby_names": ""}
	for k, v := range settings {
		all[k] = v
	}
	// pg_basebackup writes primary_conninfo into postgresql.auto.conf, which wins: it gives the
	// standby the right name already.
	return b, b.Configure(all)
}

// Synchronous makes the server wait for any one of the standbys, which must be running, and
// returns when they stream.
func (s *Server) Synchronous(ctx context.Context, names ...string) error {
	err := s.Target().Exec(ctx, fmt.Sprintf("ALTER SYSTEM SET synchronous_standby_names = 'ANY 1 (%s)'", strings.Join(names, ", ")), "SELECT pg_reload_conf()")
	if err != nil {
		return err
	}
	for {
		conn, err := s.Target().Connect(ctx)
		if err != nil {
			return err
		}
		var n int
		err = conn.QueryRow(ctx, "SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming' AND sync_state = 'quorum'").Scan(&n)
		_ = conn.Close(ctx)
		if err != nil || n == len(names) {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%d of %d standbys stream: %w", n, len(names), ctx.Err())
		case <-time.After(50 * time.Millisecond):
		}
	}
}
