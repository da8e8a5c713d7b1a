package manager

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/moby/sys/mountinfo"
)

// removeDir deletes an endpoint's local folder after its agent's end. An agent that was
// killed leaves its mount behind, dead: that goes first.
func removeDir(dir string) error {
	resolved, err := filepath.EvalSymlinks(dir) // as the kernel calls mounts there
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	var mounts []string
	if err == nil {
		mounts, err = mountsBelow(resolved)
	}
	if err != nil {
		return err
	}
	for _, m := range mounts {
		if err := syscall.Unmount(m, syscall.MNT_DETACH); err == nil {
			continue
		}
		// Users other than root unmount through FUSE's own helper.
		if out, err := exec.Command("fusermount3", "-u", "-z", m).CombinedOutput(); err != nil {
			return fmt.Errorf("unmounting %s, left behind by a killed endpoint: %w: %s", m, err, strings.TrimSpace(string(out)))
		}
	}
	return os.RemoveAll(dir)
}

// mountsBelow lists the mount points in dir, without those inside another: the outer takes
// them along, and has to go first, since a dead mount does not let anybody pass.
func mountsBelow(dir string) ([]string, error) {
	list, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir))
	if err != nil {
		return nil, fmt.Errorf("listing mounts: %w", err)
	}
	var found []string
	for _, m := range list {
		if !slices.ContainsFunc(found, func(outer string) bool { return strings.HasPrefix(m.Mountpoint, outer+"/") }) {
			found = append(found, m.Mountpoint)
		}
	}
	return found, nil
}
