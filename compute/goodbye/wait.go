package goodbye

import (
	"bytes"
	"errors"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// lookEvery is the pause between two looks at /proc.
const lookEvery = 500 * time.Microsecond

// stopped waits until processes run no more, and gives those that do not. One that waits in the
// kernel, for the mount perhaps, stops when it comes out of there.
func stopped(clients []*client, until time.Time) (list []*client) {
	waiting := clients
	for {
		var still []*client
		for _, c := range waiting {
			switch state(c.pid) {
			case 'T', 'D':
				list = append(list, c)
			case 0, 'Z', 'X': // gone
			default:
				still = append(still, c)
			}
		}
		if len(still) == 0 || !time.Now().Before(until) {
			return list
		}
		waiting = still
		time.Sleep(lookEvery)
	}
}

// state is a process's state, a letter as in proc(5); 0 if there is no such process.
func state(pid int) byte {
	stat, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return 0
	}
	if i := bytes.LastIndexByte(stat, ')'); i >= 0 && i+2 < len(stat) { // after the name, which may hold anything
		return stat[i+2]
	}
	return 0
}

// awaitPending waits until each process, stopped, has SIGQUIT waiting for it: the handler is then the
// first that it runs.
func awaitPending(clients []*client, until time.Time) {
	for _, c := range clients {
		for !quitPending(c.pid) && time.Now().Before(until) {
			time.Sleep(lookEvery)
		}
	}
}

func quitPending(pid int) bool {
	status, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/status")
	if err != nil {
		return true // gone: nothing to wait for
	}
	for line := range bytes.Lines(status) {
		if value, ok := bytes.CutPrefix(line, []byte("ShdPnd:")); ok {
			mask, err := strconv.ParseUint(string(bytes.TrimSpace(value)), 16, 64)
			return err == nil && mask&(1<<(unix.SIGQUIT-1)) != 0
		}
	}
	return false
}

// awaitExits waits for the ends of processes, notes which have ended and counts them.
func awaitExits(clients []*client, until time.Time) (ended int) {
	for {
		var open []unix.PollFd
		for _, c := range clients {
			if !c.exited {
				open = append(open, unix.PollFd{Fd: int32(c.pidfd), Events: unix.POLLIN})
			}
		}
		left := time.Until(until)
		if len(open) == 0 || left <= 0 {
			return ended
		}
		if _, err := unix.Poll(open, int(left.Milliseconds())+1); err != nil && !errors.Is(err, unix.EINTR) {
			return ended
		}
		ended += noteExits(clients, open)
	}
}

func noteExits(clients []*client, polled []unix.PollFd) (ended int) {
	for _, p := range polled {
		for _, c := range clients {
			if int32(c.pidfd) == p.Fd && p.Revents != 0 {
				c.exited = true
				ended++
			}
		}
	}
	return ended
}
