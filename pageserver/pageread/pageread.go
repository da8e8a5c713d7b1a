// Package pageread makes a page as of an LSN from what the timeline holds of it: an image or
// nothing, then the changes since, replayed by redo.
//
// Every page equals what PostgreSQL's own recovery would have at that LSN (invariant P1), or
// the read fails and says which record of which page could not be applied. The one exception
// is the free space map, which is a hint to PostgreSQL and not described by WAL: see fsm.go.
package pageread

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/internal/walrec"
	"github.com/holdfastdb/holdfast/pageserver/change"
	"github.com/holdfastdb/holdfast/pageserver/keyspace"
	"github.com/holdfastdb/holdfast/pageserver/redo"
	"github.com/holdfastdb/holdfast/pageserver/timeline"
)

// Source is where histories come from: a timeline.
type Source interface {
	Get(ctx context.Context, key keyspace.Key, lsn pg.LSN) (timeline.History, error)
}

// A Noter is a Source that keeps what was found out of heap pages for the maps that follow them.
// timeline.Timeline says what the two mean.
type Noter interface {
	Note(key keyspace.Key, lsn pg.LSN, value int)
	Noted(ctx context.Context, key keyspace.Key, lsn pg.LSN) (value int, ok bool)
}

// An Error says which page could not be made.
type Error struct {
	Key keyspace.Parsed
	LSN pg.LSN
	Err error
}

func (e *Error) Error() string {
	if e.Key.Kind == keyspace.KindSLRUPage {
		return fmt.Sprintf("page %d of %s at %v: %v", e.Key.Page, e.Key.SLRU.Dir(), e.LSN, e.Err)
	}
	return fmt.Sprintf("block %d of %v at %v: %v", e.Key.Block, e.Key.Rel, e.LSN, e.Err)
}

func (e *Error) Unwrap() error { return e.Err }

// Page fills page, 8 KiB, with the page that key names as of lsn. A page without any
// version is zeros: whether it exists at all is the caller's knowledge.
func Page(ctx context.Context, src Source, key keyspace.Key, lsn pg.LSN, page []byte) error {
	h, err := src.Get(ctx, key, lsn)
	if err != nil {
		return err
	}
	if err := Build(ctx, src, key, &h, lsn, page); err != nil {
		return err
	}
	if k, err := keyspace.Parse(key); err == nil && k.Kind == keyspace.KindRelPage && k.Rel.Fork == pg.MainFork {
		noteFree(src, key, lsn, redo.HeapFreeSpace(page)) // of an index's page nobody asks
	}
	return nil
}

// Build fills page from a history that was read already. src is asked for other pages, on
// which free space map pages depend, as of lsn.
func Build(ctx context.Context, src Source, key keyspace.Key, h *timeline.History, lsn pg.LSN, page []byte) error {
	k, err := keyspace.Parse(key)
	if err != nil {
		return err
	}
	if len(page) != pg.BlockSize {
		return fmt.Errorf("a page has %d bytes, not %d", pg.BlockSize, len(page))
	}
	if k.Kind != keyspace.KindRelPage && k.Kind != keyspace.KindSLRUPage {
		return fmt.Errorf("key %x is not that of a page", key[:])
	}
	b := builder{key: k, page: page}
	err = b.replay(h)
	if err == nil {
		err = b.followHeap(ctx, src, lsn)
	}
	switch {
	case err == nil, ctx.Err() != nil, errors.Is(err, errSource):
		return err
	}
	return &Error{k, lsn, err}
}

// Fold makes one image of a history: what Build reads as the history's base in its place. It
// is a page, and for a free space map page that follows the heap, the slots that do.
func Fold(key keyspace.Key, h *timeline.History) ([]byte, error) {
	k, err := keyspace.Parse(key)
	if err != nil {
		return nil, err
	}
	if k.Kind != keyspace.KindRelPage && k.Kind != keyspace.KindSLRUPage {
		return nil, fmt.Errorf("key %x is not that of a page", key[:])
	}
	b := builder{key: k, page: make([]byte, pg.BlockSize)}
	if err := b.replay(h); err != nil {
		return nil, err
	}
	return append(b.page, b.follow...), nil
}

// errSource marks an error of the timeline, not of the page.
var errSource = errors.New("reading a page that another depends on")

type builder struct {
	key  keyspace.Parsed
	page []byte

	follow []byte // of a bottom free space map page: a bit for each slot that follows its heap block; nil: none
}

func (b *builder) replay(h *timeline.History) (err error) {
	if h.Origin != nil {
		err = b.origin(h.Origin)
	} else {
		err = b.base(h.Base)
	}
	if err != nil {
		return err
	}
	for i := range h.Changes {
		if err := b.apply(h.Changes[i].Data, h.Changes[i].LSN); err != nil {
			return err
		}
	}
	return nil
}

// origin makes the page that this one was copied from, under its own key: its records name it
// by that. Slots of a free space map go on to follow: the copy's heap from here on.
func (b *builder) origin(o *timeline.Origin) (err error) {
	own := b.key
	defer func() { b.key = own }()
	if b.key, err = keyspace.Parse(o.Key); err != nil {
		return err
	}
	if err := b.replay(&o.History); err != nil {
		return fmt.Errorf("copied from block %d of %v: %w", b.key.Block, b.key.Rel, err)
	}
	return nil
}

func (b *builder) base(v *timeline.Value) error {
	switch {
	case v == nil:
		clear(b.page)
	case v.Kind == timeline.Init:
		clear(b.page)
		return b.apply(v.Data, v.LSN)
	case len(v.Data) == pg.BlockSize+followersSize && b.isMap():
		copy(b.page, v.Data)
		return b.takeFollowers(v.Data[pg.BlockSize:])
	case len(v.Data) != pg.BlockSize:
		return fmt.Errorf("the image at %v has %d bytes, not %d", v.LSN, len(v.Data), pg.BlockSize)
	default:
		copy(b.page, v.Data)
	}
	return nil
}

var records = sync.Pool{New: func() any { return new(walrec.Record) }}

func (b *builder) apply(data []byte, end pg.LSN) error {
	c, err := change.Decode(data, end)
	if err != nil {
		return err
	}
	switch c.Kind {
	case change.Zero:
		clear(b.page)
		return nil
	case change.Missing:
		return &redo.UnsupportedError{Record: c.Name}
	case change.ClearVM:
		return redo.ClearVM(b.page, b.key.Block, c.Block, c.Bits)
	case change.Follow:
		return b.addFollower(c.Block)
	}
	rec := records.Get().(*walrec.Record)
	defer records.Put(rec)
	if err := walrec.ParseInto(rec, c.Raw, c.LSN, end); err != nil {
		return err
	}
	if b.key.Kind == keyspace.KindSLRUPage {
		return redo.ApplySLRU(b.key.SLRU, b.key.Page, b.page, rec)
	}
	return redo.ApplyBlock(b.key.Rel, b.key.Block, b.page, rec)
}
