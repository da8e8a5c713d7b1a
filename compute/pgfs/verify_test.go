package pgfs

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"testing"

	"github.com/holdfastdb/holdfast/internal/pagemask"
	"github.com/holdfastdb/holdfast/internal/pg"
)

var le = binary.LittleEndian

// pageOfRows is a page with one item at the end of its tuple area.
func pageOfRows(lsn pg.LSN, special int, item []byte) []byte {
	p := make([]byte, pg.BlockSize)
	pg.SetPageLSN(p, lsn)
	end := len(p) - special
	off := end - (len(item)+7)&^7
	le.PutUint16(p[12:], 28)
	le.PutUint16(p[14:], uint16(off))
	le.PutUint16(p[16:], uint16(end))
	le.PutUint32(p[24:], uint32(off)|1<<15|uint32(len(item))<<17)
	copy(p[off:], item)
	return p
}

// heapPage has one row, of a transaction and its command.
func heapPage(lsn pg.LSN, xmin uint32, cid byte, value byte) []byte {
	row := make([]byte, 40)
	le.PutUint32(row, xmin)
	row[8], row[16], row[21], row[22], row[30] = cid, 1, 8, 24, value // 8: xmax is invalid
	return pageOfRows(lsn, 0, row)
}

func sequencePage(lsn pg.LSN, value byte) []byte {
	row := make([]byte, 41)
	row[24] = value
	p := pageOfRows(lsn, 8, row)
	le.PutUint16(p[pg.BlockSize-8:], 0x1717)
	return p
}

func btreePage(lsn pg.LSN, cycle byte) []byte {
	p := pageOfRows(lsn, 16, make([]byte, 16))
	p[pg.BlockSize-4], p[pg.BlockSize-2] = 1, cycle
	return p
}

func mapPage(lsn pg.LSN, bits byte) []byte {
	p := make([]byte, pg.BlockSize)
	pg.SetPageLSN(p, lsn)
	p[100] = bits
	return p
}

// verifying is a file system that compares, with what it logs.
type verifying struct {
	*FS
	h   *history
	wal *fakeWAL
	log bytes.Buffer
}

func newVerifying(t *testing.T) *verifying {
	v := &verifying{h: newHistory(), wal: &fakeWAL{}}
	v.FS = newFS(t, Config{Remote: v.h, Past: v.h, WAL: v.wal, StartLSN: startLSN, Log: slog.New(slog.NewTextHandler(&v.log, nil))})
	for _, dir := range []string{"base/5", "base/50000", "global", "pg_xact", "pg_wal", "pg_twophase"} {
		if err := v.MkdirAll(dir); err != nil {
			t.Fatal(err)
		}
	}
	v.verify.patience = 0
	return v
}

// put writes block 0 of a relation.
func (v *verifying) put(t *testing.T, path string, page []byte) *file {
	t.Helper()
	if _, err := v.find(path); err != nil {
		if err := v.WriteFile(path, nil); err != nil {
			t.Fatal(err)
		}
	}
	f := fileAt(t, v.FS, path)
	putBlock(t, v.FS, f, 0, page)
	return f
}

// settle has everything that ran end, as the rule wants to see it.
func (v *verifying) settle(s Seen) {
	v.wal.commit(startLSN << 4)
	for range 5 {
		v.Saw(s)
		v.Advance(running(), startLSN)
	}
}

func (v *verifying) counts() string {
	c, _ := v.Verified()
	s := fmt.Sprintf("%d compared, %d differ, %d withdrawn", c.Compared, c.Mismatched, c.Withdrawn)
	for _, why := range []string{skipFSM, skipTooOld, skipCopiedMap, skipEmpty, skipUnlogged, skipMulti} {
		if n := c.Skipped[why]; n > 0 {
			s += fmt.Sprintf(", %s %d", why, n)
		}
	}
	return s
}

const (
	equalPages = "1 compared, 0 differ, 0 withdrawn"
	otherPages = "0 compared, 1 differ, 0 withdrawn"
)

func TestLeavingPagesAreCompared(t *testing.T) {
	const lsn, later = startLSN + 0x1000, startLSN + 0x2000
	all := Seen{Oldest: 900}
	type versions map[pg.LSN][]byte
	for _, c := range []struct {
		name, path string
		page       []byte
		remote     versions
		seen       Seen
		want, log  string
	}{
		{"equal", "base/5/9", heapPage(lsn, 700, 0, 1), versions{lsn: heapPage(lsn, 700, 0, 1)}, all, equalPages, ""},
		{"another value", "base/5/9", heapPage(lsn, 700, 0, 1), versions{lsn: heapPage(lsn, 700, 0, 2)}, all, otherPages, "the content of row 1"},
		{"another LSN", "base/5/9", heapPage(lsn, 700, 0, 1), versions{lsn: heapPage(lsn-8, 700, 0, 1)}, all, otherPages, "pd_lsn"},
		{"not there", "base/5/9", heapPage(lsn, 700, 0, 1), nil, all, otherPages, "no such block"},
		{"newer there", "base/5/9", heapPage(lsn, 700, 0, 1), versions{lsn: heapPage(lsn, 700, 0, 1), later: heapPage(later, 700, 0, 2)}, all, equalPages, ""},
		{"newer there, and another one before", "base/5/9", heapPage(lsn, 700, 0, 1), versions{lsn: heapPage(lsn, 700, 0, 3), later: heapPage(later, 700, 0, 2)}, all, otherPages, "the content of row 1"},
		{"command of a transaction that has ended", "base/5/9", heapPage(lsn, 700, 3, 1), versions{lsn: heapPage(lsn, 700, 0, 1)}, all, equalPages, ""},
		// Broken rules: those of the poll do not see what other witnesses see.
		{"command of a transaction that runs", "base/5/9", heapPage(lsn, 900, 3, 1), versions{lsn: heapPage(lsn, 900, 0, 1)}, all, otherPages, "t_cid of row 1: whose transaction 900"},
		{"vacuum cycle", "base/5/9", btreePage(lsn, 9), versions{lsn: btreePage(lsn, 0)}, all, equalPages, ""},
		{"vacuum cycle of a vacuum that runs", "base/5/9", btreePage(lsn, 9), versions{lsn: btreePage(lsn, 0)},
			Seen{Oldest: 900, VacuumsBefore: []string{"12 now"}, VacuumsAfter: []string{"12 now"}}, otherPages, "the vacuum cycle"},
		{"map cleared since", "base/5/9_vm", mapPage(lsn, 3), versions{lsn: mapPage(lsn, 1)}, all, equalPages, ""},
		{"map says more there", "base/5/9_vm", mapPage(lsn, 1), versions{lsn: mapPage(lsn, 3)}, all, otherPages, "the visibility map"},
		{"map set since", "base/5/9_vm", mapPage(lsn, 1), versions{lsn: mapPage(lsn, 3), later: mapPage(later, 7)}, all, equalPages, ""},
		{"map said less there", "base/5/9_vm", mapPage(lsn, 3), versions{lsn: mapPage(lsn, 1), later: mapPage(later, 7)}, all, otherPages, "the visibility map"},
		{"map that CREATE DATABASE copied", "base/50000/1_vm", mapPage(lsn, 3), versions{lsn: mapPage(lsn, 1), later: mapPage(later, 7)}, all, equalPages + ", " + skipCopiedMap + " 1", ""},
		{"free space map", "base/5/9_fsm", mapPage(lsn, 3), versions{lsn: mapPage(lsn, 1)}, all, equalPages + ", " + skipFSM + " 1", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			v := newVerifying(t)
			f := v.put(t, c.path, c.page)
			for _, at := range []pg.LSN{lsn, later} {
				if p := c.remote[at]; p != nil {
					v.h.put(f.src.rel, 0, at, p)
				}
			}
			v.settle(c.seen)
			evictAll(v.FS)
			evictAll(v.FS) // what was reported is not compared again
			if got := v.counts(); got != c.want {
				t.Errorf("%s, want %s\n%s", got, c.want, v.log.String())
			}
			if left := v.Stats().EvictedPages == 1; left != (c.log == "") {
				t.Errorf("the page left: %v", left)
			}
			if !strings.Contains(v.log.String(), c.log) || (c.log == "") != (v.log.Len() == 0) {
				t.Errorf("the log says %q, want it to name %q", v.log.String(), c.log)
			}
		})
	}
}

// A page that is let go while its transaction runs is reported, whatever let it go.
func TestBrokenEvictionRuleIsReported(t *testing.T) {
	const lsn = startLSN + 0x1000
	v := newVerifying(t)
	f := v.put(t, "base/5/1", heapPage(lsn, 700, 3, 1))
	v.h.put(f.src.rel, 0, lsn, heapPage(lsn, 700, 0, 1))
	v.wal.commit(startLSN << 4)
	for range 5 {
		v.Saw(Seen{Oldest: 700})
		v.Advance(running("3/1"), startLSN)
	}
	evictAll(v.FS)
	if got := v.counts(); got != "0 compared, 0 differ, 0 withdrawn" {
		t.Fatalf("the rule let a page go: %s", got)
	}
	v.evictFrom(f, 1, v.cache.gen.Load(), v.wal.Committed()) // as if the rule did not wait
	v.evictFrom(f, 1, v.cache.gen.Load(), v.wal.Committed()) // the first spares what was read
	if got := v.counts(); got != otherPages || v.Stats().EvictedPages != 0 {
		t.Errorf("%s; %d pages left", got, v.Stats().EvictedPages)
	}
	if !bytes.Equal(block(t, v.FS, f, 0), heapPage(lsn, 700, 3, 1)) {
		t.Error("the page did not stay as it was written")
	}
}

// What differs may be half of a write whose other half comes: it is told only if it stays so.
func TestDifferenceMayPass(t *testing.T) {
	const lsn = startLSN + 0x1000
	v := newVerifying(t)
	v.verify.patience = patience
	f := v.put(t, "base/5/1", heapPage(lsn, 700, 0, 1))
	v.h.put(f.src.rel, 0, lsn, heapPage(lsn, 700, 0, 2))
	v.settle(Seen{Oldest: 900})
	evictAll(v.FS)
	if got := v.counts(); got != "0 compared, 0 differ, 0 withdrawn" || v.Stats().EvictedPages != 0 {
		t.Fatalf("a difference was believed at once, or its page left: %s", got)
	}
	putBlock(t, v.FS, f, 0, heapPage(lsn, 700, 0, 2))
	v.settle(Seen{Oldest: 900})
	evictAll(v.FS)
	if got := v.counts(); got != "1 compared, 0 differ, 1 withdrawn" || v.Stats().EvictedPages != 1 {
		t.Errorf("after the other half: %s", got)
	}
	v.h.oldest = lsn + 1
	v.put(t, "base/5/1", heapPage(lsn, 700, 0, 2))
	v.h.put(f.src.rel, 0, lsn+8, heapPage(lsn+8, 700, 0, 3))
	v.settle(Seen{Oldest: 900})
	evictAll(v.FS)
	if got := v.counts(); got != "2 compared, 0 differ, 1 withdrawn, "+skipTooOld+" 1" {
		t.Errorf("of a page whose past is forgotten: %s", got)
	}
}

// What differs when a page is to leave, and the same way at the end, is told then.
func TestDifferenceThatStays(t *testing.T) {
	const lsn = startLSN + 0x1000
	v := newVerifying(t)
	v.verify.patience = patience
	v.h.sizes = []RelationSize{{tagOf(1, pg.MainFork), 1}}
	f := v.put(t, "base/5/1", heapPage(lsn, 700, 0, 1))
	v.h.put(f.src.rel, 0, lsn, heapPage(lsn, 700, 0, 2))
	v.settle(Seen{Oldest: 900})
	evictAll(v.FS)
	if err := v.VerifyAll(t.Context(), lsn, nil); err != nil {
		t.Fatal(err)
	}
	if got := v.counts(); got != otherPages || !strings.Contains(v.log.String(), "the content of row 1") {
		t.Errorf("%s\n%s", got, v.log.String())
	}
}

func TestVerifyAll(t *testing.T) {
	const lsn, end = startLSN + 0x1000, startLSN + 0x2000
	files := map[string][]byte{"pg_twophase/000002BC": []byte("state"), "base/5/PG_VERSION": []byte("15\n"), "postgresql.conf": nil,
		controlPath: (&pg.ControlFile{CheckPointCopy: pg.CheckPoint{NextOid: 20000, Redo: lsn}}).Marshal()}
	clog := bytes.Repeat([]byte{0x55}, pg.BlockSize)
	for _, c := range []struct {
		name  string
		spoil func(t *testing.T, v *verifying)
		log   string // of the only difference
	}{
		{"all is well", func(*testing.T, *verifying) {}, ""},
		{"a value", func(t *testing.T, v *verifying) { v.put(t, "base/5/1", heapPage(lsn, 700, 3, 9)) }, "the content of row 1"},
		{"all visible there only", func(t *testing.T, v *verifying) {
			p := heapPage(lsn, 700, 0, 1)
			p[10] |= 4
			v.h.put(tagOf(1, pg.MainFork), 0, lsn, p)
		}, "pd_flags"},
		{"the map", func(t *testing.T, v *verifying) { v.put(t, "base/5/1_vm", mapPage(lsn, 1)) }, "the visibility map"},
		{"a longer relation there", func(t *testing.T, v *verifying) {
			v.h.sizes[0].Blocks = 7
			v.h.put(tagOf(1, pg.MainFork), 1, lsn, make([]byte, pg.BlockSize))
		}, "the size"},
		{"a block that is not there", func(t *testing.T, v *verifying) {
			putBlock(t, v.FS, fileAt(t, v.FS, "base/5/1"), 1, heapPage(lsn, 700, 0, 1))
		}, "no such block"},
		{"a relation that is not there", func(t *testing.T, v *verifying) { v.put(t, "base/5/77", heapPage(lsn, 700, 0, 1)) }, "no such relation"},
		{"a relation only there", func(t *testing.T, v *verifying) {
			v.h.sizes = append(v.h.sizes, RelationSize{tagOf(78, pg.MainFork), 1})
		}, "only at the page server"},
		{"transaction states", func(t *testing.T, v *verifying) { v.h.slru[pg.CLog][0] = make([]byte, pg.BlockSize) }, "pg_xact/0000"},
		{"a page of states only there", func(t *testing.T, v *verifying) { v.h.slru[pg.CLog][3] = clog }, "only at the page server"},
		{"a page of states that is not there", func(t *testing.T, v *verifying) { delete(v.h.slru[pg.CLog], 0) }, "no such page"},
		{"counters", func(t *testing.T, v *verifying) {
			_ = v.WriteFile(controlPath, (&pg.ControlFile{CheckPointCopy: pg.CheckPoint{NextOid: 20001}}).Marshal())
		}, "the counters"},
		{"a prepared transaction", func(t *testing.T, v *verifying) { _ = v.WriteFile("pg_twophase/000002BC", []byte("other")) }, "the content"},
		{"a prepared transaction only here", func(t *testing.T, v *verifying) { _ = v.WriteFile("pg_twophase/000002BD", []byte("x")) }, "no such file"},
	} {
		t.Run(c.name, func(t *testing.T) {
			v := newVerifying(t)
			v.h.slru[pg.CLog] = map[uint32][]byte{}
			v.h.sizes = []RelationSize{{tagOf(1, pg.MainFork), 1}, {tagOf(1, pg.VMFork), 1}, {tagOf(2, pg.MainFork), 1}, {tagOf(3, pg.InitFork), 0}}
			v.h.put(tagOf(1, pg.MainFork), 0, lsn, heapPage(lsn, 700, 0, 1))
			v.h.put(tagOf(1, pg.VMFork), 0, lsn, mapPage(lsn, 3))
			v.h.put(tagOf(2, pg.MainFork), 0, lsn, sequencePage(lsn, 33))
			v.put(t, "base/5/1", heapPage(lsn, 700, 3, 1))
			v.put(t, "base/5/1_vm", mapPage(lsn, 3))
			v.put(t, "base/5/1_fsm", mapPage(0, 3))
			v.put(t, "base/5/2", sequencePage(lsn, 5))
			v.put(t, "base/5/3", heapPage(lsn, 700, 0, 8)) // unlogged
			putBlock(t, v.FS, fileAt(t, v.FS, "base/5/1"), 1, make([]byte, pg.BlockSize))
			v.put(t, "pg_xact/0000", clog)
			v.h.slru[pg.CLog][0] = clog
			for path, content := range files {
				if err := v.WriteFile(path, content); err != nil {
					t.Fatal(err)
				}
			}
			c.spoil(t, v)
			if err := v.VerifyAll(t.Context(), end, files); err != nil {
				t.Fatal(err)
			}
			got, _ := v.Verified()
			if want := int64(min(len(c.log), 1)); got.Mismatched != want || !strings.Contains(v.log.String(), c.log) {
				t.Errorf("%d differences, want %d of %q:\n%s", got.Mismatched, want, c.log, v.log.String())
			}
			if c.log == "" && v.counts() != "7 compared, 0 differ, 0 withdrawn, "+skipFSM+" 1, "+skipEmpty+" 1, "+skipUnlogged+" 1" {
				t.Errorf("what was compared: %s", v.counts())
			}
		})
	}
	v := newVerifying(t)
	v.h.err = errors.New("away")
	if _, err := v.find("base/5"); err != nil {
		t.Fatal(err)
	}
	if err := v.VerifyAll(t.Context(), end, nil); err != nil {
		t.Errorf("nothing was looked at, and yet: %v", err)
	}
}

// The witnesses of the last poll count, and a vacuum from when it was first seen.
func TestSaw(t *testing.T) {
	v := newVerifying(t)
	v.Saw(Seen{Oldest: 3, VacuumsBefore: []string{"a"}, VacuumsAfter: []string{"a", "new"}})
	v.Advance(running(), startLSN)
	v.Advance(running(), startLSN)
	v.Saw(Seen{Oldest: 5, VacuumsBefore: []string{"a", "b"}, VacuumsAfter: []string{"b", "a"}})
	if got, want := v.cache.mu.saw, (proof{known: true, oldest: 5, vacuum: 1}); got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
	v.Saw(Seen{Oldest: 5, VacuumsBefore: []string{"b"}, VacuumsAfter: []string{"b"}})
	p := v.cache.mu.saw
	if got := []bool{p.noVacuum(1), p.noVacuum(2), p.noVacuum(3), p.ended(4), p.ended(5), p.ended(1 << 31), (proof{}).ended(1), (proof{}).noVacuum(1)}; !slices.Equal(got,
		[]bool{true, false, false, true, false, false, false, false}) {
		t.Errorf("%v of %+v", got, p)
	}
}

// TestPagesOfAGistBuild: a build writes its pages with an LSN of its own and logs them
// afterwards. Nothing but the LSN may differ.
func TestPagesOfAGistBuild(t *testing.T) {
	page := func(lsn pg.LSN, content byte) []byte {
		p := make([]byte, pg.BlockSize)
		pg.SetPageLSN(p, lsn)
		le := binary.LittleEndian
		le.PutUint16(p[12:], 28)
		le.PutUint16(p[14:], pg.BlockSize-32)
		le.PutUint16(p[16:], pg.BlockSize-16)
		le.PutUint16(p[18:], pg.BlockSize|4)
		le.PutUint32(p[24:], 16<<17|1<<15|(pg.BlockSize-32))
		p[pg.BlockSize-32+8] = content
		le.PutUint16(p[pg.BlockSize-2:], 0xFF81) // GIST_PAGE_ID
		return p
	}
	for _, c := range []struct {
		here, there []byte
		differs     bool
	}{
		{page(gistBuildLSN, 1), page(0x5000028, 1), false},
		{page(gistBuildLSN, 1), page(0x5000028, 2), true},
		{page(0x4000028, 1), page(0x5000028, 1), true},
	} {
		at := pagemask.Place{Fork: pg.MainFork, Kind: kindOf(pg.MainFork, c.here)}
		if at.Kind != pagemask.Gist {
			t.Fatalf("the page is taken for a %v page", at.Kind)
		}
		if d, _ := comparePages(at, c.here, c.there, pagemask.Hints); (d != nil) != c.differs {
			t.Errorf("LSNs %v and %v: %+v", pg.PageLSN(c.here), pg.PageLSN(c.there), d)
		}
	}
}
