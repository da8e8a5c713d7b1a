package timeline

import (
	"container/list"
	"slices"
	"sync"

	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/pageserver/keyspace"
)

// hotCache keeps images of keys that had very many changes when they were read: plaintext.
// The next read needs only the changes since. An image stands for all versions up to its
// LSN, which are complete: so it stays right whatever comes or is compacted later.
type hotCache struct {
	max int64

	mu struct {
		sync.Mutex
		size    int64
		images  map[keyspace.Key]*list.Element // of hotImage
		lru     list.List                      // most recently used first
		dropped bool
	}
}

type hotImage struct {
	key  keyspace.Key
	lsn  pg.LSN
	data []byte // owned by the cache, and wiped when it falls out
}

func newHotCache(max int64) *hotCache {
	c := &hotCache{max: max}
	c.mu.images = make(map[keyspace.Key]*list.Element)
	return c
}

// get gives a copy of the key's image, if there is one at or below lsn.
func (c *hotCache) get(key keyspace.Key, lsn pg.LSN) *Value {
	c.mu.Lock()
	defer c.mu.Unlock()
	e := c.mu.images[key]
	if e == nil || e.Value.(hotImage).lsn > lsn {
		return nil
	}
	c.mu.lru.MoveToFront(e)
	image := e.Value.(hotImage)
	return &Value{LSN: image.lsn, Kind: Image, Data: slices.Clone(image.data)}
}

// keep takes a copy of an image, unless there is a newer one.
func (c *hotCache) keep(key keyspace.Key, v *Value) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if e := c.mu.images[key]; c.mu.dropped || e != nil && e.Value.(hotImage).lsn >= v.LSN {
		return
	} else if e != nil {
		c.evictLocked(e)
	}
	c.mu.images[key] = c.mu.lru.PushFront(hotImage{key, v.LSN, slices.Clone(v.Data)})
	c.mu.size += int64(len(v.Data))
	for c.mu.size > c.max {
		c.evictLocked(c.mu.lru.Back())
	}
}

func (c *hotCache) evictLocked(e *list.Element) {
	image := c.mu.lru.Remove(e).(hotImage)
	delete(c.mu.images, image.key)
	c.mu.size -= int64(len(image.data))
	clear(image.data)
}

// drop empties the cache for good, and tells how much that was.
func (c *hotCache) drop() (dropped int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.mu.dropped = true
	dropped = c.mu.lru.Len()
	for e := c.mu.lru.Back(); e != nil; e = c.mu.lru.Back() {
		c.evictLocked(e)
	}
	return dropped
}
