package leaseguard

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfastdb/holdfast/internal/boottime"
)

// The test's binary is also the guard, and the roles that are guarded.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && strings.HasPrefix(os.Args[1], "as-") {
		if err := child(os.Args[1], os.Args[2:]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func child(kind string, args []string) error {
	switch kind {
	case "as-guard":
		return Run(3, 4)
	case "as-role":
		return role(args)
	}
	return fmt.Errorf("no child %q", kind)
}

func startSelf() (*Guard, error) {
	return Start(Config{Command: []string{"/proc/self/exe", "as-guard"}, Stderr: os.Stderr, Lost: func(err error) {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(7)
	}})
}

// role publishes a lease's end, says who it and its guard and child are, and does as it is told: a
// line "publish N" publishes an end N milliseconds from now, 0 none; "stop" stops itself.
func role([]string) error {
	g, err := startSelf()
	if err != nil {
		return err
	}
	// As a Postgres without a PID namespace: a session of its own with a process below it.
	other := exec.Command("sh", "-c", "sleep 600 & sleep 600")
	other.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := other.Start(); err != nil {
		return err
	}
	slot := g.Slot()
	slot.Also(other.Process.Pid)
	fmt.Println("pids", g.PID(), other.Process.Pid)
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		word, arg, _ := strings.Cut(lines.Text(), " ")
		switch word {
		case "publish":
			ms, err := strconv.Atoi(arg)
			if err != nil {
				return err
			}
			if ms == 0 {
				slot.Publish(0)
			} else {
				slot.Publish(boottime.Now() + time.Duration(ms)*time.Millisecond)
			}
			fmt.Println("published")
		case "guard":
			fmt.Println("pids", g.PID(), 0)
		case "exit":
			return g.Close()
		}
	}
	return nil
}

type guarded struct {
	t            *testing.T
	cmd          *exec.Cmd
	in           interface{ WriteString(string) (int, error) }
	out          *bufio.Scanner
	guard, other int
	ended        chan error
}

func startRole(t *testing.T) *guarded {
	t.Helper()
	r := &guarded{t: t, cmd: exec.Command("/proc/self/exe", "as-role"), ended: make(chan error, 1)}
	stdin, in, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	out, stdout, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	r.cmd.Stdin, r.cmd.Stdout, r.cmd.Stderr = stdin, stdout, os.Stderr
	if err := r.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	stdin.Close()
	stdout.Close()
	r.in, r.out = in, bufio.NewScanner(out)
	go func() { r.ended <- r.cmd.Wait() }()
	t.Cleanup(func() {
		_ = r.cmd.Process.Kill() // it may have ended
		in.Close()
		out.Close()
	})
	r.pids()
	return r
}

func (r *guarded) pids() {
	r.t.Helper()
	line := r.line()
	var other int
	if _, err := fmt.Sscanf(line, "pids %d %d", &r.guard, &other); err != nil {
		r.t.Fatalf("the role said %q: %v", line, err)
	}
	if other != 0 {
		r.other = other
	}
}

func (r *guarded) line() string {
	r.t.Helper()
	if !r.out.Scan() {
		r.t.Fatalf("the role says no more: %v", r.out.Err())
	}
	return r.out.Text()
}

func (r *guarded) say(line string) {
	r.t.Helper()
	if _, err := r.in.WriteString(line + "\n"); err != nil {
		r.t.Fatal(err)
	}
}

func (r *guarded) publish(ms int) {
	r.t.Helper()
	r.say(fmt.Sprint("publish ", ms))
	r.line()
}

// awaitGone waits until a process has ended; a zombie has.
func awaitGone(t *testing.T, what string, pid int) {
	t.Helper()
	for {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if errors.Is(err, os.ErrNotExist) || strings.Contains(string(stat), ") Z ") {
			return
		}
		select {
		case <-t.Context().Done():
			t.Fatalf("%s (process %d) lives", what, pid)
		case <-time.After(5 * time.Millisecond):
		}
	}
}

func alive(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return err == nil && !strings.Contains(string(stat), ") Z ")
}

// A role that is stopped past its lease's end is killed, and what has to end with it.
func TestStoppedRoleIsKilled(t *testing.T) {
	t.Parallel()
	r := startRole(t)
	below := firstBelow(t, r.other)
	r.publish(300)
	end := boottime.Now()
	if err := r.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	awaitGone(t, "the other", r.other)
	took := boottime.Now() - end
	awaitGone(t, "what is below it", below)
	err := <-r.ended
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != unix.SIGKILL {
		t.Errorf("the role ended with %v, want SIGKILL", err)
	}
	if took < 200*time.Millisecond+Allowance {
		t.Errorf("killed %v after a lease of 300ms began, before the allowance of %v was over", took, Allowance)
	}
	t.Logf("lease's end to killed: %v, of which %v are allowed", took-300*time.Millisecond, Allowance)
	awaitGone(t, "the guard", r.guard)
}

func firstBelow(t *testing.T, pid int) int {
	t.Helper()
	for {
		data, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
		if err != nil {
			t.Skip("this kernel does not tell children: ", err)
		}
		var child int
		if n, _ := fmt.Sscan(string(data), &child); n == 1 {
			return child
		}
		time.Sleep(time.Millisecond)
	}
}

// Renewals, and the word that all is shredded, keep it alive.
func TestAcknowledgedRoleLives(t *testing.T) {
	t.Parallel()
	r := startRole(t)
	r.publish(100)
	r.publish(600_000) // renewed
	time.Sleep(Allowance + 3*lookEvery)
	r.publish(1)
	r.publish(0) // shredded
	time.Sleep(Allowance + 3*lookEvery)
	if !alive(r.cmd.Process.Pid) || !alive(r.other) {
		t.Error("a role that had nothing left to shred was killed")
	}
}

// However the role ends, its other does, and its guard.
func TestRoleThatEnds(t *testing.T) {
	t.Parallel()
	r := startRole(t)
	if err := r.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	awaitGone(t, "the other", r.other)
	awaitGone(t, "the guard", r.guard)
}

// A guard that ends is replaced; if it does not stay, the role ends itself.
func TestLostGuard(t *testing.T) {
	t.Parallel()
	r := startRole(t)
	for range relaunches {
		old := r.guard
		if err := unix.Kill(old, unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		for r.guard == old {
			r.say("guard")
			r.pids()
		}
	}
	if err := unix.Kill(r.guard, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	err := <-r.ended
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 7 {
		t.Errorf("the role ended with %v, want its own exit status 7", err)
	}
}

func TestClose(t *testing.T) {
	t.Parallel()
	r := startRole(t)
	r.say("exit")
	if err := <-r.ended; err != nil {
		t.Error(err)
	}
	awaitGone(t, "the guard", r.guard)
	_ = unix.Kill(r.other, unix.SIGKILL) // the role let it run
}

// Parts of a process publish each for itself; the earliest counts.
func TestEarliestCounts(t *testing.T) {
	g, err := startSelf()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { g.Close() })
	a, b := g.Slot(), g.Slot()
	far := boottime.Now() + time.Hour
	for _, step := range []struct {
		slot          *Slot
		publish, want time.Duration
	}{{a, far, far}, {b, far + 5, far}, {a, far + 9, far + 5}, {b, 0, far + 9}, {a, 0, 0}} {
		step.slot.Publish(step.publish)
		if got := time.Duration(g.page.deadline().Load()); got != step.want {
			t.Errorf("after %v the page has %v, want %v", step.publish, got, step.want)
		}
	}
}

func TestOverdue(t *testing.T) {
	for _, c := range []struct {
		deadline, now, wait time.Duration
		late                bool
	}{
		{0, time.Hour, lookEvery, false},
		{time.Hour, time.Minute, lookEvery, false},
		{time.Hour, time.Hour + Allowance - 5*time.Millisecond, 5 * time.Millisecond, false},
		{time.Hour, time.Hour + Allowance, time.Millisecond, true},
		{time.Hour, 9 * time.Hour, time.Millisecond, true},
	} {
		if wait, late := overdue(c.deadline, c.now); wait != c.wait || late != c.late {
			t.Errorf("overdue(%v, %v) = %v, %v; want %v, %v", c.deadline, c.now, wait, late, c.wait, c.late)
		}
	}
}
