// Package scrub removes what the heap holds of objects that are gone. Plaintext passes through memory
// that nobody can name: messages and buffers of gRPC, copies that a decompressor or an append left behind.
// Go does not clear an object when it frees it, so it would stay, readable in /proc/PID/mem or by a bug,
// until the place is used again.
//
// A process that called Require has the collector overwrite each object that it frees (the runtime's
// setting clobberfree, about 0.2 s of processor time for each GiB of garbage). Free then collects what is
// garbage now, and gives the memory back: with MADV_DONTNEED or, where the kernel refuses that since the memory
// is locked (internal/hardening), by mapping fresh pages in its place, as the runtime does by itself.
//
// Overwriting free places through the allocator, without the setting, was tried: it leaves what is
// in the rests of spans, one in some thousand objects.
//
// Not reached: objects that live, so whoever holds plaintext clears or drops it before; and the dead
// parts of goroutines' stacks.
package scrub

import (
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"strings"
	"sync"
	"syscall"
)

const (
	variable = "GODEBUG"
	setting  = "clobberfree=1"
)

// Require begins the program anew, in this process, with the setting, unless it has it. The runtime
// reads it at its start only. It is called before anything else is done.
func Require() error {
	have := os.Getenv(variable)
	if strings.Contains(have, setting) {
		return nil
	}
	exe, err := os.Executable()
	if err != nil {
		return fmt.Errorf("beginning anew with %s=%s: %w", variable, setting, err)
	}
	if err := os.Setenv(variable, strings.TrimPrefix(have+","+setting, ",")); err != nil {
		return err
	}
	return fmt.Errorf("beginning anew with %s=%s: %w", variable, setting, syscall.Exec(exe, os.Args, os.Environ()))
}

// round serves all who ask before it begins.
type round struct{ done chan struct{} }

var (
	working sync.Mutex // held by the round that works
	state   struct {
		sync.Mutex
		next *round // has not begun; nil: none was asked for
	}
)

// Free overwrites all that is garbage now. It collects garbage, which takes processor time by the
// size of the heap, beside what else runs. Calls at the same time share one round.
func Free() {
	state.Lock()
	r := state.next
	if r == nil {
		r = &round{make(chan struct{})}
		state.next = r
		go r.run()
	}
	state.Unlock()
	<-r.done
}

func (r *round) run() {
	working.Lock()
	defer working.Unlock()
	state.Lock()
	state.next = nil // who comes from here on may have garbage that this round misses
	state.Unlock()
	// What sync.Pools hold goes with the second collection, what finalizers hold with the third.
	runtime.GC()
	runtime.GC()
	debug.FreeOSMemory() // collects, too
	close(r.done)
}
