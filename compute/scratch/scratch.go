// Package scratch keeps a compute's local bytes: an unlinked file of 8 KiB slots, each sealed
// under a key that exists only in this process's memory.
//
// A slot's tag (nonce counter and GCM tag) and its length stay in memory, beside the caller's
// knowledge of what the slot holds; so the file alone is noise, an older content of a slot
// does not open, and after Wipe or a crash nothing of it can be read again (invariants K1, K2).
// The file has no name from the moment it exists, so a dead process leaves nothing behind.
package scratch

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/holdfastdb/holdfast/internal/seal"
)

// SlotSize is the size of a slot, in bytes.
const SlotSize = 8192

// Slot names a slot. Zero is none.
type Slot uint32

const (
	chunkSlots  = 4096 // slots whose tags are allocated together
	maxChunks   = 1 << 18
	extentSlots = 128 // slots that are given back to the disk together: 1 MiB
	// punchAbove is how many wholly free extents may keep their disk space for the next
	// temporary file.
	punchAbove = 64
)

// Errors on which callers branch. They are wrapped: use errors.Is.
var (
	// ErrFull means that the disk under the store has no room.
	ErrFull = errors.New("no space left on the disk that holds the local store")
	// ErrWiped is the answer of every call after Wipe.
	ErrWiped = errors.New("the local store was wiped")
)

// Store is the file. It is safe for concurrent use, except that calls about one slot are the
// caller's to order: a Write excludes everything else about that slot.
type Store struct {
	dir   string
	file  *os.File
	box   *seal.Box
	wiped atomic.Bool

	// chunks only grows; the entries of a slot belong to the slot's holder.
	chunks atomic.Pointer[[]*chunk]

	mu struct {
		sync.Mutex
		free    []Slot   // given back, the last one on top
		next    Slot     // the first slot that was never given out
		extents []extent // by (slot-1)/extentSlots
		idle    int      // extents without a used slot that still have disk space
		// punching says that a goroutine gives disk space back; the slots concerned are not in
		// free meanwhile.
		punching bool
	}
}

type chunk struct {
	tags    [chunkSlots]seal.Tag
	lengths [chunkSlots]uint16
}

type extent struct {
	used    uint16
	punched bool
}

// Open makes an empty store in a directory, which must exist. Its key is of use within a term:
// past it nothing is read or written, even if nobody has wiped the store yet.
func Open(dir string, term *seal.Term) (*Store, error) {
	file, err := openUnlinked(dir)
	if err != nil {
		return nil, fmt.Errorf("making the local store in %s: %w", dir, err)
	}
	box, err := seal.NewBox(term)
	if err != nil {
		file.Close()
		return nil, fmt.Errorf("making the local store in %s: %w", dir, err)
	}
	s := &Store{dir: dir, file: file, box: box}
	s.chunks.Store(&[]*chunk{})
	s.mu.next = 1
	return s, nil
}

// openUnlinked opens a file without a name. Where the file system knows no O_TMPFILE, the
// name exists for a moment.
func openUnlinked(dir string) (*os.File, error) {
	fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC|unix.O_EXCL, 0o600)
	if err == nil {
		return os.NewFile(uintptr(fd), filepath.Join(dir, "local store")), nil
	}
	if !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.EISDIR) {
		return nil, err
	}
	file, err := os.CreateTemp(dir, "scratch-*")
	if err != nil {
		return nil, err
	}
	if err := os.Remove(file.Name()); err != nil {
		file.Close()
		return nil, err
	}
	return file, nil
}

// Alloc gives a slot that nobody else has. Its content is undefined until it is written.
func (s *Store) Alloc() (Slot, error) {
	if s.wiped.Load() {
		return 0, ErrWiped
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	var slot Slot
	if n := len(s.mu.free); n > 0 {
		slot = s.mu.free[n-1]
		s.mu.free = s.mu.free[:n-1]
	} else {
		slot = s.mu.next
		if err := s.growLocked(slot); err != nil {
			return 0, err
		}
		s.mu.next++
	}
	e := &s.mu.extents[(slot-1)/extentSlots]
	if e.used == 0 {
		if !e.punched {
			s.mu.idle--
		}
		e.punched = false
	}
	e.used++
	return slot, nil
}

// growLocked makes room in memory for a slot that was never given out before.
func (s *Store) growLocked(slot Slot) error {
	chunks := *s.chunks.Load()
	if int(slot-1)/chunkSlots >= len(chunks) {
		if len(chunks) == maxChunks {
			return fmt.Errorf("allocating local slot %d: %w", slot, ErrFull)
		}
		grown := append(chunks[:len(chunks):len(chunks)], new(chunk))
		s.chunks.Store(&grown)
	}
	if int(slot-1)/extentSlots >= len(s.mu.extents) {
		s.mu.extents = append(s.mu.extents, extent{punched: true})
	}
	return nil
}

// Free gives a slot back. Its content is gone.
func (s *Store) Free(slot Slot) {
	if s.wiped.Load() {
		return
	}
	c, i := s.entry(slot)
	c.tags[i], c.lengths[i] = seal.Tag{}, 0
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mu.free = append(s.mu.free, slot)
	e := &s.mu.extents[(slot-1)/extentSlots]
	if e.used--; e.used > 0 {
		return
	}
	s.mu.idle++
	if s.mu.idle > punchAbove && !s.mu.punching {
		s.mu.punching = true
		go s.punch()
	}
}

// punch gives the disk space of every wholly free extent back. That may wait for the disk,
// so the extents' slots are out of reach meanwhile, and no lock is held.
func (s *Store) punch() {
	s.mu.Lock()
	// Slots that were never given out are handed out past the free list: not of an extent
	// that is being punched.
	frontier := int(s.mu.next-1) / extentSlots
	var idle []int
	for i := range s.mu.extents {
		if e := &s.mu.extents[i]; i != frontier && e.used == 0 && !e.punched {
			e.punched = true
			idle = append(idle, i)
		}
	}
	s.mu.idle -= len(idle)
	var held, free []Slot
	for _, slot := range s.mu.free {
		if i := int(slot-1) / extentSlots; i != frontier && s.mu.extents[i].used == 0 {
			held = append(held, slot)
		} else {
			free = append(free, slot)
		}
	}
	s.mu.free = free
	s.mu.Unlock()
	for _, i := range idle {
		// Where the file system cannot do it, the space stays for reuse.
		_ = s.control(func(fd int) error {
			return unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE,
				int64(i)*extentSlots*SlotSize, extentSlots*SlotSize)
		})
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mu.free = append(held, s.mu.free...)
	s.mu.punching = false
}

func (s *Store) entry(slot Slot) (*chunk, int) {
	return (*s.chunks.Load())[(slot-1)/chunkSlots], int(slot-1) % chunkSlots
}

func offset(slot Slot) int64 { return int64(slot-1) * SlotSize }

var sealedBuffers = sync.Pool{New: func() any { return new([SlotSize]byte) }}

// Write replaces a slot's content with p, at most SlotSize bytes. After an error the slot
// holds what it held, or cannot be read.
func (s *Store) Write(slot Slot, p []byte) error {
	if len(p) > SlotSize {
		return fmt.Errorf("writing %d bytes into local slot %d: a slot has %d", len(p), slot, SlotSize)
	}
	buf := sealedBuffers.Get().(*[SlotSize]byte)
	defer sealedBuffers.Put(buf)
	sealed, tag := s.box.Seal(buf[:0], uint64(slot), p)
	if tag.IsZero() {
		return ErrWiped
	}
	if _, err := s.file.WriteAt(sealed, offset(slot)); err != nil {
		return s.ioError("writing", slot, err)
	}
	c, i := s.entry(slot)
	c.tags[i], c.lengths[i] = tag, uint16(len(p))
	return nil
}

// Read puts a slot's content at the start of p and tells its length. p has room for
// SlotSize bytes, or for as many as were written.
func (s *Store) Read(slot Slot, p []byte) (int, error) {
	if s.wiped.Load() {
		return 0, ErrWiped
	}
	c, i := s.entry(slot)
	n := int(c.lengths[i])
	if n > len(p) {
		return 0, fmt.Errorf("reading local slot %d: it holds %d bytes, there is room for %d", slot, n, len(p))
	}
	buf := sealedBuffers.Get().(*[SlotSize]byte)
	defer sealedBuffers.Put(buf)
	if _, err := s.file.ReadAt(buf[:n], offset(slot)); err != nil {
		return 0, s.ioError("reading", slot, err)
	}
	if _, err := s.box.Open(p[:0:n], uint64(slot), buf[:n], c.tags[i]); err != nil {
		return 0, s.ioError("reading", slot, err)
	}
	return n, nil
}

func (s *Store) ioError(doing string, slot Slot, err error) error {
	switch {
	case s.wiped.Load(), errors.Is(err, seal.ErrWiped):
		return ErrWiped
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		return fmt.Errorf("%s local slot %d: %w (%s): free some space there", doing, slot, ErrFull, s.dir)
	case errors.Is(err, io.EOF):
		err = io.ErrUnexpectedEOF
	}
	return fmt.Errorf("%s local slot %d of the store in %s: %w", doing, slot, s.dir, err)
}

// Wipe forgets the key and closes the file: nothing in the store can be read again, by
// anybody (invariant K2). Every later call fails with ErrWiped.
func (s *Store) Wipe() error {
	if s.wiped.Swap(true) {
		return nil
	}
	s.box.Wipe()
	return s.file.Close()
}

// Usage is how much of the store is in use.
type Usage struct {
	Used   uint64 // slots that hold something
	Free   uint64 // slots that are kept for reuse
	Backed uint64 // those of Free whose place on the disk was not given back
}

// Usage tells how much is in use.
func (s *Store) Usage() Usage {
	s.mu.Lock()
	defer s.mu.Unlock()
	given := uint64(s.mu.next - 1)
	var u Usage
	for i := range s.mu.extents {
		e := &s.mu.extents[i]
		u.Used += uint64(e.used)
		if !e.punched {
			u.Backed += min(extentSlots, given-uint64(i)*extentSlots) - uint64(e.used)
		}
	}
	u.Free = given - u.Used
	return u
}

// Statfs describes the disk that the store is on.
func (s *Store) Statfs() (st unix.Statfs_t, err error) {
	err = s.control(func(fd int) error { return unix.Fstatfs(fd, &st) })
	return st, err
}

func (s *Store) control(fn func(fd int) error) error {
	if s.wiped.Load() {
		return ErrWiped
	}
	raw, err := s.file.SyscallConn()
	if err != nil {
		return err
	}
	var inner error
	if err := raw.Control(func(fd uintptr) { inner = fn(int(fd)) }); err != nil {
		return err
	}
	return inner
}
