// Package proc starts programs that cannot outlive the test that started them, and looks
// at processes through /proc.
package proc

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/moby/sys/mountinfo"
)

// A child's parent-death signal comes when the thread that started it ends, so one thread
// that never ends starts them all.
var (
	spawnOnce sync.Once
	spawn     chan func()
)

// Start starts cmd so that it is killed when this process ends, however that ends, and so
// that a terminal's Ctrl-C does not reach it.
func Start(cmd *exec.Cmd) error {
	spawnOnce.Do(func() {
		spawn = make(chan func())
		go func() {
			runtime.LockOSThread()
			for fn := range spawn {
				fn()
			}
		}()
	})
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	cmd.SysProcAttr.Setpgid = true
	done := make(chan error, 1)
	spawn <- func() { done <- cmd.Start() }
	return <-done
}

// Process is one entry of /proc.
type Process struct {
	PID     int
	Command string
}

func (p Process) String() string { return fmt.Sprintf("%d (%s)", p.PID, p.Command) }

// Using lists the processes, this one excepted, that run in dir or name it among their
// arguments.
func Using(dir string) []Process {
	entries, _ := filepath.Glob("/proc/[0-9]*")
	var found []Process
	for _, e := range entries {
		pid, _ := strconv.Atoi(filepath.Base(e))
		if pid == os.Getpid() {
			continue
		}
		raw, err := os.ReadFile(filepath.Join(e, "cmdline"))
		if err != nil {
			continue
		}
		// One that is being killed has lost its command line already, but perhaps not its shared memory,
		// for which a server that starts again would refuse to; that goes before its folder does.
		command := strings.TrimSpace(string(bytes.ReplaceAll(raw, []byte{0}, []byte{' '})))
		cwd, _ := os.Readlink(filepath.Join(e, "cwd"))
		if strings.Contains(command, dir) || cwd == dir || strings.HasPrefix(cwd, dir+"/") {
			found = append(found, Process{PID: pid, Command: command})
		}
	}
	return found
}

// WaitNone waits until no process uses dir.
func WaitNone(dir string, timeout time.Duration) error {
	deadline := time.Now().Add(timeout)
	for {
		left := Using(dir)
		if len(left) == 0 {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("still running after %v: %v", timeout, left)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// Mounts lists the mount points below dir, without those inside another.
func Mounts(dir string) []string {
	list, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir))
	if err != nil {
		return nil
	}
	var found []string
	for _, m := range list {
		if !slices.ContainsFunc(found, func(outer string) bool { return strings.HasPrefix(m.Mountpoint, outer+"/") }) {
			found = append(found, m.Mountpoint)
		}
	}
	return found
}

// RemoveAll removes dir and what is mounted below it.
func RemoveAll(dir string) error {
	for _, m := range Mounts(dir) {
		if err := syscall.Unmount(m, syscall.MNT_DETACH); err != nil {
			_ = exec.Command("fusermount3", "-u", "-z", m).Run() // the removal below tells
		}
	}
	return os.RemoveAll(dir)
}
