package layer

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/holdfastdb/holdfast/internal/keyring/keyringtest"
	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/internal/seal"
	"github.com/holdfastdb/holdfast/pageserver/keyspace"
)

var rewrite = flag.Bool("rewrite", false, "rewrite the golden files")

// diff is cmp.Diff, but quick when there is no difference.
func diff(want, got any) string {
	if reflect.DeepEqual(want, got) {
		return ""
	}
	return cmp.Diff(want, got)
}

func testKey(n int) keyspace.Key {
	return keyspace.RelPage(pg.RelTag{RelFileNode: pg.RelFileNode{Tablespace: 1663, Database: 5, Relation: pg.Oid(16384 + n/100)}}, pg.BlockNumber(n%100))
}

// makeEntries gives about n entries in order, with several versions of some keys and,
// now and then, two at one LSN.
func makeEntries(rng *rand.Rand, n int) []Entry {
	var es []Entry
	for k := 0; len(es) < n; k += 1 + rng.IntN(3) {
		lsn := pg.LSN(1000 + rng.IntN(1000))
		for range 1 + rng.IntN(4) {
			size := rng.IntN(200)
			if rng.IntN(20) == 0 {
				size = 8192
			}
			data := make([]byte, size)
			for i := range data[:size/2] {
				data[i] = byte(rng.Uint32())
			}
			es = append(es, Entry{testKey(k), lsn, uint8(1 + rng.IntN(4)), data})
			lsn += pg.LSN(rng.IntN(3) * 8)
		}
	}
	return es
}

func writeBody(t testing.TB, es []Entry) ([]byte, Properties) {
	t.Helper()
	var buf bytes.Buffer
	w := bodyWriter{w: &buf}
	for _, e := range es {
		if err := w.add(e); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.finish(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes(), w.props
}

func openBytes(body []byte) (*Reader, error) {
	return openBody(bytes.NewReader(body), int64(len(body)), "test")
}

func readAll(l *Reader, from keyspace.Key) (es []Entry, err error) {
	it, err := l.Iterate(from)
	if err != nil {
		return nil, err
	}
	defer it.Close()
	for {
		e, more, err := it.Next()
		if err != nil || !more {
			return es, err
		}
		e.Data = bytes.Clone(e.Data)
		if e.Data == nil {
			e.Data = []byte{}
		}
		es = append(es, e)
	}
}

// lookUp finds the versions of key at or below lsn, newest first.
func lookUp(t *testing.T, l *Reader, key keyspace.Key, lsn pg.LSN) (found []Entry) {
	t.Helper()
	if !l.MayContain(key) {
		return nil
	}
	for i := l.BlockOf(key, lsn); i >= 0; i-- {
		b, err := l.ReadBlock(i)
		if err != nil {
			t.Fatal(err)
		}
		for j := b.After(key, lsn) - 1; j >= 0; j-- {
			e := b.Entry(j)
			if e.Key != key {
				return found
			}
			found = append(found, e)
		}
	}
	return found
}

func TestWhatWasWrittenIsRead(t *testing.T) {
	for seed := range uint64(20) {
		rng := rand.New(rand.NewPCG(seed, 1))
		es := makeEntries(rng, 1+rng.IntN(3000))
		body, props := writeBody(t, es)
		l, err := openBytes(body)
		if err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		if d := diff(props, l.Properties()); d != "" || props.Entries != uint64(len(es)) {
			t.Fatalf("seed %d: properties of %d entries: %s", seed, len(es), d)
		}
		got, err := readAll(l, keyspace.Key{})
		if d := diff(es, got); err != nil || d != "" {
			t.Fatalf("seed %d: %v, %s", seed, err, d)
		}
		checkLookUps(t, rng, l, es)
	}
}

func checkLookUps(t *testing.T, rng *rand.Rand, l *Reader, es []Entry) {
	t.Helper()
	for range 200 {
		key, lsn := testKey(rng.IntN(len(es)*2)), pg.LSN(990+rng.IntN(1100))
		var want, from []Entry
		for _, e := range es {
			if e.Key == key && e.LSN <= lsn {
				want = append([]Entry{e}, want...)
			}
			if e.Key.Compare(key) >= 0 {
				from = append(from, e)
			}
		}
		if d := diff(want, lookUp(t, l, key, lsn)); d != "" {
			t.Fatalf("key %x at %s: %s", key[:], lsn, d)
		}
		if rng.IntN(20) == 0 {
			got, err := readAll(l, key)
			if d := diff(from, got); err != nil || d != "" {
				t.Fatalf("from key %x: %v %s", key[:], err, d)
			}
		}
	}
}

func TestFilterKeepsAbsentKeysOut(t *testing.T) {
	var hashes []uint64
	for i := range 20000 {
		hashes = append(hashes, hash(testKey(i)))
	}
	f := makeFilter(hashes)
	passed := 0
	for i := range 20000 {
		if !f.mayContain(hash(testKey(i))) {
			t.Fatalf("key %d is in the filter and was refused", i)
		}
		if f.mayContain(hash(testKey(i + 20000))) {
			passed++
		}
	}
	if passed > 400 { // 2 %, twice what 10 bits and 7 probes are to give
		t.Errorf("%d of 20000 absent keys pass", passed)
	}
}

func TestWriterRefuses(t *testing.T) {
	add := func(es ...Entry) error {
		w := bodyWriter{w: &bytes.Buffer{}}
		for _, e := range es {
			if err := w.add(e); err != nil {
				return err
			}
		}
		return w.finish()
	}
	for name, es := range map[string][]Entry{
		"nothing":         {},
		"no kind":         {{Key: testKey(1)}},
		"keys descending": {{testKey(2), 1, 1, nil}, {testKey(1), 2, 1, nil}},
		"LSNs descending": {{testKey(1), 2, 1, nil}, {testKey(1), 1, 1, nil}},
		"too much data":   {{testKey(1), 2, 1, make([]byte, MaxData+1)}},
	} {
		if err := add(es...); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

// The keys and LSNs do not compress, so that the golden does not depend on S2's encoder.
var goldenEntries = []Entry{
	{keyspace.AuxFile("pg_stat/two"), 0x0102030405060708, 1, []byte("image")},
	{keyspace.AuxFile("pg_stat/one"), 0x1112131415161718, 3, []byte("rec")},
}

// TestGolden also proves the byte totals of the example in the package comment.
func TestGolden(t *testing.T) {
	body, _ := writeBody(t, goldenEntries)
	if len(body) != 249 {
		t.Errorf("the example has %d bytes, the package comment says 249", len(body))
	}
	parts := []struct {
		name string
		size int
	}{
		{"header: magic, version", 16}, {"block: codec, stored", 1},
		{"entry: key, LSN, kind, data", 32}, {"entry", 30}, {"offsets of entries", 8}, {"entries", 4},
		{"index: key, LSN, offset, size, size decompressed", 42}, {"filter", 8},
		{"properties: first and last key", 36}, {"least, greatest LSN, entries, keys, bytes", 40},
		{"trailer: offset of index, blocks, filter, version, magic", 32},
	}
	var out strings.Builder
	rest := body
	for _, p := range parts {
		fmt.Fprintf(&out, "# %s\n%s\n", p.name, hex.EncodeToString(rest[:p.size]))
		rest = rest[p.size:]
	}
	file := filepath.Join("testdata", "golden.hex")
	if *rewrite {
		if err := os.WriteFile(file, []byte(out.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if d := diff(string(want), out.String()); err != nil || d != "" {
		t.Errorf("%v: the format changed: %s", err, d)
	}
	l, err := openBytes(body)
	if err != nil {
		t.Fatal(err)
	}
	got, err := readAll(l, keyspace.Key{})
	if d := diff(goldenEntries, got); err != nil || d != "" {
		t.Errorf("%v, %s", err, d)
	}
}

// sealLayer gives a sealed layer and how to open it.
func sealLayer(t *testing.T, ring *keyringtest.Ring, object string, es []Entry) ([]byte, seal.Context) {
	t.Helper()
	c := seal.Context{Purpose: seal.PurposeLayer, Project: "p", Branch: "b", Object: object}
	k, wrapped, err := ring.Generate(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	var buf bytes.Buffer
	w, err := NewWriter(&buf, k, wrapped, c)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range es {
		if err := w.Add(e); err != nil {
			t.Fatal(err)
		}
	}
	if _, size, err := w.Finish(); err != nil || size != int64(buf.Len()) {
		t.Fatalf("Finish: %d bytes of %d, %v", size, buf.Len(), err)
	}
	if _, _, err := w.Finish(); err == nil {
		t.Error("a second Finish succeeded")
	}
	return buf.Bytes(), c
}

func readSealed(ctx context.Context, ring *keyringtest.Ring, data []byte, c seal.Context) error {
	l, err := Open(ctx, bytes.NewReader(data), int64(len(data)), c, ring.Open)
	if err != nil {
		return err
	}
	_, err = readAll(l, keyspace.Key{})
	return err
}

func TestDamageIsFoundAndNamed(t *testing.T) {
	ring := keyringtest.New()
	rng := rand.New(rand.NewPCG(7, 7))
	data, c := sealLayer(t, ring, "layers/one", makeEntries(rng, 400))
	other, _ := sealLayer(t, ring, "layers/two", makeEntries(rng, 400))
	if err := readSealed(t.Context(), ring, data, c); err != nil {
		t.Fatal(err)
	}
	check := func(what string, damaged []byte) {
		t.Helper()
		err := readSealed(t.Context(), ring, damaged, c)
		if err == nil || !strings.Contains(err.Error(), "layers/one") {
			t.Errorf("%s: error %v, want one that names the object", what, err)
		}
	}
	check("the file of another layer", other)
	check("an empty file", nil)
	for range 60 {
		at := rng.IntN(len(data))
		check(fmt.Sprintf("cut at %d", at), data[:at])
		flipped := bytes.Clone(data)
		flipped[at] ^= 1 << rng.IntN(8)
		check(fmt.Sprintf("bit flipped at %d", at), flipped)
	}
	check("a byte more", append(bytes.Clone(data), 0))
	ring.Revoke()
	check("a revoked key", data)
}

func TestReaderHasNoMoreThanItsBlocks(t *testing.T) {
	body, _ := writeBody(t, goldenEntries)
	l, err := openBytes(body)
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range []int{-1, l.Blocks()} {
		if _, err := l.ReadBlock(i); err == nil {
			t.Errorf("block %d: no error", i)
		}
	}
}

// FuzzOpen feeds plaintext that is no layer to everything that reads one.
func FuzzOpen(f *testing.F) {
	rng := rand.New(rand.NewPCG(1, 2))
	body, _ := writeBody(f, makeEntries(rng, 50))
	golden, _ := writeBody(f, goldenEntries)
	f.Add(body)
	f.Add(golden)
	f.Add([]byte{})
	for range 50 { // also when run as a plain test
		b := bytes.Clone(golden)
		b[rng.IntN(len(b))] = byte(rng.Uint32())
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		l, err := openBytes(body)
		if err != nil {
			return
		}
		es, err := readAll(l, keyspace.Key{})
		if err != nil {
			if !errors.Is(err, ErrFormat) {
				t.Errorf("error %v is not ErrFormat", err)
			}
			return
		}
		for _, e := range es {
			l.MayContain(e.Key)
			if l.BlockOf(e.Key, e.LSN) < 0 {
				t.Errorf("no block has key %x at %s", e.Key[:], e.LSN)
			}
		}
	})
}

func FuzzBlock(f *testing.F) {
	rng := rand.New(rand.NewPCG(1, 3))
	for range 20 {
		raw := make([]byte, 40+rng.IntN(60))
		raw[26], raw[len(raw)-4] = 1, 1
		f.Add(raw)
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		b, err := parseBlock(raw)
		if err != nil {
			return
		}
		for i := range b.Len() {
			e := b.Entry(i)
			if n := b.After(e.Key, e.LSN); n <= i {
				t.Errorf("entry %d is not before After = %d", i, n)
			}
			if n := b.From(e.Key); n > i {
				t.Errorf("entry %d is before From = %d", i, n)
			}
		}
	})
}

func FuzzCompress(f *testing.F) {
	f.Add([]byte("abc"))
	f.Add(bytes.Repeat([]byte("abcdefgh"), 1000))
	f.Fuzz(func(t *testing.T, raw []byte) {
		got, err := decompress(nil, compress([]byte("x"), raw)[1:], len(raw))
		if err != nil || !bytes.Equal(got, raw) {
			t.Errorf("round trip of %d bytes: %v", len(raw), err)
		}
		_, _ = decompress(nil, raw, 100)
	})
}

func BenchmarkReadBlock(b *testing.B) {
	body, _ := writeBody(b, makeEntries(rand.New(rand.NewPCG(1, 1)), 20000))
	l, err := openBytes(body)
	if err != nil {
		b.Fatal(err)
	}
	for i := 0; b.Loop(); i++ {
		if _, err := l.ReadBlock(i % l.Blocks()); err != nil {
			b.Fatal(err)
		}
	}
}
