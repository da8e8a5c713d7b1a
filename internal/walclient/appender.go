package walclient

import (
	"context"
	"fmt"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/internal/rpc"
)

const (
	maxUncommitted = 16 << 20 // bytes that Send takes before it blocks
	maxRequest     = 1 << 20  // bytes of chunks that are sent as one; a larger chunk goes alone
	// silence is how long the leader may leave WAL unanswered before another is tried.
	silence = 4 * time.Second
)

// Appender appends to a branch's log in one epoch. Send, Wait and the rest may be called
// from several goroutines; the order of Sends is the order of the log.
//
// A Send goes out in the caller's goroutine where it can: the way of a commit has one switch
// of goroutines less. One goroutine receives, and connects again when it must.
type Appender struct {
	c     *Client
	epoch uint64

	sending sync.Mutex // held by who sends on the stream

	mu struct {
		sync.Mutex
		stream    pb.Safekeeper_AppendClient // nil: there is none now
		queue     []chunk                    // not known to be committed, ascending
		next      int                        // of queue: the first that this stream was not sent
		bytes     int                        // in queue
		partial   bool                       // the queue ends inside a record
		tail      pg.LSN                     // where the next Send begins
		committed pg.LSN
		answered  time.Time // when the leader last told something, or had nothing to tell
		waiters   []*waiter
		room      chan struct{} // closed and replaced when bytes falls, or at the end
		err       error
	}
	done chan struct{}
	ctx  context.Context
	stop context.CancelFunc
}

type chunk struct {
	begin   pg.LSN
	wal     []byte
	partial bool // it ends inside a record
	alone   bool // it is a piece of a record, the last one included: readers find records' ends at chunks' ends
}

func (c chunk) end() pg.LSN { return c.begin + pg.LSN(len(c.wal)) }

type waiter struct {
	lsn pg.LSN
	ch  chan struct{}
}

var waiters = sync.Pool{New: func() any { return &waiter{ch: make(chan struct{}, 1)} }}

// Append begins to append in an epoch, at the epoch's End.
func (c *Client) Append(epoch uint64, from pg.LSN) *Appender {
	a := &Appender{c: c, epoch: epoch, done: make(chan struct{})}
	a.ctx, a.stop = context.WithCancel(c.ctx)
	a.mu.tail, a.mu.committed = from, from
	a.mu.room = make(chan struct{})
	go a.run()
	return a
}

// Send queues WAL that continues what was sent before: whole records, or, with partial, a piece of a
// record that goes on with the next Send and is committed with its last piece. It takes wal over. It
// blocks only while more than 16 MiB are not committed, and between two pieces never. After a chunk that ends with a switch
// record, the next one begins at the next segment's start.
func (a *Appender) Send(begin pg.LSN, wal []byte, partial bool) error {
	if len(wal) == 0 {
		return nil
	}
	a.mu.Lock()
	for a.mu.err == nil && a.mu.bytes > maxUncommitted && !a.mu.partial {
		room := a.mu.room
		a.mu.Unlock()
		<-room
		a.mu.Lock()
	}
	if err := a.mu.err; err != nil {
		a.mu.Unlock()
		return err
	}
	if begin != a.mu.tail && (begin < a.mu.tail || begin != begin.SegmentStart()) {
		tail := a.mu.tail
		a.mu.Unlock()
		return fmt.Errorf("branch %s/%s: WAL from %s does not continue what was sent, which ends at %s", a.c.project, a.c.branch, begin, tail)
	}
	if len(a.mu.queue) == 0 {
		a.mu.answered = time.Now() // from now on an answer is due
	}
	ch := chunk{begin: begin, wal: wal, partial: partial, alone: partial || a.mu.partial}
	a.mu.partial = partial
	a.mu.queue = append(a.mu.queue, ch)
	a.mu.bytes += len(wal)
	a.mu.tail = ch.end()
	a.mu.Unlock()
	a.flush()
	return nil
}

// flush sends what is queued, unless somebody does already: who holds sending looks again
// after letting go.
func (a *Appender) flush() {
	for a.pending() {
		if !a.sending.TryLock() {
			return
		}
		for a.sendNext() {
		}
		a.sending.Unlock()
	}
}

func (a *Appender) pending() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.mu.stream != nil && a.mu.next < len(a.mu.queue)
}

// sendNext sends one request. The caller holds sending.
func (a *Appender) sendNext() bool {
	a.mu.Lock()
	stream := a.mu.stream
	if stream == nil || a.mu.next >= len(a.mu.queue) {
		a.mu.Unlock()
		return false
	}
	req := a.takeLocked()
	a.mu.Unlock()
	if stream.Send(req) != nil { // why, the receiving side is told
		a.mu.Lock()
		if a.mu.stream == stream {
			a.mu.stream = nil
		}
		a.mu.Unlock()
		return false
	}
	return true
}

// takeLocked makes a request of the chunks that wait, as many as follow one another.
func (a *Appender) takeLocked() *pb.AppendRequest {
	first := a.mu.queue[a.mu.next]
	a.mu.next++
	end, n := first.end(), len(first.wal)
	to := a.mu.next
	for ; to < len(a.mu.queue) && !first.alone; to++ {
		c := a.mu.queue[to]
		if c.alone || c.begin != end || n+len(c.wal) > maxRequest {
			break
		}
		end, n = c.end(), n+len(c.wal)
	}
	wal := first.wal
	if to > a.mu.next {
		wal = make([]byte, 0, n)
		for _, c := range a.mu.queue[a.mu.next-1 : to] {
			wal = append(wal, c.wal...)
		}
		a.mu.next = to
	}
	return &pb.AppendRequest{BeginLsn: uint64(first.begin), Wal: wal, Partial: first.partial}
}

// Wait waits until the log is committed up to lsn.
func (a *Appender) Wait(ctx context.Context, lsn pg.LSN) error {
	a.mu.Lock()
	if a.mu.committed >= lsn || a.mu.err != nil {
		defer a.mu.Unlock()
		if a.mu.committed >= lsn {
			return nil
		}
		return a.mu.err
	}
	w := waiters.Get().(*waiter)
	w.lsn = lsn
	a.mu.waiters = append(a.mu.waiters, w)
	a.mu.Unlock()
	select {
	case <-w.ch:
		waiters.Put(w)
	case <-ctx.Done():
		a.forget(w)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	switch {
	case a.mu.committed >= lsn:
		return nil
	case a.mu.err != nil:
		return a.mu.err
	}
	return ctx.Err()
}

// forget takes a waiter back that may or may not have been told.
func (a *Appender) forget(w *waiter) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for i, x := range a.mu.waiters {
		if x == w {
			a.mu.waiters = append(a.mu.waiters[:i], a.mu.waiters[i+1:]...)
			break
		}
	}
	select {
	case <-w.ch:
	default:
	}
	waiters.Put(w)
}

// Committed is how far the log is known to be committed.
func (a *Appender) Committed() pg.LSN {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.mu.committed
}

// Done is closed when the Appender has ended.
func (a *Appender) Done() <-chan struct{} { return a.done }

// Err tells why the Appender ended: ErrFenced, ErrClosed, or what makes going on impossible; nil
// while it has not.
func (a *Appender) Err() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.mu.err
}

// Close ends the Appender. What is not committed may be or not.
func (a *Appender) Close() { a.finish(ErrClosed) }

func (a *Appender) finish(err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.mu.err != nil {
		return
	}
	a.mu.err = err
	a.mu.stream, a.mu.queue, a.mu.bytes = nil, nil, 0
	for _, w := range a.mu.waiters {
		w.ch <- struct{}{}
	}
	a.mu.waiters = nil
	close(a.mu.room)
	close(a.done)
	a.stop()
}

// advance takes the news that the log is committed up to lsn.
func (a *Appender) advance(lsn pg.LSN) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.mu.answered = time.Now()
	if lsn <= a.mu.committed || a.mu.err != nil {
		return
	}
	a.mu.committed = lsn
	had, n := a.mu.bytes, 0
	for n < len(a.mu.queue) && a.mu.queue[n].end() <= lsn {
		a.mu.bytes -= len(a.mu.queue[n].wal)
		a.mu.queue[n].wal = nil
		n++
	}
	if n > 0 {
		a.mu.queue = a.mu.queue[n:]
		a.mu.next = max(a.mu.next-n, 0)
		if had > maxUncommitted && a.mu.bytes <= maxUncommitted {
			close(a.mu.room)
			a.mu.room = make(chan struct{})
		}
	}
	keep := a.mu.waiters[:0]
	for _, w := range a.mu.waiters {
		if w.lsn <= lsn {
			w.ch <- struct{}{} // has room: each waiter is told once
		} else {
			keep = append(keep, w)
		}
	}
	clear(a.mu.waiters[len(keep):])
	a.mu.waiters = keep
}

// run keeps a stream to the leader, until the end.
func (a *Appender) run() {
	var pause backoff
	for {
		addr, client, err := a.c.target()
		if err == nil {
			var answered bool
			if answered, err = a.serve(client); answered {
				pause = backoff{}
			}
		}
		if a.ctx.Err() != nil {
			a.finish(ErrClosed) // no more than a note if it was finished before
			return
		}
		a.c.learn(addr, err)
		if err := a.fatal(err); err != nil {
			a.finish(fmt.Errorf("branch %s/%s, epoch %d: %w", a.c.project, a.c.branch, a.epoch, err))
			return
		}
		if pause.next == maxBackoff {
			a.c.log.Warn("WAL waits for the safekeepers", "project", a.c.project, "branch", a.c.branch, "asked", addr, "err", err)
		}
		if pause.wait(a.ctx) != nil {
			a.finish(ErrClosed)
			return
		}
	}
}

// fatal gives the reason to end, if err is one.
func (a *Appender) fatal(err error) error {
	d := rpc.Detail(err)
	switch {
	case d.GetReason() == pb.ErrorDetail_FENCED:
		return fmt.Errorf("%w: %v", ErrFenced, err)
	case d.GetReason() == pb.ErrorDetail_GAP:
		if end := pg.LSN(d.GetEndLsn()); end < a.Committed() {
			return fmt.Errorf("the log ends at %s, and was committed up to %s: %w", end, a.Committed(), err)
		}
		return nil // a leader that has not seen what went before: it is sent again
	case final(err):
		return err
	}
	return nil
}

// serve appends over one stream. answered tells whether the leader answered anything.
func (a *Appender) serve(client pb.SafekeeperClient) (answered bool, err error) {
	ctx, cancel := context.WithCancel(a.ctx)
	defer cancel()
	stream, err := client.Append(ctx)
	if err != nil {
		return false, err
	}
	// The first request asks how far the log is; what is not committed follows.
	first := &pb.AppendRequest{Project: a.c.project, Branch: a.c.branch, Epoch: a.epoch, BeginLsn: uint64(a.Committed())}
	if err := stream.Send(first); err == nil {
		a.begin(stream)
		defer a.end(stream)
		go a.watch(ctx, cancel)
		go a.flush() // beside: it may block until this goroutine receives
		for {
			r, err := stream.Recv()
			if err != nil {
				return answered, a.explain(err, ctx)
			}
			answered = true
			a.advance(pg.LSN(r.GetCommittedLsn()))
			a.flush()
		}
	}
	_, err = stream.Recv() // says why the request could not be sent
	return false, err
}

// explain tells silence from a stream that was closed.
func (a *Appender) explain(err error, ctx context.Context) error {
	if ctx.Err() != nil && a.ctx.Err() == nil {
		return status.Errorf(codes.Unavailable, "no answer within %v", silence)
	}
	return err
}

func (a *Appender) begin(stream pb.Safekeeper_AppendClient) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.mu.err == nil {
		a.mu.stream, a.mu.next, a.mu.answered = stream, 0, time.Now()
	}
}

func (a *Appender) end(stream pb.Safekeeper_AppendClient) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.mu.stream == stream {
		a.mu.stream = nil
	}
}

// watch gives a silent leader up.
func (a *Appender) watch(ctx context.Context, cancel context.CancelFunc) {
	look := time.NewTicker(silence / 4)
	defer look.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-look.C:
		}
		a.mu.Lock()
		waits := len(a.mu.queue) > 0 && time.Since(a.mu.answered) >= silence
		a.mu.Unlock()
		if waits {
			cancel()
			return
		}
	}
}
