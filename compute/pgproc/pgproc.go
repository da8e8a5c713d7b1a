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
// agent's. That they leave no core files is internal/hardening's: they inherit the limit.
package pgproc

import (
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

	"github.com/holdfastdb/holdfast/internal/proctree"
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
			return User{}, fmt.Errorf("as root no Postgres runs, and there is no user %s: install PostgreSQL 15, or make that user: %w", systemUser, err)
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

// A NoPassageError names a folder through which a user may not pass.
type NoPassageError struct{ User, Dir string }

func (e *NoPassageError) Error() string {
	return fmt.Sprintf("user %s, as whom Postgres runs, may not pass through the folder %s: chmod o+x %s, or choose another data directory", e.User, e.Dir, e.Dir)
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
			return &NoPassageError{User: u.Name, Dir: d}
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
	// Mount is the one mount of ours that the program is to see. A copy of another in its
	// namespace would keep that one alive when its own agent unmounts it.
	Mount string
}

// A Process is a program that runs, or has ended.
type Process struct {
	cmd   *exec.Cmd
	mount string
	done  chan struct{}
	err   error // set before done is closed
}

// outputDelay is how long, after the program's end, its output may stay open in others.
const outputDelay = 2 * time.Second

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
	p := &Process{cmd: cmd, mount: c.Mount, done: make(chan struct{})}
	started := make(chan error, 1)
	go onThread(func() { p.run(started) })
	if err := <-started; err != nil {
		return nil, fmt.Errorf("starting %s: %w", c.Path, err)
	}
	return p, nil
}

// onThread runs fn on a thread that ends with it. The process's first thread is not for
// that: it never ends, and what the process sees of itself (/proc/self) is what that
// thread sees.
func onThread(fn func()) {
	runtime.LockOSThread()
	if unix.Gettid() != os.Getpid() {
		fn() // not unlocked: the thread ends with this goroutine
		return
	}
	done := make(chan struct{})
	go func() { // cannot be on the first thread while that is locked here
		defer close(done)
		runtime.LockOSThread()
		fn()
	}()
	<-done
	runtime.UnlockOSThread()
}

// run starts the program and waits for its end on one thread: that thread's end would be
// taken for the parent's death. Isolated, it has left the process's namespaces.
func (p *Process) run(started chan<- error) {
	if Isolated() {
		if err := isolate(p.mount); err != nil {
			started <- err
			return
		}
	}
	if err := p.cmd.Start(); err != nil {
		started <- err
		return
	}
	protect(p.cmd.Process.Pid)
	started <- nil
	p.err = p.cmd.Wait()
	if Isolated() && p.mount != "" { // before others learn of the end and unmount theirs
		_ = unix.Unmount(p.mount, unix.MNT_DETACH)
	}
	close(p.done)
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
		for _, pid := range proctree.Below(p.PID()) {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
	}
	p.Signal(syscall.SIGKILL)
}
