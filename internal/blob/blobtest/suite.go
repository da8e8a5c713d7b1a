// Package blobtest is what every blob.Store must do, as tests that each implementation
// runs, and a Store that fails on purpose, for the tests of those who use one.
package blobtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/holdfastdb/holdfast/internal/blob"
)

// Run runs the suite. open gives an empty store.
func Run(t *testing.T, open func(t *testing.T) blob.Store) {
	for _, tc := range []struct {
		name string
		test func(*testing.T, blob.Store)
	}{
		{"what was created is read back", testRoundTrip},
		{"absent objects", testAbsent},
		{"ranges", testRanges},
		{"create refuses what exists", testCreateExists},
		{"create wants the exact size", testCreateSize},
		{"swap replaces only the version it was given", testSwap},
		{"an ETag never returns", testETagABA},
		{"list is in key order", testList},
		{"list stops at an error", testListStops},
		{"bad keys", testBadKeys},
		{"a cancelled context", testCancelled},
		{"one of many creates wins", testCreateRace},
		{"no swap is lost", testSwapRace},
		{"readers see whole versions", testReadersDuringSwaps},
	} {
		t.Run(tc.name, func(t *testing.T) { tc.test(t, open(t)) })
	}
}

// Put creates an object, or fails the test.
func Put(t *testing.T, s blob.Store, key, data string) blob.ETag {
	t.Helper()
	etag, err := s.Create(t.Context(), key, strings.NewReader(data), int64(len(data)))
	if err != nil {
		t.Fatalf("Create(%s): %v", key, err)
	}
	return etag
}

func wantData(t *testing.T, s blob.Store, key, want string) {
	t.Helper()
	got, _, err := s.Get(t.Context(), key)
	if err != nil || string(got) != want {
		t.Fatalf("Get(%s) = %.60q, %v; want %.60q", key, got, err, want)
	}
}

func wantErr(t *testing.T, what string, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("%s: error %v, want %v", what, err, want)
	}
}

func testRoundTrip(t *testing.T, s blob.Store) {
	for _, data := range []string{"", "x", strings.Repeat("0123456789", 300_000)} {
		key := fmt.Sprintf("a/b-%d/object.1", len(data))
		etag := Put(t, s, key, data)
		wantData(t, s, key, data)
		got, etag2, err := s.Get(t.Context(), key)
		if err != nil || etag2 != etag || string(got) != data {
			t.Errorf("Get: etag %q, %v; Create gave %q", etag2, err, etag)
		}
		info, err := s.Head(t.Context(), key)
		want := blob.Info{Key: key, Size: int64(len(data)), ETag: etag}
		if err != nil || info != want {
			t.Errorf("Head = %+v, %v; want %+v", info, err, want)
		}
		if err := s.Delete(t.Context(), key); err != nil {
			t.Errorf("Delete: %v", err)
		}
		_, _, err = s.Get(t.Context(), key)
		wantErr(t, "Get after Delete", err, blob.ErrNotFound)
		Put(t, s, key, "again")
	}
}

func testAbsent(t *testing.T, s blob.Store) {
	ctx := t.Context()
	Put(t, s, "dir/there", "x")
	for _, key := range []string{"absent", "dir/absent", "dir", "dir/there/below"} {
		_, _, err := s.Get(ctx, key)
		wantErr(t, "Get "+key, err, blob.ErrNotFound)
		_, err = s.GetRange(ctx, key, make([]byte, 1), 0)
		wantErr(t, "GetRange "+key, err, blob.ErrNotFound)
		_, err = s.Head(ctx, key)
		wantErr(t, "Head "+key, err, blob.ErrNotFound)
		_, err = s.Swap(ctx, key, []byte("x"), "etag")
		wantErr(t, "Swap "+key, err, blob.ErrNotFound)
		if err := s.Delete(ctx, key); err != nil {
			t.Errorf("Delete %s: %v", key, err)
		}
	}
	wantData(t, s, "dir/there", "x")
}

func testRanges(t *testing.T, s blob.Store) {
	const data = "0123456789"
	Put(t, s, "k", data)
	for _, tc := range []struct {
		off  int64
		size int
		want string
		err  error
	}{
		{0, 10, data, nil}, {0, 4, "0123", nil}, {7, 3, "789", nil}, {3, 0, "", nil},
		{7, 4, "789", io.EOF}, {10, 1, "", io.EOF}, {99, 5, "", io.EOF},
	} {
		p := make([]byte, tc.size)
		n, err := s.GetRange(t.Context(), "k", p, tc.off)
		if string(p[:n]) != tc.want || !errors.Is(err, tc.err) {
			t.Errorf("GetRange(%d bytes at %d) = %q, %v; want %q, %v", tc.size, tc.off, p[:n], err, tc.want, tc.err)
		}
	}
	if _, err := s.GetRange(t.Context(), "k", make([]byte, 1), -1); err == nil || errors.Is(err, io.EOF) {
		t.Errorf("negative offset: %v", err)
	}
}

func testCreateExists(t *testing.T, s blob.Store) {
	Put(t, s, "k", "first")
	_, err := s.Create(t.Context(), "k", strings.NewReader("second"), 6)
	wantErr(t, "second Create", err, blob.ErrExists)
	wantData(t, s, "k", "first")
}

func testCreateSize(t *testing.T, s blob.Store) {
	for size, data := range map[int64]string{3: "four", 5: "four", -1: "", 0: "x"} {
		_, err := s.Create(t.Context(), "k", strings.NewReader(data), size)
		if err == nil {
			t.Errorf("Create of %d bytes as %d succeeded", len(data), size)
		}
		_, err = s.Head(t.Context(), "k")
		wantErr(t, "Head after a failed Create", err, blob.ErrNotFound)
	}
	broken := errors.New("broken source")
	_, err := s.Create(t.Context(), "k", io.MultiReader(strings.NewReader("ab"), errReader{broken}), 4)
	wantErr(t, "Create from a broken source", err, broken)
	_, err = s.Head(t.Context(), "k")
	wantErr(t, "Head after a failed Create", err, blob.ErrNotFound)
}

type errReader struct{ err error }

func (r errReader) Read([]byte) (int, error) { return 0, r.err }

func testSwap(t *testing.T, s blob.Store) {
	ctx := t.Context()
	first := Put(t, s, "doc", "1")
	second, err := s.Swap(ctx, "doc", []byte("22"), first)
	if err != nil {
		t.Fatal(err)
	}
	_, err = s.Swap(ctx, "doc", []byte("x"), first)
	wantErr(t, "Swap of an old version", err, blob.ErrPrecondition)
	wantData(t, s, "doc", "22")
	if info, err := s.Head(ctx, "doc"); err != nil || info.ETag != second || info.Size != 2 {
		t.Errorf("Head = %+v, %v; want ETag %q", info, err, second)
	}
	if err := s.Delete(ctx, "doc"); err != nil {
		t.Fatal(err)
	}
	_, err = s.Swap(ctx, "doc", []byte("x"), second)
	wantErr(t, "Swap of a deleted document", err, blob.ErrNotFound)
}

func testETagABA(t *testing.T, s blob.Store) {
	first := Put(t, s, "doc", "a")
	b, err := s.Swap(t.Context(), "doc", []byte("b"), first)
	if err != nil {
		t.Fatal(err)
	}
	if b == first {
		t.Errorf("two contents have the ETag %q", b)
	}
}

func keysOf(t *testing.T, s blob.Store, prefix string) []string {
	t.Helper()
	keys := []string{}
	err := s.List(t.Context(), prefix, func(i blob.Info) error {
		keys = append(keys, i.Key)
		if i.Size != int64(len(i.Key)) || i.ETag == "" {
			t.Errorf("listed %+v, want size %d and an ETag", i, len(i.Key))
		}
		return nil
	})
	if err != nil {
		t.Fatalf("List(%q): %v", prefix, err)
	}
	return keys
}

func testList(t *testing.T, s blob.Store) {
	// In byte order: '-' and '.' come before '/', digits and letters after.
	all := []string{"A", "a-b", "a.b", "a/b/c", "a/b/d", "a/b0", "a/bb/x", "a0", "b/c"}
	for _, i := range []int{5, 0, 8, 3, 7, 1, 2, 6, 4} {
		Put(t, s, all[i], all[i]) // the content's length is the key's
	}
	for prefix, want := range map[string][]string{
		"":       all,
		"a":      all[1:8],
		"a/":     all[3:7],
		"a/b":    all[3:7],
		"a/b/":   all[3:5],
		"a/b/c":  all[3:4],
		"b/c":    all[8:],
		"b/cd":   {},
		"absent": {},
		"A/":     {},
	} {
		if diff := cmp.Diff(want, keysOf(t, s, prefix)); diff != "" {
			t.Errorf("List(%q): %s", prefix, diff)
		}
	}
	if err := s.Delete(t.Context(), "b/c"); err != nil {
		t.Fatal(err)
	}
	if got := keysOf(t, s, "b"); len(got) != 0 {
		t.Errorf("List after Delete = %v", got)
	}
}

func testListStops(t *testing.T, s blob.Store) {
	Put(t, s, "a", "a")
	Put(t, s, "b", "b")
	stop := errors.New("stop")
	calls := 0
	err := s.List(t.Context(), "", func(blob.Info) error { calls++; return stop })
	if !errors.Is(err, stop) || calls != 1 {
		t.Errorf("List made %d calls and gave %v, want 1 and its error", calls, err)
	}
}

func testBadKeys(t *testing.T, s blob.Store) {
	ctx := t.Context()
	Put(t, s, "folder/object", "x")
	for _, key := range []string{"", "/", "/a", "a/", "a//b", ".", "..", "a/../b", "../x", "a b", "a\x00", "ä", "a\\b",
		strings.Repeat("x", 256), strings.Repeat("x/", 300) + "x"} {
		if _, err := s.Create(ctx, key, strings.NewReader("x"), 1); err == nil || errors.Is(err, blob.ErrExists) {
			t.Errorf("Create(%.40q): %v", key, err)
		}
		if _, _, err := s.Get(ctx, key); err == nil || errors.Is(err, blob.ErrNotFound) {
			t.Errorf("Get(%.40q): %v", key, err)
		}
		if err := s.Delete(ctx, key); err == nil {
			t.Errorf("Delete(%.40q) succeeded", key)
		}
	}
	wantData(t, s, "folder/object", "x")
}

func testCancelled(t *testing.T, s blob.Store) {
	etag := Put(t, s, "k", "x")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, _, err := s.Get(ctx, "k")
	wantErr(t, "Get", err, context.Canceled)
	_, err = s.Create(ctx, "new", bytes.NewReader(make([]byte, 10)), 10)
	wantErr(t, "Create", err, context.Canceled)
	_, err = s.Swap(ctx, "k", []byte("y"), etag)
	wantErr(t, "Swap", err, context.Canceled)
	wantErr(t, "List", s.List(ctx, "", func(blob.Info) error { return nil }), context.Canceled)
	wantData(t, s, "k", "x")
}

func testCreateRace(t *testing.T, s blob.Store) {
	for round := range 5 {
		key := fmt.Sprintf("race/%d/%d", round, round) // with a folder that all make at once
		var wg sync.WaitGroup
		var winner atomic.Pointer[string]
		for i := range 8 {
			wg.Go(func() {
				data := strings.Repeat(fmt.Sprint(i), 1000+i)
				_, err := s.Create(t.Context(), key, strings.NewReader(data), int64(len(data)))
				if err == nil {
					if !winner.CompareAndSwap(nil, &data) {
						t.Error("two creates won")
					}
				} else if !errors.Is(err, blob.ErrExists) {
					t.Errorf("Create: %v", err)
				}
			})
		}
		wg.Wait()
		if w := winner.Load(); w == nil {
			t.Error("no create won")
		} else {
			wantData(t, s, key, *w)
		}
	}
}

// testSwapRace appends to one document from many goroutines: each appended byte is there.
func testSwapRace(t *testing.T, s blob.Store) {
	Put(t, s, "doc", "")
	const workers, each = 6, 5
	var wg sync.WaitGroup
	for i := range workers {
		wg.Go(func() {
			for n := 0; n < each; {
				data, etag, err := s.Get(t.Context(), "doc")
				if err != nil {
					t.Error(err)
					return
				}
				_, err = s.Swap(t.Context(), "doc", append(data, byte('a'+i)), etag)
				if err == nil {
					n++
				} else if !errors.Is(err, blob.ErrPrecondition) {
					t.Errorf("Swap: %v", err)
					return
				}
			}
		})
	}
	wg.Wait()
	got, _, err := s.Get(t.Context(), "doc")
	if err != nil || len(got) != workers*each {
		t.Fatalf("the document has %d bytes, %v; want %d", len(got), err, workers*each)
	}
	for i := range workers {
		if n := bytes.Count(got, []byte{byte('a' + i)}); n != each {
			t.Errorf("worker %d appended %d times, %d are there", i, each, n)
		}
	}
}

func testReadersDuringSwaps(t *testing.T, s blob.Store) {
	version := func(i int) string { return strings.Repeat(fmt.Sprint(i%10), 2000+i) }
	etag := Put(t, s, "doc", version(0))
	var wg sync.WaitGroup
	done := make(chan struct{})
	for range 3 {
		wg.Go(func() {
			for {
				select {
				case <-done:
					return
				default:
				}
				got, _, err := s.Get(t.Context(), "doc")
				if err != nil || string(got) != version(len(got)-2000) {
					t.Errorf("read a document of %d bytes that nobody wrote, %v", len(got), err)
					return
				}
			}
		})
	}
	for i := 1; i < 20; i++ {
		var err error
		if etag, err = s.Swap(t.Context(), "doc", []byte(version(i)), etag); err != nil {
			t.Errorf("Swap: %v", err)
			break
		}
	}
	close(done)
	wg.Wait()
}
