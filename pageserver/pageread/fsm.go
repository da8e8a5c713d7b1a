package pageread

import (
	"errors"
	"fmt"

	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/pageserver/keyspace"
	"github.com/holdfastdb/holdfast/pageserver/redo"
)

// The free space map is a hint: PostgreSQL does not log it, and checks each answer that it
// gives. A stale map costs time, a missing one space. Redo on a standby stores a heap page's
// free space in its bottom-level slot and leaves the upper levels alone, which makes the map
// useless to a server that starts from it, until a vacuum.
//
// Here, once a record changed a heap block's free space, its slot *follows* the block: the
// value is taken from the heap page when the map page is read. The slots above it say "plenty":
// a search that is misled corrects them (fsm_search), one that is never led there cannot.

// Shape of the map's tree (fsm_internals.h): physical pages are numbered depth first.
const (
	fsmSlots  = 4069         // SlotsPerFSMPage
	fsmStride = fsmSlots + 1 // a level-1 page and its children
	plenty    = pg.BlockSize // the largest category
)

// FSMAbove lists the map pages above a bottom-level one, each with the slot that leads down.
func FSMAbove(bottom pg.BlockNumber) [2]struct {
	Page  pg.BlockNumber
	Child pg.BlockNumber
} {
	group := (bottom - 1) / fsmStride
	mid := 1 + group*fsmStride
	return [2]struct{ Page, Child pg.BlockNumber }{{mid, bottom}, {0, mid}}
}

// upperSlot is the slot of an upper map page that stands for a child page.
func upperSlot(page, child pg.BlockNumber) (int, error) {
	switch {
	case page == 0 && child >= 1 && (child-1)%fsmStride == 0 && (child-1)/fsmStride < fsmSlots:
		return int((child - 1) / fsmStride), nil
	case page != 0 && (page-1)%fsmStride == 0 && child > page && child-page <= fsmSlots:
		return int(child - page - 1), nil
	}
	return 0, fmt.Errorf("map page %d is not above map page %d", page, child)
}

func isBottom(page pg.BlockNumber) bool { return page != 0 && (page-1)%fsmStride != 0 }

// followHeap sets the slots that follow what they stand for.
func (b *builder) followHeap() error {
	if len(b.follow) == 0 {
		return nil
	}
	if b.key.Kind != keyspace.KindRelPage || b.key.Rel.Fork != pg.FSMFork {
		return errors.New("a change of a free space map slot under another page")
	}
	if !isBottom(b.key.Block) {
		for child := range b.follow {
			slot, err := upperSlot(b.key.Block, child)
			if err != nil {
				return err
			}
			if err := redo.SetFreeSpace(b.page, slot, plenty); err != nil {
				return err
			}
		}
		return nil
	}
	return b.followBlocks()
}

func (b *builder) followBlocks() error {
	heap := pg.RelTag{RelFileNode: b.key.Rel.RelFileNode, Fork: pg.MainFork}
	page := make([]byte, pg.BlockSize)
	for block := range b.follow {
		at, slot := redo.FSMLocation(block)
		if at != b.key.Block {
			return fmt.Errorf("the slot of heap block %d is not on map page %d", block, b.key.Block)
		}
		free := 0
		h, err := b.src.Get(b.ctx, keyspace.RelPage(heap, block), b.lsn)
		if err != nil {
			return errors.Join(errSource, err)
		}
		// A heap page that cannot be made offers no room; reading it fails by itself. One
		// without versions was truncated away.
		if h.Exists() && Build(b.ctx, b.src, keyspace.RelPage(heap, block), &h, b.lsn, page) == nil {
			free = redo.HeapFreeSpace(page)
		}
		if err := redo.SetFreeSpace(b.page, slot, free); err != nil {
			return err
		}
	}
	return b.ctx.Err()
}
