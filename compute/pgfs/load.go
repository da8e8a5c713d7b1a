package pgfs

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/holdfastdb/holdfast/internal/pg"
)

// loadTimeout bounds the listing of a directory's files at the page server.
const loadTimeout = 60 * time.Second

// sourceOf tells where the blocks of a file would be at the page server, by its name.
func (fs *FS) sourceOf(path string) *source {
	if fs.cfg.Remote == nil {
		return nil
	}
	if tag, segment, ok := pg.ParseRelPath(path); ok {
		return &source{path: path, rel: tag, first: pg.BlockNumber(segment) * pg.RelSegmentBlocks}
	}
	if kind, first, ok := pg.ParseSLRUPath(path); ok {
		return &source{path: path, slru: kind, first: pg.BlockNumber(first)}
	}
	return nil
}

// newFileLocked makes an empty file and gives it a name: whatever the page server has under
// it does not show.
func (fs *FS) newFileLocked(parent *node, name string, mode, uid, gid uint32) (*node, error) {
	n, err := fs.newFileOfLocked(parent, name, mode, uid, gid)
	if err != nil {
		return nil, err
	}
	if err := fs.attachLocked(parent, name, n); err != nil {
		fs.dropLocked(n)
		return nil, err
	}
	return n, nil
}

// newFileOfLocked makes an empty file that is to have a name.
func (fs *FS) newFileOfLocked(parent *node, name string, mode, uid, gid uint32) (*node, error) {
	if parent.dir == nil {
		return nil, errNotDirectory
	}
	n := fs.newNode(mode, uid, gid)
	if f := n.file; f != nil {
		if f.src = fs.sourceOf(parent.dir.join(name)); f.src != nil {
			f.keep.Store(f.src.slru != 0 || isUnloggedLocked(parent.dir, f.src))
			fs.cache.list(f)
		}
	}
	return n, nil
}

// isUnloggedLocked tells whether a relation of which a file is being made has an init fork.
func isUnloggedLocked(d *dir, s *source) bool {
	return s.rel.Fork == pg.InitFork || d.children[strconv.FormatUint(uint64(s.rel.Relation), 10)+"_init"] != nil
}

// keepSegmentsLocked makes what is written to a fork's files stay.
func keepSegmentsLocked(d *dir, name string) {
	for segment := 0; ; segment++ {
		n := d.children[segmentName(name, segment)]
		if n == nil || n.file == nil {
			return
		}
		n.file.keep.Store(true)
	}
}

func segmentName(name string, segment int) string {
	if segment == 0 {
		return name
	}
	return name + "." + strconv.Itoa(segment)
}

// remoteDir tells what the page server has under a directory: a database's relations, or an
// SLRU area.
func remoteDir(path string) (tablespace, database pg.Oid, slru pg.SLRUKind, ok bool) {
	if path == "global" {
		return pg.GlobalTablespaceOid, 0, 0, true
	}
	for kind := pg.CLog; kind <= pg.CommitTS; kind++ {
		if path == kind.Dir() {
			return 0, 0, kind, true
		}
	}
	if oid, found := strings.CutPrefix(path, "base/"); found {
		if n, err := strconv.ParseUint(oid, 10, 32); err == nil {
			return pg.DefaultTablespaceOid, pg.Oid(n), 0, true
		}
	}
	return 0, 0, 0, false
}

// load lists what the page server has under a directory, once, before anybody looks at it.
func (fs *FS) load(op opContext, n *node) error {
	d := n.dir
	if d == nil || !d.lazy.Load() {
		return nil
	}
	ctx, stop := fs.begin(op, loadTimeout)
	defer stop()
	select {
	case <-d.loading:
		defer func() { d.loading <- struct{}{} }()
	case <-ctx.Done():
		return fs.cause(ctx)
	}
	if !d.lazy.Load() {
		return nil
	}
	fs.tree.RLock()
	path := d.path
	fs.tree.RUnlock()
	if err := fs.loadRemote(ctx, n, path); err != nil {
		if ctx.Err() != nil {
			err = fs.cause(ctx)
		}
		return fmt.Errorf("listing %s at the page server: %w", path, err)
	}
	d.lazy.Store(false)
	return nil
}

func (fs *FS) loadRemote(ctx context.Context, n *node, path string) error {
	tablespace, database, slru, ok := remoteDir(path)
	if !ok {
		return nil
	}
	if slru != 0 {
		pages, err := fs.cfg.Remote.SLRUPages(ctx, slru)
		if err != nil {
			return err
		}
		return fs.addSLRU(n, slru, pages)
	}
	rels, err := fs.cfg.Remote.Relations(ctx, tablespace, database)
	if err != nil {
		return err
	}
	return fs.addRelations(n, rels)
}

// addRelations shows a database's relations. An unlogged one is shown as after a crash: its
// main fork is a local copy of its init fork (brought as it is read), the other forks are
// gone.
func (fs *FS) addRelations(n *node, rels []RelationSize) error {
	unlogged := map[pg.Oid]bool{}
	for _, r := range rels {
		if r.Rel.Fork == pg.InitFork {
			unlogged[r.Rel.Relation] = true
		}
	}
	fs.tree.Lock()
	defer fs.tree.Unlock()
	for _, r := range rels {
		tag := r.Rel
		if unlogged[tag.Relation] && tag.Fork != pg.InitFork {
			continue
		}
		if err := fs.addForkLocked(n, tag, tag, r.Blocks); err != nil {
			return err
		}
		if tag.Fork == pg.InitFork {
			tag.Fork = pg.MainFork
			if err := fs.addForkLocked(n, tag, r.Rel, r.Blocks); err != nil {
				return err
			}
		}
	}
	return nil
}

// addForkLocked shows a fork's segment files, with the blocks of fork from.
func (fs *FS) addForkLocked(n *node, shown, from pg.RelTag, blocks pg.BlockNumber) error {
	for segment := 0; segment == 0 || blocks > 0; segment++ {
		size := min(blocks, pg.RelSegmentBlocks)
		path := pg.RelPath(shown, segment)
		src := &source{path: path, rel: from, first: pg.BlockNumber(segment) * pg.RelSegmentBlocks}
		if err := fs.addRemoteLocked(n, src, size, shown != from || shown.Fork == pg.InitFork, nil); err != nil {
			return err
		}
		blocks -= size
	}
	return nil
}

// addSLRU shows an SLRU area's segment files. What Postgres writes there stays.
func (fs *FS) addSLRU(n *node, kind pg.SLRUKind, pages []uint32) error {
	fs.tree.Lock()
	defer fs.tree.Unlock()
	for len(pages) > 0 {
		path, _ := pg.SLRUPath(kind, pages[0])
		first := pages[0] - pages[0]%pg.SLRUPagesPerSegment
		var present [pg.SLRUPagesPerSegment]bool
		size := pg.BlockNumber(0)
		for len(pages) > 0 && pages[0]-first < pg.SLRUPagesPerSegment {
			present[pages[0]-first] = true
			size = max(size, pg.BlockNumber(pages[0]-first)+1)
			pages = pages[1:]
		}
		src := &source{path: path, slru: kind, first: pg.BlockNumber(first)}
		if err := fs.addRemoteLocked(n, src, size, true, present[:]); err != nil {
			return err
		}
	}
	return nil
}

// addRemoteLocked shows one file whose blocks are at the page server, except those that
// present (if given) says are not. A file that is already there wins.
func (fs *FS) addRemoteLocked(parent *node, src *source, blocks pg.BlockNumber, keep bool, present []bool) error {
	name := src.path[strings.LastIndexByte(src.path, '/')+1:]
	if parent.dir.children[name] != nil {
		return nil
	}
	n := fs.newNode(syscall.S_IFREG|0o600, fs.cfg.UID, fs.cfg.GID)
	f := n.file
	f.src, f.bound = src, blocks
	f.size.Store(int64(blocks) * pg.BlockSize)
	f.keep.Store(keep)
	f.partial.Store(blocks > 0)
	for b := range blocks {
		if present != nil && !present[b] {
			f.grow(b)
			_, p := f.entry(b)
			p.slot = zeroSlot
		}
	}
	fs.cache.list(f)
	return fs.attachLocked(parent, name, n)
}
