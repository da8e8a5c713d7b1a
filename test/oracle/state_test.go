package oracle

import (
	"bytes"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/holdfastdb/holdfast/internal/pagemask"
	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/pageserver/redo"
)

// A state is what a data directory holds, as far as WAL describes it.
type state struct {
	rels     map[pg.RelTag][][]byte // pages
	slru     map[redo.SLRUPage][]byte
	relmaps  map[string][]byte // by folder
	dirs     map[string]bool   // databases' folders
	twoPhase map[pg.TransactionID][]byte
	control  *pg.ControlFile
}

// load reads a data directory.
func load(t *testing.T, dir string) *state {
	t.Helper()
	s := &state{rels: map[pg.RelTag][][]byte{}, slru: map[redo.SLRUPage][]byte{},
		relmaps: map[string][]byte{}, dirs: map[string]bool{}, twoPhase: map[pg.TransactionID][]byte{}}
	err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		rel, err := filepath.Rel(dir, p)
		if err != nil || strings.HasPrefix(rel, "pg_wal/") {
			return err
		}
		b, err := os.ReadFile(p)
		if err == nil {
			s.add(t, rel, b)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if s.control == nil {
		t.Fatalf("%s has no pg_control", dir)
	}
	return s
}

func (s *state) add(t *testing.T, p string, b []byte) {
	dir, name := filepath.Split(p)
	dir = strings.TrimSuffix(dir, "/")
	if tag, segment, ok := pg.ParseRelPath(p); ok {
		if len(b)%pg.BlockSize != 0 {
			t.Errorf("%s has %d bytes: no whole blocks", p, len(b))
		}
		s.place(tag, segment*pg.RelSegmentBlocks, b)
		return
	}
	if kind, first, ok := pg.ParseSLRUPath(p); ok {
		for i := 0; i+pg.BlockSize <= len(b); i += pg.BlockSize {
			s.slru[redo.SLRUPage{Kind: kind, Page: first + uint32(i/pg.BlockSize)}] = b[i : i+pg.BlockSize]
		}
		return
	}
	switch {
	case p == "global/pg_control":
		c, err := pg.ParseControlFile(b)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(c.Marshal(), b) {
			t.Errorf("pg_control is not what its parsed form marshals to; first difference at %d", pagemask.Difference(c.Marshal(), b))
		}
		s.control = c
	case name == "pg_filenode.map":
		s.relmaps[dir] = b
	case name == "PG_VERSION" && strings.HasPrefix(dir, "base/"):
		s.dirs[dir] = true
	case dir == "pg_twophase":
		xid, err := strconv.ParseUint(name, 16, 32)
		if err != nil {
			t.Errorf("%s is not the name of a two-phase state file", p)
		}
		s.twoPhase[pg.TransactionID(xid)] = b
	}
}

func (s *state) place(tag pg.RelTag, first int, b []byte) {
	pages := s.rels[tag]
	for len(pages) < first {
		pages = append(pages, make([]byte, pg.BlockSize))
	}
	pages = pages[:first]
	for i := 0; i+pg.BlockSize <= len(b); i += pg.BlockSize {
		pages = append(pages, b[i:i+pg.BlockSize:i+pg.BlockSize])
	}
	if pages == nil {
		pages = [][]byte{}
	}
	s.rels[tag] = pages
}

// unlogged tells a relation that WAL describes only by its init fork.
func (s *state) unlogged(r pg.RelFileNode) bool {
	_, ok := s.rels[pg.RelTag{RelFileNode: r, Fork: pg.InitFork}]
	return ok
}
