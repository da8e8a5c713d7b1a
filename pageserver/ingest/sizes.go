package ingest

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/pageserver/change"
	"github.com/holdfastdb/holdfast/pageserver/keyspace"
	"github.com/holdfastdb/holdfast/pageserver/redo"
	"github.com/holdfastdb/holdfast/pageserver/timeline"
)

// relation is what is known of a fork.
type relation struct {
	exists bool
	blocks uint32
	// grave is how many pages of an earlier life would show if it came back. If it exists they
	// are hidden; in a copy of a database not by tombstones, so that its grave is still stored.
	// Then it is known here only since the copy was made: drop looks.
	grave uint32
}

// ParseSize reads a RelSize or Dropped value.
func ParseSize(v *timeline.Value) (uint32, error) {
	if len(v.Data) != 4 {
		return 0, fmt.Errorf("a relation size of %d bytes at %v, want 4", len(v.Data), v.LSN)
	}
	return binary.LittleEndian.Uint32(v.Data), nil
}

func (c *Core) lookSize(key keyspace.Key) (size uint32, exists bool, err error) {
	h, err := c.look.Get(c.ctx, key, c.last)
	if err != nil || h.Base == nil {
		return 0, false, err
	}
	size, err = ParseSize(h.Base)
	return size, true, err
}

// relation finds a fork. What is not cached was not changed since the last Take.
func (c *Core) relation(tag pg.RelTag) (r relation, err error) {
	if r, ok := c.sizes[tag]; ok {
		return r, nil
	}
	if r.blocks, r.exists, err = c.lookSize(keyspace.RelSize(tag)); err != nil {
		return r, err
	}
	if !r.exists {
		if r.grave, _, err = c.lookSize(keyspace.Dropped(tag)); err != nil {
			return r, err
		}
	}
	c.sizes[tag] = r
	return r, nil
}

// resize stores a fork's new size, and makes it if there is none.
func (c *Core) resize(tag pg.RelTag, r relation, blocks uint32) error {
	if !r.exists && r.grave > 0 {
		if err := c.bury(tag, 0, r.grave); err != nil {
			return err
		}
		c.put(keyspace.Dropped(tag), timeline.Tombstone, nil)
		r.grave = 0
	}
	c.put(keyspace.RelSize(tag), timeline.Image, c.u32(blocks))
	c.sizes[tag] = relation{exists: true, blocks: blocks, grave: r.grave}
	return nil
}

// maxZeroed bounds for how many pages one extension stores that they are zeros. That needs no
// telling (no version means zeros), but a page without a base never gets an image.
const maxZeroed = 32

// extend makes sure that a block is inside its relation. isBase tells that the record makes
// the block's page from nothing.
func (c *Core) extend(tag pg.RelTag, block pg.BlockNumber, isBase bool) error {
	r, err := c.relation(tag)
	if err != nil || r.exists && uint32(block) < r.blocks {
		return err
	}
	if err := c.resize(tag, r, uint32(block)+1); err != nil {
		return err
	}
	for b := max(r.blocks, uint32(block)-min(uint32(block), maxZeroed)); b <= uint32(block); b++ {
		if b < uint32(block) || !isBase {
			c.put(keyspace.RelPage(tag, pg.BlockNumber(b)), timeline.Init, change.ZeroPage)
		}
	}
	return nil
}

// create makes an empty fork if there is none.
func (c *Core) create(tag pg.RelTag) error {
	r, err := c.relation(tag)
	if err != nil || r.exists {
		return err
	}
	return c.resize(tag, r, 0)
}

// bury hides the pages [from, to) of a fork.
func (c *Core) bury(tag pg.RelTag, from, to uint32) error {
	for b := from; b < to; b++ {
		c.put(keyspace.RelPage(tag, pg.BlockNumber(b)), timeline.Tombstone, nil)
		if err := c.stage(); err != nil {
			return err
		}
	}
	return nil
}

// truncate cuts a fork; one that is as short already, or absent, stays as it is.
func (c *Core) truncate(tag pg.RelTag, blocks uint32) error {
	r, err := c.relation(tag)
	if err != nil || !r.exists || r.blocks <= blocks {
		return err
	}
	if err := c.bury(tag, blocks, r.blocks); err != nil {
		return err
	}
	c.forgetMarks(tag)
	return c.resize(tag, r, blocks)
}

func (c *Core) drop(tag pg.RelTag) error {
	r, err := c.relation(tag)
	if err != nil || !r.exists {
		return err
	}
	stored, _, err := c.lookSize(keyspace.Dropped(tag))
	if err != nil {
		return err
	}
	grave := max(r.blocks, r.grave, stored)
	c.put(keyspace.RelSize(tag), timeline.Tombstone, nil)
	if grave > 0 {
		c.put(keyspace.Dropped(tag), timeline.Image, c.u32(grave))
	}
	c.sizes[tag] = relation{grave: grave}
	return c.stage()
}

func (c *Core) dropAll(rels []pg.RelFileNode) error {
	for _, rel := range rels {
		for fork := pg.MainFork; fork <= pg.InitFork; fork++ {
			if err := c.drop(pg.RelTag{RelFileNode: rel, Fork: fork}); err != nil {
				return err
			}
		}
	}
	if len(rels) > 0 {
		clear(c.marks)
	}
	return nil
}

// smgr is smgr_redo.
func (c *Core) smgr() error {
	const create = 0x10
	f := c.main()
	switch c.rec.Info & infoMask {
	case create:
		tag := pg.RelTag{RelFileNode: f.relFileNode()}
		fork := f.u32()
		if f.bad {
			return errShort
		}
		if fork > uint32(pg.InitFork) {
			return fmt.Errorf("fork %d", fork)
		}
		tag.Fork = pg.ForkNumber(fork)
		return c.create(tag)
	case smgrTruncate:
		blocks := f.u32()
		rel := f.relFileNode()
		flags := f.u32()
		if f.bad {
			return errShort
		}
		return c.smgrTruncate(rel, pg.BlockNumber(blocks), flags)
	}
	return fmt.Errorf("unknown kind %#02x", c.rec.Info&infoMask)
}

// A truncation and its flags (storage_xlog.h).
const (
	smgrTruncate = 0x20

	truncateHeap = 1
	truncateVM   = 2
	truncateFSM  = 4
)

func (c *Core) smgrTruncate(rel pg.RelFileNode, blocks pg.BlockNumber, flags uint32) error {
	if blocks == invalidBlock {
		return errors.New("truncation to no valid block")
	}
	main := pg.RelTag{RelFileNode: rel}
	if err := c.create(main); err != nil {
		return err
	}
	if flags&truncateHeap != 0 {
		if err := c.truncate(main, uint32(blocks)); err != nil {
			return err
		}
	}
	if flags&truncateFSM != 0 {
		page, slot := redo.FSMLocation(blocks)
		if err := c.truncateMap(pg.RelTag{RelFileNode: rel, Fork: pg.FSMFork}, page, slot > 0); err != nil {
			return err
		}
		clear(c.marks)
	}
	if flags&truncateVM != 0 {
		page := redo.VMBlock(blocks)
		partly := blocks > 0 && redo.VMBlock(blocks-1) == page
		return c.truncateMap(pg.RelTag{RelFileNode: rel, Fork: pg.VMFork}, page, partly)
	}
	return nil
}

// truncateMap cuts a map after (partly) or before the page that stands for the first block
// cut off. What that page says of blocks cut off is cleared when it is read.
func (c *Core) truncateMap(tag pg.RelTag, page pg.BlockNumber, partly bool) error {
	r, err := c.relation(tag)
	if err != nil || !r.exists || r.blocks <= uint32(page) {
		return err
	}
	if partly {
		c.put(keyspace.RelPage(tag, page), timeline.Delta, c.record())
		page++
	}
	return c.truncate(tag, uint32(page))
}
