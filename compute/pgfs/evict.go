package pgfs

import (
	"maps"
	"sync"
	"sync/atomic"
	"time"

	"github.com/holdfastdb/holdfast/internal/pg"
)

// The eviction rule (invariant C1). Stock WAL lacks things that a page has: command ids, the
// btree's vacuum cycle, hint bits, pages of an index build before they are logged. So a page
// that Postgres wrote may be dropped, and later be asked for at the page server, only when
// nothing that runs can miss them:
//
//   - every transaction that ran at a poll of pg_locks begun after the write has ended;
//   - all WAL that had been inserted when that was seen is on the quorum, so that what those
//     transactions left behind, synchronously or not, is at the page server;
//   - the page bears an LSN, and that is on the quorum: a page without one was never logged, and
//     a sequence's counts as such, since WAL is ahead of it;
//   - the file is an ordinary relation: no unlogged one, no SLRU.
//
// Writes are stamped with a generation. Advance closes the current one; the generation
// before it was closed before this poll began, so this poll's transactions are those that it
// has to wait for.
type evictor struct {
	gen   atomic.Uint32 // the current generation, from 1 on
	limit int64         // blocks
	wakes chan struct{}

	mu struct {
		sync.Mutex
		polls   []poll    // oldest first; those whose transactions still run
		waiting []durable // oldest first; those that wait for the quorum
		safe    uint32    // writes up to this generation may be dropped, once their own LSN is durable
		proof   proof     // of the poll that made safe what it is
		saw     proof     // of the poll that Advance will be told of
		vacuums map[string]uint32
		files   []*file // those with a source
		hand    int     // the next file to look at
	}
}

// poll: the writes up to generation gen wait for the end of running.
type poll struct {
	gen     uint32
	running map[string]struct{}
}

// durable: the writes up to generation gen wait for WAL up to lsn.
type durable struct {
	gen   uint32
	lsn   pg.LSN
	proof proof
}

// cacheEntry is the evictor's part of a file, guarded by evictor.mu.
type cacheEntry struct {
	listed bool
	index  int
}

const (
	// maxPolls bounds what a very long transaction makes us remember.
	maxPolls = 64
	// minPageLSN is below every LSN that a logged page can have: WAL starts in the second segment.
	minPageLSN = pg.WALSegmentSize
	// evictPause is how long the evictor waits after a round that found nothing.
	evictPause = time.Second
)

func (e *evictor) init(limit int64) {
	e.gen.Store(1)
	e.limit = limit
	e.wakes = make(chan struct{}, 1)
}

// Advance is told, now and then, which virtual transaction ids hold locks (pg_locks), and
// Postgres's insert position (pg_current_wal_insert_lsn()) read after that; both from a query
// that began after the previous call returned. It lets pages that Postgres wrote go. The map
// is the file system's afterwards.
func (fs *FS) Advance(running map[string]struct{}, insert pg.LSN) {
	e := &fs.cache
	e.mu.Lock()
	defer e.mu.Unlock()
	closed := e.gen.Load()
	if closed == remoteGen-1 {
		return // 2^32 polls: from here on nothing that is written leaves
	}
	e.gen.Add(1)
	ended := 0
	for ended < len(e.mu.polls) && disjoint(e.mu.polls[ended].running, running) {
		ended++
	}
	// What a poll saw still runs at every later poll until it ends, so the polls end in order.
	if ended > 0 {
		e.mu.waiting = append(e.mu.waiting, durable{gen: e.mu.polls[ended-1].gen, lsn: insert, proof: e.mu.saw})
		e.mu.polls = append([]poll(nil), e.mu.polls[ended:]...)
	}
	e.mu.polls = append(e.mu.polls, poll{gen: closed - 1, running: running})
	if n := len(e.mu.polls); n > maxPolls { // waiting for both is more than is needed
		maps.Copy(e.mu.polls[n-2].running, running)
		e.mu.polls[n-2].gen = closed - 1
		e.mu.polls = e.mu.polls[:n-1]
	}
	e.settleLocked(fs.committed())
	select {
	case e.wakes <- struct{}{}:
	default:
	}
}

func disjoint(a, b map[string]struct{}) bool {
	if len(a) > len(b) {
		a, b = b, a
	}
	for k := range a {
		if _, ok := b[k]; ok {
			return false
		}
	}
	return true
}

// settleLocked moves the safe generation as far as the quorum's LSN allows.
func (e *evictor) settleLocked(committed pg.LSN) {
	done := 0
	for done < len(e.mu.waiting) && e.mu.waiting[done].lsn <= committed {
		e.mu.safe, e.mu.proof = e.mu.waiting[done].gen, e.mu.waiting[done].proof
		done++
	}
	e.mu.waiting = e.mu.waiting[done:]
}

// committed is the end of the WAL on the quorum; without a WAL nothing is.
func (fs *FS) committed() pg.LSN {
	if fs.cfg.WAL == nil {
		return pg.InvalidLSN
	}
	return fs.cfg.WAL.Committed()
}

// list tells the evictor of a file with a source.
func (e *evictor) list(f *file) {
	e.mu.Lock()
	defer e.mu.Unlock()
	f.cached = cacheEntry{listed: true, index: len(e.mu.files)}
	e.mu.files = append(e.mu.files, f)
}

// forget is the reverse of list.
func (e *evictor) forget(f *file) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if !f.cached.listed {
		return
	}
	last := len(e.mu.files) - 1
	e.mu.files[f.cached.index] = e.mu.files[last]
	e.mu.files[f.cached.index].cached.index = f.cached.index
	e.mu.files[last] = nil
	e.mu.files = e.mu.files[:last]
	f.cached.listed = false
}

func (e *evictor) over(fs *FS) int64 {
	return fs.stats.clean.Load() + fs.stats.dirty.Load() - e.limit
}

// wake starts the evictor if the cache is over its bound.
func (e *evictor) wake(fs *FS) {
	if e.over(fs) <= 0 {
		return
	}
	select {
	case e.wakes <- struct{}{}:
	default:
	}
}

// full tells that no clean copies should be added: the evictor does not keep up, or
// Postgres has written more than the bound.
func (e *evictor) full(fs *FS) bool { return e.over(fs) > e.limit/8 }

func (fs *FS) evictLoop() {
	var warned time.Time
	for {
		select {
		case <-fs.ctx.Done():
			return
		case <-fs.cache.wakes:
		}
		if fs.cache.over(fs) <= 0 || fs.sweep() > 0 {
			continue
		}
		if dirty := fs.stats.dirty.Load(); dirty > fs.cache.limit && time.Since(warned) > time.Minute {
			warned = time.Now()
			fs.cfg.Log.Warn("what Postgres wrote and may still need exceeds the local cache's bound; it stays",
				"dirty_pages", dirty, "bound_pages", fs.cache.limit)
		}
		select {
		case <-fs.ctx.Done():
			return
		case <-time.After(evictPause):
		}
	}
}

// sweep goes round the files, as a clock's hand, until the cache is a sixteenth below its
// bound: a block that was read since the last round is spared once. It tells how many went.
func (fs *FS) sweep() int64 {
	e := &fs.cache
	committed := fs.committed()
	e.mu.Lock()
	e.settleLocked(committed)
	safe, total := e.mu.safe, 2*len(e.mu.files)
	e.mu.Unlock()
	var freed int64
	for range total {
		goal := e.over(fs) + e.limit/16
		if goal <= 0 {
			break
		}
		f := e.nextFile()
		if f == nil {
			break
		}
		freed += fs.evictFrom(f, goal, safe, committed)
	}
	return freed
}

func (e *evictor) nextFile() *file {
	e.mu.Lock()
	defer e.mu.Unlock()
	if len(e.mu.files) == 0 {
		return nil
	}
	e.mu.hand = (e.mu.hand + 1) % len(e.mu.files)
	return e.mu.files[e.mu.hand]
}

// cleanBatch is how many copies dropClean gives up at a time: 32 MiB.
const cleanBatch = 4096

// dropClean gives up copies of what the page server has, for room on a full disk, and tells
// how many.
func (fs *FS) dropClean() (freed int64) {
	e := &fs.cache
	e.mu.Lock()
	total := 2 * len(e.mu.files) // what was read lately is spared in the first round
	e.mu.Unlock()
	for range total {
		f := e.nextFile()
		if f == nil || freed >= cleanBatch || fs.stats.clean.Load() == 0 {
			break
		}
		freed += fs.evictFrom(f, cleanBatch-freed, 0, pg.InvalidLSN)
	}
	return freed
}

func (fs *FS) evictFrom(f *file, goal int64, safe uint32, committed pg.LSN) (freed int64) {
	for i := 0; freed < goal; i++ {
		n, more := fs.evictChunk(f, i, safe, committed)
		freed += n
		if !more {
			break
		}
	}
	return freed
}

func (fs *FS) evictChunk(f *file, i int, safe uint32, committed pg.LSN) (freed int64, more bool) {
	c, more := f.chunk(i)
	if c == nil {
		return 0, more
	}
	spared := c.used.Swap(0)
	var same *agreed
	if fs.verify != nil {
		same = fs.agree(f, pg.BlockNumber(i*chunkBlocks), c, spared, safe, committed)
	}
	// A chunk that was cut off meanwhile has nothing that could leave.
	f.mu.RLock()
	defer f.mu.RUnlock()
	for j := range c.pages {
		if spared&(1<<j) == 0 && fs.evictPage(f, pg.BlockNumber(i*chunkBlocks+j), &c.pages[j], safe, committed, same) {
			freed++
		}
	}
	return freed, true
}

// chunk gives the entries of a range of blocks, if there are any, and tells whether there may be
// others after them.
func (f *file) chunk(i int) (c *chunk, more bool) {
	f.mu.RLock()
	defer f.mu.RUnlock()
	if i >= len(f.chunks) {
		return nil, false
	}
	return f.chunks[i], true
}

func (fs *FS) evictPage(f *file, b pg.BlockNumber, p *page, safe uint32, committed pg.LSN, same *agreed) bool {
	lock := fs.pageLock(f, b)
	lock.Lock()
	defer lock.Unlock()
	if !p.hasSlot() {
		return false
	}
	ask := p.lsn
	if p.gen != remoteGen {
		if !mayLeave(f, p, safe, committed) || fs.verify != nil && same[b%chunkBlocks] != *p {
			return false
		}
		// Postgres leaves some pages' own LSN behind what WAL did to them: ask for all that
		// is durable, which includes everything up to the write and more.
		ask = committed
		fs.stats.evicted.Add(1)
		f.partial.Store(true)
	}
	fs.account(f, p, -1)
	fs.store.Free(p.slot)
	*p = page{gen: remoteGen, lsn: ask}
	return true
}

// mayLeave is the eviction rule for a page that Postgres wrote. The page's lock is held.
func mayLeave(f *file, p *page, safe uint32, committed pg.LSN) bool {
	return !f.keep.Load() && p.gen <= safe && p.lsn >= minPageLSN && p.lsn <= committed
}
