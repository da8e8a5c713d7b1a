package hardening

import (
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// clobber is the runtime's own setting (package runtime, "clobberfree"): the garbage collector
// overwrites each object that it frees. It is read once, when a program starts.
const clobber = "clobberfree=1"

// ClobberFreed has this program start again, in the same process and with the same arguments, so that
// its garbage collector overwrites what it frees: without it, buffers of network libraries and the
// like keep keys and plaintext until the memory is taken for something else, which may be never. Call
// it before anything else; it returns if that is so already, or if it cannot be done.
func ClobberFreed() error {
	settings := os.Getenv("GODEBUG")
	if strings.Contains(settings, clobber) {
		return nil
	}
	if settings != "" {
		settings += ","
	}
	var env []string
	for _, e := range os.Environ() {
		if !strings.HasPrefix(e, "GODEBUG=") {
			env = append(env, e)
		}
	}
	exe, err := os.Executable()
	if err != nil {
		exe = "/proc/self/exe"
	}
	err = syscall.Exec(exe, os.Args, append(env, "GODEBUG="+settings+clobber))
	return fmt.Errorf("starting again with GODEBUG=%s: %w", clobber, err)
}

// scrubs serves all who wait with one scrub that began after they came.
var scrubs struct {
	sync.Mutex
	begun atomic.Uint64
	ended uint64 // the number of the last one that ended
}

// Scrub removes what is in memory and no longer in use. It is called after keys were wiped and what
// was held under them was dropped, and returns when it is gone: after about three collections
// of the heap. Out of reach is what the program still refers to, dead frames on stacks of
// goroutines that still run, and a part of the stacks of those that ended: no key is kept on a stack.
func Scrub() {
	came := scrubs.begun.Load()
	scrubs.Lock()
	defer scrubs.Unlock()
	if scrubs.ended > came {
		return
	}
	number := scrubs.begun.Add(1)
	scrub()
	scrubs.ended = number
}

func scrub() {
	// A sync.Pool's buffers outlive one collection; the next one frees them.
	runtime.GC()
	overwriteFreeStacks()
	runtime.GC()
	// Pages without any object, freed stacks among them, go back to the system, which it refuses for
	// pages that are locked. With a swap this is a moment in which they might be written there.
	locked := unix.Munlockall() == nil
	debug.FreeOSMemory()
	if locked {
		// As in lockMemory; that it worked there and not here is a limit that was lowered since.
		_ = unix.Mlockall(unix.MCL_CURRENT | unix.MCL_FUTURE | unix.MCL_ONFAULT)
	}
	overwriteSignalFrames()
}

// overwriteSignalFrames sends each thread the signal that Go's scheduler uses and ignores if it has no
// use for it. The kernel saves a thread's registers, such as what was last copied or encrypted, on
// the thread's signal stack, and there they stay until the next signal.
func overwriteSignalFrames() {
	threads, err := os.ReadDir("/proc/self/task")
	if err != nil {
		return
	}
	for _, t := range threads {
		if tid, err := strconv.Atoi(t.Name()); err == nil {
			_ = unix.Tgkill(os.Getpid(), tid, unix.SIGURG) // it may have ended
		}
	}
}

const (
	// stackUsers is how many goroutines use stacks at once: as many pieces of each size that were free
	// are overwritten. Stacks of 32 KiB and more are pages of their own, which FreeOSMemory gives back.
	stackUsers = 256
	// stackGuard is what the runtime keeps free at a stack's end before it makes a larger one (928
	// bytes), and a few frames.
	stackGuard = 1500
)

// overwriteFreeStacks uses, for a moment, the pieces of memory that ended or grown goroutines had as
// their stacks: the runtime keeps them for the next goroutine, and as they were. Most of each is
// overwritten, not what lies between the frames here.
func overwriteFreeStacks() {
	sizes := []int{2 << 10, 4 << 10, 8 << 10, 16 << 10}
	stages := make([]sync.WaitGroup, len(sizes))
	for i := range stages {
		stages[i].Add(stackUsers)
	}
	var all sync.WaitGroup
	for range stackUsers {
		all.Go(func() {
			var top byte
			useStack(&top, sizes, stages)
		})
	}
	all.Wait()
}

// useStack fills frames with zeros and, whenever the stack is of one of the sizes and nearly full,
// waits for the others, which then have pieces of their own. top is in the first frame; when the
// stack moves, it moves along.
//
//go:noinline
func useStack(top *byte, sizes []int, stages []sync.WaitGroup) byte {
	var frame [256]byte
	used := int(uintptr(unsafe.Pointer(top)) - uintptr(unsafe.Pointer(&frame)))
	if used > sizes[0]-stackGuard {
		stages[0].Done()
		stages[0].Wait()
		sizes, stages = sizes[1:], stages[1:]
	}
	if len(sizes) == 0 {
		return frame[used%len(frame)]
	}
	return useStack(top, sizes, stages) + frame[used%len(frame)]
}
