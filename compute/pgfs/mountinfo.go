package pgfs

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// unmount uses the system call, or fusermount for a user who may not.
func unmount(point string, flags int) error {
	err := unix.Unmount(point, flags)
	if !errors.Is(err, unix.EPERM) {
		return err
	}
	args := []string{"-u", point}
	if flags&unix.MNT_DETACH != 0 {
		args = []string{"-u", "-z", point}
	}
	if out, err := exec.Command("fusermount3", args...).CombinedOutput(); err != nil {
		return fmt.Errorf("fusermount3: %w: %s", err, strings.TrimSpace(string(out)))
	}
	return nil
}

func detach(point string) error {
	if err := unmount(point, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) {
		return err
	}
	return nil
}

// mountsAt lists what is mounted on a directory, the topmost last. It does not touch the
// directory: a dead mount would not answer.
func mountsAt(point string) ([]*mountinfo.Info, error) {
	return mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) { return m.Mountpoint != point, false })
}

// detachStale detaches what a killed agent left at the mountpoint.
func detachStale(point string) error {
	mounts, err := mountsAt(filepath.Clean(point))
	if err != nil {
		return err
	}
	for _, m := range mounts {
		if m.Source != fsName || !strings.HasPrefix(m.FSType, "fuse") {
			return fmt.Errorf("a %s file system is mounted there already: unmount it, or choose another directory", m.FSType)
		}
	}
	for range mounts {
		if err := detach(point); err != nil {
			return fmt.Errorf("detaching what a former agent left there: %w", err)
		}
	}
	return nil
}

// abort ends the connection to the kernel: every request, under way or to come, fails.
func abort(point string) error {
	mounts, err := mountsAt(filepath.Clean(point))
	if err != nil {
		return err
	}
	control, done, err := controlDir()
	if err != nil {
		return err
	}
	defer done()
	for _, m := range mounts {
		if m.Source == fsName {
			err = errors.Join(err, os.WriteFile(filepath.Join(control, strconv.Itoa(m.Minor), "abort"), []byte("1"), 0))
		}
	}
	return err
}

// controlDir is where the FUSE control file system is, mounted for the moment if need be.
func controlDir() (dir string, done func(), err error) {
	const usual = "/sys/fs/fuse/connections"
	if entries, err := os.ReadDir(usual); err == nil && len(entries) > 0 {
		return usual, func() {}, nil
	}
	if dir, err = os.MkdirTemp("", "fusectl-"); err != nil {
		return "", nil, err
	}
	if err := unix.Mount("fusectl", dir, "fusectl", 0, ""); err != nil {
		_ = os.Remove(dir)
		return "", nil, fmt.Errorf("mounting the FUSE control file system: %w", err)
	}
	return dir, func() {
		_ = unix.Unmount(dir, unix.MNT_DETACH)
		_ = os.Remove(dir)
	}, nil
}

// writebackShare is how much of what the kernel allows to be dirty the mount may take, in
// percent. FUSE's own default is 1, so that servers that do not keep up cannot fill the
// memory; this one writes to a local file. Who kills Postgres may wait for what was allowed.
const writebackShare = 10

// tuneWriteback lets the kernel delay more writes than FUSE's defaults do. Where that is not
// allowed, as in a container whose /sys is read-only, writers wait sooner.
func tuneWriteback(point string, log *slog.Logger) {
	mounts, err := mountsAt(point)
	if err != nil || len(mounts) == 0 {
		return
	}
	top := mounts[len(mounts)-1]
	limit := filepath.Join("/sys/class/bdi", fmt.Sprintf("%d:%d", top.Major, top.Minor), "max_ratio")
	if err := os.WriteFile(limit, []byte(fmt.Sprint(writebackShare)), 0); err != nil {
		log.Debug("the kernel's limit on delayed writes stays", "error", err)
	}
}
