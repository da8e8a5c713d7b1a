package pgfs

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"testing"
)

// Past the lease's end the mount gives nothing of what it holds, whatever else still works.
func TestNothingIsReadPastTheLeasesEnd(t *testing.T) {
	var over atomic.Bool
	fs := mounted(t, Config{Live: func() error {
		if over.Load() {
			return errors.New("the lease ran out")
		}
		return nil
	}})
	content := bytes.Repeat([]byte("secret"), 5000)
	if err := fs.WriteFile("x", content); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(fs.cfg.Mountpoint, "x")
	if err := fs.WriteFile("y", content); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(file); err != nil || !bytes.Equal(got, content) {
		t.Fatalf("while the lease lives: %d bytes, %v", len(got), err)
	}
	over.Store(true)
	// y, since what the kernel has of x is its own until the mount goes.
	if got, err := os.ReadFile(filepath.Join(fs.cfg.Mountpoint, "y")); !errors.Is(err, syscall.EIO) || len(got) != 0 {
		t.Errorf("past the lease's end: %d bytes, %v; want an input/output error", len(got), err)
	}
}
