package compute

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/holdfastdb/holdfast/compute/pgproc"
)

// A Folder is an endpoint's, or an initdb's, place on the local disk.
type Folder struct {
	Mount   string // the data directory
	Scratch string // where the sealed file is, without a name
	Socket  string // for the agent's own connection; Postgres's user owns it
	root    string
}

const (
	// maxSocketDir leaves room for "/.s.PGSQL.65535.lock" within what the kernel takes.
	maxSocketDir = 86
	mountName    = "mnt"
)

// OpenFolder makes an endpoint's folder as it has to be, and empties it: nothing that an
// earlier agent left is of use. What that agent had mounted there is left for the new mount
// to replace.
func OpenFolder(root string, user pgproc.User) (*Folder, error) {
	// Postgres's user passes through and sees no names.
	if err := os.MkdirAll(root, 0o711); err != nil {
		return nil, fmt.Errorf("making the endpoint's folder: %w", err)
	}
	if err := os.Chmod(root, 0o711); err != nil {
		return nil, err
	}
	root, err := filepath.EvalSymlinks(root) // as the kernel calls a mount there
	if err != nil {
		return nil, err
	}
	f := &Folder{root: root, Mount: filepath.Join(root, mountName), Scratch: filepath.Join(root, "scratch"), Socket: filepath.Join(root, "socket")}
	if len(f.Socket) > maxSocketDir {
		sum := sha256.Sum256([]byte(root))
		f.Socket = filepath.Join(os.TempDir(), "holdfast-socket-"+hex.EncodeToString(sum[:8]))
	}
	if err := user.MayEnter(root); err != nil {
		return nil, err
	}
	if err := f.empty(); err != nil {
		return nil, fmt.Errorf("emptying the endpoint's folder: %w", err)
	}
	for _, dir := range []string{f.Scratch, f.Socket} {
		if err := os.Mkdir(dir, 0o700); err != nil {
			return nil, err
		}
	}
	if user.Drop {
		if err := os.Chown(f.Socket, int(user.UID), int(user.GID)); err != nil {
			return nil, err
		}
	}
	return f, nil
}

// empty removes all but the mountpoint.
func (f *Folder) empty() error {
	entries, err := os.ReadDir(f.root)
	if err != nil {
		return err
	}
	errs := []error{os.RemoveAll(f.Socket)}
	for _, e := range entries {
		if e.Name() != mountName {
			errs = append(errs, os.RemoveAll(filepath.Join(f.root, e.Name())))
		}
	}
	return errors.Join(errs...)
}

// Remove empties the folder once nothing is mounted there any more.
func (f *Folder) Remove() error {
	err := f.empty()
	if rmErr := os.Remove(f.Mount); rmErr != nil && !errors.Is(rmErr, os.ErrNotExist) {
		err = errors.Join(err, rmErr)
	}
	return err
}
