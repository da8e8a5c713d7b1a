package pgfs

import (
	"errors"
	"fmt"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/holdfastdb/holdfast/compute/scratch"
	"github.com/holdfastdb/holdfast/internal/pg"
)

// A view is one of the file system's mounts: the tree from one directory on. There are three.
// The data directory as a whole is mounted with the kernel's write-back cache: a write(2) ends
// in the kernel, and comes here when it is old, when there are many, or when the file is
// closed or fsync'ed. Inside it, pg_wal is mounted once more without that, since WAL has to
// be on its way to the quorum at the write; and so is the directory of temporary files, since
// a query that fills the disk is to get an error at its write. See docs/decisions/0009.
type view struct {
	*FS
	root    *node
	point   string
	delayed bool // the kernel delays writes
	temp    bool
	server  *fuse.Server
	done    chan struct{} // closed when the mount has ended
}

func (v *view) ended() bool {
	select {
	case <-v.done:
		return true
	default:
		return false
	}
}

// enter translates the id that FUSE gives to the directory at the mountpoint.
func (v *view) enter(id *uint64) {
	if *id == fuse.FUSE_ROOT_ID {
		*id = v.root.id
	}
}

// id is the reverse.
func (v *view) id(n *node) uint64 {
	if n == v.root {
		return fuse.FUSE_ROOT_ID
	}
	return n.id
}

// Requests that can name the directory at the mountpoint.

func (v *view) Lookup(cancel <-chan struct{}, h *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	v.enter(&h.NodeId)
	return v.FS.Lookup(cancel, h, name, out)
}

func (v *view) GetAttr(cancel <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	v.enter(&in.NodeId)
	return v.FS.GetAttr(cancel, in, out)
}

func (v *view) SetAttr(cancel <-chan struct{}, in *fuse.SetAttrIn, out *fuse.AttrOut) fuse.Status {
	v.enter(&in.NodeId)
	return v.FS.SetAttr(cancel, in, out)
}

func (v *view) Create(cancel <-chan struct{}, in *fuse.CreateIn, name string, out *fuse.CreateOut) fuse.Status {
	v.enter(&in.NodeId)
	return v.FS.Create(cancel, in, name, out)
}

func (v *view) Mknod(cancel <-chan struct{}, in *fuse.MknodIn, name string, out *fuse.EntryOut) fuse.Status {
	v.enter(&in.NodeId)
	return v.FS.Mknod(cancel, in, name, out)
}

func (v *view) Mkdir(cancel <-chan struct{}, in *fuse.MkdirIn, name string, out *fuse.EntryOut) fuse.Status {
	v.enter(&in.NodeId)
	return v.FS.Mkdir(cancel, in, name, out)
}

func (v *view) Symlink(cancel <-chan struct{}, h *fuse.InHeader, target, name string, out *fuse.EntryOut) fuse.Status {
	v.enter(&h.NodeId)
	return v.FS.Symlink(cancel, h, target, name, out)
}

func (v *view) Link(cancel <-chan struct{}, in *fuse.LinkIn, name string, out *fuse.EntryOut) fuse.Status {
	v.enter(&in.NodeId)
	return v.FS.Link(cancel, in, name, out)
}

func (v *view) Unlink(cancel <-chan struct{}, h *fuse.InHeader, name string) fuse.Status {
	v.enter(&h.NodeId)
	return v.FS.Unlink(cancel, h, name)
}

func (v *view) Rmdir(cancel <-chan struct{}, h *fuse.InHeader, name string) fuse.Status {
	v.enter(&h.NodeId)
	return v.FS.Rmdir(cancel, h, name)
}

func (v *view) Rename(cancel <-chan struct{}, in *fuse.RenameIn, oldName, newName string) fuse.Status {
	v.enter(&in.NodeId)
	v.enter(&in.Newdir)
	return v.FS.Rename(cancel, in, oldName, newName)
}

func (v *view) OpenDir(cancel <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	v.enter(&in.NodeId)
	return v.FS.OpenDir(cancel, in, out)
}

func (v *view) ReadDir(cancel <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	v.enter(&in.NodeId)
	return v.FS.ReadDir(cancel, in, out)
}

// Fsync of what is no WAL is for the kernel alone, where a view tells WAL and the rest apart.
func (v *view) Fsync(cancel <-chan struct{}, in *fuse.FsyncIn) fuse.Status {
	if v.delayed {
		return fuse.ENOSYS // it sends what it held back, and asks no more
	}
	return v.FS.Fsync(cancel, in)
}

// Write takes a write(2), or what the kernel held back of earlier ones.
func (v *view) Write(cancel <-chan struct{}, in *fuse.WriteIn, data []byte) (uint32, fuse.Status) {
	if v.temp {
		if err := v.roomForTemp(); err != nil {
			return 0, v.status(err)
		}
	}
	if in.WriteFlags&fuse.WRITE_CACHE == 0 {
		return v.FS.Write(cancel, in, data)
	}
	return v.takeDelayed(in, data)
}

// takeDelayed takes what Postgres believes to be written since long. If it cannot be kept,
// what Postgres would read from now on is not what it wrote: the endpoint has to end.
func (v *view) takeDelayed(in *fuse.WriteIn, data []byte) (uint32, fuse.Status) {
	fs := v.FS
	for tries := 0; ; {
		if fs.discards.Load() {
			return uint32(len(data)), fuse.OK
		}
		_, f, err := fs.fileOf(&in.InHeader)
		if err == nil {
			_, err = fs.write(opContext{}, f, data, int64(in.Offset))
		}
		switch {
		case err == nil:
			return uint32(len(data)), fuse.OK
		case fs.ctx.Err() != nil: // the mount ends: what is written now is for nobody
			return 0, fs.status(errClosed)
		case errors.Is(err, scratch.ErrFull) && fs.dropClean() > 0:
			continue
		case errors.Is(err, scratch.ErrFull) && tries < fullTries:
			tries++ // what was given up may be on its way back to the disk
			fs.pause(fullPause)
			continue
		case errors.Is(err, errRemote): // half a block, whose rest is at the page server
			fs.cfg.Log.Warn("a delayed write waits for the page server", "error", err)
			fs.pause(remoteRetry)
			continue
		}
		fs.fail(fmt.Errorf("keeping what Postgres wrote: %w", err))
		return 0, fs.status(err)
	}
}

const (
	// remoteRetry is the pause before the page server is asked again for what a delayed write
	// needs.
	remoteRetry = time.Second
	// A disk that is full is tried again so often, with a pause before.
	fullTries = 20
	fullPause = 100 * time.Millisecond
)

// pause waits, or until the mount ends.
func (fs *FS) pause(d time.Duration) {
	select {
	case <-fs.ctx.Done():
	case <-time.After(d):
	}
}

// Discard is for when Postgres is being killed: its end would wait for delayed writes that
// nobody will read. They are dropped, so everything else fails from now on: what a process
// still read would not be what it wrote.
func (fs *FS) Discard() {
	fs.discards.Store(true)
	fs.stop()
}

// fail ends the file system, as Wipe does, and tells Config.Fail why.
func (fs *FS) fail(err error) {
	if fs.wiped.Swap(true) {
		return
	}
	fs.cfg.Log.Error("the local store failed: this endpoint cannot go on; it keeps nothing of its own, so another start is all it takes", "error", err)
	fs.stop()
	_ = fs.store.Wipe() // the key is gone whatever it says
	if fs.cfg.Fail != nil {
		fs.cfg.Fail(err)
	}
}

// Room that temporary files leave on the disk to the pages of tables: the lesser of the two.
const (
	tempReserve      = 512 << 20
	tempReserveShare = 16 // of the disk
	roomCheckedEvery = 100 * time.Millisecond
)

// roomForTemp refuses temporary files the last of the disk, which delayed writes may need.
func (fs *FS) roomForTemp() error {
	if !fs.roomLow() || fs.dropClean() > 0 {
		return nil
	}
	return fmt.Errorf("temporary files: %w: the rest is kept for tables", scratch.ErrFull)
}

// roomLow tells whether only the reserve is left on the disk.
func (fs *FS) roomLow() bool {
	now := time.Now().UnixNano()
	if last := fs.room.checked.Load(); now-last > int64(roomCheckedEvery) && fs.room.checked.CompareAndSwap(last, now) {
		st, err := fs.store.Statfs()
		if err != nil {
			return false // whoever writes will learn it
		}
		free, size := st.Bavail*uint64(st.Bsize)+fs.store.Usage().Backed*pg.BlockSize, st.Blocks*uint64(st.Bsize)
		fs.room.low.Store(free < min(tempReserve, size/tempReserveShare))
	}
	return fs.room.low.Load()
}
