package pgfs

import (
	iofs "io/fs"

	"github.com/holdfastdb/holdfast/internal/pg"
)

// AddHistory shows the WAL before the start, which Config.History has: the segments from
// from's on, up to the page at to. Files that are there already, the segment of to among
// them, keep what they hold from to on. It has to be called before Mount.
func (fs *FS) AddHistory(from, to pg.LSN) error {
	dir, err := fs.find(walDir)
	if err != nil {
		return &iofs.PathError{Op: "find", Path: walDir, Err: err}
	}
	fs.tree.Lock()
	defer fs.tree.Unlock()
	for start := from.SegmentStart(); start < to; start += pg.WALSegmentSize {
		name := pg.WALFileName(start)
		src := &source{path: walDir + "/" + name, wal: start}
		blocks := pg.BlockNumber(min(to-start, pg.WALSegmentSize) / pg.BlockSize)
		if n := dir.dir.children[name]; n != nil && n.file != nil {
			fs.putHistory(n.file, src, blocks)
		} else if err := fs.addRemoteLocked(dir, src, blocks, true, nil); err != nil {
			return err
		}
	}
	return nil
}

// putHistory replaces the blocks at a file's start.
func (fs *FS) putHistory(f *file, src *source, blocks pg.BlockNumber) {
	f.mu.Lock()
	for b := range blocks {
		if c, p := f.entry(b); c != nil {
			fs.clearLocked(f, p)
		}
	}
	f.src, f.bound = src, blocks
	f.mu.Unlock()
	f.keep.Store(true)
	f.partial.Store(true)
	fs.cache.list(f)
}
