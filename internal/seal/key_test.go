package seal

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"reflect"
	"strings"
	"sync"
	"testing"
	"unsafe"

	"github.com/holdfastdb/holdfast/internal/pg"
)

var walContext = Context{Purpose: PurposeWAL, Project: "p1", Branch: "b1", Object: "segment-1"}

func TestGoldenWAL(t *testing.T) {
	want := golden(t, "wal.hex")
	got, err := SealWAL(nil, testKey(t), walContext, 0x1000028, 0x1000038, 5, []byte("sixteen bytes 16"))
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("sealed WAL is now\n%s%v", hex.Dump(got), err)
	}
	plain, err := OpenWAL([]byte("dst:"), testKey(t), walContext, 0x1000028, 0x1000038, 5, want)
	if err != nil || string(plain) != "dst:sixteen bytes 16" {
		t.Errorf("the golden WAL opens to %q, %v", plain, err)
	}
}

func TestWALOpensOnlyWhereItBelongs(t *testing.T) {
	k := testKey(t)
	sealed, err := SealWAL(nil, k, walContext, 100, 200, 7, []byte("wal"))
	if err != nil {
		t.Fatal(err)
	}
	other := walContext
	other.Object = "segment-2"
	for _, tc := range []struct {
		name       string
		c          Context
		begin, end pg.LSN
		counter    uint64
		cut        int
	}{
		{"another segment", other, 100, 200, 7, 0},
		{"another begin", walContext, 99, 200, 7, 0},
		{"another end", walContext, 100, 201, 7, 0},
		{"another counter", walContext, 100, 200, 8, 0},
		{"cut", walContext, 100, 200, 7, 1},
		{"nothing left", walContext, 100, 200, 7, len(sealed)},
	} {
		if _, err := OpenWAL(nil, k, tc.c, tc.begin, tc.end, tc.counter, sealed[:len(sealed)-tc.cut]); !errors.Is(err, ErrDamaged) {
			t.Errorf("%s: %v, want ErrDamaged", tc.name, err)
		}
	}
	for i := range sealed {
		changed := bytes.Clone(sealed)
		changed[i] ^= 0x10
		if _, err := OpenWAL(nil, k, walContext, 100, 200, 7, changed); !errors.Is(err, ErrDamaged) {
			t.Errorf("byte %d changed: %v", i, err)
		}
	}
	if _, err := OpenWAL(nil, k, walContext, 100, 200, 7, sealed); err != nil {
		t.Error(err)
	}
	// A file's chunk 7 under the same key is no WAL, and the reverse: nonces differ.
	var s scratch
	s.setNonce(domainFile, 7)
	s.setWAL(walContext, 100, 200, 7)
	if s.nonce[0] != byte(domainWAL) {
		t.Errorf("WAL nonce begins with %d", s.nonce[0])
	}
}

func TestNoNonceTwice(t *testing.T) {
	k := testKey(t)
	seal := func(counter uint64) error {
		_, err := SealWAL(nil, k, walContext, 1, 2, counter, []byte("x"))
		return err
	}
	for _, tc := range []struct {
		counter uint64
		ok      bool
	}{{0, true}, {0, false}, {1, true}, {5, true}, {4, false}, {5, false}, {6, true}, {^uint64(0), false}} {
		if err := seal(tc.counter); (err == nil) != tc.ok {
			t.Errorf("counter %d: %v", tc.counter, err)
		}
	}
	if _, err := NewWriter(&bytes.Buffer{}, k, testWrapped, testContext); err != nil {
		t.Errorf("the first file: %v", err)
	}
	if _, err := NewWriter(&bytes.Buffer{}, k, testWrapped, testContext); err == nil {
		t.Error("one key took a second file")
	}
	opened, err := NewOpenKey(rawKey())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := SealWAL(nil, opened, walContext, 1, 2, 9, nil); err == nil {
		t.Error("an unwrapped key sealed WAL")
	}
	if _, err := NewWriter(&bytes.Buffer{}, opened, testWrapped, testContext); err == nil {
		t.Error("an unwrapped key took a file")
	}
}

func TestBadContextsAreRefused(t *testing.T) {
	for _, c := range []Context{
		{}, {Purpose: PurposeWAL, Project: "p"}, {Project: "p", Object: "o"}, {Purpose: PurposeWAL, Object: "o"},
		{PurposeWAL, "p", "b", strings.Repeat("x", 1025)}, {PurposeWAL, "p", strings.Repeat("x", 70000), "o"},
	} {
		if _, err := SealWAL(nil, testKey(t), c, 1, 2, 1, nil); err == nil {
			t.Errorf("SealWAL took %.60s", c)
		}
		if _, err := OpenWAL(nil, testKey(t), c, 1, 2, 1, nil); err == nil {
			t.Errorf("OpenWAL took %.60s", c)
		}
		if _, err := NewWriter(nil, testKey(t), testWrapped, c); err == nil {
			t.Errorf("NewWriter took %.60s", c)
		}
		if _, err := openFile([]byte("x"), c); err == nil {
			t.Errorf("NewReader took %.60s", c)
		}
	}
}

func TestKeyKeepsNoRawBytes(t *testing.T) {
	raw := rawKey()
	if _, err := NewKey(raw); err != nil || !bytes.Equal(raw, make([]byte, KeySize)) {
		t.Errorf("raw is %x after NewKey, %v", raw, err)
	}
	short := []byte("short")
	if _, err := NewKey(short); err == nil || !bytes.Equal(short, make([]byte, 5)) {
		t.Errorf("NewKey of 5 bytes: %v", err)
	}
}

// TestWipeZeroesTheSchedule looks at the memory itself.
func TestWipeZeroesTheSchedule(t *testing.T) {
	k := testKey(t)
	v := reflect.ValueOf(k.mu.aead)
	schedule := unsafe.Slice((*byte)(v.UnsafePointer()), v.Elem().Type().Size())
	// The first two round keys of AES-256 are the raw key, as bytes or as big-endian words.
	swapped := make([]byte, KeySize)
	for i := 0; i < KeySize; i += 4 {
		binary.BigEndian.PutUint32(swapped[i:], binary.LittleEndian.Uint32(rawKey()[i:]))
	}
	has := func() bool { return bytes.Contains(schedule, rawKey()) || bytes.Contains(schedule, swapped) }
	if !has() {
		t.Fatal("the schedule is not where this test looks for it")
	}
	k.Wipe()
	if has() || !bytes.Equal(schedule, make([]byte, len(schedule))) {
		t.Error("the schedule is still in memory after Wipe")
	}
	k.Wipe() // again does nothing
}

func TestWipedKeyIsOfNoUse(t *testing.T) {
	k := testKey(t)
	w, err := NewWriter(&bytes.Buffer{}, k, testWrapped, testContext)
	if err != nil {
		t.Fatal(err)
	}
	sealed, err := SealWAL(nil, k, walContext, 1, 2, 1, []byte("x"))
	if err != nil {
		t.Fatal(err)
	}
	k.Wipe()
	_, openErr := OpenWAL(nil, k, walContext, 1, 2, 1, sealed)
	_, sealErr := SealWAL(nil, k, walContext, 1, 2, 2, []byte("x"))
	_, finishErr := w.Finish()
	for _, err := range []error{openErr, sealErr, finishErr} {
		if !errors.Is(err, ErrWiped) {
			t.Errorf("got %v, want ErrWiped", err)
		}
	}
}

func TestWipeDuringUse(t *testing.T) {
	k := testKey(t)
	sealed, err := SealWAL(nil, k, walContext, 1, 2, 1, pattern(4096))
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for {
				plain, err := OpenWAL(nil, k, walContext, 1, 2, 1, sealed)
				if errors.Is(err, ErrWiped) {
					return
				}
				if err != nil || !bytes.Equal(plain, pattern(4096)) {
					t.Errorf("before the wipe: %v", err)
					return
				}
			}
		})
	}
	k.Wipe()
	wg.Wait()
}

func TestBox(t *testing.T) {
	b, err := NewBox(Endless())
	if err != nil {
		t.Fatal(err)
	}
	plain := pattern(8192)
	around := bytes.Repeat([]byte{'#'}, 3*8192)
	sealed, tag := b.Seal(around[8192:8192], 3, plain)
	if len(sealed) != len(plain) || bytes.Equal(sealed, plain) {
		t.Fatalf("sealed %d bytes into %d", len(plain), len(sealed))
	}
	if around[8191] != '#' || around[2*8192] != '#' {
		t.Error("Seal wrote beyond what it returned")
	}
	got, err := b.Open(nil, 3, sealed, tag)
	if err != nil || !bytes.Equal(got, plain) {
		t.Fatalf("Open: %v", err)
	}
	newer, newTag := b.Seal(nil, 3, plain)
	if bytes.Equal(newer, sealed) {
		t.Error("the same content sealed twice looks the same")
	}
	other, err := NewBox(Endless())
	if err != nil {
		t.Fatal(err)
	}
	changed := bytes.Clone(sealed)
	changed[100] ^= 1
	for _, tc := range []struct {
		name   string
		box    *Box
		slot   uint64
		sealed []byte
		tag    Tag
	}{
		{"another slot", b, 4, sealed, tag}, {"an older content", b, 3, sealed, newTag}, {"another boot", other, 3, sealed, tag},
		{"a changed byte", b, 3, changed, tag}, {"cut", b, 3, sealed[:100], tag}, {"no tag", b, 3, sealed, Tag{}},
	} {
		if _, err := tc.box.Open(nil, tc.slot, tc.sealed, tc.tag); !errors.Is(err, ErrDamaged) {
			t.Errorf("%s: %v, want ErrDamaged", tc.name, err)
		}
	}
	b.Wipe()
	if _, err := b.Open(nil, 3, sealed, tag); !errors.Is(err, ErrWiped) {
		t.Errorf("Open after Wipe: %v", err)
	}
	if sealed, tag := b.Seal(nil, 3, plain); sealed != nil || !tag.IsZero() {
		t.Error("Seal after Wipe sealed")
	}
}

func FuzzOpenWAL(f *testing.F) {
	sealed, err := SealWAL(nil, testKey(f), walContext, 1, 2, 3, []byte("some WAL"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(sealed, uint64(1), uint64(2), uint64(3))
	k := testKey(f)
	f.Fuzz(func(t *testing.T, sealed []byte, begin, end, counter uint64) {
		plain, err := OpenWAL(nil, k, walContext, pg.LSN(begin), pg.LSN(end), counter, sealed)
		if err == nil && (begin != 1 || end != 2 || counter != 3 || string(plain) != "some WAL") {
			t.Errorf("opened %q as %d to %d, counter %d", plain, begin, end, counter)
		}
	})
}

func BenchmarkBoxSeal8KiB(b *testing.B) {
	box, err := NewBox(Endless())
	if err != nil {
		b.Fatal(err)
	}
	plain, dst := pattern(8192), make([]byte, 0, 8192)
	b.SetBytes(8192)
	b.ReportAllocs()
	for b.Loop() {
		box.Seal(dst, 1, plain)
	}
}

func BenchmarkBoxOpen8KiB(b *testing.B) {
	box, err := NewBox(Endless())
	if err != nil {
		b.Fatal(err)
	}
	dst := make([]byte, 0, 8192)
	sealed, tag := box.Seal(nil, 1, pattern(8192))
	b.SetBytes(8192)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := box.Open(dst, 1, sealed, tag); err != nil {
			b.Fatal(err)
		}
	}
}
