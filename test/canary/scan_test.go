package canary

import (
	"bytes"
	"compress/gzip"
	"context"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/s2"
	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"

	"github.com/holdfastdb/holdfast/test/stock"
	"github.com/holdfastdb/holdfast/test/testenv"
)

// A scanner that finds nothing proves nothing unless it finds what is there: stock
// PostgreSQL writes every one of these canaries down.
func TestEveryCanaryIsFoundInStockPostgres(t *testing.T) {
	testenv.NeedPostgres(t)
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	dir := testenv.TempDir(t)
	server, err := stock.New(ctx, dir, "stock", Settings())
	if err != nil {
		t.Fatal(err)
	}
	if err := server.Start(ctx); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := server.Kill(); err != nil {
			t.Error(err)
		}
	})
	w, err := Run(ctx, server.Target())
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	s := NewScanner(w.Canaries)
	if err := s.ScanTree(dir); err != nil {
		t.Fatal(err)
	}
	found := s.Found()
	for kind := range w.Canaries {
		if found[kind] == 0 {
			t.Errorf("%s was not found in stock PostgreSQL's files", kind)
		}
	}
	// Without the server's log and the WAL, which hold nearly everything: these prove that
	// the files of each kind are understood.
	s = NewScanner(w.Canaries)
	for _, sub := range []string{"base", "global", "pg_notify", "pg_twophase", "postgresql.auto.conf"} {
		path := filepath.Join(server.Dir, sub)
		if st, err := os.Stat(path); err == nil && !st.IsDir() {
			err = s.scanFile(path, path)
			if err != nil {
				t.Fatal(err)
			}
			continue
		}
		if err := s.ScanTree(path); err != nil {
			t.Fatal(err)
		}
	}
	found = s.Found()
	for _, kind := range []string{"table", "index key", "unlogged table", "gin index", "TOAST, not compressed", "TOAST, pglz", "TOAST, lz4",
		"large object", "comment", "temporary table", "spilled sort", "NOTIFY", "ALTER SYSTEM", "name of a prepared transaction", "function body"} {
		if found[kind] == 0 {
			t.Errorf("%s was not found in the files proper to it", kind)
		}
	}
}

// A layer that someone forgot to seal would be compressed: each of the compressions in use
// is undone.
func TestCompressionsAreUndone(t *testing.T) {
	c := NewCanary()
	plain := []byte(strings.Repeat("some page content, again and again; ", 3000) + c + strings.Repeat(" and more of it", 3000))
	pack := func(open func(io.Writer) io.WriteCloser) []byte {
		var b bytes.Buffer
		w := open(&b)
		if _, err := w.Write(plain); err != nil {
			t.Fatal(err)
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		return b.Bytes()
	}
	zstdPacked := pack(func(w io.Writer) io.WriteCloser {
		e, err := zstd.NewWriter(w)
		if err != nil {
			t.Fatal(err)
		}
		return e
	})
	for name, packed := range map[string][]byte{
		"plain":          plain,
		"s2 block":       s2.Encode(nil, plain),
		"s2 best block":  s2.EncodeBest(nil, plain),
		"snappy block":   s2.EncodeSnappy(nil, plain),
		"s2 stream":      pack(func(w io.Writer) io.WriteCloser { return s2.NewWriter(w) }),
		"zstd":           zstdPacked,
		"zstd in a zstd": func() []byte { e, _ := zstd.NewWriter(nil); return e.EncodeAll(zstdPacked, nil) }(),
		"lz4":            pack(func(w io.Writer) io.WriteCloser { return lz4.NewWriter(w) }),
		"gzip":           pack(func(w io.Writer) io.WriteCloser { return gzip.NewWriter(w) }),
	} {
		// Somewhere in a file, not at its start.
		file := append(bytes.Repeat([]byte{7}, 12345), packed...)
		s := NewScanner(map[string]string{"it": c})
		if err := s.ScanReader(bytes.NewReader(file), int64(len(file)), name); err != nil {
			t.Fatal(err)
		}
		if s.Found()["it"] == 0 {
			t.Errorf("not found in %s (%d bytes)", name, len(packed))
		}
	}
}

func TestFoundAcrossBuffersAndInDeletedFiles(t *testing.T) {
	c := NewCanary()
	for _, at := range []int{0, bufferSize - 1, bufferSize - 12, bufferSize - overlap, 2*bufferSize - overlap - 5} {
		data := make([]byte, 2*bufferSize+100)
		copy(data[at:], c)
		s := NewScanner(map[string]string{"it": c})
		if err := s.ScanReader(bytes.NewReader(data), int64(len(data)), "memory"); err != nil {
			t.Fatal(err)
		}
		if s.Found()["it"] == 0 {
			t.Errorf("not found at %d", at)
		}
	}
	f, err := os.Create(filepath.Join(t.TempDir(), "gone"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteString(c); err != nil {
		t.Fatal(err)
	}
	s := NewScanner(map[string]string{"it": c})
	outside, err := s.ScanOpenFiles(os.Getpid(), "/nowhere")
	if err != nil {
		t.Fatal(err)
	}
	if len(outside) == 0 || s.Found()["it"] != 0 {
		t.Errorf("open files outside: %v, want the file", outside)
	}
	if err := os.Remove(f.Name()); err != nil {
		t.Fatal(err)
	}
	if _, err := s.ScanOpenFiles(os.Getpid(), "/nowhere"); err != nil {
		t.Fatal(err)
	}
	if s.Found()["it"] == 0 {
		t.Error("not found in a deleted file that is open")
	}
}
