package wal

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/internal/walrec"
)

// Appender takes WAL to the quorum; walclient.Appender is one.
type Appender interface {
	// Send queues bytes that continue the log at begin and takes ownership of them. partial: they
	// end inside a record that goes on with the next Send.
	Send(begin pg.LSN, wal []byte, partial bool) error
	// Wait returns when the quorum holds the log up to lsn.
	Wait(ctx context.Context, lsn pg.LSN) error
	// Committed is how far the quorum holds the log.
	Committed() pg.LSN
}

// A Writer implements pgfs.WAL over an Appender.
//
// While the quorum is lost it blocks; it fails only when the Appender does (this compute is
// fenced, W2) or when Postgres wrote something that is not the continuation of the log. An
// error is final, and reaches Postgres as EIO, on which it panics.
type Writer struct {
	appender Appender
	accepted atomic.Uint64 // end of the last complete record, all of it sent
	failed   atomic.Pointer[error]

	mu struct {
		sync.Mutex // held while Send blocks
		tracker    *Tracker
	}
}

// NewWriter sends the WAL from start on. page is as for NewTracker.
func NewWriter(a Appender, start pg.LSN, page []byte) (*Writer, error) {
	t, err := NewTracker(start, page)
	if err != nil {
		return nil, err
	}
	w := &Writer{appender: a}
	w.mu.tracker = t
	w.accepted.Store(uint64(start))
	return w, nil
}

// Write takes what Postgres wrote and sends the records that are complete now.
func (w *Writer) Write(lsn pg.LSN, p []byte) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.Err(); err != nil {
		return err
	}
	chunks, err := w.mu.tracker.Write(lsn, p)
	if err != nil {
		return w.fail(err)
	}
	for _, c := range chunks {
		if err := w.appender.Send(c.Begin, c.WAL, c.Partial); err != nil {
			return w.fail(fmt.Errorf("sending WAL from %v: %w", c.Begin, err))
		}
		if !c.Partial {
			w.accepted.Store(uint64(c.End))
		}
	}
	return nil
}

func (w *Writer) fail(err error) error {
	w.failed.CompareAndSwap(nil, &err)
	return err
}

// Sync waits until the quorum holds every complete record that was written before.
func (w *Writer) Sync(ctx context.Context) error {
	if err := w.Err(); err != nil {
		return err
	}
	return w.appender.Wait(ctx, w.Accepted())
}

// Append adds a record of the agent's own behind what Postgres wrote, which must have ended in
// order. make gets where the record before it begins.
func (w *Writer) Append(sysid uint64, make func(prev pg.LSN) []byte) error {
	w.mu.Lock()
	at, prev := w.mu.tracker.base, w.mu.tracker.last
	w.mu.Unlock()
	bytes, _ := walrec.PlaceRecord(at, make(prev), sysid)
	return w.Write(at, bytes)
}

// Accepted is the end of the last complete record that was written.
func (w *Writer) Accepted() pg.LSN { return pg.LSN(w.accepted.Load()) }

// Committed is the end of the WAL that is known to be on the quorum.
func (w *Writer) Committed() pg.LSN { return w.appender.Committed() }

// Err is the error that ended the Writer, or nil.
func (w *Writer) Err() error {
	if err := w.failed.Load(); err != nil {
		return *err
	}
	return nil
}
