package timeline

import (
	"errors"
	"fmt"
	"testing"

	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/pageserver/keyspace"
)

// TestACopyOverARememberedPage makes a folder, of which a page is remembered as an image, a copy
// of another one: the image is of the folder before. The source changes after that.
func TestACopyOverARememberedPage(t *testing.T) {
	r := filled(t, func(c *Config) { c.ImageAfter, c.BlockCacheBytes, c.HistoryBytes = 4, 1<<20, 1 })
	dst, _ := pageKey(0).PageDir()
	src := keyspace.Dir{Tablespace: dst.Tablespace, Database: dst.Database + 1}
	lsn := r.tl.LastLSN()
	put := func(key keyspace.Key, kind ValueKind, data string) {
		t.Helper()
		lsn += 8
		if err := r.tl.Put(t.Context(), []Entry{{key, Value{LSN: lsn, Kind: kind, Data: []byte(data)}}}, lsn); err != nil {
			t.Fatal(err)
		}
	}
	read := func(block int, at pg.LSN) string {
		t.Helper()
		h, err := r.tl.Get(t.Context(), pageKey(block), at)
		if err != nil {
			t.Fatal(err)
		}
		return evaluate(h)
	}
	const changed, unchanged = 100, 102
	put(pageKey(changed), Image, "before")
	for i := range 4 * flushImageAfter {
		put(pageKey(changed), Delta, fmt.Sprint(",", i))
	}
	put(pageKey(changed).In(src), Image, "source")
	put(pageKey(unchanged).In(src), Image, "source too")
	read(changed, lsn)
	if r.tl.hot.get(pageKey(changed), lsn) == nil {
		t.Fatal("no image was remembered")
	}
	put(keyspace.Copy(dst), Image, string(MarshalSources([]Source{{Dir: src, UpTo: lsn + 8}})))
	put(pageKey(changed), Delta, ",copy")
	put(pageKey(changed).In(src), Image, "later")
	put(pageKey(unchanged).In(src), Tombstone, "")

	want := map[int]string{
		changed:   evaluate(History{Origin: &Origin{History: History{Base: &Value{Kind: Image, Data: []byte("source")}}}, Changes: []Value{{Data: []byte(",copy")}}}),
		unchanged: evaluate(History{Origin: &Origin{History: History{Base: &Value{Kind: Image, Data: []byte("source too")}}}}),
	}
	check := func(when string) {
		t.Helper()
		for block, text := range want {
			if have := read(block, lsn); have != text {
				t.Errorf("%s block %d of the copy is %q, want %q", when, block, have, text)
			}
		}
	}
	check("in memory,")
	if err := r.tl.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	r.reopen()
	check("after a restart")
	put(pageKey(0), Image, "the window goes on")
	if err := errors.Join(r.tl.Flush(t.Context()), r.tl.Compact(t.Context())); err != nil {
		t.Fatal(err)
	}
	check("when the window has passed it,")
	r.reopen()
	check("after another restart")
}
