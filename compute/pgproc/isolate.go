package pgproc

import (
	"fmt"
	"strings"

	"github.com/moby/sys/mountinfo"
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
func otherMounts(keep string) (others []string, err error) {
	list, err := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) {
		ours := m.Source == mountSource && strings.HasPrefix(m.FSType, "fuse")
		kept := keep != "" && (m.Mountpoint == keep || strings.HasPrefix(m.Mountpoint, keep+"/"))
		return !ours || kept, false
	})
	for _, m := range list {
		others = append(others, m.Mountpoint)
	}
	return others, err
}
