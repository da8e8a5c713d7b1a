package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/internal/walrec"
	"github.com/holdfastdb/holdfast/pageserver/redo"
)

// redoResult is what redo alone costs, by kind of record.
type redoResult struct{ Kinds []redoKind }

// redoKind is the records of some resource managers.
type redoKind struct {
	Name         string
	Records      int
	Microseconds float64 // for a record, decoding included
	Decoding     float64 // of it
	Allocations  float64 // for a record
}

func (r redoResult) String() string {
	var b strings.Builder
	for _, k := range r.Kinds {
		fmt.Fprintf(&b, "%d %s records, each %.2f us, %.2f allocations; ", k.Records, k.Name, k.Microseconds, k.Allocations)
	}
	return strings.TrimSuffix(b.String(), "; ")
}

// redoKinds are those that the aim speaks of, by the numbers of their managers (rmgrlist.h).
var redoKinds = []struct {
	name     string
	managers []uint8
}{{"heap", []uint8{9, 10}}, {"btree", []uint8{11}}}

// redoPart replays heap and btree records on pages in memory, in the order of the WAL: what
// a record costs when its page was not touched a moment ago.
func redoPart(_ context.Context, dir string, profile func() (func(), error)) (any, error) {
	pages, err := basePages(filepath.Join(dir, "base"))
	if err != nil {
		return nil, err
	}
	ctl, err := readControl(filepath.Join(dir, "base"))
	if err != nil {
		return nil, err
	}
	wal, err := readWAL(filepath.Join(dir, "made"), ctl.CheckPoint)
	if err != nil {
		return nil, err
	}
	stop, err := profile()
	if err != nil {
		return nil, err
	}
	defer stop()
	var r redoResult
	for _, k := range redoKinds {
		work, err := findWork(wal, k.managers, pages)
		if err != nil {
			return nil, err
		}
		kind, err := work.measure()
		if err != nil {
			return nil, err
		}
		kind.Name = k.name
		r.Kinds = append(r.Kinds, kind)
	}
	return r, nil
}

// basePages reads the relations of a data directory.
func basePages(dir string) (map[pageName][]byte, error) {
	pages := make(map[pageName][]byte)
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		rel, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		tag, segment, ok := pg.ParseRelPath(rel)
		if !ok {
			return nil
		}
		data, err := os.ReadFile(path)
		for i := 0; i < len(data)/pg.BlockSize; i++ {
			pages[pageName{rel: tag, block: uint32(segment*pg.RelSegmentBlocks + i)}] = data[i*pg.BlockSize:][:pg.BlockSize]
		}
		return err
	})
	return pages, err
}

// redoWork is records, and the page of each of their blocks: finding it is not measured.
type redoWork struct {
	records []walrec.RawRecord
	pages   [][]byte
}

// findWork collects the records of some managers. The images that other records carry, of indexes
// that were built, are put into the pages at once: they come before all other records of their
// pages, whose redo looks at the page's LSN.
func findWork(w *walRange, managers []uint8, pages map[pageName][]byte) (*redoWork, error) {
	var work redoWork
	var rec walrec.Record
	for _, raw := range w.records {
		if err := walrec.ParseInto(&rec, raw.Data, raw.LSN, raw.End); err != nil {
			return nil, err
		}
		counts := len(rec.Blocks) > 0 && slices.Contains(managers, rec.RmID)
		if counts {
			work.records = append(work.records, raw)
		}
		for i := range rec.Blocks {
			b := &rec.Blocks[i]
			n := pageName{rel: b.Rel, block: uint32(b.Block)}
			if pages[n] == nil {
				pages[n] = make([]byte, pg.BlockSize)
			}
			if counts {
				work.pages = append(work.pages, pages[n])
			} else if b.ApplyImage {
				if err := redo.ApplyBlock(b.Rel, b.Block, pages[n], &rec); err != nil {
					return nil, err
				}
			}
		}
	}
	if len(work.records) == 0 {
		return nil, errors.New("the WAL has no records of that kind")
	}
	return &work, nil
}

// measure decodes all records, and then decodes and applies them.
func (w *redoWork) measure() (k redoKind, err error) {
	n := float64(len(w.records))
	k.Records = len(w.records)
	now := stopwatch()
	if err := w.each(func(*walrec.Record, [][]byte) error { return nil }); err != nil {
		return k, err
	}
	k.Decoding = now().CPU / n * 1e6
	var before, after runtime.MemStats
	now = stopwatch()
	runtime.ReadMemStats(&before)
	err = w.each(applyRecord)
	k.Microseconds = now().CPU / n * 1e6
	runtime.ReadMemStats(&after)
	k.Allocations = float64(after.Mallocs-before.Mallocs) / n
	return k, err
}

func (w *redoWork) each(fn func(*walrec.Record, [][]byte) error) error {
	var rec walrec.Record
	pages := w.pages
	for i := range w.records {
		raw := &w.records[i]
		if err := walrec.ParseInto(&rec, raw.Data, raw.LSN, raw.End); err != nil {
			return err
		}
		if err := fn(&rec, pages); err != nil {
			return err
		}
		pages = pages[len(rec.Blocks):]
	}
	return nil
}

func applyRecord(rec *walrec.Record, pages [][]byte) error {
	for i := range rec.Blocks {
		b := &rec.Blocks[i]
		if err := redo.ApplyBlock(b.Rel, b.Block, pages[i], rec); err != nil {
			return err
		}
	}
	return nil
}
