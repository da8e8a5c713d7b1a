package keyring

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/rpc"
	"github.com/holdfastdb/holdfast/internal/seal"
)

// fakeManager is a key manager in a struct. Its answers are set by the test.
type fakeManager struct {
	pb.KeyManagerClient
	kek *seal.KEK

	mu       sync.Mutex
	err      error // of every call
	ttl      time.Duration
	leases   map[string]bool
	asked    int // Lease calls
	calls    int // GenerateDEKs and UnwrapDEKs calls
	opened   int // keys in UnwrapDEKs
	onUnwrap func()
	key      string // that leases are said to be of; empty: none is said, as an old key manager does
	requests []*pb.LeaseRequest
	reports  []*pb.ShredReport // that came, whatever was answered
	lose     int               // reports that are taken and answered with an error
	streams  int               // Watch calls
	notices  chan *pb.KeyNotice
}

func newFake(t *testing.T) *fakeManager {
	t.Helper()
	kek, err := seal.NewKEK(bytes.Repeat([]byte{7}, seal.KeySize))
	if err != nil {
		t.Fatal(err)
	}
	return &fakeManager{kek: kek, ttl: time.Hour, leases: make(map[string]bool), notices: make(chan *pb.KeyNotice)}
}

func (f *fakeManager) set(fn func(*fakeManager)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	fn(f)
}

func (f *fakeManager) fail(err error) { f.set(func(f *fakeManager) { f.err = err }) }

var (
	revoked     = rpc.Error(codes.PermissionDenied, &pb.ErrorDetail{Reason: pb.ErrorDetail_KEY_REVOKED}, "the key is disabled")
	unreachable = rpc.Error(codes.Unavailable, nil, "no route")
)

func (f *fakeManager) Lease(_ context.Context, req *pb.LeaseRequest, _ ...grpc.CallOption) (*pb.LeaseResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.asked++
	f.requests = append(f.requests, req)
	if f.err != nil {
		return nil, f.err
	}
	id := req.LeaseId
	if !f.leases[id] {
		id = fmt.Sprint("lease", f.asked)
		f.leases[id] = true
	}
	return &pb.LeaseResponse{LeaseId: id, TtlMs: f.ttl.Milliseconds(), Key: f.key}, nil
}

// Watch gives a stream of f.notices; a nil one ends the stream with an error.
func (f *fakeManager) Watch(ctx context.Context, _ *pb.WatchRequest, _ ...grpc.CallOption) (grpc.ServerStreamingClient[pb.KeyNotice], error) {
	f.set(func(f *fakeManager) { f.streams++ })
	return &noticeStream{f: f, ctx: ctx}, nil
}

type noticeStream struct {
	grpc.ClientStream
	f   *fakeManager
	ctx context.Context
}

func (s *noticeStream) Recv() (*pb.KeyNotice, error) {
	select {
	case n := <-s.f.notices:
		if n == nil {
			return nil, unreachable
		}
		return n, nil
	case <-s.ctx.Done():
		return nil, s.ctx.Err()
	}
}

func (f *fakeManager) ReportShred(_ context.Context, r *pb.ShredReport, _ ...grpc.CallOption) (*pb.ReportShredResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.reports = append(f.reports, r)
	if f.lose > 0 {
		f.lose--
		return nil, unreachable
	}
	return &pb.ReportShredResponse{}, nil
}

func (f *fakeManager) use(id string) error {
	f.calls++
	if f.err != nil {
		return f.err
	}
	if !f.leases[id] {
		return rpc.Error(codes.FailedPrecondition, nil, "no such lease")
	}
	return nil
}

func contextOf(c *pb.DEKContext) seal.Context {
	return seal.Context{Purpose: seal.Purpose(c.Purpose), Project: c.Project, Branch: c.Branch, Object: c.Object}
}

func (f *fakeManager) GenerateDEKs(_ context.Context, req *pb.GenerateDEKsRequest, _ ...grpc.CallOption) (*pb.GenerateDEKsResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.use(req.LeaseId); err != nil {
		return nil, err
	}
	resp := &pb.GenerateDEKsResponse{}
	for i, c := range req.Contexts {
		raw := bytes.Repeat([]byte{byte(f.calls), byte(i)}, seal.KeySize/2)
		wrapped, err := f.kek.Wrap(1, contextOf(c), raw)
		if err != nil {
			return nil, err
		}
		resp.Deks = append(resp.Deks, &pb.DEK{Plaintext: raw, Wrapped: wrapped})
	}
	return resp, nil
}

func (f *fakeManager) UnwrapDEKs(_ context.Context, req *pb.UnwrapDEKsRequest, _ ...grpc.CallOption) (*pb.UnwrapDEKsResponse, error) {
	f.mu.Lock()
	hook := f.onUnwrap
	f.mu.Unlock()
	if hook != nil {
		hook()
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.use(req.LeaseId); err != nil {
		return nil, err
	}
	resp := &pb.UnwrapDEKsResponse{}
	for _, d := range req.Deks {
		raw, err := f.kek.Unwrap(contextOf(d.Context), d.Wrapped)
		if err != nil {
			return nil, rpc.Error(codes.DataLoss, nil, "%v", err)
		}
		f.opened++
		resp.Plaintexts = append(resp.Plaintexts, raw)
	}
	return resp, nil
}

func object(i int) seal.Context {
	return seal.Context{Purpose: seal.PurposeWAL, Project: "p", Branch: "b", Object: fmt.Sprint("o", i)}
}

func newRing(t *testing.T, f *fakeManager) Ring {
	r := New(f, "node")
	t.Cleanup(r.Close)
	return r
}

func mustGenerate(t *testing.T, r Ring, i int) (*seal.Key, []byte) {
	t.Helper()
	k, wrapped, err := r.Generate(t.Context(), object(i))
	if err != nil {
		t.Fatal(err)
	}
	return k, wrapped
}

func wiped(k *seal.Key) bool {
	_, err := seal.OpenWAL(nil, k, object(0), 1, 2, 3, make([]byte, 20))
	return errors.Is(err, seal.ErrWiped)
}

func TestGenerateAndOpen(t *testing.T) {
	f := newFake(t)
	r := newRing(t, f)
	k, wrapped := mustGenerate(t, r, 1)
	sealed, err := seal.SealWAL(nil, k, object(1), 1, 2, 0, []byte("wal"))
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		opened, err := r.Open(t.Context(), object(1), wrapped)
		if err != nil {
			t.Fatal(err)
		}
		if plain, err := seal.OpenWAL(nil, opened, object(1), 1, 2, 0, sealed); err != nil || string(plain) != "wal" {
			t.Errorf("opened %q, %v", plain, err)
		}
		if _, err := seal.SealWAL(nil, opened, object(1), 1, 2, 9, nil); err == nil {
			t.Error("an opened key seals: its counters may have been used")
		}
	}
	if f.opened != 1 || f.asked != 1 {
		t.Errorf("%d keys opened, %d leases asked for; want 1 and 1", f.opened, f.asked)
	}
	if _, err := r.Open(t.Context(), object(2), wrapped); err == nil {
		t.Error("a wrapped key opens for another object, after the ring opened it for its own")
	}
}

func TestDenialWipesAndTells(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	f.ttl = time.Second
	r := newRing(t, f)
	reasons := make(chan error, 10)
	r.OnShred("p", "b", func(err error) []string { reasons <- err; return nil })
	cancel := r.OnShred("p", "b", func(error) []string { t.Error("a cancelled function was called"); return nil })
	cancel()
	k, wrapped := mustGenerate(t, r, 1)
	opened, err := r.Open(t.Context(), object(1), wrapped)
	if err != nil {
		t.Fatal(err)
	}
	f.fail(revoked)
	if err := <-reasons; !errors.Is(err, ErrRevoked) {
		t.Errorf("reason %v, want ErrRevoked", err)
	}
	if !wiped(k) || !wiped(opened) {
		t.Error("a key outlived the lease")
	}
	if _, err := r.Open(t.Context(), object(1), wrapped); !errors.Is(err, ErrRevoked) {
		t.Errorf("Open: %v, want ErrRevoked", err)
	}
	if _, _, err := r.Generate(t.Context(), object(2)); !errors.Is(err, ErrRevoked) {
		t.Errorf("Generate: %v, want ErrRevoked", err)
	}
	// Enabled again, it all works by itself; the function was called once.
	f.fail(nil)
	if again, err := r.Open(t.Context(), object(1), wrapped); err != nil || wiped(again) {
		t.Errorf("after enabling: %v", err)
	}
	if len(reasons) != 0 {
		t.Error("the function was called again")
	}
}

func TestLeaseRunsOutWhenNobodyAnswers(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	f.ttl = 500 * time.Millisecond
	r := newRing(t, f)
	reasons := make(chan error, 1)
	r.OnShred("p", "b", func(err error) []string { reasons <- err; return nil })
	k, _ := mustGenerate(t, r, 1)
	f.fail(unreachable)
	if err := <-reasons; !errors.Is(err, ErrUnreachable) || errors.Is(err, ErrRevoked) {
		t.Errorf("reason %v, want ErrUnreachable", err)
	}
	if !wiped(k) {
		t.Error("the key outlived the lease")
	}
	if _, _, err := r.Generate(t.Context(), object(1)); !errors.Is(err, ErrUnreachable) {
		t.Errorf("Generate: %v, want ErrUnreachable", err)
	}
}

func TestRenewalKeepsKeysAlive(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	f.ttl = 1500 * time.Millisecond
	r := newRing(t, f)
	r.OnShred("p", "b", func(err error) []string { t.Errorf("shredded: %v", err); return nil })
	k, _ := mustGenerate(t, r, 1)
	for n := 0; n < 4; time.Sleep(time.Millisecond) {
		f.set(func(f *fakeManager) { n = f.asked })
	}
	if wiped(k) {
		t.Error("the key was wiped although the lease is renewed")
	}
	r.Close()
	if !wiped(k) {
		t.Error("the key outlived Close")
	}
}

func TestRestartedKeyManagerCostsNoKeys(t *testing.T) {
	f := newFake(t)
	r := newRing(t, f)
	r.OnShred("p", "b", func(err error) []string { t.Errorf("shredded: %v", err); return nil })
	k, wrapped := mustGenerate(t, r, 1)
	f.set(func(f *fakeManager) { clear(f.leases) })
	if _, err := r.Open(t.Context(), object(1), wrapped); err != nil {
		t.Errorf("Open under a lease that was forgotten: %v", err)
	}
	if wiped(k) {
		t.Error("the key was wiped")
	}
}

// TestLeaseThatEndsAgain: each new lease is gone again before the key is given out, as when
// a denial comes in between. That is no news of the key, and must not look like damage.
func TestLeaseThatEndsAgain(t *testing.T) {
	f := newFake(t)
	r := newRing(t, f)
	_, wrapped := mustGenerate(t, r, 1)
	f.set(func(f *fakeManager) {
		f.onUnwrap = func() { f.set(func(f *fakeManager) { clear(f.leases) }) }
	})
	if _, err := r.Open(t.Context(), object(1), wrapped); !errors.Is(err, ErrUnreachable) {
		t.Errorf("Open under leases that end: %v, want ErrUnreachable", err)
	}
	for _, code := range []codes.Code{codes.Internal, codes.Unknown, codes.ResourceExhausted} {
		f.fail(rpc.Error(code, nil, "a failure on the way"))
		if _, err := r.Open(t.Context(), object(1), wrapped); !errors.Is(err, ErrUnreachable) {
			t.Errorf("Open when the call fails with %v: %v, want ErrUnreachable", code, err)
		}
	}
}

// Only the key manager's word that a wrapped key does not open is damage: whoever passes over what
// is damaged would lose it for another refusal.
func TestOtherRefusalsAreNoDamage(t *testing.T) {
	f := newFake(t)
	r := newRing(t, f)
	_, wrapped := mustGenerate(t, r, 1)
	for _, code := range []codes.Code{codes.InvalidArgument, codes.NotFound, codes.PermissionDenied, codes.Unimplemented, codes.DataLoss} {
		f.fail(rpc.Error(code, nil, "a refusal"))
		_, err := r.Open(t.Context(), object(1), wrapped)
		if err == nil || errors.Is(err, seal.ErrDamaged) != (code == codes.DataLoss) {
			t.Errorf("Open when the call fails with %v: %v", code, err)
		}
	}
}

func TestConcurrentRequestsShareCalls(t *testing.T) {
	f := newFake(t)
	r := newRing(t, f)
	const n = 200
	var wrapped [n][]byte
	for i := range n {
		_, wrapped[i] = mustGenerate(t, r, i)
	}
	// The first call waits until all have asked.
	gate, entered := make(chan struct{}), make(chan struct{}, n)
	f.set(func(f *fakeManager) {
		f.calls = 0
		f.onUnwrap = func() { entered <- struct{}{}; <-gate }
	})
	var wg sync.WaitGroup
	open := func(i int) {
		wg.Go(func() {
			c, w, damaged := object(i), wrapped[i], i == 77
			if damaged {
				w = append(bytes.Clone(w[:len(w)-1]), w[len(w)-1]^1)
			}
			if _, err := r.Open(t.Context(), c, w); (err != nil) != damaged || damaged != errors.Is(err, seal.ErrDamaged) {
				t.Errorf("%d: %v", i, err)
			}
		})
	}
	open(0)
	<-entered // with this one alone
	for i := 1; i < n; i++ {
		open(i)
	}
	p, err := r.(*ring).scope("p", "b")
	if err != nil {
		t.Fatal(err)
	}
	for waiting := 0; waiting < n-1; time.Sleep(time.Millisecond) {
		p.open.mu.Lock()
		waiting = len(p.open.mu.waiting)
		p.open.mu.Unlock()
	}
	close(gate)
	wg.Wait()
	if f.opened < n-1 {
		t.Errorf("%d keys opened, want %d", f.opened, n-1)
	}
	// One for the first, one for the rest, which fails over the damaged one, then one each.
	if f.calls > n+2 {
		t.Errorf("%d calls for %d keys", f.calls, n)
	}
}

func TestCallerWhoGoesAwayLeavesNoKey(t *testing.T) {
	f := newFake(t)
	r := newRing(t, f)
	_, wrapped := mustGenerate(t, r, 1)
	gate, entered := make(chan struct{}), make(chan struct{}, 2)
	f.set(func(f *fakeManager) { f.onUnwrap = func() { entered <- struct{}{}; <-gate } })
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() {
		_, err := r.Open(ctx, object(1), wrapped)
		done <- err
	}()
	<-entered
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("Open = %v", err)
	}
	// The lease ends while the call is under way: its key is not let in.
	p, err := r.(*ring).scope("p", "b")
	if err != nil {
		t.Fatal(err)
	}
	p.end(p.currentTerm(), ErrRevoked)
	close(gate)
	for running := true; running; time.Sleep(time.Millisecond) {
		p.open.mu.Lock()
		running = p.open.mu.running
		p.open.mu.Unlock()
	}
	if p.cached(keyName(object(1), wrapped)) != nil {
		t.Error("a key was let in after its lease ended")
	}
}

func TestPushedOutKeysAreStillWiped(t *testing.T) {
	s := newKeySet()
	newKey := func() *seal.Key {
		k, err := seal.NewOpenKey(make([]byte, seal.KeySize))
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	first := newKey()
	s.put("first", first)
	for i := range maxCached + 10 {
		s.put(fmt.Sprint(i), newKey())
		if i%512 == 0 {
			runtime.GC()
		}
	}
	if s.get("first") != nil || s.recent.Len() != maxCached || len(s.byName) != maxCached {
		t.Errorf("the set holds %d keys, and the first: %v", s.recent.Len(), s.get("first") != nil)
	}
	last := s.get(fmt.Sprint(maxCached))
	s.wipe()
	if !wiped(first) || !wiped(last) {
		t.Error("a key in use was not wiped")
	}
}

func TestShreddedNodeMayCloseItsRing(t *testing.T) {
	f := newFake(t)
	f.ttl = 500 * time.Millisecond
	r := New(f, "node")
	closed := make(chan struct{})
	r.OnShred("p", "b", func(error) []string { r.Close(); close(closed); return nil })
	mustGenerate(t, r, 1)
	f.fail(revoked)
	<-closed
}

// Of an answer that cannot be right nothing stays in memory.
func TestBadAnswersLeaveNoKey(t *testing.T) {
	for _, bad := range []int{31, 0} { // bytes of the last key; 0: it is missing
		raws := [][]byte{bytes.Repeat([]byte{1}, seal.KeySize), bytes.Repeat([]byte{2}, seal.KeySize), bytes.Repeat([]byte{3}, bad)}
		if bad == 0 {
			raws = raws[:2]
		}
		var taken []*seal.Key
		_, err := newKeys(raws, 3, func(raw []byte) (*seal.Key, error) {
			k, err := seal.NewKey(raw)
			if k != nil {
				taken = append(taken, k)
			}
			return k, err
		})
		if err == nil {
			t.Errorf("a key of %d bytes: no error", bad)
		}
		for _, raw := range raws {
			if len(bytes.Trim(raw, "\x00")) > 0 {
				t.Error("a raw key is left")
			}
		}
		for _, k := range taken {
			if !wiped(k) {
				t.Error("a key is left")
			}
		}
	}
}

func TestClosedRing(t *testing.T) {
	r := New(newFake(t), "node")
	r.Close()
	r.Close()
	if _, _, err := r.Generate(t.Context(), object(1)); !errors.Is(err, ErrUnreachable) {
		t.Errorf("Generate: %v", err)
	}
	r.OnShred("p", "b", nil)()
	if _, err := r.Open(t.Context(), seal.Context{}, nil); err == nil {
		t.Error("an empty context was taken")
	}
}
