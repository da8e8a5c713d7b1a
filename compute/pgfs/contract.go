package pgfs

import (
	"context"
	"errors"

	"github.com/holdfastdb/holdfast/internal/pg"
)

// Remote is where pages come from that this compute has not written: the pageserver. It is
// safe for concurrent use.
type Remote interface {
	// Pages returns count blocks (fewer where the relation ends), as of an LSN that is at
	// least atLeast. The slice is the caller's.
	Pages(ctx context.Context, rel pg.RelTag, block pg.BlockNumber, count int, atLeast pg.LSN) ([]byte, error)
	// Relations lists the forks in a database's folder and their sizes, as of the start
	// or later: the folder was not looked at before.
	Relations(ctx context.Context, tablespace, database pg.Oid) ([]RelationSize, error)
	// SLRUPages lists the pages of an SLRU area that exist as of the start or later,
	// ascending.
	SLRUPages(ctx context.Context, kind pg.SLRUKind) ([]uint32, error)
	// SLRU returns count consecutive pages of an SLRU area as of the start or later.
	SLRU(ctx context.Context, kind pg.SLRUKind, page uint32, count int) ([]byte, error)
}

// Past is what the comparison of pages asks for beyond Remote. It is safe for concurrent use.
type Past interface {
	// PagesAt returns count blocks, fewer where the relation ends, exactly as of an LSN. The
	// error is, or wraps, ErrTooOld if the page server has forgotten that.
	PagesAt(ctx context.Context, rel pg.RelTag, block pg.BlockNumber, count int, lsn pg.LSN) ([]byte, error)
}

// ErrTooOld means that an LSN is older than the history that the page server keeps.
var ErrTooOld = errors.New("older than the history that the page server keeps")

// RelationSize is one fork of a relation and its number of blocks.
type RelationSize struct {
	Rel    pg.RelTag
	Blocks pg.BlockNumber
}

// WAL takes what Postgres writes into pg_wal. Its methods are called from many goroutines;
// Writes of overlapping ranges come in the order in which Postgres made them.
type WAL interface {
	// Write tells that the WAL's bytes from lsn on are now p. p is valid during the call.
	// It does not wait for the network unless too much is under way.
	Write(lsn pg.LSN, p []byte) error
	// Sync returns when every complete record that was written before the call is committed
	// on the safekeepers' quorum. An error other than ctx's means that this compute is fenced
	// or shut off: it becomes EIO.
	Sync(ctx context.Context) error
	// Committed is the end of the WAL that is known to be on the quorum.
	Committed() pg.LSN
}
