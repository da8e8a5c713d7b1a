package pgproc

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/holdfastdb/holdfast/internal/proctree"
)

// buffer is a bytes.Buffer that may be read meanwhile.
type buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

func start(t *testing.T, script string, out *buffer) *Process {
	u, err := FindUser()
	if err != nil {
		t.Skip(err)
	}
	p, err := Start(Command{Path: "/bin/sh", Args: []string{"-c", script}, User: u, Stdout: out, Stderr: out})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Kill(); <-p.Done() })
	return p
}

func await(t *testing.T, what string, fn func() bool) {
	t.Helper()
	for begin := time.Now(); !fn(); time.Sleep(10 * time.Millisecond) {
		if time.Since(begin) > 30*time.Second {
			t.Fatalf("waited in vain for %s", what)
		}
	}
}

// TestKill: nothing that the program started lives on, whatever its session.
func TestKill(t *testing.T) {
	var out buffer
	mark := "1" + strconv.FormatInt(time.Now().UnixNano(), 10)
	p := start(t, "setsid sleep "+mark+" & (sleep "+mark+") & echo up; wait", &out)
	count := func() int {
		n := 0
		for _, pid := range proctree.Below(os.Getpid()) {
			cmdline, _ := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "cmdline"))
			if strings.HasPrefix(string(cmdline), "sleep\x00"+mark) {
				n++
			}
		}
		return n
	}
	await(t, "two sleeps", func() bool { return count() == 2 })
	if Isolated() {
		var st syscall.Stat_t
		if err := syscall.Stat("/proc/"+strconv.Itoa(p.PID())+"/ns/pid", &st); err != nil {
			t.Fatal(err)
		}
	}
	p.Kill()
	<-p.Done()
	if p.Err() == nil {
		t.Error("a killed program ended with success")
	}
	if out, _ := exec.Command("pgrep", "-f", "sleep "+mark).Output(); len(out) != 0 {
		t.Errorf("these live on: %s", out)
	}
}

func TestSurroundings(t *testing.T) {
	t.Setenv("HOLDFAST_TEST_SECRET", "x")
	var out buffer
	p := start(t, "id -u; env; ls /dev/shm | wc -l", &out)
	<-p.Done()
	if p.Err() != nil {
		t.Fatalf("%v: %s", p.Err(), out.String())
	}
	lines := strings.Split(out.String(), "\n")
	if lines[0] == "0" {
		t.Error("the program runs as root")
	}
	if strings.Contains(out.String(), "HOLDFAST_TEST_SECRET") {
		t.Error("the agent's environment was passed on")
	}
	if Isolated() && strings.TrimSpace(lines[len(lines)-2]) != "0" {
		t.Errorf("/dev/shm is not empty: %q", lines[len(lines)-2])
	}
}

func TestMayEnter(t *testing.T) {
	u := User{Name: "nobody", UID: 65534, GID: 65534, Drop: true}
	dir := filepath.Join(t.TempDir(), "closed", "below")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(filepath.Dir(dir), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := u.MayEnter(dir); err == nil || !strings.Contains(err.Error(), filepath.Dir(dir)) {
		t.Errorf("error %v does not name the closed folder", err)
	}
	if err := u.MayEnter("/usr"); err != nil {
		t.Error(err)
	}
}

func TestLog(t *testing.T) {
	var states []string
	l := &Log{Panic: func(s string) { states = append(states, s) }}
	write := func(s string) {
		for len(s) > 0 {
			n := min(len(s), 7)
			if _, err := l.Write([]byte(s[:n])); err != nil {
				t.Fatal(err)
			}
			s = s[n:]
		}
	}
	write("2026 [1] F0000 FATAL:  configuration file contains errors\n")
	if got := l.Startup(); !strings.Contains(got, "contains errors") {
		t.Errorf("before readiness: %q", got)
	}
	write("2026 [1] 00000 LOG:  database system is ready to accept connections\n2026 [9] 22012 ERROR:  user data\n")
	if got := l.Startup(); got != "" {
		t.Errorf("after readiness: %q", got)
	}
	write("2026 [9] XX000 PANIC:  user data\nno state PANIC:  x\n")
	if strings.Join(states, ",") != "XX000," {
		t.Errorf("states %q", states)
	}
	write(strings.Repeat("x", 3*LogBytes) + "end")
	text, v := l.Tail()
	if len(text) != LogBytes || !bytes.HasSuffix(text, []byte("xend")) || v != l.Version() {
		t.Errorf("the tail has %d bytes", len(text))
	}
}
