package localkms

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"time"
)

const (
	fileFormat = 1
	maxFile    = 16 << 20
	// lockWait bounds the wait for another process that changes the file.
	lockWait = 10 * time.Second
)

type document struct {
	Format int    `json:"format"`
	Keys   []*key `json:"keys"`
}

type key struct {
	Name     string    `json:"name"`
	Disabled bool      `json:"disabled,omitempty"`
	Versions []version `json:"versions"` // ascending; the last one is current
}

type version struct {
	Version uint32 `json:"version"`
	Key     []byte `json:"key"`
}

func (k *key) current() version { return k.Versions[len(k.Versions)-1] }

func (d *document) find(name string) *key {
	for _, k := range d.Keys {
		if k.Name == name {
			return k
		}
	}
	return nil
}

func (d *document) check() error {
	if d.Format != fileFormat {
		return fmt.Errorf("format %d, this program reads format %d", d.Format, fileFormat)
	}
	for _, k := range d.Keys {
		if k == nil || k.Name == "" || len(k.Versions) == 0 {
			return errors.New("a key without a name or without versions")
		}
		for i, v := range k.Versions {
			if len(v.Key) != 32 || i > 0 && v.Version <= k.Versions[i-1].Version {
				return fmt.Errorf("key %q: version %d is out of order or has no 32 bytes", k.Name, v.Version)
			}
		}
	}
	return nil
}

// load reads the file, which is always a whole version of it: it is replaced by rename.
// If it does not exist the document is empty and the error is fs.ErrNotExist.
func (k *KMS) load() (*document, error) {
	empty := &document{Format: fileFormat}
	st, err := os.Stat(k.file)
	if err != nil {
		return empty, fmt.Errorf("the development KMS: %w", err)
	}
	if st.Mode().Perm()&0o077 != 0 || st.Size() > maxFile {
		return nil, fmt.Errorf("the development KMS's file %s has mode %o and %d bytes: it holds keys, so want mode 600 and at most %d bytes", k.file, st.Mode().Perm(), st.Size(), maxFile)
	}
	data, err := os.ReadFile(k.file)
	if err != nil {
		return empty, fmt.Errorf("the development KMS: %w", err)
	}
	doc := &document{}
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	if err := dec.Decode(doc); err != nil {
		return nil, fmt.Errorf("the development KMS's file %s is damaged: %w", k.file, err)
	}
	if err := doc.check(); err != nil {
		return nil, fmt.Errorf("the development KMS's file %s is damaged: %w", k.file, err)
	}
	return doc, nil
}

// change replaces the file by a changed version, alone among all processes.
func (k *KMS) change(fn func(*document) error) error {
	unlock, err := k.lock()
	if err != nil {
		return err
	}
	defer unlock()
	doc, err := k.load()
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := fn(doc); err != nil {
		return err
	}
	slices.SortFunc(doc.Keys, func(a, b *key) int { return cmp.Compare(a.Name, b.Name) })
	data, err := json.MarshalIndent(doc, "", "  ")
	if err != nil {
		return err
	}
	if err := replaceFile(k.file, append(data, '\n')); err != nil {
		return fmt.Errorf("changing the development KMS: %w", err)
	}
	return nil
}

func (k *KMS) lock() (unlock func(), err error) {
	f, err := os.OpenFile(k.file+".lock", os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("locking the development KMS: %w", err)
	}
	for deadline := time.Now().Add(lockWait); ; time.Sleep(10 * time.Millisecond) {
		err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if err == nil {
			return func() { f.Close() }, nil
		}
		if !errors.Is(err, syscall.EWOULDBLOCK) && !errors.Is(err, syscall.EINTR) || time.Now().After(deadline) {
			f.Close()
			return nil, fmt.Errorf("locking the development KMS by %s: %w: another process holds it", f.Name(), err)
		}
	}
}

// replaceFile is atomic, also over a crash.
func replaceFile(path string, data []byte) error {
	f, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".new-") // mode 600
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	err = errors.Join(err, f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		os.Remove(f.Name())
		return err
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}
