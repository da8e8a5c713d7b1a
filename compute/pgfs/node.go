package pgfs

import (
	iofs "io/fs"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/holdfastdb/holdfast/internal/pg"
)

// node is an inode: a directory, a regular file, a symbolic link or a special file. It lives
// as long as it has a name or the kernel knows it.
type node struct {
	id       uint64
	mode     atomic.Uint32 // type and permissions
	uid, gid atomic.Uint32
	// Nanoseconds since 1970.
	atime, mtime, ctime atomic.Int64
	lookups             atomic.Int64 // how often the kernel has been told the id, less what it forgot
	links               atomic.Int32 // changed under FS.tree

	dir    *dir   // of a directory
	file   *file  // of a regular file
	target string // of a symbolic link
}

// dir is what a directory has beyond its attributes.
type dir struct {
	// Guarded by FS.tree.
	parent   *node // nil for the root, and once it is removed
	path     string
	children map[string]*node

	// lazy says that the directory has files at the page server that were not listed yet.
	lazy    atomic.Bool
	loading chan struct{} // holds one token: who has it may load
}

func newDir(parent *node, path string) *dir {
	d := &dir{parent: parent, path: path, children: map[string]*node{}, loading: make(chan struct{}, 1)}
	d.loading <- struct{}{}
	return d
}

// join is the path of a child, relative to the data directory.
func (d *dir) join(name string) string {
	if d.path == "" {
		return name
	}
	return d.path + "/" + name
}

// registry finds a node by the id that the kernel uses.
type registry struct {
	last   atomic.Uint64
	count  atomic.Int64
	shards [64]struct {
		sync.RWMutex
		nodes map[uint64]*node
	}
}

func (r *registry) add(n *node) {
	n.id = r.last.Add(1)
	s := &r.shards[n.id%uint64(len(r.shards))]
	s.Lock()
	defer s.Unlock()
	if s.nodes == nil {
		s.nodes = map[uint64]*node{}
	}
	s.nodes[n.id] = n
	r.count.Add(1)
}

func (r *registry) get(id uint64) *node {
	s := &r.shards[id%uint64(len(r.shards))]
	s.RLock()
	defer s.RUnlock()
	return s.nodes[id]
}

// remove forgets a node and tells whether it was there.
func (r *registry) remove(id uint64) bool {
	s := &r.shards[id%uint64(len(r.shards))]
	s.Lock()
	defer s.Unlock()
	if _, ok := s.nodes[id]; !ok {
		return false
	}
	delete(s.nodes, id)
	r.count.Add(-1)
	return true
}

// newNode makes a node without a name. The first one is the root (id 1, as FUSE wants it).
func (fs *FS) newNode(mode, uid, gid uint32) *node {
	n := &node{}
	n.mode.Store(mode)
	n.uid.Store(uid)
	n.gid.Store(gid)
	now := time.Now().UnixNano()
	n.atime.Store(now)
	n.mtime.Store(now)
	n.ctime.Store(now)
	if mode&syscall.S_IFMT == syscall.S_IFREG {
		n.file = &file{}
	}
	fs.nodes.add(n)
	if n.file != nil {
		n.file.id = n.id
	}
	return n
}

// touch tells that a node's content changed.
func (n *node) touch() {
	now := time.Now().UnixNano()
	n.mtime.Store(now)
	n.ctime.Store(now)
}

func (n *node) attr(out *fuse.Attr) {
	out.Ino = n.id
	out.Mode = n.mode.Load()
	out.Nlink = uint32(max(n.links.Load(), 0))
	out.Owner = fuse.Owner{Uid: n.uid.Load(), Gid: n.gid.Load()}
	switch {
	case n.file != nil:
		out.Size = uint64(n.file.size.Load())
	case n.dir != nil:
		out.Size = 4096
	default:
		out.Size = uint64(len(n.target))
	}
	out.Blocks = (out.Size + 511) / 512
	setTime(&out.Atime, &out.Atimensec, n.atime.Load())
	setTime(&out.Mtime, &out.Mtimensec, n.mtime.Load())
	setTime(&out.Ctime, &out.Ctimensec, n.ctime.Load())
}

func setTime(sec *uint64, nsec *uint32, ns int64) {
	*sec, *nsec = uint64(ns/1e9), uint32(ns%1e9)
}

const maxName = 255

// childLocked finds a name in a directory.
func childLocked(parent *node, name string) (*node, error) {
	if parent.dir == nil {
		return nil, errNotDirectory
	}
	if n := parent.dir.children[name]; n != nil {
		return n, nil
	}
	return nil, iofs.ErrNotExist
}

// attachLocked gives a node a name, which must be free.
func (fs *FS) attachLocked(parent *node, name string, n *node) error {
	if len(name) > maxName {
		return errNameTooLong
	}
	d := parent.dir
	if d == nil {
		return errNotDirectory
	}
	if parent != fs.root && d.parent == nil {
		return iofs.ErrNotExist // the directory was removed
	}
	d.children[name] = n
	n.links.Add(1)
	if n.dir != nil {
		n.links.Add(1)
		parent.links.Add(1)
		n.dir.parent = parent
		setPathLocked(n, d.join(name))
	}
	if n.file != nil {
		fs.nameChangedLocked(d, name, n.file, true)
	}
	parent.touch()
	return nil
}

// detachLocked takes a name from a node. The node itself goes once the kernel forgot it.
func (fs *FS) detachLocked(parent *node, name string, n *node) {
	delete(parent.dir.children, name)
	n.links.Add(-1)
	if n.dir != nil {
		n.links.Add(-1)
		parent.links.Add(-1)
		n.dir.parent = nil
	}
	if n.file != nil {
		fs.nameChangedLocked(parent.dir, name, n.file, false)
	}
	parent.touch()
	n.ctime.Store(time.Now().UnixNano())
	fs.dropLocked(n)
}

// dropLocked frees a node that nobody can reach any more.
func (fs *FS) dropLocked(n *node) {
	if n.links.Load() > 0 || n.lookups.Load() > 0 || !fs.nodes.remove(n.id) {
		return
	}
	if n.file != nil {
		fs.cache.forget(n.file)
		n.file.release(fs)
	}
}

func setPathLocked(n *node, path string) {
	n.dir.path = path
	for name, child := range n.dir.children {
		if child.dir != nil {
			setPathLocked(child, n.dir.join(name))
		}
	}
}

// nameChangedLocked upholds what a file is by its name: in pg_wal, the segment whose WAL
// is written there.
func (fs *FS) nameChangedLocked(d *dir, name string, f *file, gained bool) {
	if d.path == walDir {
		if start, ok := pg.ParseWALFileName(name); ok {
			f.setWAL(start, gained)
		}
	}
	// A relation's file under a second or another name is nothing that the page server
	// could give back: what is written to it stays.
	if gained && f.src != nil && f.src.path != d.join(name) {
		f.keep.Store(true)
	}
	// A relation with an init fork is unlogged: what is written to it stays (rule C1).
	if tag, segment, ok := pg.ParseRelPath(d.join(name)); ok && gained && tag.Fork == pg.InitFork && segment == 0 {
		tag.Fork = pg.MainFork
		base := strings.TrimSuffix(name, "_init")
		for _, suffix := range []string{"", "_fsm", "_vm"} {
			keepSegmentsLocked(d, base+suffix)
		}
	}
}
