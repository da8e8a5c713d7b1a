package timeline

import (
	"container/list"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path"
	"path/filepath"
	"sync"
)

// diskCache keeps local copies of layer files, sealed as in the bucket, up to a number of
// bytes. Nothing depends on it: a copy may be missing, damaged or deleted at any time, and
// a disk that is full means that there are no new copies.
type diskCache struct {
	dir     string
	max     int64
	log     *slog.Logger
	evicted func(name string)

	mu struct {
		sync.Mutex
		size   int64
		files  map[string]*list.Element // of copied
		lru    list.List                // most recently used first
		warned bool
	}
}

type copied struct {
	name string
	size int64
}

func newDiskCache(dir string, max int64, log *slog.Logger, evicted func(string)) *diskCache {
	c := &diskCache{dir: dir, max: max, log: log, evicted: evicted}
	c.mu.files = make(map[string]*list.Element)
	return c
}

// adopt takes over the copies that are in the folder and belong to the manifest, and deletes all
// else in it.
func (c *diskCache) adopt(m *manifest) {
	if c.dir == "" {
		return
	}
	if err := os.MkdirAll(c.dir, 0o700); err != nil {
		c.warn(err)
		return
	}
	sizes := make(map[string]int64)
	for i := range m.Layers {
		sizes[path.Base(m.Layers[i].Object)] = m.Layers[i].Size
	}
	entries, err := os.ReadDir(c.dir)
	if err != nil {
		c.warn(err)
		return
	}
	for _, e := range entries {
		info, err := e.Info()
		if err == nil && info.Mode().IsRegular() && info.Size() == sizes[e.Name()] {
			c.keep(e.Name(), info.Size())
		} else if !e.IsDir() {
			removeQuietly(c.path(e.Name()))
		}
	}
}

func (c *diskCache) path(name string) string { return filepath.Join(c.dir, name) }

// warn tells once that copies cannot be kept.
func (c *diskCache) warn(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.mu.warned {
		c.mu.warned = true
		c.log.Warn("no local copies of layers can be kept: reads go to the bucket", "dir", c.dir, "error", err)
	}
}

// keep lists a copy, and evicts others to make room.
func (c *diskCache) keep(name string, size int64) {
	c.mu.Lock()
	if e := c.mu.files[name]; e != nil {
		c.mu.size -= c.mu.lru.Remove(e).(copied).size
	}
	c.mu.files[name] = c.mu.lru.PushFront(copied{name, size})
	c.mu.size += size
	var out []string
	for c.mu.size > c.max {
		f := c.mu.lru.Remove(c.mu.lru.Back()).(copied)
		delete(c.mu.files, f.name)
		c.mu.size -= f.size
		out = append(out, f.name)
	}
	c.mu.Unlock()
	for _, name := range out {
		removeQuietly(c.path(name))
		c.evicted(name)
	}
}

// fits tells whether a copy of that size can be kept.
func (c *diskCache) fits(size int64) bool { return c.dir != "" && size <= c.max }

// open gives the copy, or nil if there is none of that size.
func (c *diskCache) open(name string, size int64) *os.File {
	c.mu.Lock()
	e := c.mu.files[name]
	if e != nil {
		c.mu.lru.MoveToFront(e)
	}
	c.mu.Unlock()
	if e == nil {
		return nil
	}
	f, err := os.Open(c.path(name))
	if err == nil {
		if info, statErr := f.Stat(); statErr == nil && info.Size() == size {
			return f
		}
		f.Close()
	}
	c.remove(name)
	return nil
}

func (c *diskCache) touch(name string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if e := c.mu.files[name]; e != nil {
		c.mu.lru.MoveToFront(e)
	}
}

// put makes a copy of what write writes.
func (c *diskCache) put(name string, size int64, write func(io.Writer) error) {
	if !c.fits(size) {
		return
	}
	tmp := c.path(name + ".new")
	if err := writeFile(tmp, write); err != nil {
		removeQuietly(tmp)
		c.warn(err)
		return
	}
	if err := os.Rename(tmp, c.path(name)); err != nil {
		removeQuietly(tmp)
		c.warn(err)
		return
	}
	c.mu.Lock()
	c.mu.warned = false
	c.mu.Unlock()
	c.keep(name, size)
}

// writeFile does not sync: a copy that a crash damages is found out by its seal.
func writeFile(path string, write func(io.Writer) error) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	if err := write(f); err != nil {
		f.Close()
		return fmt.Errorf("writing %s: %w", path, err)
	}
	return f.Close()
}

// remove deletes a copy.
func (c *diskCache) remove(name string) {
	c.mu.Lock()
	if e := c.mu.files[name]; e != nil {
		c.mu.size -= c.mu.lru.Remove(e).(copied).size
		delete(c.mu.files, name)
	}
	c.mu.Unlock()
	if c.dir != "" {
		removeQuietly(c.path(name))
	}
}
