package pgfs

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/holdfastdb/holdfast/internal/pg"
)

// source is where a file's blocks are at the page server.
type source struct {
	path  string         // the file's only right name, relative to the data directory
	rel   pg.RelTag      // the fork they belong to, or
	slru  pg.SLRUKind    // the SLRU area, or
	wal   pg.LSN         // where the WAL segment begins, of the time before the start
	first pg.BlockNumber // the file's first block, in the fork or the area
}

const (
	// fetchTimeout bounds the wait for the page server. Remote retries what may pass.
	fetchTimeout = 60 * time.Second
	// maxFetch is how many blocks one call asks for.
	maxFetch = 64
	// The read-ahead window grows from minAhead blocks to maxAhead while reads are sequential.
	minAhead, maxAhead = 16, 128
	// aheadSlack is how far, in blocks, concurrent sequential reads may be out of order.
	aheadSlack = 32
	// maxAheadFetches bounds the read-ahead calls under way, over all files.
	maxAheadFetches = 16
)

// remoteState is what a file has under way at the page server.
type remoteState struct {
	sync.Mutex
	fetches map[pg.BlockNumber]*fetch // by block
	next    pg.BlockNumber            // where a sequential reader comes next
	window  pg.BlockNumber            // 0: reads are random
	ahead   pg.BlockNumber            // read-ahead was started below this block
}

// fetch is one call to the page server. data and err are set before done is closed.
type fetch struct {
	first pg.BlockNumber
	count int
	at    pg.LSN
	done  chan struct{}
	data  []byte
	err   error
}

// bring gets a block from the page server, along with up to want-1 that follow it. If it
// is here meanwhile, the answer is empty.
func (fs *FS) bring(op opContext, f *file, b pg.BlockNumber, want int, need pg.LSN) (remotePage, error) {
	ft := fs.fetch(f, b, want, need)
	if ft == nil {
		return remotePage{}, nil
	}
	select {
	case <-ft.done:
	default:
		ctx, stop := fs.begin(op, fetchTimeout)
		defer stop()
		select {
		case <-ft.done:
		case <-ctx.Done():
			return remotePage{}, fmt.Errorf("waiting for block %d of %s %w: %w", b, f.src.path, errRemote, fs.cause(ctx))
		}
	}
	if ft.err != nil {
		return remotePage{}, ft.err
	}
	off := int(b-ft.first) * pg.BlockSize
	if off+pg.BlockSize > len(ft.data) {
		return remotePage{}, fmt.Errorf("block %d of %s: the page server has no such block at %s or later", b+f.src.first, f.src.path, ft.at)
	}
	return remotePage{data: ft.data[off : off+pg.BlockSize], at: ft.at}, nil
}

// fetch starts a call for a block and those after it that are missing too, or finds the
// one under way. Nil: the block is not missing any more.
func (fs *FS) fetch(f *file, b pg.BlockNumber, want int, need pg.LSN) *fetch {
	r := &f.remote
	r.Lock()
	defer r.Unlock()
	if ft := r.fetches[b]; ft != nil && ft.at >= need {
		return ft
	}
	need, missing := fs.missing(f, b)
	if !missing {
		return nil
	}
	return fs.fetchLocked(f, b, want, need)
}

func (fs *FS) fetchLocked(f *file, b pg.BlockNumber, want int, need pg.LSN) *fetch {
	r := &f.remote
	ft := &fetch{first: b, count: 1, at: need, done: make(chan struct{})}
	for want = min(want, maxFetch); ft.count < want; ft.count++ {
		next := b + pg.BlockNumber(ft.count)
		lsn, missing := fs.missing(f, next)
		if !missing || r.fetches[next] != nil {
			break
		}
		ft.at = max(ft.at, lsn)
	}
	if r.fetches == nil {
		r.fetches = map[pg.BlockNumber]*fetch{}
	}
	for i := range ft.count {
		r.fetches[b+pg.BlockNumber(i)] = ft
	}
	go fs.run(f, ft)
	return ft
}

// missing tells whether a block within the file is only at the page server.
func (fs *FS) missing(f *file, b pg.BlockNumber) (pg.LSN, bool) {
	f.mu.RLock()
	defer f.mu.RUnlock()
	if int64(b) >= (f.size.Load()+pg.BlockSize-1)/pg.BlockSize {
		return 0, false
	}
	c, p := f.entry(b)
	if c == nil {
		return fs.remoteNeed(f, b, &page{})
	}
	lock := fs.pageLock(f, b)
	lock.RLock()
	defer lock.RUnlock()
	return fs.remoteNeed(f, b, p)
}

func (fs *FS) run(f *file, ft *fetch) {
	ctx, cancel := context.WithTimeout(fs.ctx, fetchTimeout)
	defer cancel()
	ft.data, ft.err = fs.pages(ctx, f.src, ft)
	fs.stats.fetches.Add(1)
	fs.stats.fetched.Add(int64(len(ft.data) / pg.BlockSize))
	close(ft.done) // who waits goes on from ft.data
	for i := 0; i < len(ft.data)/pg.BlockSize; i++ {
		fs.install(f, ft.first+pg.BlockNumber(i), remotePage{data: ft.data[i*pg.BlockSize:][:pg.BlockSize], at: ft.at})
	}
	f.remote.Lock()
	defer f.remote.Unlock()
	for i := range ft.count {
		if b := ft.first + pg.BlockNumber(i); f.remote.fetches[b] == ft {
			delete(f.remote.fetches, b)
		}
	}
}

func (fs *FS) pages(ctx context.Context, s *source, ft *fetch) (data []byte, err error) {
	first := s.first + ft.first
	if s.wal != 0 {
		data, err = fs.cfg.History(ctx, s.wal+pg.LSN(first)*pg.BlockSize, ft.count)
	} else if s.slru != 0 {
		data, err = fs.cfg.Remote.SLRU(ctx, s.slru, uint32(first), ft.count)
	} else {
		data, err = fs.cfg.Remote.Pages(ctx, s.rel, first, ft.count, ft.at)
	}
	if err == nil && (len(data)%pg.BlockSize != 0 || len(data) > ft.count*pg.BlockSize) {
		err = fmt.Errorf("the page server answered with %d bytes, want %d blocks", len(data), ft.count)
	}
	if err != nil {
		return nil, fmt.Errorf("reading blocks %d to %d of %s %w at %s or later: %w",
			first, first+pg.BlockNumber(ft.count)-1, s.path, errRemote, ft.at, err)
	}
	return data, nil
}

// install keeps a fetched block as a clean copy, if it is still wanted: what Postgres wrote
// or cut off meanwhile wins. Failing is fine, the page server still has it.
func (fs *FS) install(f *file, b pg.BlockNumber, r remotePage) {
	if fs.cache.full(fs) || fs.roomLow() {
		return
	}
	f.grow(b)
	f.mu.RLock()
	defer f.mu.RUnlock()
	c, p := f.entry(b)
	if c == nil || f.gone {
		return
	}
	lock := fs.pageLock(f, b)
	lock.Lock()
	defer lock.Unlock()
	need, missing := fs.remoteNeed(f, b, p)
	if !missing || need > r.at {
		return
	}
	slot, err := fs.store.Alloc()
	if err != nil {
		return
	}
	if err := fs.store.Write(slot, r.data); err != nil {
		fs.store.Free(slot)
		return
	}
	p.slot, p.gen = slot, remoteGen // p.lsn stays: what to ask for when the copy is dropped
	fs.account(f, p, 1)
}

// readAhead starts to bring what a sequential reader of a file will want next. The read of
// blocks [b, b+n) is about to happen.
func (fs *FS) readAhead(f *file, b pg.BlockNumber, n int) {
	r := &f.remote
	r.Lock()
	defer r.Unlock()
	end := b + pg.BlockNumber(n)
	sequential := b+aheadSlack >= r.next && b <= r.next+aheadSlack && r.next > 0
	if !sequential || f.src.slru != 0 {
		r.next, r.window, r.ahead = end, 0, 0
		return
	}
	r.next = max(r.next, end)
	r.window = min(max(minAhead, 2*r.window), maxAhead)
	from, to := max(r.ahead, r.next), r.next+r.window
	if from+r.window/2 > to {
		return // enough is under way
	}
	for from < to && fs.aheadFetches.Load() < maxAheadFetches {
		lsn, missing := fs.missing(f, from)
		if !missing || r.fetches[from] != nil {
			from++
			continue
		}
		ft := fs.fetchLocked(f, from, int(to-from), lsn)
		fs.aheadFetches.Add(1)
		go func() {
			<-ft.done
			fs.aheadFetches.Add(-1)
		}()
		from += pg.BlockNumber(ft.count)
	}
	r.ahead = from
}
