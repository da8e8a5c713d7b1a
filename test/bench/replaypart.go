package main

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"runtime/pprof"
	"strings"
	"sync"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/blob/dirblob"
	"github.com/holdfastdb/holdfast/internal/keyring"
	"github.com/holdfastdb/holdfast/internal/keyring/keyringtest"
	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/internal/seal"
	"github.com/holdfastdb/holdfast/pageserver"
)

// A part of a replay runs in a process of its own, so that its processor time, its heap and its
// GOMAXPROCS are its own: `bench replay-part NAME DIR PROFILE`. It prints its result.
const (
	replayPart = "replay-part"
	partIngest = "ingest"
	partRedo   = "redo"
)

func runReplayPart(ctx context.Context, name, dir, profile string) error {
	parts := map[string]func(context.Context, string, func() (func(), error)) (any, error){partIngest: ingestPart, partRedo: redoPart}
	part := parts[name]
	if part == nil {
		return fmt.Errorf("there is no part %q of a replay", name)
	}
	result, err := part(ctx, dir, func() (func(), error) { return startProfile(profile) })
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(result)
}

// startProfile profiles the processor's time until the function it gives is called; without
// a file it does nothing.
func startProfile(file string) (func(), error) {
	if file == "" {
		return func() {}, nil
	}
	f, err := os.Create(file)
	if err != nil {
		return nil, err
	}
	return func() { pprof.StopCPUProfile(); f.Close() }, pprof.StartCPUProfile(f)
}

// span is how much time went by since a beginning, in seconds.
type span struct{ Wall, CPU float64 }

// stopwatch begins now; what is garbage already is not what is measured.
func stopwatch() func() span {
	debug.FreeOSMemory()
	wall, cpu := time.Now(), cpuTime()
	return func() span { return span{time.Since(wall).Seconds(), cpuTime() - cpu} }
}

// cpuTime is the processor time of this process, in seconds.
func cpuTime() float64 {
	var u syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &u) // it cannot fail for this process
	return time.Duration(u.Utime.Nano() + u.Stime.Nano()).Seconds()
}

// ingestResult is what the page server took, from the first byte of WAL on.
type ingestResult struct {
	Bytes    int64
	Records  int
	Pages    int  // made at the end
	Ingested span // until all WAL can be read
	Flushed  span // until it is in sealed layers
	Built    span // until each touched page was made
}

func (r ingestResult) String() string {
	return fmt.Sprintf("%d MB, ingested in %.2fs, in layers after %.2fs, %d pages after %.2fs; %.2fs of a processor",
		r.Bytes/1e6, r.Ingested.Wall, r.Flushed.Wall, r.Pages, r.Built.Wall, r.Built.CPU)
}

const (
	replayProject = "p"
	replayBranch  = "b"
)

func ingestPart(ctx context.Context, dir string, profile func() (func(), error)) (any, error) {
	tmp, err := os.MkdirTemp(dir, "ingest-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(tmp)
	store, err := dirblob.Open(filepath.Join(tmp, "bucket"))
	if err != nil {
		return nil, err
	}
	ring := keyringtest.New()
	source := &sealedFile{path: filepath.Join(tmp, "wal")}
	srv, err := pageserver.New(pageserver.Config{Dir: filepath.Join(tmp, "pageserver"), Blob: store, Ring: ring, NodeID: "bench",
		Logger:    slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn})),
		NewSource: func(string, string) (pageserver.WALSource, error) { return source, nil },
		WaitLimit: time.Hour})
	if err != nil {
		return nil, err
	}
	start, err := importBase(ctx, srv, filepath.Join(dir, "base"))
	if err != nil {
		return nil, err
	}
	wal, err := readWAL(filepath.Join(dir, "made"), start)
	if err != nil {
		return nil, err
	}
	r := ingestResult{Bytes: int64(wal.end - wal.start), Records: len(wal.records)}
	if err := source.write(ctx, ring, wal); err != nil {
		return nil, err
	}
	pages, err := wal.touched()
	if err != nil {
		return nil, err
	}
	end := wal.end
	wal = nil // the heap is a page server's

	stop, err := profile()
	if err != nil {
		return nil, err
	}
	now := stopwatch()
	if _, err := srv.Attach(ctx, &pb.AttachRequest{Project: replayProject, Branch: replayBranch}); err != nil {
		return nil, err
	}
	at := &pb.ReadPoint{Project: replayProject, Branch: replayBranch, Lsn: uint64(end)}
	if _, err := srv.ListSLRU(ctx, &pb.ListSLRURequest{At: at, Slru: uint32(pg.CLog)}); err != nil { // it waits
		return nil, err
	}
	r.Ingested = now()
	if err := srv.Flush(ctx, replayProject, replayBranch); err != nil {
		return nil, err
	}
	r.Flushed = now()
	if r.Pages, err = buildAll(ctx, srv, at, pages); err != nil {
		return nil, err
	}
	r.Built = now()
	stop()
	return r, srv.Close()
}

// buildAll makes pages, on as many goroutines as there are processors. Relations that were
// dropped or cut have none.
func buildAll(ctx context.Context, srv *pageserver.Server, at *pb.ReadPoint, runs []pageRun) (int, error) {
	var mu sync.Mutex
	var errs []error
	total, next := 0, 0
	take := func(pages int, err error) (pageRun, bool) {
		mu.Lock()
		defer mu.Unlock()
		total += pages
		if err != nil {
			errs = append(errs, err)
		}
		if next == len(runs) || len(errs) > 0 {
			return pageRun{}, false
		}
		next++
		return runs[next-1], true
	}
	var wg sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		wg.Go(func() {
			for r, ok := take(0, nil); ok; {
				pages, err := r.get(ctx, srv, at)
				r, ok = take(pages, err)
			}
		})
	}
	wg.Wait()
	return total, errors.Join(errs...)
}

// importBase makes the branch from a data directory.
func importBase(ctx context.Context, srv *pageserver.Server, dir string) (pg.LSN, error) {
	s := &importStream{ctx: ctx}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		rel, err := filepath.Rel(dir, path)
		if err != nil || strings.HasPrefix(rel, "pg_wal/") {
			return err
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		const most = 1 << 20
		for off := 0; off == 0 || off < len(data); off += most {
			s.add(&pb.ImportRequest{Path: rel, Offset: uint64(off), Data: data[off:min(off+most, len(data))]})
		}
		return nil
	})
	if err != nil {
		return 0, err
	}
	s.add(&pb.ImportRequest{Last: true})
	err = srv.Import(s)
	return s.lsn, err
}

// importStream is the call of an import without a network.
type importStream struct {
	grpc.ServerStream
	ctx      context.Context
	requests []*pb.ImportRequest
	lsn      pg.LSN
}

func (s *importStream) add(r *pb.ImportRequest) {
	r.Project, r.Branch = replayProject, replayBranch
	s.requests = append(s.requests, r)
}

func (s *importStream) Context() context.Context { return s.ctx }

func (s *importStream) Recv() (*pb.ImportRequest, error) {
	if len(s.requests) == 0 {
		return nil, io.EOF
	}
	r := s.requests[0]
	s.requests = s.requests[1:]
	return r, nil
}

func (s *importStream) SendAndClose(r *pb.ImportResponse) error {
	s.lsn = pg.LSN(r.Lsn)
	return nil
}

// sealedFile is a committed log in a file: messages as a safekeeper sends them, each after its
// length.
type sealedFile struct{ path string }

const (
	chunkBytes   = 64 << 10 // about what an endpoint under load has flushed at a time
	messageBytes = 1 << 20  // what a safekeeper sends at a time
)

// write seals the log. A segment has a key of its own.
func (s *sealedFile) write(ctx context.Context, ring keyring.Ring, w *walRange) (err error) {
	f, err := os.Create(s.path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	out := bufio.NewWriterSize(f, 1<<20)
	var key *seal.Key
	var sc seal.Context
	message := &pb.ReadResponse{CommittedLsn: uint64(w.end)}
	size, counter := 0, uint64(0)
	var wrapped []byte
	send := func() error {
		data, err := proto.Marshal(message)
		if err != nil {
			return err
		}
		message.Chunks, size = nil, 0
		if _, err := out.Write(binary.LittleEndian.AppendUint32(nil, uint32(len(data)))); err != nil {
			return err
		}
		_, err = out.Write(data)
		return err
	}
	err = w.chunks(func(begin, end pg.LSN, plain []byte) error {
		object := pg.WALFileName(begin)
		if object != sc.Object {
			sc = seal.Context{Purpose: seal.PurposeWAL, Project: replayProject, Branch: replayBranch, Object: object}
			if key, wrapped, err = ring.Generate(ctx, sc); err != nil {
				return err
			}
		}
		counter++
		sealed, err := seal.SealWAL(nil, key, sc, begin, end, counter, plain)
		if err != nil {
			return err
		}
		message.Chunks = append(message.Chunks, &pb.SealedWAL{BeginLsn: uint64(begin), EndLsn: uint64(end), Object: object, Epoch: 1,
			WrappedDek: wrapped, Counter: counter, Ciphertext: sealed})
		if size += len(sealed); size < messageBytes {
			return nil
		}
		return send()
	})
	return errors.Join(err, send(), out.Flush())
}

// Follow gives the whole log, and then waits.
func (s *sealedFile) Follow(ctx context.Context, from pg.LSN, fn func([]*pb.SealedWAL, pg.LSN) error) error {
	f, err := os.Open(s.path)
	if err != nil {
		return err
	}
	defer f.Close()
	in := bufio.NewReader(f)
	for {
		var head [4]byte
		if _, err := io.ReadFull(in, head[:]); err == io.EOF {
			break
		} else if err != nil {
			return err
		}
		data := make([]byte, binary.LittleEndian.Uint32(head[:]))
		if _, err := io.ReadFull(in, data); err != nil {
			return err
		}
		var m pb.ReadResponse
		if err := proto.Unmarshal(data, &m); err != nil {
			return err
		}
		if err := fn(m.Chunks, pg.LSN(m.CommittedLsn)); err != nil {
			return err
		}
	}
	<-ctx.Done()
	return ctx.Err()
}

// ReportDurable implements pageserver.WALSource: nothing is deleted.
func (s *sealedFile) ReportDurable(context.Context, pg.LSN) error { return nil }

// Close implements pageserver.WALSource.
func (s *sealedFile) Close() error { return nil }

var _ pageserver.WALSource = (*sealedFile)(nil)
