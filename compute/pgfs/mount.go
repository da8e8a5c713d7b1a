package pgfs

import (
	"bufio"
	"errors"
	"fmt"
	"log"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

const (
	fsName     = "holdfast"
	fuseDevice = "/dev/fuse"
	maxWrite   = 1 << 20
	// unmountWait bounds each of Unmount's two tries: in order, and by force.
	unmountWait = 2 * time.Second
)

type mountState struct {
	sync.Mutex
	server atomic.Pointer[fuse.Server]
	done   chan struct{}
	ended  bool // Unmount was called
}

// Mount mounts the file system and serves it until Unmount. A mount that a killed agent left
// at the mountpoint is detached first; anything else there is an error.
func (fs *FS) Mount() error {
	m := &fs.mount
	m.Lock()
	defer m.Unlock()
	if m.ended || m.server.Load() != nil {
		return errors.New("mounting: this file system was mounted before")
	}
	point := fs.cfg.Mountpoint
	if point == "" {
		return errors.New("mounting: no mountpoint was given")
	}
	if err := detachStale(point); err != nil {
		return fmt.Errorf("mounting on %s: %w", point, err)
	}
	if err := os.MkdirAll(point, 0o700); err != nil {
		return fmt.Errorf("mounting: %w", err)
	}
	server, err := fs.connect(point)
	if err != nil {
		return fmt.Errorf("mounting on %s: %w; is /dev/fuse there, and may this process mount (root, or CAP_SYS_ADMIN in a container)?", point, err)
	}
	m.server.Store(server)
	go func() {
		server.Serve()
		fs.stop()
		close(m.done)
	}()
	if err := server.WaitMount(); err != nil {
		_ = detach(point)
		return fmt.Errorf("mounting on %s: %w", point, err)
	}
	return nil
}

// connect mounts and answers the kernel's greeting. As root it mounts itself: the FUSE
// library's own way leaves /dev/fuse open in every child process. A Postgres that holds it
// keeps the connection alive when the agent dies, and waits for itself for ever.
func (fs *FS) connect(point string) (*fuse.Server, error) {
	if os.Geteuid() != 0 {
		return fuse.NewServer(fs, point, fs.mountOptions())
	}
	fd, err := unix.Open(fuseDevice, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("opening %s: %w", fuseDevice, err)
	}
	// allow_other: Postgres runs as another user.
	options := fmt.Sprintf("fd=%d,rootmode=%o,user_id=0,group_id=0,allow_other,default_permissions,max_read=%d", fd, unix.S_IFDIR, maxWrite)
	if err := unix.Mount(fsName, point, "fuse."+fsName, unix.MS_NOSUID|unix.MS_NODEV, options); err != nil {
		_ = unix.Close(fd)
		return nil, err
	}
	server, err := fuse.NewServer(fs, fmt.Sprintf("/dev/fd/%d", fd), fs.mountOptions()) // takes fd
	if err != nil {
		_ = detach(point)
		return nil, err
	}
	return server, nil
}

func (fs *FS) mountOptions() *fuse.MountOptions {
	return &fuse.MountOptions{
		FsName: fsName, Name: fsName,
		Options:       []string{"default_permissions"},
		MaxWrite:      maxWrite,
		MaxReadAhead:  maxWrite,
		MaxBackground: 128, // kernel read-ahead and posix_fadvise are our prefetch
		// One round trip less for every write.
		DisableXAttrs:            true,
		ExplicitDataCacheControl: true,
		DisableReadDirPlus:       true,
		DisableSplice:            true, // replies are in memory
		Logger:                   log.New(logWriter{fs.cfg.Log}, "", 0),
	}
}

// logWriter gives the FUSE library's messages to the agent's log.
type logWriter struct{ log *slog.Logger }

func (w logWriter) Write(p []byte) (int, error) {
	w.log.Warn("mount: " + strings.TrimSpace(string(p)))
	return len(p), nil
}

// Done is closed when the mount has ended: by Unmount, or because somebody else unmounted it.
func (fs *FS) Done() <-chan struct{} { return fs.mount.done }

// Unmount ends the mount, whoever still uses it: first in order, then, after a while, by
// detaching it from the tree and aborting its connection, so that a process that hangs in it
// gets an error. It also ends a file system that was never mounted.
func (fs *FS) Unmount() error {
	m := &fs.mount
	m.Lock()
	defer m.Unlock()
	first := !m.ended
	m.ended = true
	if m.server.Load() == nil {
		fs.stop()
		if first {
			close(m.done)
		}
		return nil
	}
	select {
	case <-m.done:
		return nil
	default:
	}
	for begin := time.Now(); time.Since(begin) < unmountWait; {
		if err := unmount(fs.cfg.Mountpoint, 0); !errors.Is(err, unix.EBUSY) {
			break
		}
		if fs.waitDone(50 * time.Millisecond) {
			return nil
		}
	}
	if left, err := mountsAt(filepath.Clean(fs.cfg.Mountpoint)); err == nil && len(left) == 0 && fs.waitDone(unmountWait) {
		return nil
	}
	fs.stop() // who waits for the page server or the quorum gets an error
	err := errors.Join(abort(fs.cfg.Mountpoint), detach(fs.cfg.Mountpoint))
	if fs.waitDone(unmountWait) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("unmounting %s by force: %w", fs.cfg.Mountpoint, err)
	}
	if left, err := mountsAt(filepath.Clean(fs.cfg.Mountpoint)); err == nil && len(left) > 0 {
		return fmt.Errorf("unmounting %s: it is still mounted", fs.cfg.Mountpoint)
	}
	return fmt.Errorf("unmounting %s: it is unmounted, but a request under way has not ended; is the disk under the local store very slow?", fs.cfg.Mountpoint)
}

func (fs *FS) waitDone(d time.Duration) bool {
	select {
	case <-fs.mount.done:
		return true
	case <-time.After(d):
		return false
	}
}

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

// mountEntry is a line of /proc/self/mountinfo.
type mountEntry struct {
	device, kind, source string
}

// mountsAt lists what is mounted on a directory, the topmost last. It does not touch the
// directory: a dead mount would not answer.
func mountsAt(point string) ([]mountEntry, error) {
	file, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	defer file.Close()
	var found []mountEntry
	for lines := bufio.NewScanner(file); lines.Scan(); {
		before, after, ok := strings.Cut(lines.Text(), " - ")
		left, right := strings.Fields(before), strings.Fields(after)
		if !ok || len(left) < 5 || len(right) < 2 || unescapeMount(left[4]) != point {
			continue
		}
		found = append(found, mountEntry{device: left[2], kind: right[0], source: right[1]})
	}
	return found, nil
}

func unescapeMount(s string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(s)
}

// detachStale detaches what a killed agent left at the mountpoint.
func detachStale(point string) error {
	mounts, err := mountsAt(filepath.Clean(point))
	if err != nil {
		return err
	}
	for _, m := range mounts {
		if m.source != fsName || !strings.HasPrefix(m.kind, "fuse") {
			return fmt.Errorf("a %s file system is mounted there already: unmount it, or choose another directory", m.kind)
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
		if _, minor, ok := strings.Cut(m.device, ":"); ok && m.source == fsName {
			err = errors.Join(err, os.WriteFile(filepath.Join(control, minor, "abort"), []byte("1"), 0))
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
