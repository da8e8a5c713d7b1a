package pgfs

import (
	"os/exec"
	"strings"
	"testing"
)

// A program that inherits the connection keeps a dead agent's mount alive, and hangs in it.
func TestProgramsDoNotInheritTheConnection(t *testing.T) {
	mounted(t, Config{})
	out, err := exec.Command("/bin/sh", "-c", "ls -l /proc/self/fd").CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if strings.Contains(string(out), fuseDevice) {
		t.Errorf("a child has the mount's connection:\n%s", out)
	}
}
