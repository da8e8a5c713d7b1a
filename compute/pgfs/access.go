package pgfs

import (
	"fmt"
	"io"
	iofs "io/fs"
	"slices"
	"strings"
	"syscall"
)

// The agent's own way to the files, which does not pass the kernel. What it changes while the
// file system is mounted is told to the kernel, which may have cached what was before.

// MkdirAll makes a directory and what is missing above it (mode 0700). Made this way, global,
// base/<database> and the SLRU areas show what the page server has.
func (fs *FS) MkdirAll(path string) error {
	n := fs.root
	for _, name := range splitPath(path) {
		child, err := fs.mkdir(n, name)
		if err != nil {
			return &iofs.PathError{Op: "mkdir", Path: path, Err: err}
		}
		n = child
	}
	return nil
}

func splitPath(path string) []string {
	return slices.DeleteFunc(strings.Split(path, "/"), func(s string) bool { return s == "" || s == "." })
}

func (fs *FS) mkdir(parent *node, name string) (*node, error) {
	if name == ".." {
		return nil, errInvalid
	}
	n, made, err := fs.child(parent, name, func() (*node, error) {
		n := fs.newNode(syscall.S_IFDIR|0o700, fs.cfg.UID, fs.cfg.GID)
		n.dir = newDir(nil, "")
		if err := fs.attachLocked(parent, name, n); err != nil {
			fs.dropLocked(n)
			return nil, err
		}
		_, _, _, isRemote := remoteDir(n.dir.path)
		n.dir.lazy.Store(isRemote && fs.cfg.Remote != nil)
		return n, nil
	})
	if err != nil {
		return nil, err
	}
	if made {
		fs.notifyEntry(parent, name)
	}
	if n.dir == nil {
		return nil, errNotDirectory
	}
	return n, nil
}

// child finds a name, or makes it.
func (fs *FS) child(parent *node, name string, create func() (*node, error)) (n *node, made bool, err error) {
	fs.tree.Lock()
	defer fs.tree.Unlock()
	n, err = childLocked(parent, name)
	if err == iofs.ErrNotExist && create != nil {
		n, err = create()
		made = err == nil
	}
	return n, made, err
}

// find resolves a path to a node whose names are in memory.
func (fs *FS) find(path string) (*node, error) {
	n := fs.root
	for _, name := range splitPath(path) {
		if err := fs.load(opContext{}, n); err != nil {
			return nil, err
		}
		child, _, err := fs.child(n, name, nil)
		if err != nil {
			return nil, err
		}
		n = child
	}
	return n, nil
}

// WriteFile makes or replaces a file (mode 0600). Its directory must exist. What is written
// into a WAL segment this way is not passed to WAL: it is there already.
func (fs *FS) WriteFile(path string, data []byte) error {
	if err := fs.writeFile(path, data); err != nil {
		return &iofs.PathError{Op: "write", Path: path, Err: err}
	}
	return nil
}

func (fs *FS) writeFile(path string, data []byte) error {
	parts := splitPath(path)
	if len(parts) == 0 {
		return errIsDirectory
	}
	last := len(parts) - 1
	parent := fs.root
	for _, name := range parts[:last] { // no listing: the file need not be at the page server
		child, _, err := fs.child(parent, name, nil)
		if err != nil {
			return err
		}
		parent = child
	}
	// The kernel keeps its own mind of a file's size once it has seen it: a new file, with
	// all its content, takes the place of an old one.
	fs.tree.RLock()
	n, err := fs.newFileOfLocked(parent, parts[last], syscall.S_IFREG|0o600, fs.cfg.UID, fs.cfg.GID)
	fs.tree.RUnlock()
	if err != nil {
		return err
	}
	if _, err = fs.write(opContext{}, n.file, data, 0); err == nil {
		err = fs.replace(parent, parts[last], n)
	}
	if err != nil {
		fs.tree.Lock()
		defer fs.tree.Unlock()
		fs.dropLocked(n)
		return err
	}
	fs.notifyEntry(parent, parts[last])
	return nil
}

// replace gives a new file its name.
func (fs *FS) replace(parent *node, name string, n *node) error {
	fs.tree.Lock()
	defer fs.tree.Unlock()
	switch old, err := childLocked(parent, name); {
	case err == iofs.ErrNotExist:
	case err != nil:
		return err
	case old.file == nil:
		return errIsDirectory
	default:
		fs.detachLocked(parent, name, old)
	}
	return fs.attachLocked(parent, name, n)
}

// notifyEntry makes the kernel look a name up again. No lock may be held.
func (fs *FS) notifyEntry(parent *node, name string) {
	for _, v := range fs.mount.mounted() {
		_ = v.server.EntryNotify(v.id(parent), name) // not known to the kernel: as good
		_ = v.server.InodeNotify(v.id(parent), -1, 0)
	}
}

// ReadFile gives a file's content.
func (fs *FS) ReadFile(path string) ([]byte, error) {
	n, err := fs.findFile(path)
	if err != nil {
		return nil, &iofs.PathError{Op: "read", Path: path, Err: err}
	}
	data := make([]byte, n.file.size.Load())
	read, err := fs.read(opContext{}, n.file, data, 0)
	if err != nil {
		return nil, &iofs.PathError{Op: "read", Path: path, Err: err}
	}
	return data[:read], nil
}

// ReadAt reads a part of a file, as io.ReaderAt does.
func (fs *FS) ReadAt(path string, p []byte, off int64) (int, error) {
	n, err := fs.findFile(path)
	if err == nil && off < 0 {
		err = errInvalid
	}
	if err != nil {
		return 0, &iofs.PathError{Op: "read", Path: path, Err: err}
	}
	read, err := fs.read(opContext{}, n.file, p, off)
	if err != nil {
		return read, &iofs.PathError{Op: "read", Path: path, Err: err}
	}
	if read < len(p) {
		return read, io.EOF
	}
	return read, nil
}

func (fs *FS) findFile(path string) (*node, error) {
	n, err := fs.find(path)
	if err == nil && n.file == nil {
		err = errIsDirectory
	}
	return n, err
}

// Walk calls fn for every regular file, in the order of their paths, until it fails. Files
// at the page server that nobody has looked for yet are not among them. fn may use the file
// system.
func (fs *FS) Walk(fn func(path string, size int64) error) error {
	files := map[string]*node{}
	fs.tree.RLock()
	collectLocked(fs.root, files)
	fs.tree.RUnlock()
	paths := make([]string, 0, len(files))
	for path := range files {
		paths = append(paths, path)
	}
	slices.Sort(paths)
	for _, path := range paths {
		if err := fn(path, files[path].file.size.Load()); err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
	}
	return nil
}

func collectLocked(n *node, files map[string]*node) {
	for name, child := range n.dir.children {
		switch {
		case child.file != nil:
			files[n.dir.join(name)] = child
		case child.dir != nil:
			collectLocked(child, files)
		}
	}
}
