// Package boottime is the clock of leases: it never jumps, and unlike the clock inside
// time.Time it goes on while the machine is suspended, so that a laptop or a virtual
// machine that slept past a lease's end finds it ended.
package boottime

import (
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
