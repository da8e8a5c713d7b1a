package pgfs

import (
	"errors"
	"fmt"
	"log"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
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

// Dirs lists the directories that get mounts of their own, which pass each write on at once
// (see view): they are to be made before Mount.
func Dirs() []string { return []string{walDir, tempDir} }

const (
	walDir  = "pg_wal"
	tempDir = "base/pgsql_tmp"
)

type mountState struct {
	sync.Mutex
	views atomic.Pointer[[]*view] // in the order in which they were mounted; nil: not mounted
	begun bool
	ended bool          // Unmount was called
	done  chan struct{} // closed when the last view's mount has ended
	left  sync.WaitGroup
}

// mounted lists the views that the kernel sees.
func (m *mountState) mounted() []*view {
	if v := m.views.Load(); v != nil {
		return *v
	}
	return nil
}

// Mount mounts the file system and serves it until Unmount. A mount that a killed agent left
// at the mountpoint is detached first; anything else there is an error. With a WAL, the
// directory pg_wal must have been made.
func (fs *FS) Mount() error {
	m := &fs.mount
	m.Lock()
	defer m.Unlock()
	if m.ended || m.begun {
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
	views, err := fs.plan()
	if err != nil {
		return fmt.Errorf("mounting on %s: %w", point, err)
	}
	m.begun = true
	defer func() {
		go func() {
			m.left.Wait()
			close(m.done)
		}()
	}()
	for i, v := range views {
		if err := fs.mountView(v); err != nil {
			fs.stop()
			return errors.Join(fmt.Errorf("mounting on %s: %w", v.point, err), fs.force(views[:i]))
		}
		up := slices.Clone(views[:i+1])
		m.views.Store(&up)
	}
	if views[0].delayed {
		tuneWriteback(point, fs.cfg.Log)
	}
	return nil
}

// plan tells what to mount, the outer before the inner. The kernel may delay writes only
// where pg_wal is not, and only root can mount a second time inside.
func (fs *FS) plan() ([]*view, error) {
	root := &view{FS: fs, root: fs.root, point: filepath.Clean(fs.cfg.Mountpoint), done: make(chan struct{})}
	views := []*view{root}
	if os.Geteuid() != 0 {
		return views, nil
	}
	root.delayed = true
	for _, dir := range Dirs() {
		n, err := fs.find(dir)
		switch {
		case err == nil && n.dir != nil:
			views = append(views, &view{FS: fs, root: n, point: filepath.Join(root.point, dir), temp: dir == tempDir, done: make(chan struct{})})
		case dir == walDir && fs.cfg.WAL != nil:
			return nil, fmt.Errorf("there is no directory %s to mount on", walDir)
		}
	}
	return views, nil
}

func (fs *FS) mountView(v *view) error {
	server, err := v.connect()
	if err != nil {
		return fmt.Errorf("%w; is /dev/fuse there, and may this process mount (root, or CAP_SYS_ADMIN in a container)?", err)
	}
	v.server = server
	fs.mount.left.Add(1)
	go func() {
		defer fs.mount.left.Done()
		server.Serve()
		fs.stop()
		close(v.done)
	}()
	if err := server.WaitMount(); err != nil {
		_ = detach(v.point)
		return err
	}
	return nil
}

// connect mounts and answers the kernel's greeting. As root it mounts itself: the FUSE
// library's own way leaves /dev/fuse open in every child process. A Postgres that holds it
// keeps the connection alive when the agent dies, and waits for itself for ever.
func (v *view) connect() (*fuse.Server, error) {
	if os.Geteuid() != 0 {
		return fuse.NewServer(v, v.point, v.mountOptions())
	}
	fd, err := unix.Open(fuseDevice, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("opening %s: %w", fuseDevice, err)
	}
	// allow_other: Postgres runs as another user.
	options := fmt.Sprintf("fd=%d,rootmode=%o,user_id=0,group_id=0,allow_other,default_permissions,max_read=%d", fd, unix.S_IFDIR, maxWrite)
	if err := unix.Mount(fsName, v.point, "fuse."+fsName, unix.MS_NOSUID|unix.MS_NODEV, options); err != nil {
		_ = unix.Close(fd)
		return nil, err
	}
	server, err := fuse.NewServer(v, fmt.Sprintf("/dev/fd/%d", fd), v.mountOptions()) // takes fd
	if err != nil {
		_ = detach(v.point)
		return nil, err
	}
	return server, nil
}

func (v *view) mountOptions() *fuse.MountOptions {
	o := &fuse.MountOptions{
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
		Logger:                   log.New(logWriter{v.cfg.Log}, "", 0),
	}
	if v.delayed {
		o.ExtraCapabilities = fuse.CAP_WRITEBACK_CACHE
	}
	return o
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
	if !m.begun {
		fs.stop()
		if first {
			close(m.done)
		}
		return nil
	}
	views := m.mounted()
	for begin := time.Now(); time.Since(begin) < unmountWait; {
		if unmountInOrder(views) || fs.waitDone(50*time.Millisecond) {
			break
		}
	}
	if fs.waitDone(0) || len(views) > 0 && gone(views) && fs.waitDone(unmountWait) {
		return nil
	}
	fs.stop() // who waits for the page server or the quorum gets an error
	return fs.force(views)
}

// unmountInOrder unmounts the inner before the outer; false: one is in use.
func unmountInOrder(views []*view) bool {
	for _, v := range slices.Backward(views) {
		if !v.ended() && errors.Is(unmount(v.point, 0), unix.EBUSY) {
			return false
		}
	}
	return true
}

// gone tells whether nothing is mounted any more where the views were.
func gone(views []*view) bool {
	for _, v := range views {
		if left, err := mountsAt(v.point); err != nil || len(left) > 0 {
			return false
		}
	}
	return true
}

// force ends the views' mounts over the heads of who uses them.
func (fs *FS) force(views []*view) error {
	var errs []error
	for _, v := range slices.Backward(views) {
		if !v.ended() {
			errs = append(errs, abort(v.point), detach(v.point))
		}
	}
	waited := time.After(unmountWait)
	for _, v := range views {
		select {
		case <-v.done:
		case <-waited:
			if err := errors.Join(errs...); err != nil {
				return fmt.Errorf("unmounting %s by force: %w", v.point, err)
			}
			if !gone(views) {
				return fmt.Errorf("unmounting %s: it is still mounted", v.point)
			}
			return fmt.Errorf("unmounting %s: it is unmounted, but a request under way has not ended; is the disk under the local store very slow?", v.point)
		}
	}
	return nil
}

func (fs *FS) waitDone(d time.Duration) bool {
	select {
	case <-fs.mount.done:
		return true
	case <-time.After(d):
		return false
	}
}
