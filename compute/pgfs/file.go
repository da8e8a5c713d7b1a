package pgfs

import (
	"bytes"
	"sync"
	"sync/atomic"

	"github.com/holdfastdb/holdfast/compute/scratch"
	"github.com/holdfastdb/holdfast/internal/pagemask"
	"github.com/holdfastdb/holdfast/internal/pg"
)

// file is the content of a regular file: blocks of 8 KiB, counted from the file's start.
type file struct {
	id  uint64
	src *source // where its blocks are at the page server; nil: everything is local
	// keep says that what Postgres writes here never leaves scratch.
	keep atomic.Bool
	// partial says that some blocks are, or may be, only at the page server.
	partial atomic.Bool
	wal     atomic.Uint64 // 1 + the LSN of a WAL segment's first byte; 0: no WAL segment

	size atomic.Int64 // changed under mu; growing needs only the shared lock

	// mu guards the table's shape. Who uses one block's entry holds mu shared, and that
	// block's lock (FS.pageLock) shared to read, exclusive to change; who holds mu exclusively
	// needs no other. Neither is held while waiting for the page server.
	mu     sync.RWMutex
	bound  pg.BlockNumber // blocks below are at the page server unless an entry says otherwise; only shrinks
	chunks []*chunk
	gone   bool // released: nothing may be stored any more

	remote remoteState
	cached cacheEntry
}

const (
	chunkBlocks = 64
	// maxFileSize keeps a wild offset from allocating a table without end.
	maxFileSize = 1 << 40
)

// chunk is the entries of 64 blocks (512 KiB).
type chunk struct {
	pages [chunkBlocks]page
	used  atomic.Uint64 // a bit per block that was read since the evictor last came by
}

// page is where one block is:
//
//	slot 0, gen 0          never touched here: at the page server below file.bound, else zeros
//	slot 0, gen remoteGen  at the page server; lsn is what to ask for at least
//	slot,   gen remoteGen  a clean copy of that
//	slot,   gen g          written here by Postgres in generation g; lsn is the page's own
//
// The slot may be zeroSlot, which holds zeros without using scratch.
type page struct {
	slot scratch.Slot
	gen  uint32
	lsn  pg.LSN
}

const (
	zeroSlot  = ^scratch.Slot(0)
	remoteGen = ^uint32(0)
)

func (p *page) hasSlot() bool { return p.slot != 0 && p.slot != zeroSlot }

// remoteNeed tells whether the block is only at the page server, and the LSN to ask for.
func (fs *FS) remoteNeed(f *file, b pg.BlockNumber, p *page) (pg.LSN, bool) {
	switch {
	case p.slot != 0:
		return 0, false
	case p.gen == remoteGen:
		return max(p.lsn, fs.cfg.StartLSN), true
	case p.gen == 0 && b < f.bound:
		return fs.cfg.StartLSN, true
	}
	return 0, false
}

func (fs *FS) pageLock(f *file, b pg.BlockNumber) *sync.RWMutex {
	h := (f.id*0x9e3779b97f4a7c15 ^ uint64(b)) * 0xff51afd7ed558ccd
	return &fs.pageLocks[h>>55] // 9 bits: 512 locks
}

// entry gives the block's entry, or nil where the table does not reach. mu is held.
func (f *file) entry(b pg.BlockNumber) (*chunk, *page) {
	if i := int(b / chunkBlocks); i < len(f.chunks) && f.chunks[i] != nil {
		return f.chunks[i], &f.chunks[i].pages[b%chunkBlocks]
	}
	return nil, nil
}

// grow makes the table reach a block.
func (f *file) grow(b pg.BlockNumber) {
	f.mu.RLock()
	c, _ := f.entry(b)
	f.mu.RUnlock()
	if c != nil {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	i := int(b / chunkBlocks)
	if i >= len(f.chunks) {
		f.chunks = append(f.chunks, make([]*chunk, i+1-len(f.chunks))...)
	}
	if f.chunks[i] == nil {
		f.chunks[i] = new(chunk)
	}
}

var pageBuffers = sync.Pool{New: func() any { return new([pg.BlockSize]byte) }}

// remotePage is a block as the page server gave it.
type remotePage struct {
	data []byte // nil: not asked yet
	at   pg.LSN // good for every need up to this
}

func (r remotePage) serves(need pg.LSN) bool { return r.data != nil && need <= r.at }

// contentLocked fills buf (a whole block) with the block's content and tells how many bytes
// at its start are not known to be zero. ok is false if the content has to be brought first.
func (fs *FS) contentLocked(f *file, b pg.BlockNumber, p *page, base remotePage, buf []byte) (n int, need pg.LSN, ok bool, err error) {
	if p.hasSlot() {
		n, err = fs.store.Read(p.slot, buf)
	} else if need, remote := fs.remoteNeed(f, b, p); remote {
		if !base.serves(need) {
			return 0, need, false, nil
		}
		n = copy(buf, base.data)
	}
	clear(buf[n:])
	return n, 0, true, err
}

// read copies what the file holds from off on; fewer bytes only at its end.
func (fs *FS) read(op opContext, f *file, dst []byte, off int64) (int, error) {
	size := f.size.Load()
	if off >= size || off < 0 {
		return 0, nil
	}
	dst = dst[:min(int64(len(dst)), size-off)]
	first, blocks := blockOf(off), int(blockOf(off+int64(len(dst))-1)-blockOf(off))+1
	if f.partial.Load() {
		fs.readAhead(f, first, blocks)
	}
	for done := 0; done < len(dst); {
		b, in := blockOf(off+int64(done)), int((off+int64(done))%pg.BlockSize)
		part := dst[done:min(len(dst), done+pg.BlockSize-in)]
		if err := fs.readBlock(op, f, b, in, part, blocks-int(b-first)); err != nil {
			return done, err
		}
		done += len(part)
	}
	return len(dst), nil
}

func blockOf(off int64) pg.BlockNumber { return pg.BlockNumber(off / pg.BlockSize) }

// readBlock reads a part of one block. want is how many blocks the caller is about to read.
func (fs *FS) readBlock(op opContext, f *file, b pg.BlockNumber, in int, dst []byte, want int) error {
	var base remotePage
	for {
		need, ok, err := fs.readHere(f, b, in, dst, base)
		if ok || err != nil {
			return err
		}
		if base, err = fs.bring(op, f, b, want, need); err != nil {
			return err
		}
	}
}

func (fs *FS) readHere(f *file, b pg.BlockNumber, in int, dst []byte, base remotePage) (need pg.LSN, ok bool, err error) {
	f.mu.RLock()
	defer f.mu.RUnlock()
	c, p := f.entry(b)
	if c == nil {
		p = &page{}
	} else {
		lock := fs.pageLock(f, b)
		lock.RLock()
		defer lock.RUnlock()
		if bit := uint64(1) << (b % chunkBlocks); c.used.Load()&bit == 0 {
			c.used.Or(bit)
		}
	}
	if len(dst) == pg.BlockSize {
		_, need, ok, err = fs.contentLocked(f, b, p, base, dst)
		return need, ok, err
	}
	buf := pageBuffers.Get().(*[pg.BlockSize]byte)
	defer pageBuffers.Put(buf)
	if _, need, ok, err = fs.contentLocked(f, b, p, base, buf[:]); ok && err == nil {
		copy(dst, buf[in:])
	}
	return need, ok, err
}

// write replaces the bytes from off on and grows the file as needed. After an error the
// file holds what was written before it.
func (fs *FS) write(op opContext, f *file, src []byte, off int64) (int, error) {
	if off < 0 || off+int64(len(src)) > maxFileSize {
		return 0, errTooBig
	}
	for done := 0; done < len(src); {
		b, in := blockOf(off+int64(done)), int((off+int64(done))%pg.BlockSize)
		part := src[done:min(len(src), done+pg.BlockSize-in)]
		if err := fs.writeBlock(op, f, b, in, part); err != nil {
			return done, err
		}
		done += len(part)
		f.growTo(off + int64(done))
	}
	return len(src), nil
}

func (f *file) growTo(size int64) {
	f.mu.RLock()
	defer f.mu.RUnlock()
	for {
		old := f.size.Load()
		if old >= size || f.size.CompareAndSwap(old, size) {
			return
		}
	}
}

func (fs *FS) writeBlock(op opContext, f *file, b pg.BlockNumber, in int, src []byte) error {
	var base remotePage
	for {
		f.grow(b)
		need, ok, err := fs.writeHere(f, b, in, src, base)
		if ok || err != nil {
			return err
		}
		// A part of a page that is only at the page server: its rest is needed.
		if base, err = fs.bring(op, f, b, 1, need); err != nil {
			return err
		}
	}
}

func (fs *FS) writeHere(f *file, b pg.BlockNumber, in int, src []byte, base remotePage) (need pg.LSN, ok bool, err error) {
	f.mu.RLock()
	defer f.mu.RUnlock()
	c, p := f.entry(b)
	if c == nil {
		return 0, false, errStale // only a truncation by somebody else can have come between
	}
	lock := fs.pageLock(f, b)
	lock.Lock()
	defer lock.Unlock()
	if len(src) == pg.BlockSize {
		return 0, true, fs.putLocked(f, b, p, src)
	}
	buf := pageBuffers.Get().(*[pg.BlockSize]byte)
	defer pageBuffers.Put(buf)
	n, need, ok, err := fs.contentLocked(f, b, p, base, buf[:])
	if !ok || err != nil {
		return need, false, err
	}
	end := max(n, in+copy(buf[in:], src))
	return 0, true, fs.putLocked(f, b, p, buf[:end])
}

var zeros [pg.BlockSize]byte

// putLocked stores a block as Postgres wrote it. The block's lock is held exclusively.
func (fs *FS) putLocked(f *file, b pg.BlockNumber, p *page, content []byte) error {
	if f.gone {
		return errStale
	}
	if len(content) == pg.BlockSize && bytes.Equal(content, zeros[:]) {
		fs.clearLocked(f, p)
		if f.src != nil {
			p.slot = zeroSlot // not what the page server has
			fs.stampLocked(f, p, nil)
		}
		return nil
	}
	slot := p.slot
	if !p.hasSlot() {
		var err error
		if slot, err = fs.store.Alloc(); err != nil {
			return err
		}
	}
	if err := fs.store.Write(slot, content); err != nil {
		if !p.hasSlot() {
			fs.store.Free(slot)
		}
		return err
	}
	fs.account(f, p, -1)
	p.slot = slot
	fs.stampLocked(f, p, content)
	fs.account(f, p, 1)
	return nil
}

// stampLocked marks a block as written by Postgres now. A sequence gets no LSN, so that it
// stays: WAL is ahead of it by the values that it logs in advance, which would be skipped.
func (fs *FS) stampLocked(f *file, p *page, content []byte) {
	p.lsn = 0
	if f.src != nil && f.src.slru == 0 && len(content) == pg.BlockSize && pagemask.KindOf(content) != pagemask.Sequence {
		p.lsn = pg.PageLSN(content)
	}
	// The generation must not have been closed before the stamp is there: see Advance.
	for p.gen = 0; p.gen != fs.cache.gen.Load(); {
		p.gen = fs.cache.gen.Load()
	}
}

// clearLocked forgets a block's content and where it could be had.
func (fs *FS) clearLocked(f *file, p *page) {
	fs.account(f, p, -1)
	if p.hasSlot() {
		fs.store.Free(p.slot)
	}
	*p = page{}
}

// account counts a block in or out of the cache's figures.
func (fs *FS) account(f *file, p *page, sign int64) {
	switch {
	case f.src == nil || !p.hasSlot():
	case p.gen == remoteGen:
		fs.stats.clean.Add(sign)
	default:
		fs.stats.dirty.Add(sign)
	}
	if sign > 0 && f.src != nil {
		fs.cache.wake(fs)
	}
}

// truncate sets the file's size. What is cut off never shows again, whatever the page
// server has there.
func (fs *FS) truncate(op opContext, f *file, size int64) error {
	if size < 0 || size > maxFileSize {
		return errTooBig
	}
	if err := fs.zeroTail(op, f, size); err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if size < f.size.Load() {
		fs.cutLocked(f, blockOf(size+pg.BlockSize-1))
	}
	f.size.Store(size)
	return nil
}

// zeroTail clears the rest of the block in which the file will end.
func (fs *FS) zeroTail(op opContext, f *file, size int64) error {
	in := int(size % pg.BlockSize)
	if in == 0 || size >= f.size.Load() {
		return nil
	}
	return fs.writeBlock(op, f, blockOf(size), in, zeros[in:])
}

// cutLocked forgets every block from first on.
func (fs *FS) cutLocked(f *file, first pg.BlockNumber) {
	f.bound = min(f.bound, first)
	keep := int((first + chunkBlocks - 1) / chunkBlocks)
	for i := int(first / chunkBlocks); i < len(f.chunks); i++ {
		c := f.chunks[i]
		if c == nil {
			continue
		}
		for j := range c.pages {
			if pg.BlockNumber(i*chunkBlocks+j) >= first {
				fs.clearLocked(f, &c.pages[j])
			}
		}
	}
	if keep < len(f.chunks) {
		clear(f.chunks[keep:])
		f.chunks = f.chunks[:keep]
	}
}

// zero makes a range read as zeros without changing the size.
func (fs *FS) zero(op opContext, f *file, off, length int64) error {
	for end := min(off+length, f.size.Load()); off < end; {
		in := int(off % pg.BlockSize)
		n := min(end-off, int64(pg.BlockSize-in))
		if err := fs.writeBlock(op, f, blockOf(off), in, zeros[:n]); err != nil {
			return err
		}
		off += n
	}
	return nil
}

// release frees everything: nobody can reach the file any more.
func (f *file) release(fs *FS) {
	f.mu.Lock()
	defer f.mu.Unlock()
	fs.cutLocked(f, 0)
	f.gone = true
}
