// Package pgproc runs PostgreSQL's programs so that none of their processes outlives the one
// that started them, and so that all of them can be killed at once (invariant K2).
//
// As root the program becomes the first process of a PID namespace of its own: when it is
// killed, by the agent or because the agent died (PDEATHSIG), the kernel kills every backend
// with it. It gets a /dev/shm and a System V IPC namespace of its own, too, so that shared
// memory goes when they go. Without root its descendants are looked up and killed; the agent's
// death then reaches backends only through Postgres's own watch over its postmaster.
//
// Programs run as an unprivileged user, with an environment that holds nothing of the
// agent's, and without core files.
package pgproc

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"runtime"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// DebianBin is where Debian's and Ubuntu's packages put PostgreSQL 15's programs.
const DebianBin = "/usr/lib/postgresql/15/bin"

// Binary finds one of PostgreSQL 15's programs.
func Binary(name string) (string, error) {
	if path := filepath.Join(DebianBin, name); isExecutable(path) {
		return path, nil
	}
	if path, err := exec.LookPath(name); err == nil {
		return filepath.Abs(path)
	}
	return "", fmt.Errorf("PostgreSQL 15's program %s is neither in %s nor in PATH: install PostgreSQL 15 (Debian, Ubuntu: apt-get install postgresql-15)", name, DebianBin)
}

func isExecutable(path string) bool {
	st, err := os.Stat(path)
	return err == nil && st.Mode().IsRegular() && st.Mode()&0o111 != 0
}

// A User is whom PostgreSQL's programs run as.
type User struct {
	Name     string
	UID, GID uint32
	Drop     bool // it is another than this process's: this one is root
}

// systemUser is the user that PostgreSQL's packages make.
const systemUser = "postgres"

// FindUser gives this process's user or, if that is root, as which Postgres refuses to run,
// the user postgres.
func FindUser() (User, error) {
	u, err := user.Current()
	if err != nil {
		return User{}, err
	}
	if u.Uid == "0" {
		if u, err = user.Lookup(systemUser); err != nil {
			return User{}, fmt.Errorf("Postgres refuses to run as root, and there is no user %s: install PostgreSQL 15, or make that user: %w", systemUser, err)
		}
	}
	uid, err := strconv.ParseUint(u.Uid, 10, 32)
	if err != nil {
		return User{}, fmt.Errorf("user %s: %w", u.Username, err)
	}
	gid, err := strconv.ParseUint(u.Gid, 10, 32)
	if err != nil {
		return User{}, fmt.Errorf("user %s: %w", u.Username, err)
	}
	return User{Name: u.Username, UID: uint32(uid), GID: uint32(gid), Drop: os.Geteuid() == 0}, nil
}

// MayEnter tells which folder on the way to dir the user may not pass through.
func (u User) MayEnter(dir string) error {
	if !u.Drop {
		return nil
	}
	for d := filepath.Clean(dir); ; d = filepath.Dir(d) {
		var st unix.Stat_t
		if err := unix.Stat(d, &st); err != nil {
			return &os.PathError{Op: "stat", Path: d, Err: err}
		}
		mode := st.Mode
		if !(mode&0o001 != 0 || st.Gid == u.GID && mode&0o010 != 0 || st.Uid == u.UID && mode&0o100 != 0) {
			return fmt.Errorf("user %s, as whom Postgres runs, may not pass through the folder %s: chmod o+x %s, or choose another data directory", u.Name, d, d)
		}
		if d == filepath.Dir(d) {
			return nil
		}
	}
}

// Isolated tells whether programs get their own PID namespace and /dev/shm here.
func Isolated() bool { return os.Geteuid() == 0 }

// A Command says what to run.
type Command struct {
	Path   string
	Args   []string // without the program's name
	User   User
	Env    []string // besides a few that every program gets
	Stdout io.Writer
	Stderr io.Writer
	Extra  []*os.File // the program's descriptors from 3 on
}

// A Process is a program that runs, or has ended.
type Process struct {
	cmd  *exec.Cmd
	done chan struct{}
	err  error // set before done is closed
}

const (
	// outputDelay is how long, after the program's end, its output may stay open in others.
	outputDelay = 2 * time.Second
	// A pipe in core_pattern ignores a limit of 0; 1 stops both a file and a pipe (core(5)).
	coreLimit = 1
)

// Start runs a program that dies with this process.
func Start(c Command) (*Process, error) {
	cmd := exec.Command(c.Path, c.Args...)
	cmd.Dir = "/"
	cmd.Env = append([]string{"PATH=/usr/local/bin:/usr/bin:/bin", "LANG=C",
		"PG_OOM_ADJUST_FILE=/proc/self/oom_score_adj", "PG_OOM_ADJUST_VALUE=0"}, c.Env...)
	cmd.Stdout, cmd.Stderr, cmd.ExtraFiles, cmd.WaitDelay = c.Stdout, c.Stderr, c.Extra, outputDelay
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setsid: true}
	if c.User.Drop {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: c.User.UID, Gid: c.User.GID}
	}
	if Isolated() {
		cmd.SysProcAttr.Cloneflags = syscall.CLONE_NEWPID
	}
	p := &Process{cmd: cmd, done: make(chan struct{})}
	started := make(chan error)
	go p.run(started)
	if err := <-started; err != nil {
		return nil, fmt.Errorf("starting %s: %w", c.Path, err)
	}
	return p, nil
}

// run starts the program and waits for its end on one thread: that thread's end would be
// taken for the parent's death. It has left the process's namespaces and ends with run.
func (p *Process) run(started chan<- error) {
	runtime.LockOSThread()
	if Isolated() {
		if err := isolate(); err != nil {
			started <- err
			return
		}
	}
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{Cur: coreLimit, Max: coreLimit}); err != nil && !errors.Is(err, unix.EPERM) {
		started <- fmt.Errorf("forbidding core files: %w", err)
		return
	}
	if err := p.cmd.Start(); err != nil {
		started <- err
		return
	}
	protect(p.cmd.Process.Pid)
	started <- nil
	p.err = p.cmd.Wait()
	close(p.done)
}

// isolate gives this thread mounts and System V IPC of its own. Mounts that are made or
// undone outside still reach it, and none of its own reaches the outside.
func isolate() error {
	if err := unix.Unshare(unix.CLONE_NEWNS | unix.CLONE_NEWIPC); err != nil {
		return fmt.Errorf("leaving the mount namespace: %w; in a container this needs the capability SYS_ADMIN, as the mount does", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_SLAVE|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("separating the mounts: %w", err)
	}
	if err := unix.Mount("tmpfs", "/dev/shm", "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=1777"); err != nil {
		return fmt.Errorf("mounting a private /dev/shm: %w", err)
	}
	return nil
}

// postmasterOOMScore keeps the kernel from choosing the postmaster before a backend.
const postmasterOOMScore = "-600"

// protect is for the better only: without the right to it the scores stay.
func protect(pid int) {
	_ = os.WriteFile("/proc/"+strconv.Itoa(pid)+"/oom_score_adj", []byte(postmasterOOMScore), 0)
}

// PID is the program's, as this process sees it.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Done is closed when the program has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Err is how the program ended: nil for success. It may be asked once Done is closed.
func (p *Process) Err() error { return p.err }

// Signal sends the program a signal. It may have ended already.
func (p *Process) Signal(sig syscall.Signal) { _ = p.cmd.Process.Signal(sig) }

// Kill kills the program and all that it started.
func (p *Process) Kill() {
	if !Isolated() {
		p.Signal(syscall.SIGSTOP) // it must not start more meanwhile
		for _, pid := range descendants(p.PID()) {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
	}
	p.Signal(syscall.SIGKILL)
}
