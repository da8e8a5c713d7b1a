package pgfs

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"strconv"
	"time"

	"github.com/holdfastdb/holdfast/internal/pg"
)

// opContext is what is known of who waits for an operation: the kernel closes cancel when
// the calling thread gets any signal. The zero value is the agent itself.
type opContext struct {
	cancel <-chan struct{}
	thread uint32
}

// dyingPoll is how often an interrupted caller is looked at. The kernel tells of one signal
// only, so a SIGKILL after a first signal has to be looked for.
const dyingPoll = 100 * time.Millisecond

// begin gives the context of an operation that has to wait. It ends when the mount does,
// after limit (0: never), or when the caller is being killed. Other signals must not end it:
// Postgres gets them all the time, and many of its reads and every fsync treat EINTR as a
// failure.
func (fs *FS) begin(op opContext, limit time.Duration) (context.Context, context.CancelFunc) {
	var ctx context.Context
	var stop context.CancelFunc
	if limit > 0 {
		ctx, stop = context.WithTimeout(fs.ctx, limit)
	} else {
		ctx, stop = context.WithCancel(fs.ctx)
	}
	if op.cancel != nil {
		go func() {
			select {
			case <-ctx.Done():
				return
			case <-op.cancel:
			}
			for !dying(op.thread) {
				select {
				case <-ctx.Done():
					return
				case <-time.After(dyingPoll):
				}
			}
			stop()
		}()
	}
	return ctx, stop
}

// cause tells why an operation's context ended.
func (fs *FS) cause(ctx context.Context) error {
	if fs.ctx.Err() != nil {
		return errClosed
	}
	return ctx.Err()
}

const sigKillBit = 1 << 8 // SIGKILL in the masks of /proc/PID/status

// dying tells whether a thread has a SIGKILL pending or is gone.
func dying(thread uint32) bool {
	if thread == 0 {
		return false // the kernel itself, or another PID namespace
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", thread))
	if err != nil {
		return os.IsNotExist(err)
	}
	for line := range bytes.Lines(status) {
		key, value, _ := bytes.Cut(line, []byte(":"))
		value = bytes.TrimSpace(value)
		switch string(key) {
		case "State":
			if len(value) > 0 && (value[0] == 'Z' || value[0] == 'X') {
				return true
			}
		case "SigPnd", "ShdPnd":
			if mask, err := strconv.ParseUint(string(value), 16, 64); err == nil && mask&sigKillBit != 0 {
				return true
			}
		}
	}
	return false
}

// setWAL tells that a file got or lost the name of the segment that starts at an LSN.
func (f *file) setWAL(start pg.LSN, gained bool) {
	if gained {
		f.wal.Store(uint64(start) + 1)
	} else {
		f.wal.CompareAndSwap(uint64(start)+1, 0)
	}
}

// passWAL hands what was written into a WAL segment on. Contents written under another name
// and renamed are not WAL: Postgres prepares segments that way, and writes WAL afterwards.
func (fs *FS) passWAL(f *file, p []byte, off int64) error {
	start := f.wal.Load()
	if start == 0 || fs.cfg.WAL == nil || off+int64(len(p)) > pg.WALSegmentSize {
		return nil
	}
	lsn := pg.LSN(start-1) + pg.LSN(off)
	if err := fs.cfg.WAL.Write(lsn, p); err != nil {
		return fmt.Errorf("taking %d bytes of WAL at %s: %w", len(p), lsn, err)
	}
	return nil
}

// sync waits until a WAL segment's records are on the quorum (invariant W1). For every other
// file there is nothing to wait for: local bytes do not outlive the compute.
func (fs *FS) sync(op opContext, f *file) error {
	if f.wal.Load() == 0 || fs.cfg.WAL == nil {
		return nil
	}
	ctx, stop := fs.begin(op, 0)
	defer stop()
	err := fs.cfg.WAL.Sync(ctx)
	if err != nil && ctx.Err() != nil {
		err = fs.cause(ctx)
	}
	if err != nil {
		return fmt.Errorf("waiting for the safekeepers' quorum: %w", err)
	}
	return nil
}
