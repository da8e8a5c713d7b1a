package walstore

import (
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// FS is what the store needs of a file system. Tests put one below that fails and forgets.
// Names are paths; a renamed or new name is durable only after SyncDir.
type FS interface {
	MkdirAll(dir string) error
	// Open opens for reading and writing; create makes the file if it is absent.
	Open(name string, create bool) (File, error)
	List(dir string) ([]string, error) // base names, sorted
	Rename(from, to string) error
	Remove(name string) error
	SyncDir(dir string) error
}

// File is an open file. Sync makes what was written durable, size included.
type File interface {
	io.ReaderAt
	io.WriterAt
	io.Closer
	Size() (int64, error)
	Truncate(size int64) error
	Sync() error
}

// OS is the real file system.
type OS struct{}

// MkdirAll implements FS.
func (OS) MkdirAll(dir string) error { return os.MkdirAll(dir, 0o700) }

// Open implements FS.
func (OS) Open(name string, create bool) (File, error) {
	flags := os.O_RDWR
	if create {
		flags |= os.O_CREATE
	}
	f, err := os.OpenFile(name, flags, 0o600)
	if err != nil {
		return nil, err
	}
	return osFile{f}, nil
}

// List implements FS.
func (OS) List(dir string) ([]string, error) {
	ents, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	names := make([]string, len(ents))
	for i, e := range ents {
		names[i] = e.Name()
	}
	return names, nil
}

// Rename implements FS.
func (OS) Rename(from, to string) error { return os.Rename(from, to) }

// Remove implements FS.
func (OS) Remove(name string) error { return os.Remove(name) }

// SyncDir implements FS.
func (OS) SyncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

type osFile struct{ *os.File }

func (f osFile) Size() (int64, error) {
	st, err := f.Stat()
	if err != nil {
		return 0, err
	}
	return st.Size(), nil
}

func (f osFile) Sync() error {
	for {
		if err := unix.Fdatasync(int(f.Fd())); err != unix.EINTR {
			if err != nil {
				return &os.PathError{Op: "fdatasync", Path: f.Name(), Err: err}
			}
			return nil
		}
	}
}

// IsFull tells whether err means that the disk has no room: the write can be tried again.
func IsFull(err error) bool { return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) }

// Small documents (snapshot, identity) are replaced as a whole:
//
//	0 magic, 8 bytes   8 length u32   12 crc u32 of the payload   16 payload
const docHeader = 16

// WriteDoc replaces the document at name. When it returns nil, the new one is durable; a crash
// leaves the old or the new one.
func WriteDoc(fs FS, name, magic string, payload []byte) error {
	b := append(make([]byte, 0, docHeader+len(payload)), magic...)
	b = le.AppendUint32(b, uint32(len(payload)))
	b = le.AppendUint32(b, crc32.Checksum(payload, castagnoli))
	b = append(b, payload...)
	temp := name + ".tmp"
	if err := writeFile(fs, temp, b); err != nil {
		return fmt.Errorf("writing %s: %w", temp, err)
	}
	if err := fs.Rename(temp, name); err != nil {
		return err
	}
	return fs.SyncDir(filepath.Dir(name))
}

func writeFile(fs FS, name string, b []byte) (err error) {
	f, err := fs.Open(name, true)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if err := f.Truncate(0); err != nil {
		return err
	}
	if _, err := f.WriteAt(b, 0); err != nil {
		return err
	}
	return f.Sync()
}

// ReadDoc reads what WriteDoc wrote; os.ErrNotExist if there is none.
func ReadDoc(fs FS, name, magic string) ([]byte, error) {
	f, err := fs.Open(name, false)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := readAll(f)
	if err != nil {
		return nil, err
	}
	if len(b) < docHeader || string(b[:8]) != magic || uint64(le.Uint32(b[8:])) != uint64(len(b)-docHeader) ||
		crc32.Checksum(b[docHeader:], castagnoli) != le.Uint32(b[12:]) {
		return nil, fmt.Errorf("%s, %d bytes: %w", name, len(b), ErrDamaged)
	}
	return b[docHeader:], nil
}

func readAll(f File) ([]byte, error) {
	size, err := f.Size()
	if err != nil {
		return nil, err
	}
	if size > maxFile {
		return nil, fmt.Errorf("file has %d bytes, at most %d are possible", size, maxFile)
	}
	b := make([]byte, size)
	n, err := f.ReadAt(b, 0)
	if n == len(b) {
		return b, nil
	}
	return nil, err
}
