// Package history gives the WAL of before an endpoint's start, as it was: for replication
// slots, whose consumers read the past. It is fetched from the safekeepers a segment at a time,
// when somebody reads it.
package history

import (
	"context"
	"errors"
	"fmt"
	"sync"

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

	mu struct {
		sync.Mutex // held while a segment is fetched
		start      pg.LSN
		segment    []byte // nil: none
		wiped      bool
	}
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

// Pages gives count pages of one segment, from lsn on. Those below Begin are zeros, which no
// reader takes for WAL; but whoever opens a segment finds a header on its first page.
func (h *History) Pages(ctx context.Context, lsn pg.LSN, count int) ([]byte, error) {
	start := lsn.SegmentStart()
	from, to := int(lsn-start), int(lsn-start)+count*pg.WALPageSize
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.mu.wiped {
		return nil, walclient.ErrClosed
	}
	if h.mu.segment == nil || h.mu.start != start {
		if err := h.loadLocked(ctx, start); err != nil {
			return nil, err
		}
	}
	pages := append([]byte(nil), h.mu.segment[from:to]...)
	if to == pg.WALSegmentSize { // who reads in order comes back to this segment no more
		h.dropLocked()
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

// Wipe forgets what was opened (K2).
func (h *History) Wipe() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.dropLocked()
	h.mu.wiped = true
}

func (h *History) dropLocked() {
	clear(h.mu.segment)
	h.mu.segment = nil
}

func (h *History) loadLocked(ctx context.Context, start pg.LSN) error {
	h.dropLocked()
	segment := make([]byte, pg.WALSegmentSize)
	from, until := max(start, h.begin), min(start+pg.WALSegmentSize, h.cfg.End)
	if from > start {
		h.putHeaders(segment, start, from)
	}
	if from < until {
		var plain []byte
		defer func() { clear(plain[:cap(plain)]) }()
		err := h.cfg.Source.Read(ctx, from, until, func(c *pb.SealedWAL) (err error) {
			if plain, err = h.cfg.Unseal(ctx, plain[:0], c); err != nil {
				return err
			}
			place(segment, start, until, pg.LSN(c.BeginLsn), plain)
			return nil
		})
		if err != nil {
			clear(segment)
			return fmt.Errorf("fetching WAL %v to %v: %w", from, until, err)
		}
	}
	h.mu.start, h.mu.segment = start, segment
	return nil
}

// putHeaders makes the headers by which a reader knows the segment and the page in which
// the WAL begins that can be had.
func (h *History) putHeaders(segment []byte, start, from pg.LSN) {
	for _, page := range []pg.LSN{start, from.PageStart()} {
		if page < from {
			copy(segment[page-start:], pg.NewWALPageHeader(page, 0, h.cfg.SystemID).Append(nil))
		}
	}
}

// place copies what of the WAL at begin is in the segment and before until.
func place(segment []byte, start, until, begin pg.LSN, plain []byte) {
	if begin < start {
		plain = plain[min(len(plain), int(start-begin)):]
		begin = start
	}
	if begin < until {
		copy(segment[begin-start:], plain[:min(len(plain), int(until-begin))])
	}
}
