package seal

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"strings"
	"sync"
	"testing"
)

var (
	testContext = Context{Purpose: PurposeLayer, Project: "p1", Branch: "b1", Object: "000-fff"}
	testWrapped = []byte("wrapped key")
)

func rawKey() []byte { return []byte("0123456789abcdef0123456789ABCDEF") }

func testKey(t testing.TB) *Key {
	t.Helper()
	k, err := NewKey(rawKey())
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func openTestKey(context.Context, Context, []byte) (*Key, error) { return NewOpenKey(rawKey()) }

func sealFile(t testing.TB, plain []byte, c Context, chunkSize int) []byte {
	t.Helper()
	var out bytes.Buffer
	w, err := newWriter(&out, testKey(t), testWrapped, c, chunkSize)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(plain); err != nil {
		t.Fatal(err)
	}
	size, err := w.Finish()
	if err != nil || size != int64(out.Len()) {
		t.Fatalf("Finish = %d, %v; %d bytes were written", size, err, out.Len())
	}
	return out.Bytes()
}

// openFile opens a sealed file and reads all of it.
func openFile(sealed []byte, c Context) ([]byte, error) {
	r, err := NewReader(context.Background(), bytes.NewReader(sealed), int64(len(sealed)), c, openTestKey)
	if err != nil {
		return nil, err
	}
	plain := make([]byte, r.Size())
	if _, err := r.ReadAt(plain, 0); err != nil {
		return nil, err
	}
	return plain, nil
}

func pattern(n int) []byte {
	b := make([]byte, n)
	r := rand.NewPCG(1, uint64(n))
	for i := range b {
		b[i] = byte(r.Uint64())
	}
	return b
}

// golden reads a testdata file of hex with "#" comments.
func golden(t *testing.T, name string) []byte {
	t.Helper()
	text, err := os.ReadFile("testdata/" + name)
	if err != nil {
		t.Fatal(err)
	}
	var digits strings.Builder
	for line := range strings.Lines(string(text)) {
		line, _, _ = strings.Cut(line, "#")
		digits.WriteString(strings.Join(strings.Fields(line), ""))
	}
	b, err := hex.DecodeString(digits.String())
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestGoldenFile(t *testing.T) {
	plain := append(bytes.Repeat([]byte{'a'}, minChunkSize), "the last chunk"...)
	want := golden(t, "file.hex")
	if got := sealFile(t, plain, testContext, minChunkSize); !bytes.Equal(got, want) {
		t.Errorf("sealed file is now\n%s", hex.Dump(got))
	}
	if got, err := openFile(want, testContext); err != nil || !bytes.Equal(got, plain) {
		t.Errorf("the golden file opens to %d bytes, %v", len(got), err)
	}
}

func TestWorkedExampleOfTheDoc(t *testing.T) {
	var out bytes.Buffer
	w, err := NewWriter(&out, testKey(t), make([]byte, 96), testContext)
	if err != nil {
		t.Fatal(err)
	}
	w.Write(make([]byte, 20000))
	size, err := w.Finish()
	if err != nil || size != 20144 || SealedSize(20000, 96) != 20144 {
		t.Errorf("size %d, %v; SealedSize %d; want 20144", size, err, SealedSize(20000, 96))
	}
}

func TestSizesAroundChunks(t *testing.T) {
	const c = minChunkSize
	for _, n := range []int{0, 1, c - 1, c, c + 1, 2 * c, 2*c + 1, 20*c - 1, 20 * c, ChunkSize} {
		plain := pattern(n)
		sealed := sealFile(t, plain, testContext, c)
		got, err := openFile(sealed, testContext)
		if err != nil || !bytes.Equal(got, plain) {
			t.Errorf("%d bytes: opened %d, %v", n, len(got), err)
		}
		full := sealFile(t, plain, testContext, ChunkSize)
		if want := SealedSize(int64(n), len(testWrapped)); int64(len(full)) != want {
			t.Errorf("%d bytes seal to %d, SealedSize says %d", n, len(full), want)
		}
	}
}

func TestWritesOfAnySizeSealTheSame(t *testing.T) {
	plain := pattern(5*minChunkSize + 77)
	want := sealFile(t, plain, testContext, minChunkSize)
	for _, step := range []int{1, 7, minChunkSize - 1, minChunkSize, minChunkSize + 1, 3 * minChunkSize} {
		var out bytes.Buffer
		w, err := newWriter(&out, testKey(t), testWrapped, testContext, minChunkSize)
		if err != nil {
			t.Fatal(err)
		}
		for rest := plain; len(rest) > 0; {
			n, err := w.Write(rest[:min(step, len(rest))])
			if err != nil {
				t.Fatal(err)
			}
			rest = rest[n:]
		}
		if _, err := w.Finish(); err != nil || !bytes.Equal(out.Bytes(), want) {
			t.Errorf("writes of %d bytes seal to something else, %v", step, err)
		}
	}
}

func TestReadAtAnywhere(t *testing.T) {
	plain := pattern(30*minChunkSize + 5)
	sealed := sealFile(t, plain, testContext, minChunkSize)
	r, err := NewReader(t.Context(), bytes.NewReader(sealed), int64(len(sealed)), testContext, openTestKey)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for worker := range 4 {
		wg.Go(func() {
			rnd := rand.New(rand.NewPCG(7, uint64(worker)))
			for range 300 {
				off, n := rnd.IntN(len(plain)+10), rnd.IntN(20*minChunkSize)
				p := make([]byte, n)
				got, err := r.ReadAt(p, int64(off))
				want := plain[min(off, len(plain)):min(off+n, len(plain))]
				if !bytes.Equal(p[:got], want) {
					t.Errorf("%d bytes at %d differ", n, off)
				}
				if wantEOF := got < n; wantEOF != (err == io.EOF) || err != nil && err != io.EOF {
					t.Errorf("%d bytes at %d: got %d, %v", n, off, got, err)
				}
			}
		})
	}
	wg.Wait()
	if _, err := r.ReadAt(make([]byte, 1), -1); err == nil || err == io.EOF {
		t.Errorf("negative offset: %v", err)
	}
}

func TestEveryChangedBitIsRefused(t *testing.T) {
	plain := pattern(2*minChunkSize + 100)
	sealed := sealFile(t, plain, testContext, minChunkSize)
	start := fixedHeader + len(testWrapped)
	for i := range sealed {
		if i >= fixedHeader && i < start {
			continue // the wrapped DEK is the key manager's to authenticate
		}
		changed := bytes.Clone(sealed)
		changed[i] ^= 1 << (i % 8)
		if _, err := openFile(changed, testContext); err == nil {
			t.Fatalf("byte %d was changed and the file opens", i)
		}
	}
}

func TestEveryTruncationAndExtensionIsRefused(t *testing.T) {
	sealed := sealFile(t, pattern(2*minChunkSize), testContext, minChunkSize)
	for n := range sealed {
		if _, err := openFile(sealed[:n], testContext); !errors.Is(err, ErrDamaged) {
			t.Fatalf("cut to %d of %d bytes: %v, want ErrDamaged", n, len(sealed), err)
		}
	}
	one := sealFile(t, pattern(minChunkSize), testContext, minChunkSize)
	start := fixedHeader + len(testWrapped)
	for _, more := range [][]byte{{0}, make([]byte, TagSize), make([]byte, TagSize+1), one[start:], sealed[start:]} {
		if _, err := openFile(append(bytes.Clone(sealed), more...), testContext); !errors.Is(err, ErrDamaged) {
			t.Errorf("extended by %d bytes: %v, want ErrDamaged", len(more), err)
		}
	}
	// Told a size that is not the file's, the Reader says so and does not read nonsense.
	for _, size := range []int64{0, int64(len(sealed)) + minChunkSize + TagSize, 1 << 62} {
		_, err := NewReader(t.Context(), bytes.NewReader(sealed), size, testContext, openTestKey)
		if !errors.Is(err, ErrDamaged) {
			t.Errorf("size %d: %v, want ErrDamaged", size, err)
		}
	}
}

func TestChunksDoNotMove(t *testing.T) {
	sealed := sealFile(t, pattern(4*minChunkSize), testContext, minChunkSize)
	start, step := fixedHeader+len(testWrapped), minChunkSize+TagSize
	chunk := func(b []byte, i int) []byte { return b[start+i*step : start+(i+1)*step] }
	for i := range 4 {
		for j := range i {
			moved := bytes.Clone(sealed)
			copy(chunk(moved, i), chunk(sealed, j))
			copy(chunk(moved, j), chunk(sealed, i))
			if _, err := openFile(moved, testContext); !errors.Is(err, ErrDamaged) {
				t.Errorf("chunks %d and %d exchanged: %v", i, j, err)
			}
		}
	}
	// A chunk left out: the chunks after it have other numbers.
	out := append(bytes.Clone(sealed[:start+step]), sealed[start+2*step:]...)
	if _, err := openFile(out, testContext); !errors.Is(err, ErrDamaged) {
		t.Errorf("chunk 1 left out: %v", err)
	}
}

func TestNothingOpensInAnotherContext(t *testing.T) {
	sealed := sealFile(t, []byte("x"), testContext, ChunkSize)
	for _, c := range []Context{
		{PurposeWAL, "p1", "b1", "000-fff"}, {PurposeLayer, "p2", "b1", "000-fff"},
		{PurposeLayer, "p1", "b2", "000-fff"}, {PurposeLayer, "p1", "b1", "000-ffe"},
		{PurposeLayer, "p1b", "1", "000-fff"}, {PurposeLayer, "p1", "", "b1000-fff"},
	} {
		if _, err := openFile(sealed, c); !errors.Is(err, ErrDamaged) {
			t.Errorf("opened as %s: %v", c, err)
		}
	}
}

func TestBadHeaders(t *testing.T) {
	sealed := sealFile(t, []byte("x"), testContext, ChunkSize)
	for _, tc := range []struct {
		name string
		at   int
		with []byte
		want string
	}{
		{"magic", 0, []byte("HFSEALEX"), "magic"},
		{"version", 8, []byte{2, 0}, "version 2"},
		{"no wrapped DEK", 10, []byte{0, 0}, "wrapped DEK of 0"},
		{"long wrapped DEK", 10, []byte{0xff, 0xff}, "wrapped DEK of 65535"},
		{"chunk size 0", 12, []byte{0, 0, 0, 0}, "chunk size 0"},
		{"chunk size huge", 12, []byte{0xff, 0xff, 0xff, 0xff}, "chunk size 4294967295"},
	} {
		bad := bytes.Clone(sealed)
		copy(bad[tc.at:], tc.with)
		if _, err := openFile(bad, testContext); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v, want %q", tc.name, err, tc.want)
		}
	}
}

func TestLongWrappedKeyIsReadWhole(t *testing.T) {
	wrapped := pattern(MaxWrapped)
	var out bytes.Buffer
	w, err := NewWriter(&out, testKey(t), wrapped, testContext)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Finish(); err != nil {
		t.Fatal(err)
	}
	_, err = NewReader(t.Context(), bytes.NewReader(out.Bytes()), int64(out.Len()), testContext,
		func(_ context.Context, c Context, got []byte) (*Key, error) {
			if !bytes.Equal(got, wrapped) || c != testContext {
				t.Errorf("asked for the key of %s with %d bytes", c, len(got))
			}
			return NewOpenKey(rawKey())
		})
	if err != nil {
		t.Error(err)
	}
}

type failingWriter struct{ left int }

func (w *failingWriter) Write(p []byte) (int, error) {
	if len(p) > w.left {
		return 0, errors.New("full")
	}
	w.left -= len(p)
	return len(p), nil
}

func TestWriterKeepsItsError(t *testing.T) {
	for left := range 5 {
		w, err := newWriter(&failingWriter{left * minChunkSize}, testKey(t), testWrapped, testContext, minChunkSize)
		if err != nil {
			t.Fatal(err)
		}
		_, err = w.Write(make([]byte, 10*minChunkSize))
		_, err2 := w.Write([]byte("x"))
		_, err3 := w.Finish()
		for _, err := range []error{err, err2, err3} {
			if err == nil || !strings.Contains(err.Error(), "full") || !strings.Contains(err.Error(), testContext.Object) {
				t.Errorf("after %d KiB: %v", left, err)
			}
		}
		if _, err := w.Write([]byte("x")); err == nil {
			t.Error("Write after Finish succeeded")
		}
	}
}

func TestReaderErrorsAreNotDamage(t *testing.T) {
	broken := errors.New("disk")
	_, err := NewReader(t.Context(), brokenAt{broken}, 1000, testContext, openTestKey)
	if !errors.Is(err, broken) || errors.Is(err, ErrDamaged) {
		t.Errorf("got %v, want the disk's error", err)
	}
	sealed := sealFile(t, []byte("x"), testContext, ChunkSize)
	_, err = NewReader(t.Context(), bytes.NewReader(sealed), int64(len(sealed)), testContext,
		func(context.Context, Context, []byte) (*Key, error) { return nil, fmt.Errorf("no: %w", broken) })
	if !errors.Is(err, broken) {
		t.Errorf("got %v, want the key's error", err)
	}
}

type brokenAt struct{ err error }

func (b brokenAt) ReadAt([]byte, int64) (int, error) { return 0, b.err }

func FuzzReader(f *testing.F) {
	for _, n := range []int{0, 1, minChunkSize, 3*minChunkSize + 1} {
		f.Add(sealFile(f, pattern(n), testContext, minChunkSize))
	}
	f.Fuzz(func(t *testing.T, sealed []byte) {
		plain, err := openFile(sealed, testContext)
		if err != nil {
			return
		}
		// What opens is what was sealed, byte for byte, but for the wrapped DEK.
		h, err := readHeader(bytes.NewReader(sealed), int64(len(sealed)))
		if err != nil {
			t.Fatal(err)
		}
		again := sealFile(t, plain, testContext, h.chunkSize)
		if !bytes.Equal(again[fixedHeader+len(testWrapped):], sealed[h.size():]) {
			t.Error("opened something that sealing does not give")
		}
	})
}

func FuzzRoundTrip(f *testing.F) {
	f.Add([]byte(""), uint16(0))
	f.Add(pattern(5000), uint16(3000))
	f.Fuzz(func(t *testing.T, plain []byte, off uint16) {
		sealed := sealFile(t, plain, testContext, minChunkSize)
		r, err := NewReader(t.Context(), bytes.NewReader(sealed), int64(len(sealed)), testContext, openTestKey)
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(io.NewSectionReader(r, int64(off), r.Size()))
		if err != nil || !bytes.Equal(got, plain[min(int(off), len(plain)):]) {
			t.Errorf("from %d: %d bytes, %v", off, len(got), err)
		}
	})
}

func BenchmarkReaderRandom24KiB(b *testing.B) {
	sealed := sealFile(b, pattern(8<<20), testContext, ChunkSize)
	r, err := NewReader(b.Context(), bytes.NewReader(sealed), int64(len(sealed)), testContext, openTestKey)
	if err != nil {
		b.Fatal(err)
	}
	p := make([]byte, 24<<10)
	rnd := rand.New(rand.NewPCG(1, 1))
	b.SetBytes(int64(len(p)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := r.ReadAt(p, rnd.Int64N(8<<20-24<<10)); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkWriter(b *testing.B) {
	plain := pattern(4 << 20)
	b.SetBytes(int64(len(plain)))
	for b.Loop() {
		w, err := NewWriter(io.Discard, testKey(b), testWrapped, testContext)
		if err != nil {
			b.Fatal(err)
		}
		w.Write(plain)
		if _, err := w.Finish(); err != nil {
			b.Fatal(err)
		}
	}
}
