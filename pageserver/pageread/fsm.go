package pageread

import (
	"context"
	"errors"
	"fmt"
	"math/bits"
	"slices"

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
// value is taken from the heap page when the map page is read. It follows until the map page
// is replaced or cut: an image that a history is folded into keeps the followers beside the
// page. The slots above it say "plenty": a search that is misled corrects them (fsm_search),
// one that is never led there cannot.

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

// heapBlock is the heap block of a slot of a bottom page: the inverse of redo.FSMLocation.
func heapBlock(bottom pg.BlockNumber, slot int) pg.BlockNumber {
	group, child := (bottom-1)/fsmStride, (bottom-1)%fsmStride-1
	return (group*fsmSlots+child)*fsmSlots + pg.BlockNumber(slot)
}

// followersSize is the length of the bit map of a folded map page's followers.
const followersSize = (fsmSlots + 7) / 8

func (b *builder) isMap() bool {
	return b.key.Kind == keyspace.KindRelPage && b.key.Rel.Fork == pg.FSMFork
}

// addFollower notes that a bottom page's slot follows its heap block. An upper page's slot,
// which stands for a map page, says "plenty" from here on.
func (b *builder) addFollower(what pg.BlockNumber) error {
	if !b.isMap() {
		return errors.New("a change of a free space map slot under another page")
	}
	if !isBottom(b.key.Block) {
		slot, err := upperSlot(b.key.Block, what)
		if err != nil {
			return err
		}
		return redo.SetFreeSpace(b.page, slot, plenty)
	}
	at, slot := redo.FSMLocation(what)
	if at != b.key.Block {
		return fmt.Errorf("the slot of heap block %d is not on map page %d", what, b.key.Block)
	}
	if b.follow == nil {
		b.follow = make([]byte, followersSize)
	}
	b.follow[slot/8] |= 1 << (slot % 8)
	return nil
}

// takeFollowers adds the followers that an image was folded with.
func (b *builder) takeFollowers(slots []byte) error {
	if !isBottom(b.key.Block) || slots[followersSize-1]>>(fsmSlots%8) != 0 {
		return errors.New("the image names slots that the map page does not have")
	}
	b.follow = slices.Clone(slots)
	return nil
}

// followHeap sets the slots that follow the heap.
func (b *builder) followHeap(ctx context.Context, src Source, lsn pg.LSN) error {
	heap := pg.RelTag{RelFileNode: b.key.Rel.RelFileNode, Fork: pg.MainFork}
	var page []byte
	for i, set := range b.follow {
		for ; set != 0; set &= set - 1 {
			if page == nil {
				page = make([]byte, pg.BlockSize)
			}
			slot := 8*i + bits.TrailingZeros8(set)
			block := heapBlock(b.key.Block, slot)
			free, err := heapFree(ctx, src, keyspace.RelPage(heap, block), lsn, page)
			if err != nil {
				return err
			}
			if err := redo.SetFreeSpace(b.page, slot, free); err != nil {
				return err
			}
		}
	}
	return ctx.Err()
}

// heapFree is the free space of a heap page, for which page is room to make it.
func heapFree(ctx context.Context, src Source, key keyspace.Key, lsn pg.LSN, page []byte) (free int, err error) {
	if n, ok := src.(Noter); ok {
		if free, ok := n.Noted(ctx, key, lsn); ok {
			return free, nil
		}
	}
	h, err := src.Get(ctx, key, lsn)
	if err != nil {
		return 0, errors.Join(errSource, err)
	}
	// A heap page that cannot be made offers no room; reading it fails by itself. One
	// without versions was truncated away.
	if !h.Exists() || Build(ctx, src, key, &h, lsn, page) != nil {
		return 0, nil
	}
	free = redo.HeapFreeSpace(page)
	noteFree(src, key, lsn, free)
	return free, nil
}

func noteFree(src Source, key keyspace.Key, lsn pg.LSN, free int) {
	if n, ok := src.(Noter); ok {
		n.Note(key, lsn, free)
	}
}
