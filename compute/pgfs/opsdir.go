package pgfs

import (
	iofs "io/fs"
	"sync"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// The kernel's requests about names.

// answer tells the kernel of a node, which it may keep from now on.
func (fs *FS) answerLocked(n *node, out *fuse.EntryOut) fuse.Status {
	n.lookups.Add(1)
	out.NodeId, out.Generation = n.id, 1
	n.attr(&out.Attr)
	out.SetEntryTimeout(cacheTime)
	out.SetAttrTimeout(cacheTime)
	return fuse.OK
}

// Lookup finds a name. That there is none is an answer too, which the kernel keeps.
func (fs *FS) Lookup(cancel <-chan struct{}, h *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	parent, err := fs.loaded(cancel, h)
	if err != nil {
		return fs.status(err)
	}
	if len(name) > maxName {
		return fs.status(errNameTooLong)
	}
	fs.tree.RLock()
	defer fs.tree.RUnlock()
	n, err := childLocked(parent, name)
	if err == iofs.ErrNotExist {
		out.SetEntryTimeout(cacheTime)
		return fuse.OK
	}
	if err != nil {
		return fs.status(err)
	}
	return fs.answerLocked(n, out)
}

// loaded gives a directory whose names are all in memory.
func (fs *FS) loaded(cancel <-chan struct{}, h *fuse.InHeader) (*node, error) {
	n, err := fs.nodeOf(h)
	if err == nil {
		err = fs.load(caller(cancel, h), n)
	}
	return n, err
}

// make gives a new node a name.
func (fs *FS) make(cancel <-chan struct{}, h *fuse.InHeader, name string, mode uint32, out *fuse.EntryOut, fill func(*node)) fuse.Status {
	parent, err := fs.loaded(cancel, h)
	if err != nil {
		return fs.status(err)
	}
	fs.tree.Lock()
	defer fs.tree.Unlock()
	if _, err := childLocked(parent, name); err == nil {
		return fs.status(iofs.ErrExist)
	} else if err != iofs.ErrNotExist {
		return fs.status(err)
	}
	var n *node
	if mode&syscall.S_IFMT == syscall.S_IFREG {
		n, err = fs.newFileLocked(parent, name, mode, h.Uid, h.Gid)
	} else {
		n = fs.newNode(mode, h.Uid, h.Gid)
		if fill != nil {
			fill(n)
		}
		if err = fs.attachLocked(parent, name, n); err != nil {
			fs.dropLocked(n)
		}
	}
	if err != nil {
		return fs.status(err)
	}
	return fs.answerLocked(n, out)
}

// Create makes a file. The kernel has looked the name up before and holds the directory, so
// the file can only exist if the agent put it there just now.
func (fs *FS) Create(cancel <-chan struct{}, in *fuse.CreateIn, name string, out *fuse.CreateOut) fuse.Status {
	out.OpenFlags = fuse.FOPEN_KEEP_CACHE | fuse.FOPEN_NOFLUSH
	return fs.make(cancel, &in.InHeader, name, syscall.S_IFREG|in.Mode&07777, &out.EntryOut, nil)
}

// Mknod makes a regular file, a socket or a pipe; devices are refused.
func (fs *FS) Mknod(cancel <-chan struct{}, in *fuse.MknodIn, name string, out *fuse.EntryOut) fuse.Status {
	switch in.Mode & syscall.S_IFMT {
	case syscall.S_IFREG, syscall.S_IFSOCK, syscall.S_IFIFO:
		return fs.make(cancel, &in.InHeader, name, in.Mode, out, nil)
	}
	return fs.status(errNotPermitted)
}

// Mkdir makes a directory. The page server has nothing under it, whatever its name. Where it
// would be a tablespace (allow_in_place_tablespaces) it is refused: see Symlink.
func (fs *FS) Mkdir(cancel <-chan struct{}, in *fuse.MkdirIn, name string, out *fuse.EntryOut) fuse.Status {
	if err := fs.refuseTablespace(&in.InHeader); err != nil {
		return fs.status(err)
	}
	return fs.make(cancel, &in.InHeader, name, syscall.S_IFDIR|in.Mode&07777, out, func(n *node) { n.dir = newDir(nil, "") })
}

// Symlink is refused where Postgres would use it for a tablespace: that is outside the mount,
// so its files would neither be sealed nor survive this compute.
func (fs *FS) Symlink(cancel <-chan struct{}, h *fuse.InHeader, target, name string, out *fuse.EntryOut) fuse.Status {
	if err := fs.refuseTablespace(h); err != nil {
		return fs.status(err)
	}
	return fs.make(cancel, h, name, syscall.S_IFLNK|0o777, out, func(n *node) { n.target = target })
}

// refuseTablespace refuses what is made in pg_tblspc.
func (fs *FS) refuseTablespace(h *fuse.InHeader) error {
	parent, err := fs.nodeOf(h)
	if err != nil {
		return err
	}
	fs.tree.RLock()
	refused := parent.dir != nil && parent.dir.path == "pg_tblspc"
	fs.tree.RUnlock()
	if !refused {
		return nil
	}
	fs.cfg.Log.Error("CREATE TABLESPACE was refused: this storage has one tablespace, " +
		"because files of another would be neither sealed nor kept; create the objects in the default tablespace")
	return errNotSupported
}

// Readlink gives a symbolic link's target.
func (fs *FS) Readlink(_ <-chan struct{}, h *fuse.InHeader) ([]byte, fuse.Status) {
	n, err := fs.nodeOf(h)
	if err == nil && n.mode.Load()&syscall.S_IFMT != syscall.S_IFLNK {
		err = errInvalid
	}
	if err != nil {
		return nil, fs.status(err)
	}
	return []byte(n.target), fuse.OK
}

// Link gives a file a second name (durable_rename_excl).
func (fs *FS) Link(cancel <-chan struct{}, in *fuse.LinkIn, name string, out *fuse.EntryOut) fuse.Status {
	n := fs.nodes.get(in.Oldnodeid)
	parent, err := fs.loaded(cancel, &in.InHeader)
	switch {
	case err != nil:
	case n == nil:
		err = errStale
	case n.dir != nil:
		err = errNotPermitted
	}
	if err != nil {
		return fs.status(err)
	}
	fs.tree.Lock()
	defer fs.tree.Unlock()
	if _, err = childLocked(parent, name); err == nil {
		err = iofs.ErrExist
	} else if err == iofs.ErrNotExist {
		err = fs.attachLocked(parent, name, n)
	}
	if err != nil {
		return fs.status(err)
	}
	return fs.answerLocked(n, out)
}

// Unlink takes a file's name. Its content lives on while a process has it open.
func (fs *FS) Unlink(cancel <-chan struct{}, h *fuse.InHeader, name string) fuse.Status {
	return fs.unname(cancel, h, name, false)
}

// Rmdir removes an empty directory.
func (fs *FS) Rmdir(cancel <-chan struct{}, h *fuse.InHeader, name string) fuse.Status {
	return fs.unname(cancel, h, name, true)
}

func (fs *FS) unname(cancel <-chan struct{}, h *fuse.InHeader, name string, isDir bool) fuse.Status {
	parent, err := fs.loaded(cancel, h)
	if err == nil {
		err = fs.remove(caller(cancel, h), parent, name, isDir)
	}
	return fs.status(err)
}

func (fs *FS) remove(op opContext, parent *node, name string, isDir bool) error {
	if err := fs.dropAux(op, parent, name, isDir); err != nil {
		return err
	}
	fs.tree.Lock()
	defer fs.tree.Unlock()
	n, err := childLocked(parent, name)
	if err == nil {
		err = removableLocked(n, isDir)
	}
	if err == nil {
		fs.detachLocked(parent, name, n)
	}
	return err
}

// removableLocked tells what is wrong with taking a node's name away.
func removableLocked(n *node, wantDir bool) error {
	switch {
	case wantDir && n.dir == nil:
		return errNotDirectory
	case !wantDir && n.dir != nil:
		return errIsDirectory
	case n.dir != nil && (len(n.dir.children) > 0 || n.dir.lazy.Load()):
		return errNotEmpty
	}
	return nil
}

// Rename moves a name, over an existing one if need be; the file's identity stays.
func (fs *FS) Rename(cancel <-chan struct{}, in *fuse.RenameIn, oldName, newName string) fuse.Status {
	if in.Flags&^unix.RENAME_NOREPLACE != 0 {
		return fs.status(errInvalid)
	}
	from, err := fs.loaded(cancel, &in.InHeader)
	to := fs.nodes.get(in.Newdir)
	if err == nil && to == nil {
		err = errStale
	}
	if err == nil {
		err = fs.load(caller(cancel, &in.InHeader), to)
	}
	if err == nil {
		err = fs.move(caller(cancel, &in.InHeader), from, oldName, to, newName, in.Flags&unix.RENAME_NOREPLACE != 0)
	}
	return fs.status(err)
}

func (fs *FS) move(op opContext, from *node, oldName string, to *node, newName string, noReplace bool) error {
	if err := fs.keepAux(op, from, oldName, to, newName, noReplace); err != nil {
		return err
	}
	return fs.rename(from, oldName, to, newName, noReplace)
}

func (fs *FS) rename(from *node, oldName string, to *node, newName string, noReplace bool) error {
	fs.tree.Lock()
	defer fs.tree.Unlock()
	n, old, err := movableLocked(fs.root, from, oldName, to, newName, noReplace)
	if err != nil || old == n { // two names of one file: POSIX leaves both
		return err
	}
	if old != nil {
		fs.detachLocked(to, newName, old)
	}
	n.lookups.Add(1) // keeps it while it has no name
	defer func() {
		n.lookups.Add(-1)
		fs.dropLocked(n)
	}()
	fs.detachLocked(from, oldName, n)
	return fs.attachLocked(to, newName, n)
}

// movableLocked gives what a rename moves and what it replaces, if anything, or tells why it
// cannot be.
func movableLocked(root, from *node, oldName string, to *node, newName string, noReplace bool) (n, old *node, err error) {
	if n, err = childLocked(from, oldName); err != nil {
		return nil, nil, err
	}
	if len(newName) > maxName {
		return nil, nil, errNameTooLong
	}
	if n.dir != nil && (isBelowLocked(to, n) || n.dir.lazy.Load()) {
		return nil, nil, errInvalid
	}
	if to != root && to.dir != nil && to.dir.parent == nil {
		return nil, nil, iofs.ErrNotExist
	}
	old, err = childLocked(to, newName)
	switch {
	case err == iofs.ErrNotExist:
		return n, nil, nil
	case err != nil:
		return nil, nil, err
	case noReplace:
		return nil, nil, iofs.ErrExist
	case old == n:
		return n, old, nil
	}
	return n, old, removableLocked(old, n.dir != nil)
}

func isBelowLocked(n, top *node) bool {
	for ; n != nil && n.dir != nil; n = n.dir.parent {
		if n == top {
			return true
		}
	}
	return false
}

// handles are the open directories, with what a reader has been promised: every name that
// was there when it began exactly once, whatever changes meanwhile.
type handles struct {
	sync.Mutex
	last uint64
	open map[uint64][]fuse.DirEntry
}

// OpenDir begins to list a directory.
func (fs *FS) OpenDir(cancel <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	n, err := fs.loaded(cancel, &in.InHeader)
	if err == nil && n.dir == nil {
		err = errNotDirectory
	}
	if err != nil {
		return fs.status(err)
	}
	h := &fs.handles
	h.Lock()
	defer h.Unlock()
	if h.open == nil {
		h.open = map[uint64][]fuse.DirEntry{}
	}
	h.last++
	h.open[h.last] = nil
	out.Fh = h.last
	return fuse.OK
}

// ReadDir gives the names from an offset on; offset 0 looks afresh.
func (fs *FS) ReadDir(_ <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	n, err := fs.nodeOf(&in.InHeader)
	if err != nil || n.dir == nil {
		return fs.status(errStale)
	}
	h := &fs.handles
	h.Lock()
	entries, ok := h.open[in.Fh]
	h.Unlock()
	if !ok {
		return fs.status(errInvalid)
	}
	if in.Offset == 0 {
		entries = fs.entries(n)
		h.Lock()
		h.open[in.Fh] = entries
		h.Unlock()
	}
	for i := in.Offset; i < uint64(len(entries)); i++ {
		e := entries[i]
		e.Off = i + 1
		if !out.AddDirEntry(e) {
			break
		}
	}
	return fuse.OK
}

func (fs *FS) entries(n *node) []fuse.DirEntry {
	fs.tree.RLock()
	defer fs.tree.RUnlock()
	parent := n
	if n.dir.parent != nil {
		parent = n.dir.parent
	}
	list := make([]fuse.DirEntry, 0, len(n.dir.children)+2)
	list = append(list, fuse.DirEntry{Name: ".", Ino: n.id, Mode: syscall.S_IFDIR},
		fuse.DirEntry{Name: "..", Ino: parent.id, Mode: syscall.S_IFDIR})
	for name, child := range n.dir.children {
		list = append(list, fuse.DirEntry{Name: name, Ino: child.id, Mode: child.mode.Load()})
	}
	return list
}

// ReleaseDir ends a listing.
func (fs *FS) ReleaseDir(in *fuse.ReleaseIn) {
	fs.handles.Lock()
	defer fs.handles.Unlock()
	delete(fs.handles.open, in.Fh)
}
