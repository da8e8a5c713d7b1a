package scrub

import (
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// count looks through this process's memory. The canary is kept in another form, so that looking
// does not find what looks.
func count(t *testing.T, hidden []byte) (found int) {
	t.Helper()
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		t.Fatal(err)
	}
	mem, err := os.Open("/proc/self/mem")
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	buf, err := unix.Mmap(-1, 0, 1<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(buf)
	own := fmt.Sprintf("%x-", uintptrOf(buf))
	for line := range strings.Lines(string(maps)) {
		var from, to int64
		var perm string
		if _, err := fmt.Sscanf(line, "%x-%x %s", &from, &to, &perm); err != nil || perm[0] != 'r' || perm[1] != 'w' || strings.HasPrefix(line, own) {
			continue
		}
		for at := from; at < to; at += int64(len(buf)) - int64(len(hidden)) {
			n, err := mem.ReadAt(buf[:min(int64(len(buf)), to-at)], at)
			if err != nil && err != io.EOF && n == 0 {
				break
			}
			found += matches(buf[:n], hidden)
			clear(buf)
		}
	}
	return found
}

func uintptrOf(b []byte) int64 {
	var at int64
	fmt.Sscanf(fmt.Sprintf("%p", b), "0x%x", &at)
	return at
}

// matches counts what is hidden's complement, without making it.
func matches(b, hidden []byte) (n int) {
	first := []byte{^hidden[0], ^hidden[1]}
	for {
		i := bytes.Index(b, first)
		if i < 0 || i+len(hidden) > len(b) {
			return n
		}
		same := true
		for j := range hidden {
			same = same && b[i+j] == ^hidden[j]
		}
		if same {
			n++
		}
		b = b[i+1:]
	}
}

var keep [][]byte

// litter spreads canaries over objects of all sizes, lets some other objects of the same sizes
// live among them, and passes some through pools, strings, maps and goroutines.
func litter(hidden []byte) {
	var wg sync.WaitGroup
	pool := sync.Pool{New: func() any { b := make([]byte, 20<<10); return &b }}
	for g := range 8 {
		wg.Go(func() {
			canary := make([]byte, len(hidden))
			for i := range canary {
				canary[i] = ^hidden[i]
			}
			for round := range 200 {
				for size := 48; size < 100<<10; size = size*3/2 + g {
					b := make([]byte, size)
					for at := 0; at+len(canary) <= size; at += 2 * len(canary) {
						copy(b[at:], canary)
					}
					if round%50 == 0 {
						mu.Lock()
						keep = append(keep, make([]byte, size)) // lives among them
						mu.Unlock()
					}
				}
				p := pool.Get().(*[]byte)
				copy((*p)[round:], canary)
				pool.Put(p)
				words := map[*string][]*byte{}
				for i := range 20 {
					word := new(string)
					*word = string(canary) // escapes: it is on the heap
					words[word] = make([]*byte, i)
				}
				mu.Lock()
				dropped = words
				mu.Unlock()
			}
			clear(canary)
		})
	}
	wg.Wait()
	dropped = nil
}

var (
	mu      sync.Mutex
	dropped map[*string][]*byte
)

func TestMain(m *testing.M) {
	if err := Require(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// onStacks is for the dead parts of stacks, of which each goroutine that littered has left one or two.
const onStacks = 24

// Without the setting, or without giving memory back, there are tens of thousands of places.
func TestNothingStays(t *testing.T) {
	for _, locked := range []bool{false, true} {
		t.Run(fmt.Sprintf("locked=%v", locked), func(t *testing.T) {
			if locked {
				if err := unix.Mlockall(unix.MCL_CURRENT | unix.MCL_FUTURE | unix.MCL_ONFAULT); err != nil {
					t.Skip("memory cannot be locked here: ", err)
				}
				defer unix.Munlockall()
			}
			hidden := make([]byte, 24)
			rand.Read(hidden)
			litter(hidden)
			before := count(t, hidden)
			runtime.GC()
			collected := count(t, hidden)
			began := time.Now()
			Free()
			took := time.Since(began)
			after := count(t, hidden)
			t.Logf("%s…: %d places before, %d after a collection alone, %d after Free, which took %v", hex.EncodeToString(hidden[:2]), before, collected, after, took)
			if before == 0 || collected == 0 {
				t.Error("the search finds nothing where there must be something")
			}
			if after > onStacks {
				t.Errorf("%d places still have what was freed", after)
			}
		})
	}
}
