package pgfs

import (
	"fmt"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// The kernel's requests about one file. Answers of ENOSYS (OPEN, FLUSH, FSYNCDIR, ACCESS, and
// what the embedded default gives) make the kernel stop asking: opening and closing a file
// then costs no round trip, and a file's end of life shows in FORGET.

// cacheTime is how long the kernel may keep names and attributes: we are the only source of
// changes, and all of them go through the kernel.
const cacheTime = 365 * 24 * time.Hour

func (fs *FS) nodeOf(h *fuse.InHeader) (*node, error) {
	if n := fs.nodes.get(h.NodeId); n != nil {
		return n, nil
	}
	return nil, errStale
}

func (fs *FS) fileOf(h *fuse.InHeader) (*node, *file, error) {
	if fs.wiped.Load() || fs.discards.Load() {
		return nil, nil, errClosed // also where there would be zeros to read
	}
	n, err := fs.nodeOf(h)
	if err != nil {
		return nil, nil, err
	}
	if n.file == nil {
		if n.dir != nil {
			return nil, nil, errIsDirectory
		}
		return nil, nil, errInvalid
	}
	return n, n.file, nil
}

func caller(cancel <-chan struct{}, h *fuse.InHeader) opContext {
	return opContext{cancel: cancel, thread: h.Pid}
}

// Read answers a read(2) or the kernel's read-ahead, into the reply itself.
func (fs *FS) Read(cancel <-chan struct{}, in *fuse.ReadIn, buf []byte) (fuse.ReadResult, fuse.Status) {
	_, f, err := fs.fileOf(&in.InHeader)
	if err != nil {
		return nil, fs.status(err)
	}
	n, err := fs.read(caller(cancel, &in.InHeader), f, buf, int64(in.Offset))
	if err == nil {
		err = fs.live()
	}
	if err != nil {
		clear(buf) // the server uses it again
		return nil, fs.status(err)
	}
	return fuse.ReadResultData(buf[:n]), fuse.OK
}

// live tells whether content may leave: past the end of the lease there is none (K2).
func (fs *FS) live() error {
	if fs.cfg.Live == nil {
		return nil
	}
	if err := fs.cfg.Live(); err != nil {
		return fmt.Errorf("%w: %w", errClosed, err)
	}
	return nil
}

// Write takes a write(2). When it returns, the bytes are ours, and WAL is on its way.
func (fs *FS) Write(cancel <-chan struct{}, in *fuse.WriteIn, data []byte) (uint32, fuse.Status) {
	n, f, err := fs.fileOf(&in.InHeader)
	if err != nil {
		return 0, fs.status(err)
	}
	done, err := fs.write(caller(cancel, &in.InHeader), f, data, int64(in.Offset))
	if err == nil {
		err = fs.passWAL(f, data, int64(in.Offset))
	} else if done > 0 && f.wal.Load() == 0 {
		err = nil // a short write, as at a disk that is nearly full
	}
	if err != nil {
		return 0, fs.status(err)
	}
	n.touch()
	return uint32(done), fuse.OK
}

// Fsync is where a commit waits for the quorum.
func (fs *FS) Fsync(cancel <-chan struct{}, in *fuse.FsyncIn) fuse.Status {
	_, f, err := fs.fileOf(&in.InHeader)
	if err != nil {
		return fs.status(err)
	}
	return fs.status(fs.sync(caller(cancel, &in.InHeader), f))
}

// Open is not needed: a file has no state per open descriptor.
func (fs *FS) Open(<-chan struct{}, *fuse.OpenIn, *fuse.OpenOut) fuse.Status { return fuse.ENOSYS }

// GetAttr answers stat(2), and lseek(SEEK_END) after a write.
func (fs *FS) GetAttr(_ <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	n, err := fs.nodeOf(&in.InHeader)
	if err != nil {
		return fs.status(err)
	}
	n.attr(&out.Attr)
	out.SetTimeout(cacheTime)
	return fuse.OK
}

// SetAttr is truncate, chmod, chown and utimes.
func (fs *FS) SetAttr(cancel <-chan struct{}, in *fuse.SetAttrIn, out *fuse.AttrOut) fuse.Status {
	n, err := fs.nodeOf(&in.InHeader)
	if err != nil {
		return fs.status(err)
	}
	if size, ok := in.GetSize(); ok {
		if n.file == nil {
			return fs.status(errIsDirectory)
		}
		if err := fs.truncate(caller(cancel, &in.InHeader), n.file, int64(size)); err != nil {
			return fs.status(err)
		}
		n.touch()
	}
	if mode, ok := in.GetMode(); ok {
		n.mode.Store(n.mode.Load()&syscall.S_IFMT | mode)
	}
	if uid, ok := in.GetUID(); ok {
		n.uid.Store(uid)
	}
	if gid, ok := in.GetGID(); ok {
		n.gid.Store(gid)
	}
	if t, ok := in.GetATime(); ok {
		n.atime.Store(t.UnixNano())
	}
	if t, ok := in.GetMTime(); ok {
		n.mtime.Store(t.UnixNano())
	}
	n.ctime.Store(time.Now().UnixNano())
	n.attr(&out.Attr)
	out.SetTimeout(cacheTime)
	return fuse.OK
}

// Fallocate extends a file, or makes a range read as zeros. Room on the disk is not reserved.
func (fs *FS) Fallocate(cancel <-chan struct{}, in *fuse.FallocateIn) fuse.Status {
	n, f, err := fs.fileOf(&in.InHeader)
	if err != nil {
		return fs.status(err)
	}
	off, length := int64(in.Offset), int64(in.Length)
	if off < 0 || length <= 0 || off > maxFileSize || length > maxFileSize-off {
		return fs.status(errTooBig)
	}
	mode := in.Mode
	if mode&^(unix.FALLOC_FL_KEEP_SIZE|unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_ZERO_RANGE) != 0 {
		return fs.status(errNotSupported)
	}
	if mode&(unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_ZERO_RANGE) != 0 {
		if err := fs.zero(caller(cancel, &in.InHeader), f, off, length); err != nil {
			return fs.status(err)
		}
	}
	if mode&unix.FALLOC_FL_KEEP_SIZE == 0 {
		f.growTo(off + length)
	}
	n.touch()
	return fuse.OK
}

// StatFs describes the disk under the scratch store.
func (fs *FS) StatFs(_ <-chan struct{}, _ *fuse.InHeader, out *fuse.StatfsOut) fuse.Status {
	st, err := fs.store.Statfs()
	if err != nil {
		return fs.status(err)
	}
	*out = fuse.StatfsOut{Blocks: st.Blocks, Bfree: st.Bfree, Bavail: st.Bavail, Files: st.Files, Ffree: st.Ffree,
		Bsize: uint32(st.Bsize), Frsize: uint32(st.Frsize), NameLen: maxName}
	return fuse.OK
}

// Forget takes back how often the kernel was told of a node.
func (fs *FS) Forget(id, lookups uint64) {
	n := fs.nodes.get(id)
	if n == nil || n.lookups.Add(-int64(lookups)) > 0 || n.links.Load() > 0 {
		return
	}
	fs.tree.Lock()
	defer fs.tree.Unlock()
	fs.dropLocked(n)
}
