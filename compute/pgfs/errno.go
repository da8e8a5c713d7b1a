package pgfs

import (
	"context"
	"errors"
	iofs "io/fs"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/holdfastdb/holdfast/compute/scratch"
)

// What the tree and the files answer; the table below says what Postgres sees.
var (
	errNotDirectory = errors.New("not a directory")
	errIsDirectory  = errors.New("is a directory")
	errNotEmpty     = errors.New("directory not empty")
	errInvalid      = errors.New("invalid argument")
	errNameTooLong  = errors.New("file name too long")
	errTooBig       = errors.New("file too large")
	errNotSupported = errors.New("operation not supported by this storage")
	errNotPermitted = errors.New("not permitted by this storage")
	errStale        = errors.New("the file is gone")
	errClosed       = errors.New("the mount is shut")
	errRemote       = errors.New("from the page server") // marks errors that are not the local store's
)

// errnos is the one table of the mount. What is not in it is EIO.
var errnos = []struct {
	err   error
	errno syscall.Errno
}{
	{iofs.ErrNotExist, syscall.ENOENT},
	{iofs.ErrExist, syscall.EEXIST},
	{errNotDirectory, syscall.ENOTDIR},
	{errIsDirectory, syscall.EISDIR},
	{errNotEmpty, syscall.ENOTEMPTY},
	{errInvalid, syscall.EINVAL},
	{errNameTooLong, syscall.ENAMETOOLONG},
	{errTooBig, syscall.EFBIG},
	{errNotSupported, syscall.EOPNOTSUPP},
	{errNotPermitted, syscall.EPERM},
	{errStale, syscall.ESTALE},
	{scratch.ErrFull, syscall.ENOSPC},
	// Only a dying caller's wait is cut short: see opContext.
	{context.Canceled, syscall.EINTR},
}

// lastAnswers is for how long errors are held back once the lease has ended: Postgres is about to be
// stopped and then killed, and what a backend never hears it does not tell its client, who is to hear
// of the key and not of input and output.
const lastAnswers = 50 * time.Millisecond

func errnoOf(err error) syscall.Errno {
	for _, e := range errnos {
		if errors.Is(err, e.err) {
			return e.errno
		}
	}
	return syscall.EIO
}

// status turns an error into the kernel's answer. It logs what is the storage's fault:
// Postgres only learns a number.
func (fs *FS) status(err error) fuse.Status {
	if err == nil {
		return fuse.OK
	}
	errno := errnoOf(err)
	if errno == syscall.EIO && fs.live() != nil {
		fs.pause(lastAnswers)
	}
	if (errno == syscall.EIO || errno == syscall.ENOSPC) && fs.ctx.Err() == nil {
		fs.cfg.Log.Error("a file operation of Postgres failed", "errno", errno.Error(), "error", err)
	}
	return fuse.Status(errno)
}
