// Package canary looks for plaintext in what rests. Unique strings are put through every
// path by which PostgreSQL writes something down; then every byte of every file is
// searched for them, raw and after undoing the compressions in use.
//
// A canary is found by any 8 consecutive bytes of it: PostgreSQL's own compression (pglz)
// leaves literals in runs of 8 between its control bytes, and the literals of snappy, S2
// and LZ4 stand as they are. 8 bytes of chance in a terabyte of random bytes would be found
// once in a hundred thousand such scans.
package canary

import (
	"bytes"
	"compress/gzip"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/klauspost/compress/s2"
	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
)

// canaryLength gives every 8-byte run between pglz's control bytes, wherever these fall,
// room inside a canary.
const (
	canaryLength = 24
	window       = 8
)

const alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"

// NewCanary is a random string that is nowhere yet. It begins with a letter.
func NewCanary() string {
	b := make([]byte, canaryLength)
	for i := range b {
		n := int64(len(alphabet))
		if i == 0 {
			n = 52
		}
		r, err := rand.Int(rand.Reader, big.NewInt(n))
		if err != nil {
			panic(err) // crypto/rand does not fail
		}
		b[i] = alphabet[r.Int64()]
	}
	return string(b)
}

// Hit is a canary that was found.
type Hit struct {
	Kind   string // which canary
	Where  string // the file, and how it had to be unpacked
	Offset int64
}

func (h Hit) String() string { return fmt.Sprintf("%s: in %s at %d", h.Kind, h.Where, h.Offset) }

// Scanner searches for a set of canaries.
type Scanner struct {
	windows map[uint64]string // the canary's kind by its 8-byte runs
	first   [1 << 16]bool     // their first two bytes

	Files int   // that were read
	Bytes int64 // that were read, unpacked ones included
	Hits  []Hit
}

// NewScanner searches for canaries, named by kind.
func NewScanner(canaries map[string]string) *Scanner {
	s := &Scanner{windows: make(map[uint64]string)}
	for kind, c := range canaries {
		for i := 0; i+window <= len(c); i++ {
			w := binary.LittleEndian.Uint64([]byte(c[i : i+window]))
			s.windows[w] = kind
			s.first[uint16(w)] = true
		}
	}
	return s
}

// Found lists the kinds that were found.
func (s *Scanner) Found() map[string]int {
	found := make(map[string]int)
	for _, h := range s.Hits {
		found[h.Kind]++
	}
	return found
}

// perFile bounds the hits that are kept of one file and kind.
const maxHits = 10000

// search looks at p, which stands at off; it reports each kind once a buffer.
func (s *Scanner) search(p []byte, where string, off int64) {
	var seen map[string]bool
	for i := 0; i+window <= len(p); i++ {
		if !s.first[uint16(p[i])|uint16(p[i+1])<<8] {
			continue
		}
		kind, ok := s.windows[binary.LittleEndian.Uint64(p[i:])]
		if !ok || seen[kind] {
			continue
		}
		if seen == nil {
			seen = make(map[string]bool)
		}
		seen[kind] = true
		if len(s.Hits) < maxHits {
			s.Hits = append(s.Hits, Hit{Kind: kind, Where: where, Offset: off + int64(i)})
		}
	}
}

const (
	bufferSize = 4 << 20
	overlap    = 64
	// maxUnpacked bounds what one frame may unpack to, and maxDepth how often in a row.
	maxUnpacked = 256 << 20
	maxDepth    = 3
)

// ScanReader searches all of r.
func (s *Scanner) ScanReader(r io.ReaderAt, size int64, where string) error {
	return s.scan(r, size, where, 0)
}

func (s *Scanner) scan(r io.ReaderAt, size int64, where string, depth int) error {
	buf := make([]byte, bufferSize)
	for off := int64(0); off < size; {
		n, err := r.ReadAt(buf[:min(int64(len(buf)), size-off)], off)
		if err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		if n == 0 { // the file became shorter
			return nil
		}
		p := buf[:n]
		s.Bytes += int64(n)
		s.search(p, where, off)
		if depth < maxDepth {
			s.unpackFrames(r, size, p, off, where, depth)
		}
		if off+int64(n) >= size {
			return nil
		}
		off += int64(max(n-overlap, 1))
	}
	return nil
}

// codec is a compression whose frames begin with a magic number.
type codec struct {
	name  string
	magic []byte
	open  func(io.Reader) (io.Reader, error)
}

var codecs = []codec{
	{"zstd", []byte{0x28, 0xb5, 0x2f, 0xfd}, func(r io.Reader) (io.Reader, error) {
		d, err := zstd.NewReader(r, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(maxUnpacked))
		if err != nil {
			return nil, err
		}
		return d.IOReadCloser(), nil
	}},
	{"lz4", []byte{0x04, 0x22, 0x4d, 0x18}, func(r io.Reader) (io.Reader, error) { return lz4.NewReader(r), nil }},
	{"snappy", []byte("\xff\x06\x00\x00sNaPpY"), func(r io.Reader) (io.Reader, error) { return s2.NewReader(r), nil }},
	{"s2", []byte("\xff\x06\x00\x00S2sTwO"), func(r io.Reader) (io.Reader, error) { return s2.NewReader(r), nil }},
	{"gzip", []byte{0x1f, 0x8b, 0x08}, func(r io.Reader) (io.Reader, error) { return gzip.NewReader(r) }},
}

// unpackFrames tries every place where a frame may begin. What does not unpack was no frame;
// what did until an error is searched all the same.
func (s *Scanner) unpackFrames(r io.ReaderAt, size int64, p []byte, off int64, where string, depth int) {
	for _, c := range codecs {
		for at := 0; ; {
			i := bytes.Index(p[at:], c.magic)
			if i < 0 {
				break
			}
			start := off + int64(at+i)
			at += i + 1
			in, err := c.open(io.NewSectionReader(r, start, size-start))
			if err != nil {
				continue
			}
			plain, _ := io.ReadAll(io.LimitReader(in, maxUnpacked)) // as far as it is a frame
			if closer, ok := in.(io.Closer); ok {
				_ = closer.Close() // a reader's end
			}
			if len(plain) > 0 {
				_ = s.scan(bytes.NewReader(plain), int64(len(plain)), fmt.Sprintf("%s (%s at %d)", where, c.name, start), depth+1) // memory
			}
		}
	}
}

// ScanTree searches every file below root. What is mounted there is not at rest there: it
// is left out.
func (s *Scanner) ScanTree(root string) error {
	device, err := deviceOf(root)
	if err != nil {
		return err
	}
	return filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) { // gone since it was listed
			return nil
		}
		if d != nil && d.IsDir() {
			dev, statErr := deviceOf(path)
			if statErr != nil || dev != device { // a mount, perhaps a dead one
				return filepath.SkipDir
			}
		}
		if err != nil {
			return err
		}
		s.search([]byte(path), "the name "+path, 0)
		if !d.Type().IsRegular() {
			return nil
		}
		return s.scanFile(path, path)
	})
}

func deviceOf(path string) (uint64, error) {
	var st syscall.Stat_t
	if err := syscall.Lstat(path, &st); err != nil {
		return 0, fmt.Errorf("looking at %s: %w", path, err)
	}
	return st.Dev, nil
}

func (s *Scanner) scanFile(path, where string) error {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	s.Files++
	if err := s.ScanReader(f, st.Size(), where); err != nil {
		return fmt.Errorf("searching %s: %w", where, err)
	}
	return nil
}

const fuseMagic = 0x65735546 // FUSE_SUPER_MAGIC

// ScanOpenFiles searches the files that a process holds open and that no name leads to any
// more, and lists those open for writing outside root: what is written there would escape
// the search. Memory (/dev/shm, memfd) and files on a FUSE mount do not rest.
func (s *Scanner) ScanOpenFiles(pid int, root string) (outside []string, err error) {
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	fds, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("listing the open files of process %d: %w", pid, err)
	}
	for _, fd := range fds {
		path := filepath.Join(dir, fd.Name())
		target, err := os.Readlink(path)
		if err != nil || !strings.HasPrefix(target, "/") || strings.HasPrefix(target, "/dev/") || strings.HasPrefix(target, "/memfd:") ||
			strings.HasPrefix(target, "/proc/") || strings.HasPrefix(target, "/sys/") {
			continue
		}
		st, err := os.Stat(path)
		if err != nil || !st.Mode().IsRegular() {
			continue
		}
		var fsInfo syscall.Statfs_t
		if err := syscall.Statfs(path, &fsInfo); err == nil && fsInfo.Type == fuseMagic {
			continue
		}
		if strings.HasSuffix(target, " (deleted)") {
			if err := s.scanFile(path, fmt.Sprintf("%s, open in process %d", target, pid)); err != nil {
				return nil, err
			}
			continue
		}
		if !strings.HasPrefix(target, root+"/") && writable(pid, fd.Name()) {
			outside = append(outside, target)
		}
	}
	return outside, nil
}

// writable tells whether a file descriptor is open for writing.
func writable(pid int, fd string) bool {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/fdinfo/%s", pid, fd))
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(data)) {
		if v, ok := strings.CutPrefix(line, "flags:"); ok {
			var flags int
			if _, err := fmt.Sscanf(strings.TrimSpace(v), "%o", &flags); err == nil {
				return flags&syscall.O_ACCMODE != syscall.O_RDONLY
			}
		}
	}
	return false
}

// ScanSwap searches the machine's swap; it names what could not be read.
func (s *Scanner) ScanSwap() (unread []string) {
	data, err := os.ReadFile("/proc/swaps")
	if err != nil {
		return []string{err.Error()}
	}
	for _, line := range strings.Split(string(data), "\n")[1:] {
		f := strings.Fields(line)
		if len(f) == 0 {
			continue
		}
		if err := s.scanDevice(f[0]); err != nil {
			unread = append(unread, err.Error())
		}
	}
	return unread
}

func (s *Scanner) scanDevice(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	s.Files++
	return s.ScanReader(f, size, path)
}
