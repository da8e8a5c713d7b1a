package pgfs

import (
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// fuseDevice is what a mount's connection to the kernel is opened as.
const fuseDevice = "/dev/fuse"

// closeDeviceOnExec keeps programs that this process starts from inheriting its connections
// to the kernel: go-fuse opens them without O_CLOEXEC. A connection lives until its last
// descriptor is closed. If Postgres held one, the agent's death would not end it, and a
// backend that waits for an answer could not even be killed: it would wait, for ever, for
// the descriptor that it holds itself.
func closeDeviceOnExec() error {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return fmt.Errorf("looking for the mount's descriptor: %w", err)
	}
	for _, e := range entries {
		if target, err := os.Readlink("/proc/self/fd/" + e.Name()); err != nil || target != fuseDevice {
			continue // the folder's own descriptor is closed by now
		}
		fd, err := strconv.Atoi(e.Name())
		if err != nil {
			return err
		}
		unix.CloseOnExec(fd)
	}
	return nil
}
