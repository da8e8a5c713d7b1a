package pgfs

import (
	"bytes"
	"math/rand/v2"
	"strconv"
	"testing"

	"github.com/holdfastdb/holdfast/internal/pg"
)

// world is a model of a Postgres that writes pages, transactions that need what WAL does
// not carry, and a page server that has only what WAL carries.
type world struct {
	t    *testing.T
	rng  *rand.Rand
	fs   *FS
	h    *history
	wal  *fakeWAL
	now  pg.LSN
	xact int
	live map[string]struct{}
	rels []*modelRel
}

type modelRel struct {
	tag   pg.RelTag
	file  *file
	pages []modelPage // by block
}

type modelPage struct {
	logged   uint64
	volatile uint64              // what WAL lacks
	needs    map[string]struct{} // transactions that ran when it was written
	blank    bool
}

func (w *world) write(r *modelRel, b int) {
	w.now += 8 * pg.LSN(1+w.rng.IntN(100))
	for b >= len(r.pages) {
		r.pages = append(r.pages, modelPage{blank: true})
	}
	m := modelPage{logged: w.rng.Uint64(), volatile: w.rng.Uint64() | 1, needs: map[string]struct{}{}}
	for x := range w.live {
		m.needs[x] = struct{}{}
	}
	r.pages[b] = m
	w.h.put(r.tag, pg.BlockNumber(b), w.now, pageOf(w.now, m.logged, 0))
	w.wal.commit(w.now) // WAL before data
	putBlock(w.t, w.fs, r.file, pg.BlockNumber(b), pageOf(w.now, m.logged, m.volatile))
}

func (w *world) check(r *modelRel, b int) {
	w.t.Helper()
	m := r.pages[b]
	p := block(w.t, w.fs, r.file, pg.BlockNumber(b))
	if m.blank {
		if !bytes.Equal(p, zeros[:]) {
			w.t.Fatalf("%s block %d was never written and is not zero", r.tag, b)
		}
		return
	}
	if word(p, 0) != m.logged {
		w.t.Fatalf("%s block %d: an old or another page", r.tag, b)
	}
	if word(p, 1) != m.volatile && !disjoint(m.needs, w.live) {
		w.t.Fatalf("%s block %d lost what WAL lacks while a transaction of the time still runs (C1)", r.tag, b)
	}
}

func (w *world) step() {
	r := w.rels[w.rng.IntN(len(w.rels))]
	switch w.rng.IntN(20) {
	case 0:
		w.xact++
		w.live["3/"+strconv.Itoa(w.xact)] = struct{}{}
	case 1:
		for x := range w.live {
			delete(w.live, x)
			break
		}
	case 2:
		seen := running()
		for x := range w.live {
			seen[x] = struct{}{}
		}
		w.now += 8
		w.fs.Advance(seen, w.now)
		if w.rng.IntN(2) == 0 {
			w.wal.commit(w.now)
		}
	case 3:
		evictAll(w.fs)
	case 4:
		if cut := w.rng.IntN(len(r.pages) + 1); w.rng.IntN(4) == 0 {
			r.pages = r.pages[:cut]
			if err := w.fs.truncate(opContext{}, r.file, int64(cut)*pg.BlockSize); err != nil {
				w.t.Fatal(err)
			}
		}
	case 5, 6, 7, 8, 9, 10:
		w.write(r, w.rng.IntN(len(r.pages)+3))
	default:
		if len(r.pages) > 0 {
			w.check(r, w.rng.IntN(len(r.pages)))
		}
	}
}

func TestEvictionModel(t *testing.T) {
	w := &world{t: t, rng: seed(t), h: newHistory(), wal: &fakeWAL{}, now: startLSN, live: running()}
	w.h.newest = w.wal.Committed
	w.wal.commit(startLSN)
	for rel := range pg.Oid(4) {
		r := &modelRel{tag: tagOf(rel+1, pg.MainFork)}
		for b := range pg.BlockNumber(20) {
			m := modelPage{logged: w.rng.Uint64()}
			w.h.put(r.tag, b, startLSN, pageOf(startLSN, m.logged, 0))
			r.pages = append(r.pages, m)
		}
		w.h.sizes = append(w.h.sizes, RelationSize{r.tag, 20})
		w.rels = append(w.rels, r)
	}
	w.fs = relationFS(t, w.h, w.wal)
	for _, r := range w.rels {
		r.file = fileAt(t, w.fs, pg.RelPath(r.tag, 0))
	}
	for range *stepsFlag * 2 {
		w.step()
	}
	if s := w.fs.Stats(); s.EvictedPages == 0 || s.FetchedPages == 0 {
		t.Errorf("the model exercised nothing: %+v", s)
	}
}
