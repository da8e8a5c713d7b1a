// Package history gives the WAL of before an endpoint's start, as it was: for replication
// slots, whose consumers read the past. It is fetched from the safekeepers when somebody reads it,
// as much as is asked for: the mount reads ahead, and keeps what it got.
package history

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/internal/walclient"
)

// Source is where sealed WAL comes from; walclient.Client is one.
type Source interface {
	Read(ctx context.Context, from, until pg.LSN, fn func(*pb.SealedWAL) error) error
}

// Config is what a History is made of.
type Config struct {
	Source Source
	// Unseal appends a chunk's WAL to dst.
	Unseal func(ctx context.Context, dst []byte, c *pb.SealedWAL) ([]byte, error)
	// Oldest is what is needed at least, Start where the branch's log begins, End where it
	// ended when the endpoint started.
	Oldest, Start, End pg.LSN
	SystemID           uint64
}

// History is the WAL from Begin to Config.End. It is safe for concurrent use.
type History struct {
	cfg   Config
	begin pg.LSN
	wiped atomic.Bool
}

// errFirst ends the look for the first chunk.
var errFirst = errors.New("found")

// Open finds out from where on the WAL is held: from the start of Oldest's segment, since
// who streams asks for whole segments, or later.
func Open(ctx context.Context, cfg Config) (*History, error) {
	h := &History{cfg: cfg, begin: max(cfg.Oldest.SegmentStart(), cfg.Start)}
	if h.begin >= cfg.End {
		h.begin = cfg.End
		return h, nil
	}
	err := cfg.Source.Read(ctx, h.begin, cfg.End, func(*pb.SealedWAL) error { return errFirst })
	switch {
	case errors.Is(err, walclient.ErrTruncated):
		h.begin = min(walclient.TruncatedAt(err), cfg.End)
	case err != nil && !errors.Is(err, errFirst):
		return nil, fmt.Errorf("looking for the WAL that replication slots need: %w", err)
	}
	return h, nil
}

// Begin is where the WAL begins that can be had.
func (h *History) Begin() pg.LSN { return h.begin }

// Pages gives count pages from lsn on. Those below Begin are zeros, which no reader takes for
// WAL; but whoever opens a segment finds a header on its first page.
func (h *History) Pages(ctx context.Context, lsn pg.LSN, count int) ([]byte, error) {
	pages := make([]byte, count*pg.WALPageSize)
	h.putHeaders(pages, lsn)
	err := h.fetch(ctx, pages, lsn)
	if err == nil && h.wiped.Load() {
		err = walclient.ErrClosed
	}
	if err != nil {
		clear(pages)
		return nil, err
	}
	return pages, nil
}

// Prefix gives what stands on End's page before End.
func (h *History) Prefix(ctx context.Context) ([]byte, error) {
	page := h.cfg.End.PageStart()
	if page == h.cfg.End {
		return nil, nil
	}
	data, err := h.Pages(ctx, page, 1)
	if err != nil {
		return nil, err
	}
	return data[:h.cfg.End-page], nil
}

// Wipe ends it (K2): it gives nothing any more.
func (h *History) Wipe() { h.wiped.Store(true) }

// fetch puts the WAL that can be had into pages, which begin at lsn.
func (h *History) fetch(ctx context.Context, pages []byte, lsn pg.LSN) error {
	from, until := max(lsn, h.begin), min(lsn+pg.LSN(len(pages)), h.cfg.End)
	if from >= until || h.wiped.Load() {
		return nil
	}
	var plain []byte
	defer func() { clear(plain[:cap(plain)]) }()
	err := h.cfg.Source.Read(ctx, from, until, func(c *pb.SealedWAL) (err error) {
		if plain, err = h.cfg.Unseal(ctx, plain[:0], c); err != nil {
			return err
		}
		place(pages, lsn, until, pg.LSN(c.BeginLsn), plain)
		return nil
	})
	if err != nil {
		return fmt.Errorf("fetching WAL %v to %v: %w", from, until, err)
	}
	return nil
}

// putHeaders makes the headers by which a reader knows the segment, and the page, in which the
// WAL begins that can be had.
func (h *History) putHeaders(pages []byte, lsn pg.LSN) {
	for _, page := range []pg.LSN{h.begin.SegmentStart(), h.begin.PageStart()} {
		if page < h.begin && lsn <= page && page < lsn+pg.LSN(len(pages)) {
			copy(pages[page-lsn:], pg.NewWALPageHeader(page, 0, h.cfg.SystemID).Append(nil))
		}
	}
}

// place copies what of the WAL at begin is in the pages at start and before until.
func place(pages []byte, start, until, begin pg.LSN, plain []byte) {
	if begin < start {
		plain = plain[min(len(plain), int(start-begin)):]
		begin = start
	}
	if begin < until {
		copy(pages[begin-start:], plain[:min(len(plain), int(until-begin))])
	}
}
