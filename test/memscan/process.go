package memscan

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/holdfastdb/holdfast/test/proc"
)

const (
	pageSize = 4096
	// bufferSize is read at a time; overlap, of a buffer's end, is read again, so that no run is divided.
	bufferSize = 4 << 20
	overlap    = pageSize
	// maxHits bounds the hits that are kept of each name and process.
	maxHits = 50
)

// Scanner searches processes for a Set.
type Scanner struct {
	Set *Set

	Hits      []Hit
	Processes int
	Bytes     int64    // that were searched
	Unread    []string // what could not be, and why

	shared map[object]bool // that were searched
	kept   map[place]*keptHits
}

// place is where hits are counted.
type place struct {
	pid  int
	name string
}

type keptHits struct {
	count, last int    // the last one's index in Hits
	end         uint64 // of it
	mapping     string
}

// object is what several processes share.
type object struct{ device, inode uint64 }

// Processes finds all processes of what runs in dir: those that run there or name it, and
// all of their descendants, whatever these call themselves.
func Processes(dir string) []proc.Process {
	found := proc.Using(dir)
	known := map[int]bool{os.Getpid(): true}
	for _, p := range found {
		known[p.PID] = true
	}
	for i := 0; i < len(found); i++ {
		for _, pid := range children(found[i].PID) {
			if !known[pid] {
				known[pid] = true
				found = append(found, proc.Process{PID: pid, Command: command(pid)})
			}
		}
	}
	return found
}

func children(pid int) []int {
	var found []int
	lists, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	for _, list := range lists {
		data, _ := os.ReadFile(list) // the thread may have ended
		for _, f := range strings.Fields(string(data)) {
			if child, err := strconv.Atoi(f); err == nil {
				found = append(found, child)
			}
		}
	}
	return found
}

func command(pid int) string {
	raw, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid)) // it may have ended
	return strings.TrimSpace(strings.ReplaceAll(string(raw), "\x00", " "))
}

// ScanAll searches processes, one after the other. What ended meanwhile has no memory.
func (s *Scanner) ScanAll(list []proc.Process) error {
	for _, p := range list {
		if err := s.Scan(p); err != nil {
			return err
		}
	}
	return nil
}

// mapping is a line of /proc/PID/maps.
type mapping struct {
	start, end, offset uint64
	perms, name        string
	id                 object
}

// Scan searches one process. It runs on meanwhile: what it moves from a place that was not yet
// searched to one that was is missed, so a search for absence is made when nothing is left to do that.
func (s *Scanner) Scan(p proc.Process) error {
	maps, err := readMaps(p.PID)
	if gone(err) || err == nil && len(maps) == 0 { // a kernel thread, or one that has ended
		return nil
	}
	if err != nil {
		return fmt.Errorf("searching process %v: %w", p, err)
	}
	mem, err := os.Open(fmt.Sprintf("/proc/%d/mem", p.PID))
	if gone(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("searching process %v needs root: %w", p, err)
	}
	defer mem.Close()
	s.Processes++
	for _, m := range maps {
		err := s.scanMapping(p, mem, m)
		if gone(err) {
			return nil
		}
		if err != nil {
			s.Unread = append(s.Unread, fmt.Sprintf("process %v, %s %s: %v", p, m.perms, m.name, err))
		}
	}
	return s.scanOpenMemory(p)
}

func gone(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ESRCH)
}

func readMaps(pid int) ([]mapping, error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var maps []mapping
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		m, err := parseMapping(lines.Text())
		if err != nil {
			return nil, err
		}
		maps = append(maps, m)
	}
	return maps, lines.Err()
}

// parseMapping reads a line as proc_pid_maps(5) shows it.
func parseMapping(line string) (mapping, error) {
	var m mapping
	var major, minor uint32
	var inode uint64
	n, err := fmt.Sscanf(line, "%x-%x %s %x %x:%x %d", &m.start, &m.end, &m.perms, &m.offset, &major, &minor, &inode)
	if err != nil || n != 7 || len(m.perms) != 4 || m.end < m.start {
		return m, fmt.Errorf("a line of maps that cannot be read: %q", line)
	}
	m.id = object{unix.Mkdev(major, minor), inode}
	if fields := strings.SplitN(line, " ", 6); len(fields) == 6 {
		m.name = strings.TrimSpace(fields[5])
	}
	return m, nil
}

// inMemory tells whether a mapping's name is of an object of memory alone, which has no file on a disk.
func inMemory(name string) bool {
	for _, prefix := range []string{"/dev/zero", "/dev/shm/", "/memfd:", "/SYSV"} {
		if strings.HasPrefix(name, prefix) {
			return true
		}
	}
	return false
}

func (s *Scanner) scanMapping(p proc.Process, mem *os.File, m mapping) error {
	switch {
	case strings.HasPrefix(m.name, "[vvar") || m.name == "[vsyscall]": // the kernel's clock
		return nil
	case m.perms[3] == 's' && inMemory(m.name):
		// Whole, from the object: a page need not be in this process's table to be there.
		file := fmt.Sprintf("/proc/%d/map_files/%x-%x", p.PID, m.start, m.end)
		return s.scanShared(p, file, m.perms+" "+m.name, m.id)
	}
	return s.scanPresent(p, mem, m)
}

// scanPresent reads the pages that are there: reading others would make them.
func (s *Scanner) scanPresent(p proc.Process, mem *os.File, m mapping) error {
	pages, err := presentPages(p.PID, m)
	if err != nil {
		return err
	}
	what := m.perms + " " + m.name
	if m.name == "" {
		what += "anonymous"
	}
	for first := 0; first < len(pages); first++ {
		if !pages[first] {
			continue
		}
		end := first
		for end < len(pages) && pages[end] {
			end++
		}
		begin, stop := m.start+uint64(first)*pageSize, m.start+uint64(end)*pageSize
		if err := s.scanRange(p, mem, begin, stop, what); err != nil {
			return err
		}
		first = end
	}
	return nil
}

// presentPages tells by /proc/PID/pagemap which pages are in memory (bit 63) or in swap (bit 62).
func presentPages(pid int, m mapping) ([]bool, error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/pagemap", pid))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	n := int((m.end - m.start) / pageSize)
	pages := make([]bool, n)
	buf := make([]byte, 8*8192)
	for done := 0; done < n; {
		part := buf[:8*min(n-done, len(buf)/8)]
		got, err := f.ReadAt(part, int64(m.start/pageSize+uint64(done))*8)
		if got < 8 {
			return nil, errors.Join(err, fmt.Errorf("pagemap ends at page %d of %d", done, n))
		}
		for i := 0; i+8 <= got; i += 8 {
			pages[done] = binary.LittleEndian.Uint64(part[i:])>>62 != 0
			done++
		}
	}
	return pages, nil
}

func (s *Scanner) scanRange(p proc.Process, r io.ReaderAt, begin, end uint64, what string) error {
	buf := make([]byte, min(bufferSize, int(end-begin)))
	for at := begin; at < end; {
		part := buf[:min(uint64(len(buf)), end-at)]
		n, err := r.ReadAt(part, int64(at))
		s.searchIn(p, part[:n], at, what)
		switch {
		case n == len(part) && at+uint64(n) >= end:
			return nil
		case n == len(part) && n > overlap:
			at += uint64(n - overlap)
		case n == 0 && errors.Is(err, io.EOF): // unmapped, or its object became shorter
			return nil
		case n == 0 && gone(err):
			return err
		case n == 0: // a page of a file that is shorter, or of a device
			s.Unread = append(s.Unread, fmt.Sprintf("process %v, %s at %#x: %v", p, what, at, err))
			at += pageSize
		default:
			at += uint64(n)
		}
	}
	return nil
}

// searchIn keeps what is found in a buffer that stands at an address.
func (s *Scanner) searchIn(p proc.Process, part []byte, at uint64, what string) {
	s.Bytes += int64(len(part))
	if s.kept == nil {
		s.kept = make(map[place]*keptHits)
	}
	s.Set.search(part, func(n needle, i int) {
		k := s.kept[place{p.PID, n.name}]
		if k == nil {
			k = &keptHits{}
			s.kept[place{p.PID, n.name}] = k
		}
		address := at + uint64(i)
		goesOn := k.count > 0 && k.mapping == what && address <= k.end
		k.end, k.mapping = max(address+uint64(len(n.run)), k.end), what
		if goesOn {
			s.Hits[k.last].Runs++
			return
		}
		if k.count++; k.count <= maxHits {
			k.last = len(s.Hits)
			s.Hits = append(s.Hits, Hit{Name: n.name, Form: n.form, Runs: 1, PID: p.PID, Command: p.Command, Mapping: what,
				Address: address, Hint: hint(part, i, len(n.run))})
		}
	})
}

// scanShared searches an object of memory, the first time that it is met.
func (s *Scanner) scanShared(p proc.Process, file, what string, id object) error {
	if s.shared == nil {
		s.shared = make(map[object]bool)
	}
	if s.shared[id] {
		return nil
	}
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	s.shared[id] = true
	for at := int64(0); ; {
		begin, err := unix.Seek(int(f.Fd()), at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return nil
		}
		if err != nil {
			return err
		}
		end, err := unix.Seek(int(f.Fd()), begin, unix.SEEK_HOLE)
		if err != nil {
			return err
		}
		if err := s.scanRange(p, f, uint64(begin), uint64(end), what); err != nil {
			return err
		}
		at = end
	}
}

// scanOpenMemory searches memory that a process holds open and need not have mapped.
func (s *Scanner) scanOpenMemory(p proc.Process) error {
	dir := fmt.Sprintf("/proc/%d/fd", p.PID)
	fds, err := os.ReadDir(dir)
	if gone(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("searching process %v: %w", p, err)
	}
	for _, fd := range fds {
		path := filepath.Join(dir, fd.Name())
		target, err := os.Readlink(path)
		if err != nil || !strings.HasPrefix(target, "/memfd:") && !strings.HasPrefix(target, "/dev/shm/") {
			continue
		}
		var st unix.Stat_t
		if err := unix.Stat(path, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFREG {
			continue
		}
		if err := s.scanShared(p, path, target, object{st.Dev, st.Ino}); err != nil && !gone(err) {
			s.Unread = append(s.Unread, fmt.Sprintf("process %v, %s: %v", p, target, err))
		}
	}
	return nil
}

// Found counts hits by name.
func (s *Scanner) Found() map[string]int {
	found := make(map[string]int)
	for _, h := range s.Hits {
		found[h.Name]++
	}
	return found
}
