package pgproc

import (
	"bufio"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// isolate gives this thread mounts and System V IPC of its own. Nothing that it mounts or
// unmounts reaches the outside.
func isolate(keep string) error {
	if err := unix.Unshare(unix.CLONE_NEWNS | unix.CLONE_NEWIPC); err != nil {
		return fmt.Errorf("leaving the mount namespace: %w; in a container this needs the capability SYS_ADMIN, as the mount does", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_SLAVE|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("separating the mounts: %w", err)
	}
	if err := unix.Mount("tmpfs", "/dev/shm", "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=1777"); err != nil {
		return fmt.Errorf("mounting a private /dev/shm: %w", err)
	}
	others, err := otherMounts(keep)
	if err != nil {
		return fmt.Errorf("looking for other endpoints' mounts: %w", err)
	}
	for _, m := range others {
		_ = unix.Unmount(m, unix.MNT_DETACH) // it may be gone, by propagation
	}
	return nil
}

// mountSource is what pgfs's mounts say that they are of.
const mountSource = "holdfast"

// otherMounts lists the mounts of ours, as this thread sees them, but for one and those inside it.
func otherMounts(keep string) ([]string, error) {
	file, err := os.Open("/proc/thread-self/mountinfo")
	if err != nil {
		return nil, err
	}
	defer file.Close()
	var others []string
	lines := bufio.NewScanner(file)
	for lines.Scan() {
		before, after, _ := strings.Cut(lines.Text(), " - ")
		left, right := strings.Fields(before), strings.Fields(after)
		if len(left) < 5 || len(right) < 2 || !strings.HasPrefix(right[0], "fuse") || right[1] != mountSource {
			continue
		}
		if point := unescape.Replace(left[4]); point != keep && (keep == "" || !strings.HasPrefix(point, keep+"/")) {
			others = append(others, point)
		}
	}
	return others, lines.Err()
}

// unescape undoes what the kernel does to names in mountinfo.
var unescape = strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)
