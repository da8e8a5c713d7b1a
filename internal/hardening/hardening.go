// Package hardening keeps what a process holds in plaintext, keys above all, out of files
// that the kernel could write its memory to (invariant K1).
package hardening

import (
	"bufio"
	"crypto/fips140"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

const coreLimit = 1 // byte; see Process

// Process hardens this process, for all of its threads and for good. Every role calls it
// before it holds a key. It returns what could not be done, each with its consequence and
// what to do; the process goes on.
//
//   - PR_SET_DUMPABLE 0: no core file, in whatever way; and other processes of the same user may
//     not read this one's memory (/proc/PID/mem, ptrace).
//   - RLIMIT_CORE 1: no core file of the children either, which the first does not reach: it
//     ends at exec, the limit does not. 1 byte is too little for a file, and the one limit that a
//     core_pattern's program heeds (core(5)).
//   - mlockall(MCL_CURRENT|MCL_FUTURE|MCL_ONFAULT): pages that are in use, and those to come,
//     are never swapped. It covers the whole heap, as expanded AES schedules, plaintext pages and
//     buffers of network libraries are all over it; ONFAULT, since Go reserves far more addresses
//     than it uses. The price: Go returns no memory to the system any more. Children
//     do not inherit it, so Postgres's memory may be swapped where the machine swaps: Process
//     says so.
//
// `holdfast up` is one process with a child for each endpoint; each agent calls Process
// itself.
func Process() (warnings []string) {
	warn := func(format string, args ...any) { warnings = append(warnings, fmt.Sprintf(format, args...)) }
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		warn("this process's memory can be read by other processes of its user (PR_SET_DUMPABLE: %v): run it as a user of its own", err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{Cur: coreLimit, Max: coreLimit}); err != nil {
		warn("a crash may write a core file (RLIMIT_CORE: %v): set a limit of 1 byte where the process is started", err)
	}
	if err := lockMemory(); err != nil {
		warn("keys may be written to swap, since memory could not be locked (%v): give the process CAP_IPC_LOCK or an unlimited RLIMIT_MEMLOCK (systemd: LimitMEMLOCK=infinity; docker: --ulimit memlock=-1), or turn swap off", err)
	}
	if swaps := activeSwaps("/proc/swaps"); len(swaps) > 0 {
		warn("the machine swaps to %s: pages that Postgres holds may be written there; turn swap off or encrypt it with a key made at boot", strings.Join(swaps, ", "))
	}
	return warnings
}

// Apply calls Process and logs what could not be done, and in which mode cryptography works.
func Apply(log *slog.Logger) {
	if fips140.Enabled() {
		log.Info("cryptography is in FIPS 140-3 mode", "fips140", "on", "module", fips140.Version())
	}
	for _, w := range Process() {
		log.Warn("hardening is incomplete: " + w)
	}
}

// lockMemory locks all memory, if there is no limit to how much: under a limit a later
// allocation would fail, and the process with it.
func lockMemory() error {
	unlimited := &unix.Rlimit{Cur: unix.RLIM_INFINITY, Max: unix.RLIM_INFINITY}
	if err := unix.Setrlimit(unix.RLIMIT_MEMLOCK, unlimited); err != nil {
		var have unix.Rlimit
		if err := unix.Getrlimit(unix.RLIMIT_MEMLOCK, &have); err != nil {
			return err
		}
		mayLock, err := hasCapability(unix.CAP_IPC_LOCK)
		if err != nil {
			return err
		}
		if have.Cur != unix.RLIM_INFINITY && !mayLock {
			return fmt.Errorf("RLIMIT_MEMLOCK is %d bytes", have.Cur)
		}
	}
	if err := unix.Mlockall(unix.MCL_CURRENT | unix.MCL_FUTURE | unix.MCL_ONFAULT); err != nil {
		return fmt.Errorf("mlockall: %w", err)
	}
	return nil
}

func hasCapability(capability uint) (bool, error) {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return false, fmt.Errorf("reading capabilities: %w", err)
	}
	return data[capability/32].Effective&(1<<(capability%32)) != 0, nil
}

// activeSwaps names the swap areas on disks; compressed memory (zram) is none.
func activeSwaps(file string) []string {
	f, err := os.Open(file)
	if errors.Is(err, os.ErrNotExist) {
		return nil // a kernel without swap
	}
	if err != nil {
		return []string{"places unknown (" + err.Error() + ")"}
	}
	defer f.Close()
	return parseSwaps(f)
}

func parseSwaps(r io.Reader) []string {
	var swaps []string
	lines := bufio.NewScanner(r)
	lines.Scan() // headings
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) > 0 && !strings.HasPrefix(fields[0], "/dev/zram") {
			swaps = append(swaps, fields[0])
		}
	}
	return swaps
}
