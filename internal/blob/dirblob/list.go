package dirblob

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/holdfastdb/holdfast/internal/blob"
)

// List implements blob.Store. It reads a folder at a time; an object made or deleted
// meanwhile may be listed or not.
func (s *Store) List(ctx context.Context, prefix string, fn func(blob.Info) error) error {
	folder := ""
	if i := strings.LastIndexByte(prefix, '/'); i >= 0 {
		folder = prefix[:i+1]
		if err := blob.CheckKey(folder[:i]); err != nil {
			return fmt.Errorf("listing prefix: %w", err)
		}
	}
	return s.list(ctx, folder, prefix, fn)
}

// list visits the keys under folder ("" or ending in a slash) that begin with prefix.
func (s *Store) list(ctx context.Context, folder, prefix string, fn func(blob.Info) error) error {
	entries, err := os.ReadDir(filepath.Join(s.dir, "objects", filepath.FromSlash(folder)))
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("listing %s: %w", folder, err)
	}
	name := func(e fs.DirEntry) string {
		if e.IsDir() {
			return e.Name() + "/" // as it stands in keys: the order depends on it
		}
		return e.Name()
	}
	slices.SortFunc(entries, func(a, b fs.DirEntry) int { return cmp.Compare(name(a), name(b)) })
	for _, e := range entries {
		if err := ctx.Err(); err != nil {
			return err
		}
		key := folder + name(e)
		if e.IsDir() {
			if strings.HasPrefix(key, prefix) || strings.HasPrefix(prefix, key) {
				err = s.list(ctx, key, prefix, fn)
			}
		} else if strings.HasPrefix(key, prefix) {
			err = s.visit(ctx, key, fn)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (s *Store) visit(ctx context.Context, key string, fn func(blob.Info) error) error {
	info, err := s.Head(ctx, key)
	if errors.Is(err, blob.ErrNotFound) {
		return nil // deleted meanwhile
	}
	if err != nil {
		return err
	}
	return fn(info)
}
