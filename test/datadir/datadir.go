// Package datadir reads a stock data directory, and sets what a page server gives at an LSN
// against it: every block of every relation, the SLRUs, sizes and small files.
package datadir

import (
	"bytes"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/holdfastdb/holdfast/internal/pg"
)

// Directory is what a data directory holds, as far as WAL describes it.
type Directory struct {
	Relations map[pg.RelTag][]byte
	SLRU      map[pg.SLRUKind]map[uint32][]byte // pages by their number
	Files     map[string]string                 // relation maps, databases' versions, two-phase state
	Control   *pg.ControlFile
}

// Load reads the data directory of a server that does not run, or a copy of one.
func Load(dir string) (*Directory, error) {
	d := &Directory{Relations: map[pg.RelTag][]byte{}, SLRU: map[pg.SLRUKind]map[uint32][]byte{}, Files: map[string]string{}}
	err := filepath.WalkDir(dir, func(p string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		name, err := filepath.Rel(dir, p)
		if err != nil || strings.HasPrefix(name, "pg_wal/") {
			return err
		}
		b, err := os.ReadFile(p)
		if err != nil {
			return err
		}
		return d.add(name, b)
	})
	if err == nil && d.Control == nil {
		err = fmt.Errorf("%s has no pg_control", dir)
	}
	return d, err
}

func (d *Directory) add(name string, b []byte) (err error) {
	if tag, segment, ok := pg.ParseRelPath(name); ok {
		d.place(tag, segment, b)
		return nil
	}
	if kind, first, ok := pg.ParseSLRUPath(name); ok {
		if d.SLRU[kind] == nil {
			d.SLRU[kind] = map[uint32][]byte{}
		}
		for i := range len(b) / pg.BlockSize {
			d.SLRU[kind][first+uint32(i)] = b[i*pg.BlockSize:][:pg.BlockSize]
		}
		return nil
	}
	switch base := filepath.Base(name); {
	case name == "global/pg_control":
		d.Control, err = pg.ParseControlFile(b)
	case base == "pg_filenode.map", base == "PG_VERSION", strings.HasPrefix(name, "pg_twophase/"):
		d.Files[name] = string(b)
	}
	return err
}

// place puts a segment file where it belongs in its fork, which the segments' order on the
// disk does not follow.
func (d *Directory) place(tag pg.RelTag, segment int, b []byte) {
	at := segment * pg.RelSegmentBlocks * pg.BlockSize
	have := d.Relations[tag]
	if n := at + len(b); len(have) < n {
		have = append(have, make([]byte, n-len(have))...)
	}
	copy(have[at:], b)
	if have == nil {
		have = []byte{}
	}
	d.Relations[tag] = have
}

// IsUnlogged tells a relation of which WAL describes only the init fork.
func (d *Directory) IsUnlogged(r pg.RelFileNode) bool {
	_, ok := d.Relations[pg.RelTag{RelFileNode: r, Fork: pg.InitFork}]
	return ok
}

// SaysNothing tells whether b, of whole pages, is zeros but for headers of empty pages.
func SaysNothing(b []byte) bool {
	for ; len(b) > 0; b = b[pg.BlockSize:] {
		if !allZero(b[pageHeaderSize:pg.BlockSize]) {
			return false
		}
	}
	return true
}

// pageHeaderSize is SizeOfPageHeaderData.
const pageHeaderSize = 24

func allZero(b []byte) bool { return bytes.Count(b, []byte{0}) == len(b) }
