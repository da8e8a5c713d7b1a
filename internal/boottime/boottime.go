// Package boottime is the clock of leases: it never jumps, and unlike the clock inside
// time.Time it goes on while the machine is suspended, so that a laptop or a virtual
// machine that slept past a lease's end finds it ended.
package boottime

import (
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Now is the time since the machine booted, suspension included.
func Now() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		panic("reading CLOCK_BOOTTIME: " + err.Error()) // there since Linux 2.6.39
	}
	return time.Duration(ts.Nano())
}

// coarseFor is for how much running time one reading of the clock serves Coarse.
const coarseFor = time.Millisecond

// started has a monotonic clock, which stands still during suspension; reading it needs no system
// call, which reading the clock that goes on does.
var started = time.Now()

// coarse is the newest reading of both clocks.
var coarse struct{ running, boot atomic.Int64 }

// Coarse is Now for who cannot pay a system call at each use. It is behind by at most what the
// machine slept since a reading that is at most 1 ms of running time old. So who acts on it may do for
// 1 ms, after the machine woke, what was allowed before it slept; as might who asked Now immediately
// before the machine slept.
func Coarse() time.Duration {
	running := int64(time.Since(started))
	// Invariant: boot belongs to this reading of running or to a later one.
	last := coarse.running.Load()
	if boot := coarse.boot.Load(); last != 0 && running-last < int64(coarseFor) {
		return time.Duration(boot + max(running-last, 0))
	}
	now := Now()
	raise(&coarse.boot, int64(now)) // first: see the invariant
	raise(&coarse.running, running)
	return now
}

// raise keeps the greater of two values.
func raise(v *atomic.Int64, to int64) {
	for {
		have := v.Load()
		if have >= to || v.CompareAndSwap(have, to) {
			return
		}
	}
}
