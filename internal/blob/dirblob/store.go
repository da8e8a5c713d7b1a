// Package dirblob is a bucket in a directory of a local file system: every object a file,
// every write durable before it returns, any number of processes at once.
//
//	DIR/format       "holdfast directory bucket 1\n"
//	DIR/objects/KEY  content, then a trailer: "HFOBJECT" and 16 random bytes, the ETag
//	DIR/tmp/         files that are being written, each locked by its writer
//	DIR/lock/        locks (flock): "open", and one for each of 64 shares of the keys
//
// A write goes to a file in tmp, which is synced, then linked (Create: link(2) fails where
// the name exists) or renamed (Swap) to its place, whose folder is synced. Link and rename are the
// commit points: a crash before leaves an unlocked file in tmp, which the next Open removes. Swap and
// Delete of a key exclude one another by the lock of the key's share, over
// processes too. A reader holds the file it opened, whose bytes never change. ETags are
// random, not hashes, so that a document that returns to an earlier content still counts as
// changed.
package dirblob

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/holdfastdb/holdfast/internal/blob"
)

const (
	formatName = "format"
	formatText = "holdfast directory bucket 1\n"

	// openWait bounds how long Open waits for other processes' short locks.
	openWait = 10 * time.Second
)

// Store is a bucket in a directory.
type Store struct {
	dir string
	// synced holds folders whose own entry in their parent this Store has synced.
	synced sync.Map
}

var _ blob.Store = (*Store)(nil)

// Open opens the bucket in dir, or makes one, and removes what crashed writers left.
func Open(dir string) (*Store, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("directory bucket: %w", err)
	}
	s := &Store{dir: dir}
	for _, sub := range []string{"objects", "tmp", "lock"} {
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o700); err != nil {
			return nil, fmt.Errorf("making directory bucket %s: %w", dir, err)
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), openWait)
	defer cancel()
	unlock, err := s.lock(ctx, openLock, syscall.LOCK_EX)
	if err != nil {
		return nil, fmt.Errorf("opening directory bucket %s: %w", dir, err)
	}
	defer unlock()
	if err := s.checkFormat(); err != nil {
		return nil, err
	}
	if err := s.removeLeftovers(); err != nil {
		return nil, fmt.Errorf("removing what crashed writers left in %s: %w", dir, err)
	}
	return s, nil
}

func (s *Store) checkFormat() error {
	path := filepath.Join(s.dir, formatName)
	have, err := os.ReadFile(path)
	if err == nil && string(have) == formatText {
		return nil
	}
	if err == nil && len(have) > 0 {
		return fmt.Errorf("%s says %.60q, this program knows %q: another program's directory, or a newer version's", path, have, formatText)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	// Absent, or cut short by a crash while the bucket was first made.
	f, err := os.OpenFile(path, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.WriteString(formatText)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return fmt.Errorf("writing %s: %w", path, err)
	}
	return errors.Join(syncDir(s.dir), syncDir(filepath.Dir(s.dir)))
}

// removeLeftovers runs under the open lock, which no writer can be between making its
// temporary file and locking it.
func (s *Store) removeLeftovers() error {
	entries, err := os.ReadDir(filepath.Join(s.dir, "tmp"))
	if err != nil {
		return err
	}
	for _, e := range entries {
		path := filepath.Join(s.dir, "tmp", e.Name())
		f, err := os.Open(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue // its writer was done just now
		}
		if err != nil {
			return err
		}
		if syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB) == nil {
			err = os.Remove(path)
		}
		f.Close()
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

func (s *Store) path(key string) string {
	return filepath.Join(s.dir, "objects", filepath.FromSlash(key))
}

// Get implements blob.Store.
func (s *Store) Get(ctx context.Context, key string) ([]byte, blob.ETag, error) {
	o, err := s.open(ctx, key)
	if err != nil {
		return nil, "", err
	}
	defer o.Close()
	if o.size > blob.MaxDocument {
		return nil, "", fmt.Errorf("object %s has %d bytes, a document at most %d: read it by ranges", key, o.size, blob.MaxDocument)
	}
	data := make([]byte, o.size)
	if _, err := io.ReadFull(o, data); err != nil {
		return nil, "", fmt.Errorf("reading object %s: %w", key, err)
	}
	etag, err := o.etag()
	return data, etag, err
}

// GetRange implements blob.Store.
func (s *Store) GetRange(ctx context.Context, key string, p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("reading object %s at %d: negative offset", key, off)
	}
	o, err := s.open(ctx, key)
	if err != nil {
		return 0, err
	}
	defer o.Close()
	want := p[:max(0, min(int64(len(p)), o.size-off))]
	n, err := o.ReadAt(want, off)
	if err != nil {
		return n, fmt.Errorf("reading object %s at %d: %w", key, off, err)
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// Head implements blob.Store.
func (s *Store) Head(ctx context.Context, key string) (blob.Info, error) {
	o, err := s.open(ctx, key)
	if err != nil {
		return blob.Info{}, err
	}
	defer o.Close()
	etag, err := o.etag()
	return blob.Info{Key: key, Size: o.size, ETag: etag}, err
}

// object is an open file of the bucket.
type object struct {
	*os.File
	key  string
	size int64 // without the trailer
}

func (s *Store) open(ctx context.Context, key string) (*object, error) {
	if err := errors.Join(blob.CheckKey(key), ctx.Err()); err != nil {
		return nil, err
	}
	f, err := os.Open(s.path(key))
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) {
		return nil, fmt.Errorf("object %s: %w", key, blob.ErrNotFound)
	}
	if err != nil {
		return nil, fmt.Errorf("opening object %s: %w", key, err)
	}
	st, err := f.Stat()
	if err == nil && st.IsDir() {
		err = fmt.Errorf("object %s: %w: it is a folder of others", key, blob.ErrNotFound)
	}
	if err == nil && st.Size() < trailerSize {
		err = fmt.Errorf("object %s is damaged: file %s has %d bytes, its trailer alone has %d", key, f.Name(), st.Size(), trailerSize)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return &object{File: f, key: key, size: st.Size() - trailerSize}, nil
}

func (o *object) etag() (blob.ETag, error) {
	var t [trailerSize]byte
	if _, err := o.ReadAt(t[:], o.size); err != nil {
		return "", fmt.Errorf("reading the trailer of object %s: %w", o.key, err)
	}
	if string(t[:len(trailerMagic)]) != trailerMagic {
		return "", fmt.Errorf("object %s is damaged: file %s does not end in its trailer", o.key, o.Name())
	}
	return trailerETag(t), nil
}

// Delete implements blob.Store.
func (s *Store) Delete(ctx context.Context, key string) error {
	if err := blob.CheckKey(key); err != nil {
		return err
	}
	unlock, err := s.lock(ctx, shareOf(key), syscall.LOCK_EX)
	if err != nil {
		return fmt.Errorf("deleting object %s: %w", key, err)
	}
	defer unlock()
	path := s.path(key)
	err = syscall.Unlink(path) // of files only: os.Remove would take an empty folder as well
	switch {
	case errors.Is(err, syscall.ENOENT), errors.Is(err, syscall.ENOTDIR), errors.Is(err, syscall.EISDIR):
		return nil
	case err != nil:
		return fmt.Errorf("deleting object %s: %w", key, err)
	}
	return syncDir(filepath.Dir(path))
}
