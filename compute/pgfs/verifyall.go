package pgfs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/holdfastdb/holdfast/internal/pagemask"
	"github.com/holdfastdb/holdfast/internal/pg"
)

// VerifyAll compares everything durable that this file system holds with what the page server
// has at the end of the WAL. Postgres must have ended in order, so that nothing is only in its
// memory, and the page server must have got as far as end. files is what it would start a
// compute from there. The error says that it could not be compared; what differs is reported
// and counted.
func (fs *FS) VerifyAll(ctx context.Context, end pg.LSN, files map[string][]byte) error {
	if fs.verify == nil {
		return errors.New("comparing what is left: pages are not compared (Config.Past)")
	}
	w := &wholeCheck{fs: fs, v: fs.verify, ctx: ctx, end: end}
	dirs, local, err := w.tree()
	if err != nil {
		return fmt.Errorf("comparing what is left with the page server: %w", err)
	}
	w.files(local, files)
	if there, ok := files[controlPath]; ok {
		if err := w.control(there); err != nil {
			return fmt.Errorf("comparing the counters in %s with the page server's: %w", controlPath, err)
		}
	}
	for _, d := range dirs {
		if d.slru != 0 {
			err = w.slru(d)
		} else {
			err = w.relations(d)
		}
		if err != nil {
			return fmt.Errorf("comparing what is left in %s with the page server: %w", d.path, err)
		}
	}
	return nil
}

// wholeCheck is VerifyAll under way.
type wholeCheck struct {
	fs  *FS
	v   *verifier
	ctx context.Context
	end pg.LSN
}

// checkedDir is a directory of which the page server has files, and that was looked at here.
type checkedDir struct {
	path                 string
	tablespace, database pg.Oid
	slru                 pg.SLRUKind
	children             map[string]*file // by path
}

// tree lists the directories, and the small files that are compared as they are.
func (w *wholeCheck) tree() (dirs []checkedDir, small map[string][]byte, err error) {
	all := map[string]*node{}
	w.fs.tree.RLock()
	collectLocked(w.fs.root, all)
	byDir := map[string]*checkedDir{}
	w.dirsLocked(w.fs.root, byDir)
	w.fs.tree.RUnlock()
	small = map[string][]byte{}
	for path, n := range all {
		if d := byDir[path[:max(0, strings.LastIndexByte(path, '/'))]]; d != nil {
			d.children[path] = n.file
		}
		if isSmall(path) {
			if small[path], err = w.fs.ReadFile(path); err != nil {
				return nil, nil, err
			}
		}
	}
	for _, d := range byDir {
		dirs = append(dirs, *d)
	}
	slices.SortFunc(dirs, func(a, b checkedDir) int { return strings.Compare(a.path, b.path) })
	return dirs, small, nil
}

func (w *wholeCheck) dirsLocked(n *node, found map[string]*checkedDir) {
	if tablespace, database, slru, ok := remoteDir(n.dir.path); ok && !n.dir.lazy.Load() {
		found[n.dir.path] = &checkedDir{path: n.dir.path, tablespace: tablespace, database: database, slru: slru, children: map[string]*file{}}
	}
	for _, child := range n.dir.children {
		if child.dir != nil {
			w.dirsLocked(child, found)
		}
	}
}

// isSmall tells the files that a start needs and that WAL describes.
func isSmall(path string) bool {
	dir, name := path[:max(0, strings.LastIndexByte(path, '/'))], path[strings.LastIndexByte(path, '/')+1:]
	return dir == "pg_twophase" || name == "pg_filenode.map" || name == "PG_VERSION" && strings.HasPrefix(dir, "base/")
}

func (w *wholeCheck) files(here, there map[string][]byte) {
	for path := range there {
		if _, ok := here[path]; !ok && isSmall(path) {
			w.v.report(path, "what", "it is only at the page server")
		}
	}
	for path, content := range here {
		switch other, ok := there[path]; {
		case !ok:
			w.v.report(path, "what", "the page server has no such file")
		case !bytes.Equal(content, other):
			w.v.report(path, "what", "the content", "bytes", len(content), "remote_bytes", len(other))
		default:
			w.v.compared()
		}
	}
}

const controlPath = "global/pg_control"

// control compares the counters that the next start goes on from: of the shutdown checkpoint
// here, and as the page server followed them.
func (w *wholeCheck) control(there []byte) error {
	data, err := w.fs.ReadFile(controlPath)
	if err != nil {
		return err
	}
	have, err := pg.ParseControlFile(data)
	if err != nil {
		return err
	}
	other, err := pg.ParseControlFile(there)
	if err != nil {
		return err
	}
	a, b := have.CheckPointCopy, other.CheckPointCopy
	a.Redo, a.Time, b.Redo, b.Time = 0, 0, 0, 0 // the next start's own
	if a != b {
		w.v.report(controlPath, "what", "the counters", "here", fmt.Sprintf("%+v", a), "there", fmt.Sprintf("%+v", b))
		return nil
	}
	w.v.compared()
	return nil
}

// slru compares the pages of an area that Postgres wrote.
func (w *wholeCheck) slru(d checkedDir) error {
	pages, err := w.fs.cfg.Remote.SLRUPages(w.ctx, d.slru)
	if err != nil {
		return err
	}
	exist := map[uint32]bool{}
	for _, n := range pages {
		exist[n] = true
		if path, off := pg.SLRUPath(d.slru, n); d.children[path] == nil || d.children[path].size.Load() <= off {
			w.v.report(path, "page", n, "what", "it is only at the page server")
		}
	}
	for path, f := range d.children {
		kind, first, ok := pg.ParseSLRUPath(path)
		if !ok || kind != d.slru {
			continue
		}
		for b := range f.blocks() {
			page, _, err := w.fs.written(f, b)
			if err != nil || page == nil {
				if err != nil {
					return err
				}
				continue
			}
			if err := w.slruPage(path, d.slru, first+uint32(b), page, exist); err != nil {
				return err
			}
		}
	}
	return nil
}

func (w *wholeCheck) slruPage(path string, kind pg.SLRUKind, n uint32, page []byte, exist map[uint32]bool) error {
	if !exist[n] {
		if bytes.Equal(page, zeros[:]) {
			w.v.skip(skipEmpty, 1)
		} else {
			w.v.report(path, "page", n, "what", "the page server has no such page")
		}
		return nil
	}
	there, err := w.fs.cfg.Remote.SLRU(w.ctx, kind, n, 1)
	switch {
	case err != nil:
		return err
	case len(there) != pg.BlockSize || !bytes.Equal(page, there):
		at := pagemask.Difference(page, append(there, make([]byte, max(0, pg.BlockSize-len(there)))...))
		w.v.report(path, "page", n, "offset", at, "what", "the content")
	default:
		w.v.compared()
	}
	return nil
}

// fork is one fork of a relation, here and at the page server.
type fork struct {
	segments []*file
	blocks   pg.BlockNumber // here
	remote   pg.BlockNumber
	exists   bool // at the page server
}

func (w *wholeCheck) relations(d checkedDir) error {
	sizes, err := w.fs.cfg.Remote.Relations(w.ctx, d.tablespace, d.database)
	if err != nil {
		return err
	}
	forks := map[pg.RelTag]*fork{}
	at := func(tag pg.RelTag) *fork {
		if forks[tag] == nil {
			forks[tag] = &fork{}
		}
		return forks[tag]
	}
	for _, s := range sizes {
		f := at(s.Rel)
		f.remote, f.exists = s.Blocks, true
	}
	for path, child := range d.children {
		tag, segment, ok := pg.ParseRelPath(path)
		if !ok {
			continue
		}
		f := at(tag)
		f.segments = append(f.segments, make([]*file, max(0, segment+1-len(f.segments)))...)
		f.segments[segment] = child
		f.blocks = max(f.blocks, pg.BlockNumber(segment)*pg.RelSegmentBlocks+child.blocks())
	}
	for tag, f := range forks {
		init := tag
		init.Fork = pg.InitFork
		if forks[init] != nil && tag.Fork != pg.InitFork {
			w.v.skip(skipUnlogged, int64(f.blocks))
			continue
		}
		if err := w.fork(tag, f); err != nil {
			return err
		}
	}
	return nil
}

// fork compares a fork's existence, size and pages.
func (w *wholeCheck) fork(tag pg.RelTag, f *fork) error {
	path := pg.RelPath(tag, 0)
	switch {
	case tag.Fork == pg.FSMFork:
		w.v.skip(skipFSM, int64(f.blocks))
		return nil
	case len(f.segments) == 0:
		w.v.report(path, "relation", tag.String(), "what", "it is only at the page server")
		return nil
	case !f.exists && tag.Fork == pg.MainFork:
		w.v.report(path, "relation", tag.String(), "what", "the page server has no such relation")
		return nil
	case f.remote > f.blocks:
		w.v.report(path, "relation", tag.String(), "what", "the size", "blocks", uint32(f.blocks), "remote_blocks", uint32(f.remote))
	}
	for i, file := range f.segments {
		if file == nil {
			continue
		}
		src := &source{path: pg.RelPath(tag, i), rel: tag, first: pg.BlockNumber(i) * pg.RelSegmentBlocks}
		for b := pg.BlockNumber(0); b < file.blocks(); b += verifyBatch {
			if err := w.batch(src, file, b, min(verifyBatch, file.blocks()-b), f.remote); err != nil {
				return err
			}
		}
	}
	return nil
}

// batch compares count blocks of a segment from block b on.
func (w *wholeCheck) batch(src *source, f *file, b, count, remote pg.BlockNumber) error {
	var there []byte
	for i := range count {
		here, gen, err := w.fs.written(f, b+i)
		if err != nil {
			return err
		}
		if here == nil {
			continue
		}
		if known, d := w.v.settle(f, b+i, gen); known {
			if d != nil {
				w.v.report(src.path, append(d.attrs(src, b+i), "when", "since before it was to leave")...)
			}
			continue
		}
		if n := src.first + b + i; n >= remote {
			w.beyond(src, b+i, here)
			continue
		}
		if there == nil { // only now: most batches were not written here
			first := src.first + b
			if there, err = w.fs.cfg.Past.PagesAt(w.ctx, src.rel, first, int(min(count, remote-first)), w.end); err != nil {
				return err
			}
		}
		page := there[min(len(there), int(i)*pg.BlockSize):]
		if len(page) < pg.BlockSize {
			return fmt.Errorf("block %d of %s: the page server has no such block at %s, but %d blocks", src.first+b+i, src.path, w.end, remote)
		}
		w.page(src, b+i, here, page[:pg.BlockSize])
	}
	return nil
}

// beyond takes a page that the page server does not have: the primary makes relations longer
// before it logs what goes there.
func (w *wholeCheck) beyond(src *source, b pg.BlockNumber, here []byte) {
	if pagemask.Empty(here) {
		w.v.skip(skipEmpty, 1)
		return
	}
	d := difference{what: "the page server has no such block", here: pg.PageLSN(here)}
	w.v.report(src.path, append(d.attrs(src, b), "when", "at the end")...)
}

func (w *wholeCheck) page(src *source, b pg.BlockNumber, here, there []byte) {
	at := pagemask.Place{Fork: src.rel.Fork, Block: src.first + b, Kind: kindOf(src.rel.Fork, here)}
	d, _ := comparePages(at, here, there, pagemask.Hints|pagemask.Ahead)
	switch {
	case d == nil:
		w.v.compared()
	case src.rel.Fork == pg.VMFork && copied(src.rel) && saysMore(there, here) < 0:
		w.v.skip(skipCopiedMap, 1)
	default:
		w.v.report(src.path, append(d.attrs(src, b), "when", "at the end")...)
	}
}

// blocks is the file's size in blocks; the last may be a part of one.
func (f *file) blocks() pg.BlockNumber { return blockOf(f.size.Load() + pg.BlockSize - 1) }

// written gives a block that was written here, or was left out when the file grew; nil: its
// content is the page server's.
func (fs *FS) written(f *file, b pg.BlockNumber) (content []byte, gen uint32, err error) {
	f.mu.RLock()
	defer f.mu.RUnlock()
	p := &page{}
	if c, found := f.entry(b); c != nil {
		p = found
		lock := fs.pageLock(f, b)
		lock.RLock()
		defer lock.RUnlock()
	}
	if _, remote := fs.remoteNeed(f, b, p); remote || p.hasSlot() && p.gen == remoteGen {
		return nil, 0, nil
	}
	content = make([]byte, pg.BlockSize)
	_, _, _, err = fs.contentLocked(f, b, p, remotePage{}, content)
	return content, p.gen, err
}
