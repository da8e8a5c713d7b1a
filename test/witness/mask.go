package witness

import (
	"bytes"

	"github.com/holdfastdb/holdfast/internal/pagemask"
	"github.com/holdfastdb/holdfast/internal/pg"
)

// maskUnused copies a page without the bytes that belong to nothing. What a server that
// recovered leaves there depends on which pages it had in memory.
func maskUnused(tag pg.RelTag, block uint32, page []byte) ([]byte, error) {
	p := bytes.Clone(page)
	return p, pagemask.Mask(p, pagemask.Place{Fork: tag.Fork, Block: pg.BlockNumber(block), Kind: pagemask.KindOf(p)}, 0)
}
