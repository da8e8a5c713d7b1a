package timeline

import (
	"container/list"
	"context"
	"sync"
	"sync/atomic"

	"github.com/holdfastdb/holdfast/pageserver/layer"
)

// blockCache keeps the blocks that were read last, decompressed: plaintext. A block that
// falls out is wiped once nobody uses it (K2). Reads of one block wait for one load.
type blockCache struct {
	max int64

	mu struct {
		sync.Mutex
		size    int64
		blocks  map[blockID]*list.Element // of *cachedBlock
		lru     list.List                 // most recently used first
		loading map[blockID]*loading
		dropped bool // for good: nothing is kept any more
	}
}

type blockID struct {
	layer uint64
	i     int
}

type cachedBlock struct {
	*layer.Block
	id   blockID
	refs atomic.Int64 // the cache's, and one for each user
}

func (b *cachedBlock) release() {
	if b.refs.Add(-1) == 0 {
		b.Wipe()
	}
}

type loading struct {
	done    chan struct{}
	waiters int64 // who will own a reference; guarded by the cache's mu
	block   *cachedBlock
	err     error
}

func newBlockCache(max int64) *blockCache {
	c := &blockCache{max: max}
	c.mu.blocks = make(map[blockID]*list.Element)
	c.mu.loading = make(map[blockID]*loading)
	return c
}

// get gives a block, which the caller releases. A load goes on if ctx ends.
func (c *blockCache) get(ctx context.Context, id blockID, load func() (*layer.Block, error)) (*cachedBlock, error) {
	c.mu.Lock()
	if e := c.mu.blocks[id]; e != nil {
		c.mu.lru.MoveToFront(e)
		b := e.Value.(*cachedBlock)
		b.refs.Add(1)
		c.mu.Unlock()
		return b, nil
	}
	l := c.mu.loading[id]
	if l == nil {
		l = &loading{done: make(chan struct{})}
		c.mu.loading[id] = l
		go c.load(id, l, load)
	}
	l.waiters++
	c.mu.Unlock()
	select {
	case <-l.done:
		return l.block, l.err
	case <-ctx.Done():
		c.leave(l)
		return nil, ctx.Err()
	}
}

// leave gives up the reference of a waiter that went away.
func (c *blockCache) leave(l *loading) {
	c.mu.Lock()
	defer c.mu.Unlock()
	select {
	case <-l.done:
		if l.block != nil {
			l.block.release()
		}
	default:
		l.waiters--
	}
}

func (c *blockCache) load(id blockID, l *loading, load func() (*layer.Block, error)) {
	b, err := load()
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.mu.loading, id)
	l.err = err
	if err == nil {
		l.block = &cachedBlock{Block: b, id: id}
		l.block.refs.Store(l.waiters + 1)
		c.keepLocked(l.block)
	}
	close(l.done)
}

// keepLocked takes over one reference to b.
func (c *blockCache) keepLocked(b *cachedBlock) {
	if c.mu.dropped {
		b.release()
		return
	}
	c.mu.blocks[b.id] = c.mu.lru.PushFront(b)
	c.mu.size += b.Size()
	for c.mu.size > c.max {
		c.evictLocked(c.mu.lru.Back())
	}
}

func (c *blockCache) evictLocked(e *list.Element) {
	b := c.mu.lru.Remove(e).(*cachedBlock)
	delete(c.mu.blocks, b.id)
	c.mu.size -= b.Size()
	b.release()
}

// drop empties the cache for good, and tells how much that was.
func (c *blockCache) drop() (dropped int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.mu.dropped = true
	dropped = c.mu.lru.Len()
	for e := c.mu.lru.Back(); e != nil; e = c.mu.lru.Back() {
		c.evictLocked(e)
	}
	return dropped
}
