package pgfs

import (
	"context"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"github.com/holdfastdb/holdfast/internal/pg"
)

// history is a page server over pages that a test writes: it keeps every version.
type history struct {
	mu     sync.Mutex
	rng    *rand.Rand
	pages  map[pg.RelTag]map[pg.BlockNumber][]version
	sizes  []RelationSize
	slru   map[pg.SLRUKind]map[uint32][]byte
	err    error
	hold   chan struct{} // if set, an answer waits for its end
	calls  []string
	newest func() pg.LSN
	oldest pg.LSN // what is before is forgotten
}

type version struct {
	lsn  pg.LSN
	page []byte
}

func newHistory() *history {
	return &history{rng: rand.New(rand.NewPCG(1, 1)), pages: map[pg.RelTag]map[pg.BlockNumber][]version{}, slru: map[pg.SLRUKind]map[uint32][]byte{}}
}

func (h *history) put(rel pg.RelTag, b pg.BlockNumber, lsn pg.LSN, page []byte) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.pages[rel] == nil {
		h.pages[rel] = map[pg.BlockNumber][]version{}
	}
	h.pages[rel][b] = append(h.pages[rel][b], version{lsn, slices.Clone(page)})
}

func (h *history) Pages(ctx context.Context, rel pg.RelTag, block pg.BlockNumber, count int, atLeast pg.LSN) ([]byte, error) {
	h.mu.Lock()
	hold := h.hold
	h.mu.Unlock()
	if hold != nil {
		select {
		case <-hold:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.calls = append(h.calls, fmt.Sprintf("%s %d+%d", rel, block, count))
	if h.err != nil {
		return nil, h.err
	}
	at := atLeast // or later: any LSN up to the newest
	if h.newest != nil && h.newest() > at {
		at += pg.LSN(h.rng.Uint64N(uint64(h.newest()-at) + 1))
	}
	return h.asOfLocked(rel, block, count, at), nil
}

func (h *history) PagesAt(_ context.Context, rel pg.RelTag, block pg.BlockNumber, count int, lsn pg.LSN) ([]byte, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if lsn < h.oldest {
		return nil, ErrTooOld
	}
	return h.asOfLocked(rel, block, count, lsn), h.err
}

// asOfLocked gives the blocks that exist at an LSN, up to the first that does not.
func (h *history) asOfLocked(rel pg.RelTag, block pg.BlockNumber, count int, at pg.LSN) (out []byte) {
	for b := block; b < block+pg.BlockNumber(count); b++ {
		versions := h.pages[rel][b]
		i := len(versions) - 1
		for i >= 0 && versions[i].lsn > at {
			i--
		}
		if i < 0 {
			break
		}
		out = append(out, versions[i].page...)
	}
	return out
}

func (h *history) Relations(_ context.Context, tablespace, database pg.Oid) ([]RelationSize, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	var out []RelationSize
	for _, s := range h.sizes {
		if s.Rel.Tablespace == tablespace && s.Rel.Database == database {
			out = append(out, s)
		}
	}
	return out, h.err
}

func (h *history) SLRUPages(_ context.Context, kind pg.SLRUKind) ([]uint32, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	var out []uint32
	for n := range h.slru[kind] {
		out = append(out, n)
	}
	slices.Sort(out)
	return out, h.err
}

func (h *history) SLRU(_ context.Context, kind pg.SLRUKind, page uint32, count int) ([]byte, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	var out []byte
	for n := page; n < page+uint32(count) && h.slru[kind][n] != nil; n++ {
		out = append(out, h.slru[kind][n]...)
	}
	return out, h.err
}

// pageOf is a relation page that can be told from every other.
func pageOf(lsn pg.LSN, words ...uint64) []byte {
	p := make([]byte, pg.BlockSize)
	pg.SetPageLSN(p, lsn)
	for i, w := range words {
		binary.LittleEndian.PutUint64(p[24+8*i:], w)
	}
	p[len(p)-1] = 1
	return p
}

func word(p []byte, i int) uint64 { return binary.LittleEndian.Uint64(p[24+8*i:]) }

// fakeWAL records what it gets.
type fakeWAL struct {
	mu        sync.Mutex
	writes    []string
	committed pg.LSN
	writeErr  error
	sync      func(ctx context.Context) error
}

func (w *fakeWAL) Write(lsn pg.LSN, p []byte) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.writes = append(w.writes, fmt.Sprintf("%s+%d", lsn, len(p)))
	return w.writeErr
}

func (w *fakeWAL) Sync(ctx context.Context) error {
	w.mu.Lock()
	fn := w.sync
	w.mu.Unlock()
	if fn == nil {
		return nil
	}
	return fn(ctx)
}

func (w *fakeWAL) Committed() pg.LSN {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.committed
}

func (w *fakeWAL) commit(lsn pg.LSN) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.committed = lsn
}

// dataDir is a page server over the files of a data directory that nobody writes to.
type dataDir string

func (d dataDir) read(name string, off int64, count int) ([]byte, error) {
	file, err := os.Open(filepath.Join(string(d), name))
	if err != nil {
		return nil, err
	}
	defer file.Close()
	p := make([]byte, count*pg.BlockSize)
	n, err := file.ReadAt(p, off)
	if n > 0 {
		err = nil
	}
	return p[:n], err
}

func (d dataDir) Pages(_ context.Context, rel pg.RelTag, block pg.BlockNumber, count int, _ pg.LSN) ([]byte, error) {
	return d.read(pg.RelPath(rel, int(block/pg.RelSegmentBlocks)), int64(block%pg.RelSegmentBlocks)*pg.BlockSize, count)
}

func (d dataDir) Relations(_ context.Context, tablespace, database pg.Oid) ([]RelationSize, error) {
	dir := pg.DatabasePath(tablespace, database)
	entries, err := os.ReadDir(filepath.Join(string(d), dir))
	var out []RelationSize
	for _, e := range entries {
		tag, segment, ok := pg.ParseRelPath(dir + "/" + e.Name())
		info, err := e.Info()
		if !ok || segment > 0 || err != nil {
			continue
		}
		out = append(out, RelationSize{Rel: tag, Blocks: pg.BlockNumber(info.Size() / pg.BlockSize)})
	}
	return out, err
}

func (d dataDir) SLRUPages(_ context.Context, kind pg.SLRUKind) ([]uint32, error) {
	entries, err := os.ReadDir(filepath.Join(string(d), kind.Dir()))
	var out []uint32
	for _, e := range entries {
		_, first, ok := pg.ParseSLRUPath(kind.Dir() + "/" + e.Name())
		info, err := e.Info()
		if !ok || err != nil {
			continue
		}
		for i := range uint32(info.Size() / pg.BlockSize) {
			out = append(out, first+i)
		}
	}
	return out, err
}

func (d dataDir) SLRU(_ context.Context, kind pg.SLRUKind, page uint32, count int) ([]byte, error) {
	name, off := pg.SLRUPath(kind, page)
	return d.read(name, off, count)
}
