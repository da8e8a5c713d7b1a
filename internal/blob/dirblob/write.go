package dirblob

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/holdfastdb/holdfast/internal/blob"
)

const (
	trailerMagic = "HFOBJECT"
	trailerSize  = int64(len(trailerMagic) + 16)

	openLock = "open"
	shares   = 64
)

func newTrailer() (t [trailerSize]byte) {
	copy(t[:], trailerMagic)
	rand.Read(t[len(trailerMagic):]) // never fails: crypto/rand
	return t
}

func trailerETag(t [trailerSize]byte) blob.ETag {
	return blob.ETag(hex.EncodeToString(t[len(trailerMagic):]))
}

// Create implements blob.Store.
func (s *Store) Create(ctx context.Context, key string, r io.Reader, size int64) (blob.ETag, error) {
	if err := blob.CheckKey(key); err != nil {
		return "", err
	}
	path := s.path(key)
	if err := checkAbsent(key, path); err != nil {
		return "", err // before the body is read for nothing
	}
	t, err := s.writeTemp(ctx, key, r, size)
	if err != nil {
		return "", err
	}
	defer t.discard()
	if err := s.makeDir(filepath.Dir(path)); err != nil {
		return "", fmt.Errorf("making the folder of object %s: %w", key, err)
	}
	if err := os.Link(t.Name(), path); err != nil { // the commit point
		if errors.Is(err, fs.ErrExist) {
			return "", checkAbsent(key, path)
		}
		return "", fmt.Errorf("creating object %s: %w", key, err)
	}
	return t.etag, syncDir(filepath.Dir(path))
}

// checkAbsent gives ErrExists if the key's object exists.
func checkAbsent(key, path string) error {
	st, err := os.Lstat(path)
	switch {
	case err == nil && st.IsDir():
		return fmt.Errorf("object key %s is a folder of other keys", key)
	case err == nil:
		return fmt.Errorf("object %s: %w", key, blob.ErrExists)
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case errors.Is(err, syscall.ENOTDIR):
		return fmt.Errorf("object key %s lies under another object's key", key)
	}
	return fmt.Errorf("looking for object %s: %w", key, err)
}

// Swap implements blob.Store.
func (s *Store) Swap(ctx context.Context, key string, data []byte, old blob.ETag) (blob.ETag, error) {
	if err := s.checkETag(ctx, key, old); err != nil {
		return "", err // before anything is written for nothing
	}
	if len(data) > blob.MaxDocument {
		return "", fmt.Errorf("document %s has %d bytes, the most is %d", key, len(data), blob.MaxDocument)
	}
	t, err := s.writeTemp(ctx, key, bytes.NewReader(data), int64(len(data)))
	if err != nil {
		return "", err
	}
	defer t.discard()
	unlock, err := s.lock(ctx, shareOf(key), syscall.LOCK_EX)
	if err != nil {
		return "", fmt.Errorf("replacing document %s: %w", key, err)
	}
	defer unlock()
	// Under the lock nobody else replaces or deletes it between comparing and renaming.
	if err := s.checkETag(ctx, key, old); err != nil {
		return "", err
	}
	path := s.path(key)
	if err := os.Rename(t.Name(), path); err != nil { // the commit point
		return "", fmt.Errorf("replacing document %s: %w", key, err)
	}
	return t.etag, syncDir(filepath.Dir(path))
}

func (s *Store) checkETag(ctx context.Context, key string, want blob.ETag) error {
	info, err := s.Head(ctx, key)
	if err != nil {
		return err
	}
	if info.ETag != want {
		return fmt.Errorf("document %s: %w", key, blob.ErrPrecondition)
	}
	return nil
}

// temp is a whole object that has no key yet. It is locked while it is open.
type temp struct {
	*os.File
	etag blob.ETag
}

// discard closes the file and takes its name in tmp away; a link or a renamed file stays.
func (t *temp) discard() {
	os.Remove(t.Name()) // gone already after a rename; a leftover is removed by the next Open
	t.Close()
}

// writeTemp writes and syncs an object's file in tmp. Nothing of it stays if it fails.
func (s *Store) writeTemp(ctx context.Context, key string, r io.Reader, size int64) (*temp, error) {
	f, err := s.makeTemp(ctx)
	if err != nil {
		return nil, fmt.Errorf("making a file for object %s: %w", key, err)
	}
	trailer := newTrailer()
	t := &temp{File: f, etag: trailerETag(trailer)}
	err = copyExactly(ctx, f, r, size)
	if err == nil {
		_, err = f.Write(trailer[:])
	}
	if err == nil {
		err = f.Sync()
	}
	if err != nil {
		t.discard()
		if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
			return nil, fmt.Errorf("writing object %s of %d bytes: %w: free some space of the file system that holds %s", key, size, err, s.dir)
		}
		return nil, fmt.Errorf("writing object %s of %d bytes: %w", key, size, err)
	}
	return t, nil
}

func (s *Store) makeTemp(ctx context.Context) (*os.File, error) {
	unlock, err := s.lock(ctx, openLock, syscall.LOCK_SH)
	if err != nil {
		return nil, err
	}
	defer unlock()
	f, err := os.CreateTemp(filepath.Join(s.dir, "tmp"), "")
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		os.Remove(f.Name())
		f.Close()
		return nil, fmt.Errorf("locking %s: %w", f.Name(), err)
	}
	return f, nil
}

// copyStep is how much is copied between looks at the context, in bytes.
const copyStep = 1 << 20

// copyExactly copies size bytes, which must be all that r has.
func copyExactly(ctx context.Context, w io.Writer, r io.Reader, size int64) error {
	if size < 0 {
		return errors.New("negative size")
	}
	for left := size; left > 0; {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, err := io.CopyN(w, r, min(left, copyStep))
		left -= n
		if err == io.EOF {
			return fmt.Errorf("the source ended after %d bytes", size-left)
		}
		if err != nil {
			return err
		}
	}
	if n, err := io.ReadFull(r, make([]byte, 1)); n > 0 {
		return errors.New("the source has more bytes")
	} else if err != io.EOF {
		return err
	}
	return nil
}

// makeDir makes a folder below objects with its parents, each durable.
func (s *Store) makeDir(dir string) error {
	if _, ok := s.synced.Load(dir); ok || dir == s.dir {
		return nil
	}
	if err := s.makeDir(filepath.Dir(dir)); err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	// One that exists may have been made by a process that has not synced it yet.
	if err := syncDir(filepath.Dir(dir)); err != nil {
		return err
	}
	s.synced.Store(dir, true)
	return nil
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := d.Sync(); err != nil {
		return fmt.Errorf("syncing folder %s: %w", dir, err)
	}
	return nil
}

// shareOf names the lock of the share of keys that key belongs to.
func shareOf(key string) string {
	h := fnv.New32a()
	io.WriteString(h, key)
	return fmt.Sprintf("%02x", h.Sum32()%shares)
}

// lock takes a lock file until unlock. Every call opens the file anew, so that goroutines
// exclude one another as processes do; the lock ends with the process, however it ends.
func (s *Store) lock(ctx context.Context, name string, how int) (unlock func(), err error) {
	f, err := os.OpenFile(filepath.Join(s.dir, "lock", name), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	for wait := time.Millisecond; ; wait = min(2*wait, 20*time.Millisecond) {
		err := syscall.Flock(int(f.Fd()), how|syscall.LOCK_NB)
		if err == nil {
			return func() { f.Close() }, nil
		}
		if !errors.Is(err, syscall.EWOULDBLOCK) && !errors.Is(err, syscall.EINTR) {
			f.Close()
			return nil, fmt.Errorf("locking %s: %w", f.Name(), err)
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, fmt.Errorf("waiting for the lock %s: %w", f.Name(), ctx.Err())
		case <-time.After(wait):
		}
	}
}
