package scratch

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfastdb/holdfast/internal/seal"
)

func open(t testing.TB) *Store {
	t.Helper()
	s, err := Open(t.TempDir(), seal.Endless())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Wipe() })
	return s
}

func put(t testing.TB, s *Store, p []byte) Slot {
	t.Helper()
	slot, err := s.Alloc()
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Write(slot, p); err != nil {
		t.Fatal(err)
	}
	return slot
}

func content(t testing.TB, s *Store, slot Slot) []byte {
	t.Helper()
	p := make([]byte, SlotSize)
	n, err := s.Read(slot, p)
	if err != nil {
		t.Fatal(err)
	}
	return p[:n]
}

func TestSlotsKeepWhatWasWritten(t *testing.T) {
	s := open(t)
	rng := rand.New(rand.NewPCG(1, 2))
	want := map[Slot][]byte{}
	for range 20000 {
		p := bytes.Repeat([]byte{byte(rng.Uint32())}, rng.IntN(SlotSize+1))
		switch {
		case len(want) < 50 || rng.IntN(3) == 0:
			want[put(t, s, p)] = p
		default:
			for slot, old := range want { // any one
				if got := content(t, s, slot); !bytes.Equal(got, old) {
					t.Fatalf("slot %d holds %d bytes, want %d", slot, len(got), len(old))
				}
				if rng.IntN(2) == 0 {
					s.Free(slot)
					delete(want, slot)
				} else if err := s.Write(slot, p); err != nil {
					t.Fatal(err)
				} else {
					want[slot] = p
				}
				break
			}
		}
	}
	for slot, p := range want {
		if !bytes.Equal(content(t, s, slot), p) {
			t.Fatalf("slot %d lost its content", slot)
		}
	}
	if u := s.Usage(); u.Used != uint64(len(want)) {
		t.Errorf("usage: %d slots, want %d", u.Used, len(want))
	}
}

func TestManyGoroutines(t *testing.T) {
	s := open(t)
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			p, q := bytes.Repeat([]byte{byte(g)}, SlotSize), make([]byte, SlotSize)
			for i := range 400 {
				slot, err := s.Alloc()
				if err == nil {
					err = s.Write(slot, p[:SlotSize-i])
				}
				if err == nil {
					_, err = s.Read(slot, q)
				}
				if err != nil || !bytes.Equal(q[:SlotSize-i], p[:SlotSize-i]) {
					t.Errorf("slot %d: wrong content or %v", slot, err)
					return
				}
				if i%4 > 0 {
					s.Free(slot)
				}
			}
		})
	}
	wg.Wait()
}

// The file must hold nothing readable, and must have no name. The same scan finds the
// canary in a file that is not sealed.
func TestNothingReadableOnDisk(t *testing.T) {
	s := open(t)
	canary := []byte("canary-6c1f0b")
	page := bytes.Repeat(append(canary, ' '), SlotSize/(len(canary)+1))
	for range 100 {
		put(t, s, page)
	}
	entries, err := os.ReadDir(s.dir)
	if err != nil || len(entries) > 0 {
		t.Fatalf("the store's directory has %d entries (%v), want none", len(entries), err)
	}
	raw, err := os.ReadFile(fmt.Sprintf("/proc/self/fd/%d", s.file.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	if len(raw) < 100*len(page) {
		t.Fatalf("read %d bytes of the file, want at least %d", len(raw), 100*len(page))
	}
	if bytes.Contains(raw, canary) {
		t.Error("the backing file holds plaintext (K1)")
	}
	if !bytes.Contains(page, canary) {
		t.Error("the scan does not find what is not sealed")
	}
}

func TestDamageIsFound(t *testing.T) {
	s := open(t)
	a, b := put(t, s, []byte("one")), put(t, s, []byte("two"))
	if _, err := s.file.WriteAt([]byte{0xff}, offset(a)+1); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Read(a, make([]byte, SlotSize)); err == nil {
		t.Error("a changed slot was read")
	}
	// A slot cut off by a shorter file is an error too, not zeros.
	if err := s.file.Truncate(offset(b) + 1); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Read(b, make([]byte, SlotSize)); err == nil {
		t.Error("a cut slot was read")
	}
}

func TestWipe(t *testing.T) {
	s := open(t)
	slot := put(t, s, []byte("secret"))
	if err := s.Wipe(); err != nil {
		t.Fatal(err)
	}
	_, allocErr := s.Alloc()
	_, readErr := s.Read(slot, make([]byte, SlotSize))
	_, statErr := s.Statfs()
	for what, err := range map[string]error{"Alloc": allocErr, "Read": readErr, "Statfs": statErr,
		"Write": s.Write(slot, []byte("x"))} {
		if !errors.Is(err, ErrWiped) {
			t.Errorf("%s after Wipe: %v, want ErrWiped", what, err)
		}
	}
	s.Free(slot)
	if err := s.Wipe(); err != nil {
		t.Errorf("second Wipe: %v", err)
	}
}

func TestSpaceIsGivenBack(t *testing.T) {
	s := open(t)
	page := bytes.Repeat([]byte{7}, SlotSize)
	var slots []Slot
	for range (punchAbove + 20) * extentSlots {
		slots = append(slots, put(t, s, page))
	}
	before := blocks(t, s)
	keep := slots[0]
	for _, slot := range slots[1:] {
		s.Free(slot)
	}
	for range 1000 {
		if blocks(t, s) < before && !punching(s) {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	if after := blocks(t, s); after >= before {
		t.Errorf("the file has %d blocks after everything was freed, %d before", after, before)
	}
	for range slots {
		if got := put(t, s, page); got > slots[len(slots)-1]+1 {
			t.Fatalf("slot %d is new while freed ones wait", got)
		}
	}
	if !bytes.Equal(content(t, s, keep), page) {
		t.Error("a used slot was lost")
	}
}

// Slots are given out, written and freed while disk space is given back.
func TestPunchingLosesNothing(t *testing.T) {
	s := open(t)
	var wg sync.WaitGroup
	for g := range 4 {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(g), 1))
			for range 6 {
				held := map[Slot][]byte{}
				for range (punchAbove/2 + rng.IntN(punchAbove)) * extentSlots {
					p := []byte(fmt.Sprint(g, rng.Uint64()))
					slot, err := s.Alloc()
					if err == nil {
						err = s.Write(slot, p)
					}
					if err != nil {
						t.Error(err)
						return
					}
					held[slot] = p
				}
				p := make([]byte, SlotSize)
				for slot, want := range held {
					if n, err := s.Read(slot, p); err != nil || !bytes.Equal(p[:n], want) {
						t.Errorf("slot %d holds %q, %v, want %q", slot, p[:n], err, want)
						return
					}
					s.Free(slot)
				}
			}
		})
	}
	wg.Wait()
}

func punching(s *Store) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.mu.punching
}

func blocks(t *testing.T, s *Store) int64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Fstat(int(s.file.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	return st.Blocks
}

func TestFullDiskSaysSo(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=1m"); err != nil {
		t.Skipf("mounting a small tmpfs: %v", err)
	}
	defer func() { _ = unix.Unmount(dir, unix.MNT_DETACH) }()
	s, err := Open(dir, seal.Endless())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = s.Wipe() }()
	page := bytes.Repeat([]byte{7}, SlotSize)
	var first Slot
	for range 1000 {
		slot, err := s.Alloc()
		if err == nil {
			err = s.Write(slot, page)
		}
		if first == 0 {
			first = slot
		}
		if err == nil {
			continue
		}
		if !errors.Is(err, ErrFull) || !strings.Contains(err.Error(), dir) {
			t.Errorf("error %q, want ErrFull naming %s", err, dir)
		}
		if !bytes.Equal(content(t, s, first), page) {
			t.Error("a full disk cost an older slot")
		}
		return
	}
	t.Error("1000 slots fit into 1 MiB")
}

func BenchmarkWrite(b *testing.B) {
	s := open(b)
	page := bytes.Repeat([]byte{7}, SlotSize)
	slot := put(b, s, page)
	b.SetBytes(SlotSize)
	b.ReportAllocs()
	for b.Loop() {
		if err := s.Write(slot, page); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkRead(b *testing.B) {
	s := open(b)
	page := bytes.Repeat([]byte{7}, SlotSize)
	slot := put(b, s, page)
	b.SetBytes(SlotSize)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := s.Read(slot, page); err != nil {
			b.Fatal(err)
		}
	}
}
