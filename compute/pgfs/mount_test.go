package pgfs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/holdfastdb/holdfast/internal/pg"
)

const segment = "000000010000000000000003"

func openFile(t testing.TB, path string) int {
	t.Helper()
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CREAT, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(fd) })
	return fd
}

func walMount(t testing.TB, wal *fakeWAL) (*FS, string) {
	t.Helper()
	fs := mounted(t, Config{WAL: wal})
	return fs, filepath.Join(fs.cfg.Mountpoint, "pg_wal")
}

func TestWALIsPassedOn(t *testing.T) {
	wal := &fakeWAL{}
	fs, dir := walMount(t, wal)
	page := bytes.Repeat([]byte{1}, 8192)
	write := func(fd int, off int64) {
		t.Helper()
		if _, err := unix.Pwrite(fd, page, off); err != nil {
			t.Fatal(err)
		}
	}
	// Prepared under another name, as Postgres does: no WAL yet.
	temp := openFile(t, dir+"/xlogtemp.77")
	write(temp, pg.WALSegmentSize-8192)
	if err := unix.Rename(dir+"/xlogtemp.77", dir+"/"+segment); err != nil {
		t.Fatal(err)
	}
	write(temp, 8192) // the same descriptor
	// A second name, and the first one taken away (durable_rename_excl).
	other := openFile(t, dir+"/xlogtemp.78")
	if err := unix.Link(dir+"/xlogtemp.78", dir+"/000000010000000000000004"); err != nil {
		t.Fatal(err)
	}
	if err := unix.Unlink(dir + "/xlogtemp.78"); err != nil {
		t.Fatal(err)
	}
	write(other, 0)
	// Neither another timeline nor another folder is WAL, nor what the agent writes.
	write(openFile(t, dir+"/000000020000000000000004"), 0)
	write(openFile(t, filepath.Dir(dir)+"/"+segment), 0)
	if err := fs.WriteFile("pg_wal/000000010000000000000009", page); err != nil {
		t.Fatal(err)
	}
	// A segment that lost its name takes no WAL any more.
	if err := unix.Unlink(dir + "/" + segment); err != nil {
		t.Fatal(err)
	}
	write(temp, 0)
	want := []string{"0/3002000+8192", "0/4000000+8192"}
	if diff := cmp.Diff(want, wal.writes); diff != "" {
		t.Errorf("WAL passed on (-want +got):\n%s", diff)
	}
}

func TestWALErrorsReachPostgres(t *testing.T) {
	wal := &fakeWAL{writeErr: errors.New("fenced"), sync: func(context.Context) error { return errors.New("fenced") }}
	_, dir := walMount(t, wal)
	fd := openFile(t, dir+"/"+segment)
	if _, err := unix.Pwrite(fd, make([]byte, 8192), 0); err != unix.EIO {
		t.Errorf("write: %v, want EIO", err)
	}
	if err := unix.Fdatasync(fd); err != unix.EIO {
		t.Errorf("fdatasync: %v, want EIO", err)
	}
	if err := unix.Fsync(openFile(t, filepath.Dir(dir)+"/other")); err != nil {
		t.Errorf("fsync of another file: %v", err)
	}
}

// blocked is a WAL whose quorum is lost until release is called.
func blocked() (wal *fakeWAL, waiting chan struct{}, release func()) {
	free := make(chan struct{})
	waiting = make(chan struct{}, 8)
	wal = &fakeWAL{sync: func(ctx context.Context) error {
		waiting <- struct{}{}
		select {
		case <-free:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}}
	return wal, waiting, func() { close(free) }
}

// A process that waits for the quorum can be killed.
func TestKilledWhileItWaits(t *testing.T) {
	wal, waiting, _ := blocked()
	_, dir := walMount(t, wal)
	openFile(t, dir+"/"+segment)
	cmd := exec.Command("sync", "-d", dir+"/"+segment)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	<-waiting
	_ = cmd.Process.Signal(syscall.SIGSTOP) // a first signal, which must not end the wait
	_ = cmd.Process.Signal(syscall.SIGCONT)
	_ = cmd.Process.Kill()
	ended := make(chan error)
	go func() { ended <- cmd.Wait() }()
	select {
	case <-ended:
	case <-time.After(20 * time.Second):
		t.Error("a killed process still waits")
	}
}

// Other signals do not make an fsync fail: Postgres would panic.
func TestSignalsDoNotInterrupt(t *testing.T) {
	wal, waiting, release := blocked()
	_, dir := walMount(t, wal)
	fd := openFile(t, dir+"/"+segment)
	result, thread := make(chan error), make(chan int, 1)
	go func() {
		runtime.LockOSThread()
		thread <- unix.Gettid()
		result <- unix.Fdatasync(fd)
	}()
	<-waiting
	tid := <-thread
	for range 5 {
		if err := unix.Tgkill(os.Getpid(), tid, unix.SIGURG); err != nil {
			t.Fatal(err)
		}
		time.Sleep(dyingPoll / 2)
	}
	select {
	case err := <-result:
		t.Fatalf("a signal ended the wait: %v", err)
	default:
	}
	release()
	if err := <-result; err != nil {
		t.Errorf("fdatasync: %v", err)
	}
}

// Unmount ends though a process waits in the mount, and that process gets an error.
func TestUnmountWhileInUse(t *testing.T) {
	wal, waiting, _ := blocked()
	fs, dir := walMount(t, wal)
	fd, err := unix.Open(dir+"/"+segment, unix.O_RDWR|unix.O_CREAT, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	result := make(chan error)
	go func() { result <- unix.Fdatasync(fd) }()
	<-waiting
	unmounted := make(chan error)
	go func() { unmounted <- fs.Unmount() }()
	if err := <-result; err == nil {
		t.Error("an fsync was reported as done that was not")
	}
	if err := <-unmounted; err != nil {
		t.Error(err)
	}
	_ = unix.Close(fd)
	<-fs.Done()
	if err := fs.Unmount(); err != nil {
		t.Error(err)
	}
}

const helperMount = "HOLDFAST_TEST_MOUNT"

// TestHelperAgent is not a test: it is the agent that TestStaleMount kills.
func TestHelperAgent(t *testing.T) {
	point := os.Getenv(helperMount)
	if point == "" {
		return
	}
	fs := mounted(t, Config{Mountpoint: point})
	child := exec.Command("sleep", "1000")
	file, err := os.Create(filepath.Join(fs.cfg.Mountpoint, "open"))
	if err != nil {
		t.Fatal(err)
	}
	child.Stdin = file // an exit closes it, which the kernel tells the mount
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	if err := file.Close(); err != nil { // at the agent's own end it would wait for itself
		t.Fatal(err)
	}
	fmt.Printf("ready %d\n", child.Process.Pid)
	select {}
}

// A killed agent leaves a dead mount; the next one detaches it.
func TestStaleMount(t *testing.T) {
	needMount(t)
	point := filepath.Join(openDir(t), "mnt")
	cmd := exec.Command(os.Args[0], "-test.run=^TestHelperAgent$")
	cmd.Env = append(os.Environ(), helperMount+"="+point, "TMPDIR="+t.TempDir()) // which it cannot remove
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var child int
	if _, err := fmt.Fscanf(out, "ready %d\n", &child); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	// The child outlives the agent; it can be killed, though it has a file of the mount open.
	if err := unix.Kill(child, unix.SIGKILL); err != nil {
		t.Error(err)
	}
	eventually(t, "the agent's child is gone", func() bool {
		status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", child))
		return err != nil || bytes.Contains(status, []byte("State:\tZ"))
	})
	if err := unix.Access(point, unix.F_OK); err != unix.ENOTCONN {
		t.Fatalf("the dead mount answers %v, want ENOTCONN", err)
	}
	fs := mounted(t, Config{Mountpoint: point})
	if err := unix.Mkdir(point+"/x", 0o700); err != nil {
		t.Error(err)
	}
	if err := fs.Unmount(); err != nil {
		t.Error(err)
	}
	if left, err := mountsAt(point); err != nil || len(left) > 0 {
		t.Errorf("mounts left: %v, %v", left, err)
	}
}

func TestForeignMountIsLeftAlone(t *testing.T) {
	needMount(t)
	point := openDir(t)
	if err := unix.Mount("tmpfs", point, "tmpfs", 0, "size=64k"); err != nil {
		t.Skip(err)
	}
	defer func() { _ = unix.Unmount(point, unix.MNT_DETACH) }()
	fs := newFS(t, Config{Mountpoint: point})
	if err := fs.Mount(); err == nil || !strings.Contains(err.Error(), "tmpfs") {
		t.Errorf("mounting over another file system: %v", err)
	}
}

// What the agent writes while the mount is in use is seen through the kernel's cache.
func TestAgentWritesAreSeen(t *testing.T) {
	fs := mounted(t, Config{})
	path := filepath.Join(fs.cfg.Mountpoint, "conf", "a")
	if err := unix.Access(path, unix.F_OK); err != unix.ENOENT {
		t.Fatal(err)
	}
	if err := fs.MkdirAll("conf"); err != nil {
		t.Fatal(err)
	}
	for _, content := range []string{"first", "the second one", "3"} {
		if err := fs.WriteFile("conf/a", []byte(content)); err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(path); err != nil || string(got) != content {
			t.Errorf("the file holds %q (%v), want %q", got, err, content)
		}
	}
	if err := os.WriteFile(path, []byte("by Postgres"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got, err := fs.ReadFile("conf/a"); err != nil || string(got) != "by Postgres" {
		t.Errorf("the agent reads %q, %v", got, err)
	}
}

// Names that come and go while a directory is listed: the others show exactly once.
func TestListingABigDirectory(t *testing.T) {
	fs := mounted(t, Config{})
	dir := fs.cfg.Mountpoint + "/d"
	if err := unix.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	name := func(i int) string {
		return strings.Repeat("n", 40) + string(rune('a'+i%26)) + string(rune('a'+i/26%26)) + string(rune('a'+i/676))
	}
	const files = 3000
	for i := range files {
		if err := fs.WriteFile("d/"+name(i), nil); err != nil {
			t.Fatal(err)
		}
	}
	file, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	seen := map[string]int{}
	for i := 0; ; i++ {
		names, err := file.Readdirnames(100)
		for _, n := range names {
			seen[n]++
		}
		if err != nil {
			break
		}
		if i*3 < files { // every third goes
			_ = unix.Unlink(dir + "/" + name(i*3))
		}
	}
	for i := range files {
		if i%3 != 0 && seen[name(i)] != 1 {
			t.Fatalf("%s was listed %d times", name(i), seen[name(i)])
		}
	}
}
