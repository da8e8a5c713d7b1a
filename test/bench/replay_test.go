package main

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/internal/walrec"
)

const recoveryLog = `LOG:  redo starts at 0/14D55B0
LOG:  invalid record length at 0/7A2F0A8: wanted 24, got 0
LOG:  redo done at 0/7A2F030 system usage: CPU: user: 0.50 s, system: 0.25 s, elapsed: 1.05 s
`

func TestRecoveryIsReadFromTheLog(t *testing.T) {
	got, err := parseRecovery(recoveryLog, 0x7A2F030)
	if want := (recovery{elapsed: 1.05, cpu: 0.75}); err != nil || got != want {
		t.Errorf("the log gives %+v, %v; want %+v", got, err, want)
	}
	if _, err := parseRecovery(recoveryLog, 0x7A2F0A8); err == nil {
		t.Error("redo that ended elsewhere counts")
	}
	if _, err := parseRecovery(strings.ReplaceAll(recoveryLog, "redo done", "redo is not required"), 0x7A2F030); err == nil {
		t.Error("a server that did not redo counts")
	}
}

func TestTouchedPagesAreAskedForInRuns(t *testing.T) {
	heap := pg.RelTag{RelFileNode: pg.RelFileNode{Tablespace: 1663, Database: 5, Relation: 16384}}
	index := heap
	index.Relation++
	names := []pageName{{rel: heap, block: 7}}
	for b := range uint32(runPages + 2) {
		names = append(names, pageName{rel: heap, block: 10 + b})
	}
	names = append(names, pageName{rel: index, block: 10 + runPages + 2}, pageName{slru: pg.CLog}, pageName{slru: pg.CLog, block: 1})
	want := []pageRun{
		{pageName{rel: heap, block: 7}, 1}, {pageName{rel: heap, block: 10}, runPages}, {pageName{rel: heap, block: 10 + runPages}, 2},
		{pageName{rel: index, block: 10 + runPages + 2}, 1}, {pageName{slru: pg.CLog}, 2},
	}
	if d := cmp.Diff(want, runsOf(names), cmp.AllowUnexported(pageRun{}, pageName{})); d != "" {
		t.Errorf("(-want +have) %s", d)
	}
}

func TestChunksEndWithRecords(t *testing.T) {
	const start = pg.LSN(0x3000028)
	w := &walRange{start: start, end: start}
	var prev pg.LSN
	for range 3000 {
		b, end := walrec.PlaceRecord(w.end, walrec.Build(10, 0, 7, prev, make([]byte, 100)), 1)
		w.bytes = append(w.bytes, b...)
		prev = w.end
		w.records = append(w.records, walrec.RawRecord{LSN: prev, End: end})
		w.end = end
	}
	ends := make(map[pg.LSN]bool)
	for _, r := range w.records {
		ends[r.End] = true
	}
	at, n := start, 0
	err := w.chunks(func(begin, end pg.LSN, plain []byte) error {
		if begin != at || !ends[end] || pg.LSN(len(plain)) != end-begin || &plain[0] != &w.bytes[begin-start] {
			t.Errorf("a chunk of %d bytes goes from %v to %v, want it at %v", len(plain), begin, end, at)
		}
		at = end
		n++
		return nil
	})
	if err != nil || at != w.end || n < 4 {
		t.Errorf("%d chunks end at %v, %v; want them to end at %v", n, at, err, w.end)
	}
}
