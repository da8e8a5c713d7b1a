package pageclient

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	"github.com/holdfastdb/holdfast/compute/pgfs"
	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/internal/rpc"
)

// server is a page server with one relation of 300 blocks, each filled with its number, that
// fails as it is told to.
type server struct {
	pb.UnimplementedPageServerServer
	mu       sync.Mutex
	errs     []error // of the next calls, in order
	attached bool
	calls    int
	last     *pb.ReadPoint
	behind   bool // answers as of an LSN before the one asked for
}

const relBlocks = 300

func (s *server) next() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.calls++
	if !s.attached {
		return rpc.Error(codes.NotFound, nil, "branch b is not served here")
	}
	if len(s.errs) == 0 {
		return nil
	}
	err := s.errs[0]
	s.errs = s.errs[1:]
	return err
}

func (s *server) Attach(context.Context, *pb.AttachRequest) (*pb.AttachResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.attached = true
	return &pb.AttachResponse{}, nil
}

func (s *server) GetPages(_ context.Context, r *pb.GetPagesRequest) (*pb.GetPagesResponse, error) {
	if err := s.next(); err != nil {
		return nil, err
	}
	if r.Count == 0 || r.Count > 128 {
		return nil, rpc.Error(codes.InvalidArgument, nil, "count %d", r.Count)
	}
	s.last = r.At
	resp := &pb.GetPagesResponse{Lsn: r.At.Lsn}
	if s.behind {
		resp.Lsn--
	}
	for b := r.Block; b < min(r.Block+r.Count, relBlocks); b++ {
		resp.Pages = append(resp.Pages, bytes.Repeat([]byte{byte(b)}, pg.BlockSize)...)
	}
	return resp, nil
}

func (s *server) ListRelations(_ context.Context, r *pb.ListRelationsRequest) (*pb.ListRelationsResponse, error) {
	if !r.At.Latest { // the start may be older than the history that is kept
		return nil, rpc.Error(codes.FailedPrecondition, nil, "the LSN is older than the history that is kept")
	}
	return &pb.ListRelationsResponse{Relations: []*pb.RelationSize{{Relation: 1259, Fork: 1, Blocks: 3}}, Lsn: r.At.Lsn}, s.next()
}

// serve runs s at a socket until the returned function is called.
func serve(t *testing.T, addr string, s *server) (stop func()) {
	l, err := rpc.Listen(addr)
	if err != nil {
		t.Fatal(err)
	}
	g := grpc.NewServer()
	pb.RegisterPageServerServer(g, s)
	done := make(chan struct{})
	go func() { _ = g.Serve(l); close(done) }()
	return func() { g.Stop(); <-done }
}

func client(t *testing.T, addr string) *Client {
	conn, err := rpc.Dial(addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return New(conn, "p", "b", slog.New(slog.NewTextHandler(io.Discard, nil)))
}

var rel = pg.RelTag{RelFileNode: pg.RelFileNode{Tablespace: 1663, Database: 5, Relation: 1259}}

func TestPages(t *testing.T) {
	addr := "unix:" + filepath.Join(t.TempDir(), "run", "ps")
	s := &server{}
	defer serve(t, addr, s)()
	r := client(t, addr).At(100, 7)
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	pages, err := r.Pages(ctx, rel, 10, 280, 200) // more than one call may ask for, and ending in the middle
	if err != nil {
		t.Fatal(err)
	}
	if len(pages) != 280*pg.BlockSize || pages[0] != 10 || pages[len(pages)-1] != 289-256 {
		t.Fatalf("%d bytes", len(pages))
	}
	if pages, err = r.Pages(ctx, rel, 290, 50, 200); err != nil || len(pages) != 10*pg.BlockSize {
		t.Fatalf("%d bytes, %v", len(pages), err)
	}
	sizes, err := r.Relations(ctx, 1663, 5)
	want := []pgfs.RelationSize{{Rel: pg.RelTag{RelFileNode: rel.RelFileNode, Fork: pg.FSMFork}, Blocks: 3}}
	if diff := cmp.Diff(want, sizes); diff != "" || err != nil {
		t.Fatal(diff, err)
	}
	s.behind = true
	if _, err = r.Pages(ctx, rel, 0, 1, 200); err == nil {
		t.Fatal("pages as of an older LSN were accepted")
	}
}

// TestPagesAt: the LSN is meant exactly, and what is forgotten is told apart.
func TestPagesAt(t *testing.T) {
	addr := "unix:" + filepath.Join(t.TempDir(), "run", "ps")
	s := &server{attached: true}
	defer serve(t, addr, s)()
	r := client(t, addr).At(100, 7)
	pages, err := r.PagesAt(t.Context(), rel, 299, 2, 200)
	if err != nil || len(pages) != pg.BlockSize || s.last.Latest || s.last.Lsn != 200 || s.last.Epoch != 7 {
		t.Fatalf("%d bytes, %v, asked at %v", len(pages), err, s.last)
	}
	for _, c := range []struct {
		err error
		old bool
	}{{rpc.Error(codes.FailedPrecondition, &pb.ErrorDetail{Reason: pb.ErrorDetail_TRUNCATED}, "too old"), true}, {rpc.Error(codes.DataLoss, nil, "layer x"), false}} {
		s.errs = []error{c.err}
		if _, err := r.PagesAt(t.Context(), rel, 0, 1, 200); err == nil || errors.Is(err, pgfs.ErrTooOld) != c.old {
			t.Errorf("after %v: %v", c.err, err)
		}
	}
}

// TestRetries: what passes is waited for, what does not is an error at once.
func TestRetries(t *testing.T) {
	addr := "unix:" + filepath.Join(t.TempDir(), "run", "ps")
	s := &server{}
	stop := serve(t, addr, s)
	r := client(t, addr).At(100, 7)
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	detail := func(code codes.Code, reason pb.ErrorDetail_Reason) error {
		return rpc.Error(code, &pb.ErrorDetail{Reason: reason}, "for the test")
	}
	s.errs = []error{rpc.Error(codes.Unavailable, nil, "starting"), rpc.Error(codes.Internal, nil, "?"),
		detail(codes.PermissionDenied, pb.ErrorDetail_KEY_REVOKED), detail(codes.Unavailable, pb.ErrorDetail_KEY_UNREACHABLE)}
	if _, err := r.Pages(ctx, rel, 0, 1, 200); err != nil {
		t.Fatal(err)
	}
	for _, err := range []error{detail(codes.FailedPrecondition, pb.ErrorDetail_UNSUPPORTED_RECORD), rpc.Error(codes.DataLoss, nil, "layer x"),
		rpc.Error(codes.InvalidArgument, nil, "?")} {
		s.errs = []error{err}
		s.calls = 0
		_, got := r.Pages(ctx, rel, 7, 1, 200)
		if got == nil || s.calls != 1 || !strings.Contains(got.Error(), "1663/5/1259.main, blocks 7 to 7, at 0/C8") {
			t.Errorf("after %v: %d calls, error %v", err, s.calls, got)
		}
	}
	// The server goes away in the middle and comes back, knowing no branch.
	stop()
	result := make(chan error)
	go func() {
		_, err := r.Pages(ctx, rel, 0, 1, 200)
		result <- err
	}()
	s.attached = false
	stop = serve(t, addr, s)
	if err := <-result; err != nil {
		t.Errorf("across a restart: %v", err)
	}
	stop()
	ended, cancelNow := context.WithCancel(ctx)
	cancelNow()
	if _, err := r.Pages(ended, rel, 0, 1, 200); err == nil {
		t.Error("no error although the context ended")
	}
}
