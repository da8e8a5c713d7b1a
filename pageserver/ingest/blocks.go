package ingest

import (
	"errors"
	"fmt"

	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/internal/walrec"
	"github.com/holdfastdb/holdfast/pageserver/change"
	"github.com/holdfastdb/holdfast/pageserver/keyspace"
	"github.com/holdfastdb/holdfast/pageserver/pageread"
	"github.com/holdfastdb/holdfast/pageserver/redo"
	"github.com/holdfastdb/holdfast/pageserver/timeline"
)

// blocks files the record under each block that it names. Whole images become pages at
// once: a record may carry 32 of them, too much to keep 32 times.
func (c *Core) blocks() error {
	for i := range c.rec.Blocks {
		b := &c.rec.Blocks[i]
		if b.Rel.Fork > pg.InitFork {
			return fmt.Errorf("block reference %d is to fork %d", b.ID, b.Rel.Fork)
		}
		if b.Block == invalidBlock {
			return fmt.Errorf("block reference %d is to no valid block of %v", b.ID, b.Rel)
		}
		if c.rec.RmID == rmXLOG && !b.ApplyImage {
			switch c.rec.Info & infoMask {
			case xlogFPIForHint:
				continue // written without an image when full_page_writes is off: changes nothing
			case xlogFPI:
				return errors.New("no page image")
			}
		}
		if err := c.extend(b.Rel, b.Block, b.ApplyImage || b.WillInit); err != nil {
			return err
		}
		if err := c.block(b); err != nil {
			return err
		}
	}
	return nil
}

const invalidBlock pg.BlockNumber = 0xFFFFFFFF

func (c *Core) block(b *walrec.Block) error {
	key := keyspace.RelPage(b.Rel, b.Block)
	switch {
	case b.ApplyImage:
		page := c.alloc(pg.BlockSize)
		clear(page)
		if err := redo.ApplyBlock(b.Rel, b.Block, page, c.rec); err != nil {
			return err
		}
		c.put(key, timeline.Image, page)
		c.forgetMarks(b.Rel)
	case b.WillInit:
		c.put(key, timeline.Init, c.record())
	default:
		c.put(key, timeline.Delta, c.record())
	}
	return nil
}

// heap also files what heap records change without naming it: bits of the visibility map,
// and that the free space map is to follow the block.
func (c *Core) heap() error {
	const opMask, rewrite = 0x70, 0x00 // of rmHeap2: XLOG_HEAP2_REWRITE
	if c.rec.RmID == rmHeap2 && c.rec.Info&opMask == rewrite {
		return c.rewrite()
	}
	if err := c.blocks(); err != nil {
		return err
	}
	clears, err := redo.ImpliedVM(c.rec)
	if err != nil {
		return err
	}
	for _, v := range clears {
		tag := pg.RelTag{RelFileNode: v.Rel, Fork: pg.VMFork}
		block := redo.VMBlock(v.Heap)
		if err := c.extend(tag, block, false); err != nil {
			return err
		}
		data := c.alloc(change.ClearVMSize)
		change.PutClearVM(data, v.Heap, v.Bits)
		c.put(keyspace.RelPage(tag, block), timeline.Delta, data)
	}
	if b := redo.FreeSpaceBlock(c.rec); b != nil && b.Rel.Fork == pg.MainFork {
		return c.followFreeSpace(b.Rel.RelFileNode, b.Block)
	}
	return nil
}

// A mark remembers that a slot of the free space map follows its heap block already. To
// forget marks costs repeated entries; to keep one too long makes a slot stale.
type mark struct {
	rel   pg.RelFileNode
	block pg.BlockNumber
}

func (c *Core) followFreeSpace(rel pg.RelFileNode, heap pg.BlockNumber) error {
	m := mark{rel, heap}
	if _, ok := c.marks[m]; ok {
		return nil
	}
	if len(c.marks) >= maxMarks {
		clear(c.marks)
	}
	c.marks[m] = struct{}{}
	tag := pg.RelTag{RelFileNode: rel, Fork: pg.FSMFork}
	bottom, _ := redo.FSMLocation(heap)
	if err := c.extend(tag, bottom, false); err != nil {
		return err
	}
	c.follow(tag, bottom, heap)
	upper := mark{rel, bottom | 1<<31} // heap blocks of that number would need a map of 2^31 pages
	if _, ok := c.marks[upper]; ok {
		return nil
	}
	c.marks[upper] = struct{}{}
	for _, u := range pageread.FSMAbove(bottom) {
		c.follow(tag, u.Page, u.Child)
	}
	return nil
}

func (c *Core) follow(tag pg.RelTag, page, what pg.BlockNumber) {
	data := c.alloc(change.FollowSize)
	change.PutFollow(data, what)
	c.put(keyspace.RelPage(tag, page), timeline.Delta, data)
}

// forgetMarks is for when a map's pages are replaced or cut.
func (c *Core) forgetMarks(tag pg.RelTag) {
	if tag.Fork == pg.FSMFork && len(c.marks) > 0 {
		clear(c.marks)
	}
}
