package hardening

import (
	"bufio"
	"bytes"
	"crypto/rand"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"runtime/debug"
	"strings"
	"sync"
	"testing"
)

// keptAlive shares pages with what is freed; garbage is on the heap.
var (
	keptAlive [][]byte
	garbage   []byte
)

// scrubChild leaves copies of a secret in garbage of each kind, and is asked what is left of them.
func scrubChild() {
	if err := ClobberFreed(); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	if w := lockMemory(); w != nil {
		fmt.Println("not locked:", w)
	}
	secret := make([]byte, 32)
	rand.Read(secret)
	debug.SetGCPercent(-1) // until the scrub
	litter(secret)
	fmt.Println("before:", countInMemory(secret))
	Scrub()
	fmt.Println("after:", countInMemory(secret))
	runtime.KeepAlive(keptAlive)
}

var pool = sync.Pool{New: func() any { return new([512]byte) }}

// litter makes small objects between others that stay, large ones and pooled ones.
//
//go:noinline
func litter(secret []byte) {
	for range 500 {
		keptAlive = append(keptAlive, make([]byte, 64))
		garbage = make([]byte, 64)
		copy(garbage, secret)
		keptAlive = append(keptAlive, make([]byte, 64))
	}
	garbage = bytes.Repeat(secret, 64<<10)
	garbage = nil
	pooled := pool.Get().(*[512]byte)
	copy(pooled[:], secret)
	pool.Put(pooled)
}

// countInMemory counts copies of secret beyond its own, by reading this process's memory.
func countInMemory(secret []byte) int {
	text, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		panic(err)
	}
	mem, err := os.Open("/proc/self/mem")
	if err != nil {
		panic(err)
	}
	defer mem.Close()
	n := 0
	buf := make([]byte, 1<<20)
	// What was read before must not be found in the buffer: all of it is overwritten each time.
	for line := range strings.Lines(string(text)) {
		var begin, end uint64
		var perms string
		if _, err := fmt.Sscanf(line, "%x-%x %s", &begin, &end, &perms); err != nil || !strings.HasPrefix(perms, "rw") {
			continue
		}
		for at := begin; at < end; at += uint64(len(buf)) {
			part := buf[:min(uint64(len(buf)), end-at)]
			if got, err := mem.ReadAt(part, int64(at)); err != nil && got == 0 {
				break
			}
			n += countOthers(part, secret, at, buf)
		}
	}
	return n
}

// countOthers leaves out secret's own place and the buffer's.
func countOthers(part, secret []byte, at uint64, buf []byte) (n int) {
	own, reading := address(secret), address(buf)
	for i := 0; ; i++ {
		j := bytes.Index(part[i:], secret)
		if j < 0 {
			return n
		}
		i += j
		if a := at + uint64(i); a != own && (a < reading || a >= reading+uint64(len(buf))) {
			n++
		}
	}
}

func address(b []byte) (a uint64) {
	_, _ = fmt.Sscanf(fmt.Sprintf("%p", b), "0x%x", &a) // of a slice: its first element
	return a
}

// TestScrub: what was freed is there before and is gone after.
func TestScrub(t *testing.T) {
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), childEnv+"=scrub")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	said := make(map[string]int)
	lines := bufio.NewScanner(io.TeeReader(out, os.Stderr))
	for lines.Scan() {
		var n int
		name, rest, _ := strings.Cut(lines.Text(), ": ")
		if _, err := fmt.Sscan(rest, &n); err == nil {
			said[name] = n
		}
	}
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	if before, ok := said["before"]; !ok || before < 500 {
		t.Errorf("before the scrub %d copies were found, want hundreds: the search finds nothing", before)
	}
	if after, ok := said["after"]; !ok || after > 0 {
		t.Errorf("%d copies are left after the scrub", after)
	}
}

func TestScrubsServeAllWhoWait(t *testing.T) {
	before := scrubs.begun.Load()
	var wg sync.WaitGroup
	for range 50 {
		wg.Go(Scrub)
	}
	wg.Wait()
	if n := scrubs.begun.Load() - before; n < 1 || n > 25 {
		t.Errorf("50 calls at once made %d scrubs", n)
	}
}
