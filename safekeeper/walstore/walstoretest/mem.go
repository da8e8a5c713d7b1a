// Package walstoretest is a file system in memory for tests: it forgets, in a crash, what was
// not synced, all of it or parts, and it can be full or fail.
package walstoretest

import (
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/holdfastdb/holdfast/safekeeper/walstore"
)

// sector is the unit that a disk writes as a whole, in bytes.
const sector = 512

// errCrashed is the answer to who holds on to a file across a crash.
var errCrashed = errors.New("test: the machine crashed")

// FS is a walstore.FS in memory.
type FS struct {
	mu      sync.Mutex
	life    int               // counts crashes
	names   map[string]*inode // as a process sees them
	durable map[string]*inode // as they stand after a crash
	free    int64             // bytes by which files may still grow; <0: no limit
	syncErr error
}

type inode struct {
	data    []byte
	durable []byte
	pending []write // since the last sync, in order
}

type write struct {
	off  int64
	data []byte // nil: truncation to off
}

// New makes an empty one.
func New() *FS {
	return &FS{names: map[string]*inode{}, durable: map[string]*inode{}, free: -1}
}

// SetFree limits by how much files may grow from now on; negative: no limit.
func (fs *FS) SetFree(n int64) {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	fs.free = n
}

// FailSync makes Sync of files fail with err, until it is nil again.
func (fs *FS) FailSync(err error) {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	fs.syncErr = err
}

// Kill ends the process and not the machine: nothing is lost, all handles are dead.
func (fs *FS) Kill() {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	fs.life++
}

// Crash ends the machine: of what was not synced, none, all, or some sectors remain.
func (fs *FS) Crash(rng *rand.Rand) {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	fs.life++
	if rng.IntN(2) == 0 { // the directory's changes reached the disk anyhow
		fs.durable = map[string]*inode{}
		for n, f := range fs.names {
			fs.durable[n] = f
		}
	}
	fs.names = map[string]*inode{}
	for _, name := range sorted(fs.durable) {
		f := fs.durable[name]
		how := rng.IntN(3)
		for _, w := range f.pending {
			switch how {
			case 0: // none
			case 1:
				f.durable = w.apply(f.durable)
			default:
				f.durable = w.applySome(f.durable, rng)
			}
		}
		f.pending = nil
		f.data = slices.Clone(f.durable)
		fs.names[name] = f
	}
}

func (w write) apply(b []byte) []byte {
	if w.data == nil {
		return append(slices.Clone(b[:min(int64(len(b)), w.off)]), make([]byte, max(0, w.off-int64(len(b))))...)
	}
	if need := w.off + int64(len(w.data)); need > int64(len(b)) {
		b = append(b, make([]byte, need-int64(len(b)))...)
	}
	copy(b[w.off:], w.data)
	return b
}

func (w write) applySome(b []byte, rng *rand.Rand) []byte {
	if w.data == nil {
		return w.apply(b)
	}
	for at := int64(0); at < int64(len(w.data)); {
		n := min(sector-(w.off+at)%sector, int64(len(w.data))-at)
		if rng.IntN(2) == 0 {
			b = write{w.off + at, w.data[at : at+n]}.apply(b)
		}
		at += n
	}
	return b
}

// Flip changes one bit of a file, as a failing disk would.
func (fs *FS) Flip(name string, off int64) {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	f := fs.names[name]
	f.data[off] ^= 0x10
	if off < int64(len(f.durable)) {
		f.durable[off] ^= 0x10
	}
}

// Names are all files below dir, sorted.
func (fs *FS) Names(dir string) []string {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	var out []string
	for _, n := range sorted(fs.names) {
		if strings.HasPrefix(n, dir+"/") {
			out = append(out, n)
		}
	}
	return out
}

// Data is a file's content.
func (fs *FS) Data(name string) []byte {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	return slices.Clone(fs.names[name].data)
}

// RemoveAll loses a directory, durably.
func (fs *FS) RemoveAll(dir string) {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	for _, m := range []map[string]*inode{fs.names, fs.durable} {
		for n := range m {
			if strings.HasPrefix(n, dir+"/") {
				delete(m, n)
			}
		}
	}
}

func sorted(m map[string]*inode) []string {
	names := make([]string, 0, len(m))
	for n := range m {
		names = append(names, n)
	}
	slices.Sort(names)
	return names
}

// MkdirAll implements walstore.FS: directories are there as names need them.
func (fs *FS) MkdirAll(string) error { return nil }

// Open implements walstore.FS.
func (fs *FS) Open(name string, create bool) (walstore.File, error) {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	f := fs.names[name]
	if f == nil {
		if !create {
			return nil, &os.PathError{Op: "open", Path: name, Err: os.ErrNotExist}
		}
		f = &inode{}
		fs.names[name] = f
	}
	return &file{fs: fs, f: f, life: fs.life}, nil
}

// List implements walstore.FS.
func (fs *FS) List(dir string) ([]string, error) {
	var out []string
	for _, n := range fs.Names(dir) {
		if filepath.Dir(n) == dir {
			out = append(out, filepath.Base(n))
		}
	}
	return out, nil
}

// Rename implements walstore.FS.
func (fs *FS) Rename(from, to string) error {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	f := fs.names[from]
	if f == nil {
		return &os.PathError{Op: "rename", Path: from, Err: os.ErrNotExist}
	}
	fs.names[to] = f
	delete(fs.names, from)
	return nil
}

// Remove implements walstore.FS.
func (fs *FS) Remove(name string) error {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	delete(fs.names, name)
	return nil
}

// SyncDir implements walstore.FS.
func (fs *FS) SyncDir(dir string) error {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	for _, m := range []map[string]*inode{fs.durable, fs.names} {
		for n := range m {
			if filepath.Dir(n) != dir {
				continue
			}
			if f := fs.names[n]; f != nil {
				fs.durable[n] = f
			} else {
				delete(fs.durable, n)
			}
		}
	}
	return nil
}

type file struct {
	fs   *FS
	f    *inode
	life int
}

func (h *file) lock() (unlock func(), err error) {
	h.fs.mu.Lock()
	if h.life != h.fs.life {
		h.fs.mu.Unlock()
		return nil, errCrashed
	}
	return h.fs.mu.Unlock, nil
}

func (h *file) ReadAt(p []byte, off int64) (int, error) {
	unlock, err := h.lock()
	if err != nil {
		return 0, err
	}
	defer unlock()
	if off >= int64(len(h.f.data)) {
		return 0, io.EOF
	}
	n := copy(p, h.f.data[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (h *file) WriteAt(p []byte, off int64) (int, error) {
	unlock, err := h.lock()
	if err != nil {
		return 0, err
	}
	defer unlock()
	if grow := off + int64(len(p)) - int64(len(h.f.data)); grow > 0 && h.fs.free >= 0 {
		if grow > h.fs.free {
			return 0, &os.PathError{Op: "write", Path: "test", Err: unix.ENOSPC}
		}
		h.fs.free -= grow
	}
	w := write{off, slices.Clone(p)}
	h.f.data = w.apply(h.f.data)
	h.f.pending = append(h.f.pending, w)
	return len(p), nil
}

func (h *file) Truncate(size int64) error {
	unlock, err := h.lock()
	if err != nil {
		return err
	}
	defer unlock()
	w := write{off: size}
	h.f.data = w.apply(h.f.data)
	h.f.pending = append(h.f.pending, w)
	return nil
}

func (h *file) Size() (int64, error) {
	unlock, err := h.lock()
	if err != nil {
		return 0, err
	}
	defer unlock()
	return int64(len(h.f.data)), nil
}

func (h *file) Sync() error {
	unlock, err := h.lock()
	if err != nil {
		return err
	}
	defer unlock()
	if h.fs.syncErr != nil {
		return h.fs.syncErr
	}
	for _, w := range h.f.pending {
		h.f.durable = w.apply(h.f.durable)
	}
	h.f.pending = nil
	return nil
}

func (h *file) Close() error { return nil }
