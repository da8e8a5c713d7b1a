// Package leaseguard ends a process that goes on past the end of a lease. A role shreds by itself
// when a lease of its ends (invariant K2); but one that is stopped (SIGSTOP, a debugger, a hung kernel
// call) cannot, and what it was given to keep running, an endpoint's Postgres above all, would go on
// answering. So each role has a guard: a child process, small and locked in memory, with which it shares
// one page. The role writes there when the earliest lease ends of which not all is shredded; past that and
// Allowance the guard kills the role and what has to end with it. SIGKILL needs no help of a stopped process.
//
// The page, a memfd of PageSize bytes; each number is 8 bytes in the machine's order:
//
//	0  deadline   nanoseconds of CLOCK_BOOTTIME, 0: none
//	8  also       a process that has to end with the role, 0: none
//
// The guard looks at the page each 250 ms, and ends with its role. A role whose guard ends starts another;
// if that is not possible the role ends: without a guard it cannot keep what was promised. Who can
// stop the guard too can keep both from acting: that takes the rights of the role's own user.
package leaseguard

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	// Allowance is how long a role may take to shred, from when its ring lets go of a lease (which is up to
	// a second before the lease's end), before it is killed.
	Allowance = 2500 * time.Millisecond
	// PageSize is the size of the shared page, in bytes.
	PageSize = 4096

	lookEvery = 250 * time.Millisecond
)

// page is the shared page.
type page struct{ data []byte }

func mapPage(fd int) (page, error) {
	data, err := unix.Mmap(fd, 0, PageSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	return page{data}, err
}

// word is a number of the page; the mapping is aligned to pages.
func (p page) word(offset int) *atomic.Int64 { return (*atomic.Int64)(unsafe.Pointer(&p.data[offset])) }

func (p page) deadline() *atomic.Int64 { return p.word(0) }
func (p page) also() *atomic.Int64     { return p.word(8) }

// Config says how a guard is run.
type Config struct {
	// Command is the guard's program and arguments: one that calls Run with descriptors 3 and 4.
	Command []string
	// Lost is told that there is no guard and can be none. It must end the process.
	Lost   func(error)
	Stderr io.Writer // nil: nowhere
}

// Guard is a role's side.
type Guard struct {
	cfg  Config
	page page
	mem  *os.File
	self *os.File // pidfd

	mu struct {
		sync.Mutex
		closed bool
		cmd    *exec.Cmd
		slots  map[*Slot]time.Duration // what each published; those that published 0 are absent
	}
	done chan struct{} // closed when no guard runs or will run
}

// Start starts the guard of this process.
func Start(cfg Config) (*Guard, error) {
	g := &Guard{cfg: cfg, done: make(chan struct{})}
	g.mu.slots = make(map[*Slot]time.Duration)
	if err := g.open(); err != nil {
		return nil, fmt.Errorf("starting the guard of this process's leases: %w", errors.Join(err, g.release()))
	}
	if err := g.launch(); err != nil {
		return nil, fmt.Errorf("starting the guard of this process's leases: %w", errors.Join(err, g.release()))
	}
	go g.keep()
	return g, nil
}

func (g *Guard) open() error {
	fd, err := unix.MemfdCreate("holdfast guard", unix.MFD_CLOEXEC)
	if err != nil {
		return err
	}
	g.mem = os.NewFile(uintptr(fd), "the guard's page")
	if err := g.mem.Truncate(PageSize); err != nil {
		return err
	}
	if g.page, err = mapPage(fd); err != nil {
		return err
	}
	self, err := unix.PidfdOpen(os.Getpid(), 0)
	if err != nil {
		return fmt.Errorf("pidfd_open: %w", err)
	}
	g.self = os.NewFile(uintptr(self), "this process")
	return nil
}

func (g *Guard) release() error {
	var errs []error
	for _, f := range []*os.File{g.mem, g.self} {
		if f != nil {
			errs = append(errs, f.Close())
		}
	}
	if g.page.data != nil {
		errs = append(errs, unix.Munmap(g.page.data))
	}
	return errors.Join(errs...)
}

// launch runs the guard's process. In a session of its own it does not get the terminal's signals.
func (g *Guard) launch() error {
	cmd := exec.Command(g.cfg.Command[0], g.cfg.Command[1:]...)
	cmd.Dir, cmd.Env, cmd.Stderr = "/", []string{"GOMAXPROCS=1", "GOGC=off", "GOMEMLIMIT=16MiB"}, g.cfg.Stderr
	cmd.ExtraFiles = []*os.File{g.mem, g.self}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.mu.closed {
		return os.ErrClosed
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	g.mu.cmd = cmd
	return nil
}

// Bounds of starting the guard again: one that ends at once, again and again, is none.
const (
	relaunches    = 5
	relaunchReset = time.Minute
)

// keep starts the guard again when it ended.
func (g *Guard) keep() {
	defer close(g.done)
	for tries := 0; ; tries++ {
		began := time.Now()
		err := g.mu.cmd.Wait() // only keep changes cmd after Start
		if time.Since(began) > relaunchReset {
			tries = 0
		}
		g.mu.Lock()
		closed := g.mu.closed
		g.mu.Unlock()
		if closed {
			return
		}
		if tries >= relaunches {
			g.cfg.Lost(fmt.Errorf("the guard of this process's leases ended %d times: %w", tries+1, err))
			return
		}
		if err := g.launch(); err != nil && !errors.Is(err, os.ErrClosed) {
			g.cfg.Lost(fmt.Errorf("the guard of this process's leases ended, and cannot be started again: %w", err))
			return
		} else if err != nil {
			return
		}
	}
}

// PID is the guard's process.
func (g *Guard) PID() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.mu.cmd.Process.Pid
}

// Close ends the guard: there are no leases any more.
func (g *Guard) Close() error {
	g.mu.Lock()
	if g.mu.closed {
		g.mu.Unlock()
		return nil
	}
	g.mu.closed = true
	_ = g.mu.cmd.Process.Kill() // it may have ended: done tells
	g.mu.Unlock()
	<-g.done
	return g.release()
}

// Slot gives a part of the process, such as one of several key rings, its own say.
func (g *Guard) Slot() *Slot { return &Slot{g} }

// Slot is what one part of the process says.
type Slot struct{ g *Guard }

// Publish tells the earliest end of a lease of this part of which not all is shredded; 0: none.
func (s *Slot) Publish(earliest time.Duration) {
	g := s.g
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.mu.closed {
		return
	}
	if earliest == 0 {
		delete(g.mu.slots, s)
	} else {
		g.mu.slots[s] = earliest
	}
	var first time.Duration
	for _, end := range g.mu.slots {
		if first == 0 || end < first {
			first = end
		}
	}
	g.page.deadline().Store(int64(first))
}

// Also names a process, a child of this one, that has to end with it.
func (s *Slot) Also(pid int) {
	s.g.mu.Lock()
	defer s.g.mu.Unlock()
	if !s.g.mu.closed {
		s.g.page.also().Store(int64(pid))
	}
}
