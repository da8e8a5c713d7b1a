package pgfs

import (
	"bytes"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

var (
	seedFlag  = flag.Uint64("seed", 0, "the seed of the random tests (0: a new one)")
	stepsFlag = flag.Int("steps", 4000, "how many operations a random test does")
)

func seed(t testing.TB) *rand.Rand {
	s := *seedFlag
	if s == 0 {
		s = uint64(time.Now().UnixNano())
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("run again with -seed=%d", s)
		}
	})
	return rand.New(rand.NewPCG(s, 1))
}

// twin does the same on the mount and in a plain directory of the host's file system, and
// compares what comes back.
type twin struct {
	t    *testing.T
	rng  *rand.Rand
	dirs [2]string
	fds  [][2]int
	log  []string
}

func (w *twin) both(what string, fn func(side int) (any, error)) {
	w.t.Helper()
	w.log = append(w.log, what)
	a, errA := fn(0)
	b, errB := fn(1)
	if errA != errB || !cmp.Equal(a, b) {
		w.t.Fatalf("%s:\nmount: %.200v, %v\nplain: %.200v, %v\nbefore that:\n%q", what, a, errA, b, errB, w.log[max(0, len(w.log)-30):])
	}
}

func (w *twin) name() string {
	name := string(rune('a' + w.rng.IntN(6)))
	if w.rng.IntN(3) == 0 {
		name = fmt.Sprintf("d%d/%s", w.rng.IntN(3), name)
	}
	return name
}

// offset prefers the neighbourhood of block boundaries.
func (w *twin) offset() int64 {
	off := int64(w.rng.IntN(20)) * 8192
	switch w.rng.IntN(4) {
	case 0:
		off += int64(w.rng.IntN(8192))
	case 1:
		off = max(0, off-int64(w.rng.IntN(20)))
	}
	return off
}

func (w *twin) data() []byte {
	n := []int{1, 10, 4096, 8192, 16384, 40000}[w.rng.IntN(6)]
	p := bytes.Repeat([]byte{byte(w.rng.IntN(3))}, n) // zeros are a case of their own
	if w.rng.IntN(2) == 0 {
		for i := range p {
			p[i] = byte(w.rng.Uint32())
		}
	}
	return p
}

func (w *twin) fd() ([2]int, bool) {
	if len(w.fds) == 0 {
		return [2]int{}, false
	}
	return w.fds[w.rng.IntN(len(w.fds))], true
}

func (w *twin) open() {
	name, flags := w.name(), unix.O_RDWR
	for _, f := range []int{unix.O_CREAT, unix.O_TRUNC, unix.O_EXCL, unix.O_APPEND} {
		if w.rng.IntN(3) == 0 {
			flags |= f
		}
	}
	if flags&unix.O_CREAT == 0 {
		flags &^= unix.O_EXCL
	}
	var pair [2]int
	var failed bool
	w.both(fmt.Sprintf("open %s %#x", name, flags), func(side int) (any, error) {
		fd, err := unix.Open(filepath.Join(w.dirs[side], name), flags, 0o640)
		pair[side], failed = fd, err != nil
		return nil, err
	})
	if failed {
		return
	}
	w.fds = append(w.fds, pair)
	if len(w.fds) > 8 {
		for _, fd := range w.fds[0] {
			_ = unix.Close(fd)
		}
		w.fds = w.fds[1:]
	}
}

func (w *twin) step() {
	fd, ok := w.fd()
	kind := w.rng.IntN(16)
	if !ok && kind < 8 {
		kind = 15
	}
	off := w.offset()
	switch kind {
	case 0, 1, 2:
		p := w.data()
		w.both(fmt.Sprintf("pwrite %d+%d", off, len(p)), func(side int) (any, error) { n, err := unix.Pwrite(fd[side], p, off); return n, err })
	case 3, 4:
		n := len(w.data())
		w.both(fmt.Sprintf("pread %d+%d", off, n), func(side int) (any, error) {
			p := make([]byte, n)
			n, err := unix.Pread(fd[side], p, off)
			return p[:max(n, 0)], err
		})
	case 5:
		w.both(fmt.Sprintf("ftruncate %d", off), func(side int) (any, error) { return nil, unix.Ftruncate(fd[side], off) })
	case 6:
		mode := []uint32{0, unix.FALLOC_FL_KEEP_SIZE, unix.FALLOC_FL_KEEP_SIZE | unix.FALLOC_FL_PUNCH_HOLE, unix.FALLOC_FL_ZERO_RANGE}[w.rng.IntN(4)]
		n := int64(len(w.data()))
		w.both(fmt.Sprintf("fallocate %#x %d+%d", mode, off, n), func(side int) (any, error) { return nil, unix.Fallocate(fd[side], mode, off, n) })
	case 7:
		w.both("fstat", func(side int) (any, error) {
			var st unix.Stat_t
			err := unix.Fstat(fd[side], &st)
			return []any{st.Size, st.Nlink, st.Mode}, err
		})
	case 8:
		a, b := w.name(), w.name()
		w.both("rename "+a+" "+b, func(side int) (any, error) {
			return nil, unix.Rename(filepath.Join(w.dirs[side], a), filepath.Join(w.dirs[side], b))
		})
	case 9:
		a, b := w.name(), w.name()
		w.both("link "+a+" "+b, func(side int) (any, error) {
			return nil, unix.Link(filepath.Join(w.dirs[side], a), filepath.Join(w.dirs[side], b))
		})
	case 10:
		a := w.name()
		w.both("unlink "+a, func(side int) (any, error) { return nil, unix.Unlink(filepath.Join(w.dirs[side], a)) })
	case 11:
		w.directories()
	case 12:
		w.both("list", func(side int) (any, error) { return list(w.dirs[side]) })
	case 13:
		a := w.name()
		w.both("chmod "+a, func(side int) (any, error) { return nil, unix.Chmod(filepath.Join(w.dirs[side], a), 0o600) })
	default:
		w.open()
	}
}

func (w *twin) directories() {
	a, b := fmt.Sprintf("d%d", w.rng.IntN(3)), fmt.Sprintf("d%d", w.rng.IntN(3))
	switch w.rng.IntN(4) {
	case 0, 1:
		w.both("mkdir "+a, func(side int) (any, error) { return nil, unix.Mkdir(filepath.Join(w.dirs[side], a), 0o755) })
	case 2:
		w.both("rmdir "+a, func(side int) (any, error) { return nil, unix.Rmdir(filepath.Join(w.dirs[side], a)) })
	case 3:
		w.both("rename dir", func(side int) (any, error) {
			return nil, unix.Rename(filepath.Join(w.dirs[side], a), filepath.Join(w.dirs[side], b))
		})
	}
}

func list(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	var names []string
	for _, e := range entries {
		names = append(names, e.Name()+" "+e.Type().String())
	}
	slices.Sort(names)
	return names, err
}

// tree reads everything below a directory.
func tree(t *testing.T, dir string) map[string]string {
	t.Helper()
	all := map[string]string{}
	err := filepath.Walk(dir, func(path string, info os.FileInfo, err error) error {
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(dir, path)
		all[rel] = info.Mode().String()
		if info.Mode().IsRegular() {
			p, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			all[rel] += fmt.Sprintf(" %d bytes, %x", len(p), p)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// Whatever is done to files, the mount answers as the host's file system does.
func TestAsAPlainDirectory(t *testing.T) {
	fs := mounted(t, Config{})
	w := &twin{t: t, rng: seed(t), dirs: [2]string{fs.cfg.Mountpoint + "/x", t.TempDir() + "/x"}}
	for _, dir := range w.dirs {
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for range *stepsFlag {
		w.step()
	}
	want := tree(t, w.dirs[1])
	if diff := cmp.Diff(want, tree(t, w.dirs[0])); diff != "" {
		t.Errorf("the trees differ (-plain +mount):\n%.2000s", diff)
	}
	for _, pair := range w.fds {
		for _, fd := range pair {
			_ = unix.Close(fd)
		}
	}
	// The same without the kernel's cache above it.
	for path, content := range want {
		p, err := fs.ReadFile("x/" + path)
		if err == nil && !bytes.HasSuffix([]byte(content), fmt.Appendf(nil, "%d bytes, %x", len(p), p)) {
			t.Errorf("%s differs below the kernel's cache", path)
		}
	}
	if err := os.RemoveAll(w.dirs[0]); err != nil {
		t.Fatal(err)
	}
	eventually(t, "every slot is free once every file is gone", func() bool { return fs.Stats().Slots.Used == 0 && fs.Stats().Nodes == 1 })
}

func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for range 1000 {
		if ok() {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Errorf("it never came true that %s", what)
}
