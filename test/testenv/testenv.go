// Package testenv says what a test needs of the machine. Where it is missing the test is
// skipped with the reason, or, with HOLDFAST_REQUIRE=1 (`make test`), fails.
package testenv

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/holdfastdb/holdfast/test/pgtools"
	"github.com/holdfastdb/holdfast/test/proc"
)

func missing(t testing.TB, format string, args ...any) {
	t.Helper()
	if os.Getenv("HOLDFAST_REQUIRE") != "" {
		t.Fatalf("missing: "+format, args...)
	}
	t.Skipf("missing: "+format, args...)
}

// NeedPostgres needs the programs of stock PostgreSQL 15.
func NeedPostgres(t testing.TB) {
	t.Helper()
	if _, err := pgtools.Dir(); err != nil {
		missing(t, "%v", err)
	}
}

// NeedFUSE needs a kernel that mounts.
func NeedFUSE(t testing.TB) {
	t.Helper()
	f, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	if err != nil {
		missing(t, "%v: `modprobe fuse`, or in a container: --device /dev/fuse --cap-add SYS_ADMIN --security-opt apparmor=unconfined", err)
		return
	}
	f.Close()
}

// NeedRoot needs the right to mount small file systems.
func NeedRoot(t testing.TB) {
	t.Helper()
	if os.Getuid() != 0 {
		missing(t, "root, to mount file systems that are full")
	}
}

// TempDir is a folder on disk for servers that run as other users. It is removed with the
// test, and what is still mounted in it; a failed test's folder stays if HOLDFAST_KEEP is set.
func TempDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp(os.Getenv("HOLDFAST_TMP"), "hf-")
	if err != nil {
		t.Fatal(err)
	}
	if dir, err = filepath.EvalSymlinks(dir); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o711); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() && os.Getenv("HOLDFAST_KEEP") != "" {
			t.Logf("kept: %s", dir)
			return
		}
		if err := proc.RemoveAll(dir); err != nil {
			t.Errorf("removing %s: %v", dir, err)
		}
	})
	return dir
}

// GoBuild builds a program that a tools module pins, downloading what it is made of if need be.
func GoBuild(t testing.TB, module, program string) (binary string) {
	t.Helper()
	binary = filepath.Join(t.TempDir(), filepath.Base(program))
	cmd := exec.CommandContext(t.Context(), "go", "build", "-o", binary, program)
	cmd.Dir = module
	t.Logf("building %s as %s/go.mod pins it; it is downloaded if it is not there", program, module)
	if out, err := cmd.CombinedOutput(); err != nil {
		missing(t, "%s, which could not be built: %v\n%s", program, err, out)
	}
	return binary
}

// NeedSoftHSM needs SoftHSM 2, and gives its PKCS#11 library.
func NeedSoftHSM(t testing.TB) (module string) {
	t.Helper()
	_, err := exec.LookPath("softhsm2-util")
	for _, pattern := range []string{"/usr/lib/softhsm/libsofthsm2.so", "/usr/lib/*/softhsm/libsofthsm2.so", "/usr/lib*/pkcs11/libsofthsm2.so"} {
		if found, _ := filepath.Glob(pattern); err == nil && len(found) > 0 {
			return found[0]
		}
	}
	missing(t, "SoftHSM 2 (Debian's package softhsm2)")
	return ""
}
