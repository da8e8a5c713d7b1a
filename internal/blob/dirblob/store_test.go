package dirblob

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/holdfastdb/holdfast/internal/blob"
	"github.com/holdfastdb/holdfast/internal/blob/blobtest"
)

func open(t *testing.T, dir string) *Store {
	t.Helper()
	s, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestConformance(t *testing.T) {
	blobtest.Run(t, func(t *testing.T) blob.Store { return open(t, t.TempDir()) })
}

func TestConformanceBehindAFaultyThatDoesNotFail(t *testing.T) {
	blobtest.Run(t, func(t *testing.T) blob.Store { return blobtest.NewFaulty(open(t, t.TempDir()), nil) })
}

func TestFaultyFailsInBothWays(t *testing.T) {
	f := blobtest.NewFaulty(open(t, t.TempDir()), nil)
	f.FailNext(blobtest.OpCreate, "a", blobtest.Lost)
	f.FailNext(blobtest.OpCreate, "b", blobtest.Unreported)
	for key, want := range map[string]error{"a": blob.ErrNotFound, "b": nil} {
		if _, err := f.Create(t.Context(), key, strings.NewReader("x"), 1); !errors.Is(err, blobtest.ErrInjected) {
			t.Errorf("Create(%s): %v", key, err)
		}
		if _, err := f.Head(t.Context(), key); !errors.Is(err, want) {
			t.Errorf("Head(%s): %v, want %v", key, err, want)
		}
	}
}

func TestOpenRemovesWhatCrashedWritersLeft(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	blobtest.Put(t, s, "k", "kept")
	// A writer that is alive holds its lock, one that crashed does not.
	alive, err := s.writeTemp(t.Context(), "alive", strings.NewReader("x"), 1)
	if err != nil {
		t.Fatal(err)
	}
	defer alive.discard()
	dead := filepath.Join(dir, "tmp", "dead")
	if err := os.WriteFile(dead, []byte("half"), 0o600); err != nil {
		t.Fatal(err)
	}
	s = open(t, dir)
	if _, err := os.Stat(dead); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the crashed writer's file is still there: %v", err)
	}
	if _, err := os.Stat(alive.Name()); err != nil {
		t.Errorf("the living writer's file was removed: %v", err)
	}
	if got, _, err := s.Get(t.Context(), "k"); err != nil || string(got) != "kept" {
		t.Errorf("Get = %q, %v", got, err)
	}
}

func TestNothingStaysInTmp(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	etag := blobtest.Put(t, s, "k", "1")
	_, _ = s.Create(t.Context(), "k", strings.NewReader("2"), 1)
	_, _ = s.Create(t.Context(), "short", strings.NewReader("2"), 9)
	_, _ = s.Swap(t.Context(), "k", []byte("2"), etag)
	_, _ = s.Swap(t.Context(), "k", []byte("3"), etag)
	if left, err := os.ReadDir(filepath.Join(dir, "tmp")); err != nil || len(left) != 0 {
		t.Errorf("tmp holds %v, %v", left, err)
	}
}

func TestForeignDirectoryIsRefused(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, formatName), []byte("holdfast directory bucket 9\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(dir); err == nil || !strings.Contains(err.Error(), "bucket 9") {
		t.Errorf("Open: %v", err)
	}
}

func TestDamagedObjectIsNamed(t *testing.T) {
	s := open(t, t.TempDir())
	for _, tc := range []struct {
		key    string
		damage func(path string) error
	}{
		{"cut", func(p string) error { return os.Truncate(p, 20) }},
		{"empty", func(p string) error { return os.Truncate(p, 0) }},
	} {
		blobtest.Put(t, s, tc.key, "some content")
		if err := tc.damage(s.path(tc.key)); err != nil {
			t.Fatal(err)
		}
		if _, _, err := s.Get(t.Context(), tc.key); err == nil || !strings.Contains(err.Error(), "damaged") || !strings.Contains(err.Error(), tc.key) {
			t.Errorf("Get(%s): %v, want an error that says it is damaged", tc.key, err)
		}
	}
}

func TestKeyInTheWayOfAnother(t *testing.T) {
	s := open(t, t.TempDir())
	blobtest.Put(t, s, "a/b", "x")
	blobtest.Put(t, s, "c", "x")
	for _, key := range []string{"a", "c/d", "c/d/e"} {
		if _, err := s.Create(t.Context(), key, strings.NewReader("y"), 1); err == nil || errors.Is(err, blob.ErrExists) {
			t.Errorf("Create(%s): %v, want an error that is not ErrExists", key, err)
		}
	}
	if err := s.Delete(t.Context(), "a"); err != nil {
		t.Errorf("Delete of a folder's name: %v", err)
	}
}

// TestFullDisk runs with a limit on the size of files, which the kernel answers as it does a
// full disk: with a failing write in the middle.
func TestFullDisk(t *testing.T) {
	if os.Getenv("DIRBLOB_TEST_FULL") == "" {
		cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestFullDisk$", "-test.v")
		cmd.Env = append(os.Environ(), "DIRBLOB_TEST_FULL=1")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		return
	}
	dir := t.TempDir()
	s := open(t, dir)
	etag := blobtest.Put(t, s, "doc", "old")
	if err := syscall.Setrlimit(syscall.RLIMIT_FSIZE, &syscall.Rlimit{Cur: 64 << 10, Max: 64 << 10}); err != nil {
		t.Fatal(err)
	}
	big := strings.Repeat("x", 1<<20)
	if _, err := s.Create(t.Context(), "big", strings.NewReader(big), int64(len(big))); err == nil || !strings.Contains(err.Error(), "object big") {
		t.Errorf("Create: %v", err)
	}
	if _, err := s.Swap(t.Context(), "doc", []byte(big), etag); err == nil {
		t.Error("Swap succeeded")
	}
	if left, err := os.ReadDir(filepath.Join(dir, "tmp")); err != nil || len(left) != 0 {
		t.Errorf("tmp holds %v, %v", left, err)
	}
	if got, now, err := s.Get(t.Context(), "doc"); err != nil || string(got) != "old" || now != etag {
		t.Errorf("Get = %q, %v", got, err)
	}
}

// TestProcessesDoNotLoseSwaps counts up one document from several processes.
func TestProcessesDoNotLoseSwaps(t *testing.T) {
	const processes, each = 3, 8
	if dir := os.Getenv("DIRBLOB_TEST_DIR"); dir != "" {
		s := open(t, dir)
		for n := 0; n < each; {
			data, etag, err := s.Get(t.Context(), "doc")
			if err != nil {
				t.Fatal(err)
			}
			_, err = s.Swap(t.Context(), "doc", append(data, 'x'), etag)
			if err == nil {
				n++
			} else if !errors.Is(err, blob.ErrPrecondition) {
				t.Fatal(err)
			}
		}
		return
	}
	dir := t.TempDir()
	s := open(t, dir)
	blobtest.Put(t, s, "doc", "")
	var wg sync.WaitGroup
	for range processes {
		wg.Go(func() {
			cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestProcessesDoNotLoseSwaps$")
			cmd.Env = append(os.Environ(), "DIRBLOB_TEST_DIR="+dir)
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Errorf("%v\n%s", err, out)
			}
		})
	}
	wg.Wait()
	if got, _, err := s.Get(t.Context(), "doc"); err != nil || len(got) != processes*each {
		t.Errorf("the document counts %d, %v; want %d", len(got), err, processes*each)
	}
}

func TestLockWaitIsBounded(t *testing.T) {
	s := open(t, t.TempDir())
	etag := blobtest.Put(t, s, "k", "x")
	unlock, err := s.lock(t.Context(), shareOf("k"), syscall.LOCK_EX)
	if err != nil {
		t.Fatal(err)
	}
	defer unlock()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() {
		_, err := s.Swap(ctx, "k", []byte("y"), etag)
		done <- err
	}()
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("Swap behind a held lock: %v", err)
	}
}

func BenchmarkGetRange(b *testing.B) {
	s, err := Open(b.TempDir())
	if err != nil {
		b.Fatal(err)
	}
	const size = 4 << 20
	if _, err := s.Create(b.Context(), "k", strings.NewReader(strings.Repeat("x", size)), size); err != nil {
		b.Fatal(err)
	}
	p := make([]byte, 16<<10)
	b.SetBytes(int64(len(p)))
	for i := 0; b.Loop(); i++ {
		if _, err := s.GetRange(b.Context(), "k", p, int64(i%200)<<14); err != nil {
			b.Fatal(fmt.Errorf("at %d: %w", i, err))
		}
	}
}
