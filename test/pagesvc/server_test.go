package pagesvc

import (
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/blob"
	"github.com/holdfastdb/holdfast/internal/blob/dirblob"
	"github.com/holdfastdb/holdfast/internal/keyring/keyringtest"
	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/internal/rpc"
	"github.com/holdfastdb/holdfast/pageserver"
	"github.com/holdfastdb/holdfast/pageserver/timeline"
)

const (
	project = "p1"
	branch  = "b1"
)

// world is a page server and what it depends on. The page server may be ended and begun again.
type world struct {
	t      testing.TB
	dir    string
	store  blob.Store
	ring   *keyringtest.Ring
	log    *wal
	config pageserver.Config

	server *pageserver.Server
	grpc   *grpc.Server
	conn   *grpc.ClientConn
	client pb.PageServerClient
}

func newWorld(t testing.TB, dir string) *world {
	t.Helper()
	if err := os.MkdirAll(filepath.Join(dir, "bucket"), 0o700); err != nil {
		t.Fatal(err)
	}
	store, err := dirblob.Open(filepath.Join(dir, "bucket"))
	if err != nil {
		t.Fatal(err)
	}
	w := &world{t: t, dir: dir, store: store, ring: keyringtest.New()}
	w.log = newWAL(w.ring, 0)
	w.config = pageserver.Config{Dir: filepath.Join(dir, "pageserver"), Blob: store, Ring: w.ring, NodeID: "test",
		Logger:    slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelWarn})),
		NewSource: func(string, string) (pageserver.WALSource, error) { return source{w.log}, nil },
		WaitLimit: 60 * time.Second}
	w.begin()
	t.Cleanup(w.end)
	return w
}

func (w *world) begin() {
	w.t.Helper()
	var err error
	if w.server, err = pageserver.New(w.config); err != nil {
		w.t.Fatal(err)
	}
	addr := "unix:" + filepath.Join(w.dir, "s", "ps")
	l, err := rpc.Listen(addr)
	if err != nil {
		w.t.Fatal(err)
	}
	w.grpc = rpc.NewServer()
	w.server.Register(w.grpc)
	go w.grpc.Serve(l)
	if w.conn, err = rpc.Dial(addr); err != nil {
		w.t.Fatal(err)
	}
	w.client = pb.NewPageServerClient(w.conn)
}

// end ends the page server as a crash does: nothing is flushed. Twice is no harm.
func (w *world) end() {
	if w.server == nil {
		return
	}
	w.conn.Close()
	w.grpc.Stop()
	if err := w.server.Close(); err != nil {
		w.t.Error(err)
	}
	w.server = nil
}

// restart ends the page server, deletes what it has locally, and begins it again.
func (w *world) restart() {
	w.t.Helper()
	w.end()
	if err := os.RemoveAll(w.config.Dir); err != nil {
		w.t.Fatal(err)
	}
	w.begin()
	w.attach()
}

func (w *world) attach() {
	w.t.Helper()
	if _, err := w.client.Attach(w.t.Context(), &pb.AttachRequest{Project: project, Branch: branch}); err != nil {
		w.t.Fatal(err)
	}
}

// importDir imports a data directory and gives the branch's first LSN.
func (w *world) importDir(dir string) (pg.LSN, error) {
	stream, err := w.client.Import(w.t.Context())
	if err != nil {
		return 0, err
	}
	send := func(r *pb.ImportRequest) error {
		r.Project, r.Branch = project, branch
		return stream.Send(r)
	}
	err = filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		rel, err := filepath.Rel(dir, p)
		if err != nil || strings.HasPrefix(rel, "pg_wal/") {
			return err
		}
		data, err := os.ReadFile(p)
		if err != nil {
			return err
		}
		for off := 0; off == 0 || off < len(data); off += 1 << 20 {
			r := &pb.ImportRequest{Path: rel, Offset: uint64(off), Data: data[off:min(off+1<<20, len(data))]}
			if err := send(r); err != nil {
				return err
			}
		}
		return nil
	})
	if err == nil {
		err = send(&pb.ImportRequest{Last: true})
	}
	resp, recvErr := stream.CloseAndRecv()
	if recvErr != nil { // says more than the error of a Send
		return 0, recvErr
	}
	return pg.LSN(resp.Lsn), err
}

func (w *world) point(lsn pg.LSN, latest bool) *pb.ReadPoint {
	return &pb.ReadPoint{Project: project, Branch: branch, Lsn: uint64(lsn), Latest: latest}
}

// wait waits until the WAL up to lsn is ingested.
func (w *world) wait(lsn pg.LSN) {
	w.t.Helper()
	_, err := w.client.ListSLRU(w.t.Context(), &pb.ListSLRURequest{At: w.point(lsn, true), Slru: uint32(pg.CLog)})
	if err != nil {
		w.t.Fatal(err)
	}
}

// withTimeline makes the layers small, so that a short test flushes and compacts.
func (w *world) withTimeline(cfg timeline.Config) { w.config.Timeline = cfg }
