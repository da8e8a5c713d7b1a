package walclient

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/internal/rpc"
)

// world is what three fake safekeepers have in common: one log, one leader, and what is to
// go wrong.
type world struct {
	t     *testing.T
	addrs []string

	mu     sync.Mutex
	leader int
	epoch  uint64
	start  pg.LSN
	log    []byte // from start on
	lose   int    // appends to be lost
	mute   int    // appends to be taken and not answered
	calls  int    // unary calls whose answer is to be lost
	trunc  pg.LSN
	moved  chan struct{} // closed when the leader changes
	grown  chan struct{} // closed when the log grows
}

type fake struct {
	pb.UnimplementedSafekeeperServer
	w  *world
	id int
}

const start = pg.LSN(0x100)

func newWorld(t *testing.T) (*world, *Client) {
	w := &world{t: t, start: start, moved: make(chan struct{}), grown: make(chan struct{})}
	dir, err := os.MkdirTemp("", "wc")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	for id := range 3 {
		addr := fmt.Sprintf("unix:%s/run/%d", dir, id)
		l, err := rpc.Listen(addr)
		if err != nil {
			t.Fatal(err)
		}
		srv := rpc.NewServer()
		pb.RegisterSafekeeperServer(srv, &fake{w: w, id: id})
		go srv.Serve(l)
		t.Cleanup(srv.Stop)
		w.addrs = append(w.addrs, addr)
	}
	c, err := New("p", "b", w.addrs, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return w, c
}

func (w *world) move(to int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.leader = to
	close(w.moved)
	w.moved = make(chan struct{})
}

func (w *world) end() pg.LSN { return w.start + pg.LSN(len(w.log)) }

// notLeaderLocked is what another than the leader answers.
func (f *fake) notLeaderLocked() error {
	if f.id == f.w.leader {
		return nil
	}
	d := &pb.ErrorDetail{Reason: pb.ErrorDetail_NOT_LEADER}
	if f.id == 1 && f.w.leader >= 0 { // the others do not know who leads
		d.Leader = f.w.addrs[f.w.leader]
	}
	return rpc.Error(codes.Unavailable, d, "fake %d does not lead", f.id)
}

func (f *fake) OpenEpoch(context.Context, *pb.OpenEpochRequest) (*pb.OpenEpochResponse, error) {
	f.w.mu.Lock()
	defer f.w.mu.Unlock()
	if err := f.notLeaderLocked(); err != nil {
		return nil, err
	}
	f.w.epoch++
	if f.w.calls > 0 { // done, and the answer is lost
		f.w.calls--
		return nil, status.Error(codes.Unavailable, "lost")
	}
	return &pb.OpenEpochResponse{Epoch: f.w.epoch, StartLsn: uint64(f.w.start), EndLsn: uint64(f.w.end())}, nil
}

func (f *fake) CreateBranch(_ context.Context, r *pb.CreateBranchRequest) (*pb.CreateBranchResponse, error) {
	f.w.mu.Lock()
	defer f.w.mu.Unlock()
	if err := f.notLeaderLocked(); err != nil {
		return nil, err
	}
	if pg.LSN(r.GetStartLsn()) != f.w.start {
		return nil, status.Error(codes.AlreadyExists, "elsewhere")
	}
	return &pb.CreateBranchResponse{}, nil
}

func (f *fake) ReportDurable(context.Context, *pb.ReportDurableRequest) (*pb.ReportDurableResponse, error) {
	f.w.mu.Lock()
	defer f.w.mu.Unlock()
	return &pb.ReportDurableResponse{}, f.notLeaderLocked()
}

// append takes one request; answer is false if it is to be silent.
func (f *fake) append(epoch uint64, r *pb.AppendRequest) (end pg.LSN, answer bool, err error) {
	w := f.w
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := f.notLeaderLocked(); err != nil {
		return 0, false, err
	}
	if epoch != w.epoch {
		return 0, false, rpc.Error(codes.FailedPrecondition, &pb.ErrorDetail{Reason: pb.ErrorDetail_FENCED}, "fenced")
	}
	if len(r.GetWal()) == 0 {
		return w.end(), true, nil
	}
	if w.lose > 0 {
		w.lose--
		return 0, false, status.Error(codes.Unavailable, "lost on the way")
	}
	begin := pg.LSN(r.GetBeginLsn())
	if begin > w.end() {
		return 0, false, rpc.Error(codes.FailedPrecondition, &pb.ErrorDetail{Reason: pb.ErrorDetail_GAP, EndLsn: uint64(w.end())}, "gap")
	}
	if known := w.end() - begin; known < pg.LSN(len(r.GetWal())) {
		if !bytes.Equal(w.log[begin-w.start:], r.GetWal()[:known]) {
			w.t.Error("other bytes were sent again")
		}
		w.log = append(w.log, r.GetWal()[known:]...)
		close(w.grown)
		w.grown = make(chan struct{})
	}
	if w.mute > 0 {
		w.mute--
		return 0, false, status.Error(codes.Unavailable, "done, and the answer is lost")
	}
	return w.end(), true, nil
}

func (f *fake) Append(s pb.Safekeeper_AppendServer) error {
	f.w.mu.Lock()
	moved := f.w.moved
	f.w.mu.Unlock()
	got := make(chan error, 1)
	go func() {
		var epoch uint64
		for {
			r, err := s.Recv()
			if err != nil {
				got <- err
				return
			}
			epoch = max(epoch, r.GetEpoch())
			end, answer, err := f.append(epoch, r)
			if err == nil && answer {
				err = s.Send(&pb.AppendResponse{CommittedLsn: uint64(end)})
			}
			if err != nil {
				got <- err
				return
			}
		}
	}()
	select {
	case err := <-got:
		return err
	case <-moved:
		f.w.mu.Lock()
		defer f.w.mu.Unlock()
		return f.notLeaderLocked()
	}
}

func (f *fake) Read(r *pb.ReadRequest, s pb.Safekeeper_ReadServer) error {
	at := pg.LSN(r.GetFromLsn())
	for n := 0; ; n++ {
		f.w.mu.Lock()
		trunc, end, grown := f.w.trunc, f.w.end(), f.w.grown
		rest := bytes.Clone(f.w.log[min(at-f.w.start, pg.LSN(len(f.w.log))):])
		f.w.mu.Unlock()
		if at < trunc {
			return rpc.Error(codes.FailedPrecondition, &pb.ErrorDetail{Reason: pb.ErrorDetail_TRUNCATED, BeginLsn: uint64(trunc)}, "truncated")
		}
		if n == 3 {
			return status.Error(codes.Unavailable, "this replica stops")
		}
		resp := &pb.ReadResponse{CommittedLsn: uint64(end)}
		if len(rest) > 0 {
			resp.Chunks = []*pb.SealedWAL{{BeginLsn: uint64(at), EndLsn: uint64(end), Ciphertext: rest}}
		}
		if err := s.Send(resp); err != nil {
			return err
		}
		at = end
		select {
		case <-grown:
		case <-s.Context().Done():
			return s.Context().Err()
		}
	}
}

func wal(n, size int) []byte { return bytes.Repeat([]byte{byte(n + 1)}, size) }

func testCtx(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// TestAppendsSurviveEverything appends while requests are lost, answers are lost, and the
// leader changes.
func TestAppendsSurviveEverything(t *testing.T) {
	w, c := newWorld(t)
	w.leader, w.calls = 2, 1
	ctx := testCtx(t)
	if err := c.CreateBranch(ctx, start); err != nil {
		t.Fatal(err)
	}
	if err := c.CreateBranch(ctx, start+8); status.Code(errors.Unwrap(err)) != codes.AlreadyExists {
		t.Errorf("CreateBranch elsewhere: %v", err)
	}
	e, err := c.OpenEpoch(ctx, "n")
	if err != nil || e.Number != 2 || e.Start != start || e.End != start {
		t.Fatalf("OpenEpoch after a lost answer: %+v, %v", e, err)
	}
	a := c.Append(e.Number, e.End)
	defer a.Close()
	at, all := start, []byte(nil)
	for i := range 300 {
		switch i % 50 {
		case 10:
			w.mu.Lock()
			w.lose = 1
			w.mu.Unlock()
		case 20:
			w.mu.Lock()
			w.mute = 1
			w.mu.Unlock()
		case 30:
			w.move(i / 50 % 3)
		}
		b := wal(i, 8*(i%40+1))
		all = append(all, b...)
		if err := a.Send(at, b, false); err != nil {
			t.Fatal(err)
		}
		at += pg.LSN(len(b))
		if i%7 == 0 {
			if err := a.Wait(ctx, at); err != nil {
				t.Fatal(err)
			}
			if a.Committed() != at {
				t.Fatalf("waited for %s, committed is %s", at, a.Committed())
			}
		}
	}
	if err := a.Wait(ctx, at); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(w.log, all) {
		t.Errorf("the log has %d bytes, %d were sent, and they differ", len(w.log), len(all))
	}
}

func TestSendsFromManyGoroutinesWait(t *testing.T) {
	w, c := newWorld(t)
	w.epoch = 1
	a := c.Append(1, start)
	defer a.Close()
	var mu sync.Mutex
	at := start
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			for i := range 100 {
				b := wal(g, 64)
				mu.Lock()
				err := a.Send(at, b, false)
				at += pg.LSN(len(b))
				mine := at
				mu.Unlock()
				if err == nil && i%3 == 0 {
					err = a.Wait(testCtx(t), mine)
				}
				if err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	if err := a.Wait(testCtx(t), at); err != nil || len(w.log) != 8*100*64 {
		t.Errorf("%d bytes, %v", len(w.log), err)
	}
}

func TestSendBlocksWhileTooMuchIsUncommitted(t *testing.T) {
	w, c := newWorld(t)
	w.epoch, w.leader = 1, -1
	a := c.Append(1, start)
	defer a.Close()
	at := start
	sent := make(chan error)
	go func() {
		for i := range 20 {
			err := a.Send(at, wal(i, 1<<20), false)
			at += 1 << 20
			sent <- err
		}
	}()
	n := 0
	for blocked := false; !blocked; {
		select {
		case err := <-sent:
			if n++; err != nil {
				t.Fatal(err)
			}
		case <-time.After(200 * time.Millisecond):
			blocked = true
		}
	}
	if n != 17 {
		t.Errorf("%d MiB were taken before Send blocked, want 17", n)
	}
	w.move(0)
	for ; n < 20; n++ {
		if err := <-sent; err != nil {
			t.Fatal(err)
		}
	}
	if err := a.Wait(testCtx(t), at); err != nil {
		t.Fatal(err)
	}
}

func TestFencedAppenderEnds(t *testing.T) {
	w, c := newWorld(t)
	w.epoch = 1
	a := c.Append(1, start)
	if err := a.Send(start, wal(1, 8), false); err != nil {
		t.Fatal(err)
	}
	if err := a.Wait(testCtx(t), start+8); err != nil {
		t.Fatal(err)
	}
	if err := a.Send(start+24, wal(1, 8), false); err == nil {
		t.Error("a gap is taken")
	}
	if _, err := c.OpenEpoch(testCtx(t), "other"); err != nil {
		t.Fatal(err)
	}
	if err := a.Send(start+8, wal(2, 8), false); err != nil {
		t.Fatal(err)
	}
	if err := a.Wait(testCtx(t), start+16); !errors.Is(err, ErrFenced) {
		t.Errorf("Wait: %v", err)
	}
	<-a.Done()
	if err := a.Send(start+16, wal(2, 8), false); !errors.Is(err, ErrFenced) || !errors.Is(a.Err(), ErrFenced) {
		t.Errorf("Send: %v, Err: %v", err, a.Err())
	}
}

func TestLostLogIsNotPapered(t *testing.T) {
	w, c := newWorld(t)
	w.epoch = 1
	a := c.Append(1, start)
	if err := a.Send(start, wal(1, 80), false); err != nil {
		t.Fatal(err)
	}
	if err := a.Wait(testCtx(t), start+80); err != nil {
		t.Fatal(err)
	}
	w.mu.Lock()
	w.log = w.log[:8] // cannot be
	w.mu.Unlock()
	if err := a.Send(start+80, wal(2, 8), false); err != nil {
		t.Fatal(err)
	}
	<-a.Done()
	if err := a.Err(); err == nil || errors.Is(err, ErrFenced) || errors.Is(err, ErrClosed) {
		t.Errorf("Err: %v", err)
	}
}

func TestCloseWakesWaiters(t *testing.T) {
	w, c := newWorld(t)
	w.leader = -1
	a := c.Append(1, start)
	ctx, cancel := context.WithCancel(testCtx(t))
	cancel()
	if err := a.Wait(ctx, start+8); !errors.Is(err, context.Canceled) {
		t.Errorf("Wait: %v", err)
	}
	time.AfterFunc(20*time.Millisecond, a.Close)
	if err := a.Wait(testCtx(t), start+8); !errors.Is(err, ErrClosed) {
		t.Errorf("Wait: %v", err)
	}
	ctx, cancel = context.WithTimeout(testCtx(t), 20*time.Millisecond)
	defer cancel()
	// Who of the two notices the end first says so in its own words.
	if err := c.ReportDurable(ctx, start); !errors.Is(err, context.DeadlineExceeded) && status.Code(errors.Unwrap(err)) != codes.DeadlineExceeded {
		t.Errorf("a call without a leader: %v", err)
	}
}

func TestFollowGoesFromReplicaToReplica(t *testing.T) {
	w, c := newWorld(t)
	w.epoch = 1
	a := c.Append(1, start)
	defer a.Close()
	done := make(chan error, 1)
	var got []byte
	stop := errors.New("enough")
	go func() {
		done <- c.Follow(testCtx(t), start, func(chunks []*pb.SealedWAL, committed pg.LSN) error {
			for _, ch := range chunks {
				got = append(got, ch.GetCiphertext()...)
			}
			if committed == start+50*16 && len(got) == 50*16 {
				return stop
			}
			return nil
		})
	}()
	for i := range 50 {
		if err := a.Send(start+pg.LSN(i)*16, wal(i, 16), false); err != nil {
			t.Fatal(err)
		}
		if err := a.Wait(testCtx(t), start+pg.LSN(i+1)*16); err != nil {
			t.Fatal(err)
		}
	}
	if err := <-done; err != stop {
		t.Errorf("Follow: %v", err)
	}
	if !bytes.Equal(got, w.log) {
		t.Error("what was followed differs from the log")
	}
	w.mu.Lock()
	w.trunc = start + 16
	w.mu.Unlock()
	if err := c.Follow(testCtx(t), start, func([]*pb.SealedWAL, pg.LSN) error { return nil }); !errors.Is(err, ErrTruncated) {
		t.Errorf("Follow of what is gone: %v", err)
	}
}
