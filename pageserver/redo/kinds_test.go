package redo

import (
	"errors"
	"testing"

	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/internal/walrec"
)

// imagesOnly are the kinds of records of which PostgreSQL makes none that change a page without
// giving its image, and why.
var imagesOnly = map[string]string{
	"XLOG/FPI":             "it is nothing but images",
	"XLOG/FPI_FOR_HINT":    "without an image it changes nothing",
	"Heap/HOT_UPDATE+INIT": "the page of a HOT update holds the old version",
	"Hash/SPLIT_PAGE":      "it is nothing but images",
	"Gin/VACUUM_PAGE":      "it is nothing but an image",
}

// TestCorpusHasEachRedo: the corpus, on which TestHostile and FuzzApply build, has samples of each
// kind of record that changes some block.
func TestCorpusHasEachRedo(t *testing.T) {
	have, kinds := map[string]int{}, 0
	for _, s := range samples(t) {
		if rec, blk := s.parse(t); !blk.ApplyImage {
			have[walrec.Name(rec.RmID, rec.Info)]++
		}
	}
	for rmid, fn := range managers {
		for info := 0; fn != nil && info < 256; info += 16 {
			name := walrec.Name(uint8(rmid), uint8(info))
			if !walrec.Known(uint8(rmid), uint8(info)) || !changesBlocks(fn, uint8(rmid), uint8(info)) {
				continue
			}
			kinds++
			if _, none := imagesOnly[name]; none != (have[name] == 0) {
				t.Errorf("the corpus has %d samples of %s; listed as having none: %v", have[name], name, none)
			}
		}
	}
	if kinds < 75 {
		t.Errorf("only %d kinds of records change blocks", kinds)
	}
}

// changesBlocks tells whether a redo function takes some block reference of a kind of record.
func changesBlocks(fn func(*op) error, rmid, info uint8) bool {
	for ref := range uint8(5) {
		rec := &walrec.Record{RmID: rmid, Info: info, Blocks: []walrec.Block{{ID: ref}}}
		err := fn(&op{rec: rec, blk: &rec.Blocks[0], page: make(page, pg.BlockSize)})
		if !errors.Is(err, errNoBlocks) && !errors.Is(err, errUnusedRef) {
			return true
		}
	}
	return false
}
