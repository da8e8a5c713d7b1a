package manager

import (
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// An endpoint's mounts are one inside the other. A dead outer one lets nobody pass to the
// inner, so the outer goes first.
func TestRemoveDirTakesTheOuterMounts(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	dir := filepath.Join(t.TempDir(), "endpoint")
	outer := filepath.Join(dir, "mnt")
	for _, m := range []string{outer, outer, filepath.Join(outer, "pg_wal"), filepath.Join(outer, "base", "tmp"), filepath.Join(dir, "mnt2")} {
		if err := os.MkdirAll(m, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := syscall.Mount("holdfast-test", m, "tmpfs", 0, "size=64k"); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = syscall.Unmount(m, syscall.MNT_DETACH) })
	}
	found, err := mountsBelow(dir)
	if diff := cmp.Diff([]string{outer, outer, filepath.Join(dir, "mnt2")}, found); err != nil || diff != "" {
		t.Errorf("mounts (-want +got):\n%s%v", diff, err)
	}
	if err := removeDir(dir); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(dir); !os.IsNotExist(err) {
		t.Errorf("the folder is still there: %v", err)
	}
}
