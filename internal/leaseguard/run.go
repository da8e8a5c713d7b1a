package leaseguard

import (
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfastdb/holdfast/internal/boottime"
	"github.com/holdfastdb/holdfast/internal/proctree"
)

// watched is what the guard's process sees.
type watched struct {
	page  page
	role  int // pidfd
	other other
}

// other is the process that has to end with the role: known by a descriptor as soon as it is
// named, so that its number cannot have become another's.
type other struct {
	pid int
	fd  int // pidfd; -1: it is not known, or gone
}

// Run is the guard's process: descriptor mem is the page, role a pidfd of the guard's parent. It
// returns when the role has ended.
func Run(mem, role int) error {
	var st unix.Stat_t
	if err := unix.Fstat(mem, &st); err != nil || st.Size != PageSize {
		return fmt.Errorf("this is what `holdfast` starts for itself: descriptor %d is no page of a guard (%v)", mem, err)
	}
	p, err := mapPage(mem)
	if err != nil {
		return err
	}
	// For the better only: it is small, but must act when memory is short.
	_ = unix.Mlockall(unix.MCL_CURRENT | unix.MCL_FUTURE | unix.MCL_ONFAULT)
	_ = os.WriteFile("/proc/self/oom_score_adj", []byte("-900"), 0)
	w := &watched{page: p, role: role, other: other{fd: -1}}
	for {
		w.other.follow(int(p.also().Load()))
		wait, late := overdue(time.Duration(p.deadline().Load()), boottime.Now())
		if late {
			// The role may be in no state to say it.
			fmt.Fprintf(os.Stderr, "holdfast guard: process %d held what it had under a key %v past its lease's end; it is killed, and can be started again\n",
				os.Getppid(), Allowance)
			w.kill()
		}
		ended, err := awaitEnd(role, wait)
		if err != nil {
			return err
		}
		if ended { // however it came to that
			w.other.kill()
			return nil
		}
	}
}

// overdue tells whether the deadline and the allowance are past, and how long to wait if not.
func overdue(deadline, now time.Duration) (wait time.Duration, late bool) {
	if deadline == 0 {
		return lookEvery, false
	}
	left := deadline + Allowance - now
	return max(min(left, lookEvery), time.Millisecond), left <= 0
}

// awaitEnd waits until the process ends.
func awaitEnd(pidfd int, wait time.Duration) (ended bool, err error) {
	fds := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
	ts := unix.NsecToTimespec(int64(wait))
	n, err := unix.Ppoll(fds, &ts, nil)
	if errors.Is(err, unix.EINTR) {
		return false, nil
	}
	return n > 0, err
}

// kill kills the other first: it is what answers.
func (w *watched) kill() {
	w.other.kill()
	_ = unix.PidfdSendSignal(w.role, unix.SIGKILL, nil, 0) // it may have ended
}

// follow gets hold of the process that is named.
func (o *other) follow(pid int) {
	if pid == o.pid {
		return
	}
	if o.fd >= 0 {
		unix.Close(o.fd)
	}
	o.pid, o.fd = pid, -1
	if pid == 0 {
		return
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return // it has ended
	}
	if parent, ok := proctree.Parent(pid); !ok || parent != os.Getppid() {
		unix.Close(fd)
		return
	}
	o.fd = fd
}

// kill kills the process and all below it. Where it is the first of a PID namespace the kernel kills
// the others; else they are looked for, while it is stopped and makes no more.
func (o *other) kill() {
	if o.fd < 0 || unix.PidfdSendSignal(o.fd, unix.SIGSTOP, nil, 0) != nil {
		return
	}
	below := proctree.Below(o.pid)
	_ = unix.PidfdSendSignal(o.fd, unix.SIGKILL, nil, 0) // what it was sent before is no error either
	for _, pid := range below {
		_ = unix.Kill(pid, unix.SIGKILL)
	}
}
