package rotation

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/blob"
	"github.com/holdfastdb/holdfast/internal/blob/dirblob"
	"github.com/holdfastdb/holdfast/internal/keyring"
	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/internal/rpc"
	"github.com/holdfastdb/holdfast/internal/seal"
	"github.com/holdfastdb/holdfast/keymgr"
	"github.com/holdfastdb/holdfast/keymgr/localkms"
	"github.com/holdfastdb/holdfast/pageserver/keyspace"
	"github.com/holdfastdb/holdfast/pageserver/timeline"
)

// meter is a bucket that counts what is read and written, by what it is.
type meter struct {
	blob.Store
	mu    sync.Mutex
	bytes map[string]int64 // "read layers", "written documents", …
}

func (m *meter) note(how, key string, n int) {
	what := "documents"
	if strings.Contains(key, "/layers/") {
		what = "layers"
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.bytes[how+" "+what] += int64(n)
}

func (m *meter) reset() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.bytes = make(map[string]int64)
}

func (m *meter) Get(ctx context.Context, key string) ([]byte, blob.ETag, error) {
	data, tag, err := m.Store.Get(ctx, key)
	m.note("read", key, len(data))
	return data, tag, err
}

func (m *meter) GetRange(ctx context.Context, key string, p []byte, off int64) (int, error) {
	n, err := m.Store.GetRange(ctx, key, p, off)
	m.note("read", key, n)
	return n, err
}

func (m *meter) Create(ctx context.Context, key string, r io.Reader, size int64) (blob.ETag, error) {
	m.note("written", key, int(size))
	return m.Store.Create(ctx, key, r, size)
}

func (m *meter) Swap(ctx context.Context, key string, data []byte, old blob.ETag) (blob.ETag, error) {
	m.note("written", key, len(data))
	return m.Store.Swap(ctx, key, data, old)
}

// countedKMS counts calls. The check interval of these tests is long: no call is a check's.
type countedKMS struct {
	keymgr.Provider
	wraps, unwraps atomic.Int64
}

func (k *countedKMS) Wrap(ctx context.Context, cmk string, ec keymgr.EncryptionContext, plain []byte) (keymgr.Wrapped, error) {
	k.wraps.Add(1)
	return k.Provider.Wrap(ctx, cmk, ec, plain)
}

func (k *countedKMS) Unwrap(ctx context.Context, cmk string, ec keymgr.EncryptionContext, w []byte) (keymgr.Unwrapped, error) {
	k.unwraps.Add(1)
	return k.Provider.Unwrap(ctx, cmk, ec, w)
}

func (k *countedKMS) take() (wraps, unwraps int64) { return k.wraps.Swap(0), k.unwraps.Swap(0) }

const (
	manyDEKs = 10_000
	realOnes = 10
	branch   = "b1"
)

// bench is a key manager, a node's ring to it and a page server's timeline over one metered bucket.
type bench struct {
	t      *testing.T
	store  *meter
	kms    *countedKMS
	keymgr *keymgr.Server
	ring   keyring.Ring
}

func newBench(t *testing.T) *bench {
	dir := t.TempDir()
	kms, err := localkms.Open(filepath.Join(dir, "kms.json"))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"dev", "other"} {
		if err := kms.Create(name); err != nil {
			t.Fatal(err)
		}
	}
	bucket, err := dirblob.Open(filepath.Join(dir, "bucket"))
	if err != nil {
		t.Fatal(err)
	}
	b := &bench{t: t, store: &meter{Store: bucket, bytes: make(map[string]int64)}, kms: &countedKMS{Provider: kms}}
	b.keymgr, err = keymgr.New(keymgr.Config{Dir: dir, BlobStore: b.store, Provider: b.kms, CheckInterval: time.Hour, LeaseTTL: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	g := rpc.NewServer()
	pb.RegisterKeyManagerServer(g, b.keymgr)
	addr := "unix:" + filepath.Join(dir, "run", "k")
	l, err := rpc.Listen(addr)
	if err != nil {
		t.Fatal(err)
	}
	go func() { _ = g.Serve(l) }() // ends with Stop
	conn, err := rpc.Dial(addr)
	if err != nil {
		t.Fatal(err)
	}
	client := pb.NewKeyManagerClient(conn)
	if _, err := client.CreateProject(t.Context(), &pb.CreateProjectRequest{Project: "p1", Cmk: "dev"}, grpc.WaitForReady(true)); err != nil {
		t.Fatal(err)
	}
	b.ring = keyring.New(client, "pageserver")
	t.Cleanup(func() { b.ring.Close(); conn.Close(); g.Stop(); b.keymgr.Close() })
	return b
}

func (b *bench) config() timeline.Config {
	return timeline.Config{Project: "p1", Branch: branch, Store: b.store, Ring: b.ring, Log: slog.New(slog.DiscardHandler), FlushAge: -1, CompactAfter: -1}
}

func (b *bench) open() *timeline.Timeline {
	b.t.Helper()
	tl, err := timeline.Open(b.t.Context(), b.config())
	if err != nil {
		b.t.Fatal(err)
	}
	return tl
}

const start = pg.LSN(0x1000000)

func pageKey(block int) keyspace.Key {
	return keyspace.RelPage(pg.RelTag{RelFileNode: pg.RelFileNode{Tablespace: 1663, Database: 5, Relation: 16384}}, pg.BlockNumber(block))
}

// fill makes a branch of realOnes layers, each of some MB.
func (b *bench) fill() {
	b.t.Helper()
	tl, err := timeline.Create(b.t.Context(), b.config(), start)
	if err != nil {
		b.t.Fatal(err)
	}
	defer tl.Close()
	page := make([]byte, pg.BlockSize)
	for i := range realOnes {
		var entries []timeline.Entry
		lsn := start + pg.LSN(8*(i+1))
		for block := range 100 {
			copy(page, fmt.Sprintf("layer %d block %d", i, block))
			entries = append(entries, timeline.Entry{Key: pageKey(1000*i + block), Value: timeline.Value{LSN: lsn, Kind: timeline.Image, Data: bytes.Clone(page)}})
		}
		if err := tl.Put(b.t.Context(), entries, lsn); err != nil {
			b.t.Fatal(err)
		}
		if err := tl.Flush(b.t.Context()); err != nil {
			b.t.Fatal(err)
		}
	}
}

// grow adds layers to the manifest, each with a DEK that the key manager made. Their files are not there:
// whoever asked for one would fail. Reads do not: these layers are of LSNs above all reads.
func (b *bench) grow(deks int) {
	b.t.Helper()
	name := "projects/p1/branches/" + branch + "/manifest"
	data, tag, err := b.store.Get(b.t.Context(), name)
	if err != nil {
		b.t.Fatal(err)
	}
	line, body, _ := bytes.Cut(data, []byte("\n"))
	var m map[string]any
	if err := json.Unmarshal(body, &m); err != nil {
		b.t.Fatal(err)
	}
	layers := m["layers"].([]any)
	model := layers[0].(map[string]any)
	added := make([]any, deks-len(layers))
	var wg sync.WaitGroup
	for w := range 64 {
		wg.Go(func() {
			for i := w; i < len(added); i += 64 {
				d := make(map[string]any)
				for k, v := range model {
					d[k] = v
				}
				object := fmt.Sprintf("projects/p1/branches/%s/layers/0000ffff-%08x-l0", branch, i)
				_, wrapped, err := b.ring.Generate(b.t.Context(), seal.Context{Purpose: seal.PurposeLayer, Project: "p1", Branch: branch, Object: object})
				if err != nil {
					b.t.Error(err)
					return
				}
				d["object"], d["wrapped_dek"], d["min_lsn"], d["max_lsn"] = object, wrapped, "FF/0", "FF/10"
				added[i] = d
			}
		})
	}
	wg.Wait()
	m["layers"] = append(layers, added...)
	if body, err = json.Marshal(m); err != nil {
		b.t.Fatal(err)
	}
	sum := sha256.Sum256(body)
	magic := line[:len(line)-hex.EncodedLen(len(sum))]
	data = append(append(append(bytes.Clone(magic), hex.EncodeToString(sum[:])...), '\n'), body...)
	if _, err := b.store.Swap(b.t.Context(), name, data, tag); err != nil {
		b.t.Fatal(err)
	}
}

func (b *bench) readAll(tl *timeline.Timeline) {
	b.t.Helper()
	for i := range realOnes {
		for block := range 100 {
			h, err := tl.Get(b.t.Context(), pageKey(1000*i+block), tl.LastLSN())
			if want := fmt.Sprintf("layer %d block %d", i, block); err != nil || h.Base == nil || !bytes.HasPrefix(h.Base.Data, []byte(want)) {
				b.t.Fatalf("%s: %v", want, err)
			}
		}
	}
}

// TestTenThousandDEKs measures what a change of the CMK and a rotation of the KEK cost a branch of 10,000
// layers: calls of the KMS for the KEKs alone, and no byte of a layer read or written.
func TestTenThousandDEKs(t *testing.T) {
	b := newBench(t)
	b.fill()
	b.grow(manyDEKs)
	tl := b.open()
	key := &pb.KeyRef{Project: "p1"}
	b.kms.take()
	b.store.reset()

	began := time.Now()
	if _, err := b.keymgr.Rewrap(t.Context(), &pb.RewrapRequest{Key: key, Cmk: "other"}); err != nil {
		t.Fatal(err)
	}
	wraps, unwraps := b.kms.take()
	t.Logf("SHOW: another CMK, 1 KEK, %d DEKs: %v; %d calls to wrap and %d to unwrap, one of each to try the CMK; bytes: %v",
		manyDEKs, time.Since(began).Round(time.Millisecond), wraps, unwraps, b.store.bytes)
	if wraps != 2 || unwraps != 2 {
		t.Errorf("%d wraps and %d unwraps of one KEK, want one of each, and one of each to try the CMK", wraps, unwraps)
	}
	b.wantNoLayers()

	b.store.reset()
	began = time.Now()
	if _, err := b.keymgr.RotateKEK(t.Context(), key); err != nil {
		t.Fatal(err)
	}
	done, err := tl.Rewrap(t.Context())
	if err != nil || done.DEKs != manyDEKs || done.KEKVersion != 2 {
		t.Fatalf("Rewrap: %+v, %v", done, err)
	}
	wraps, unwraps = b.kms.take()
	t.Logf("SHOW: a new KEK, %d DEKs: %v; %d calls to wrap and %d to unwrap; bytes: %v",
		manyDEKs, time.Since(began).Round(time.Millisecond), wraps, unwraps, b.store.bytes)
	if wraps != 1 || unwraps > 2 { // the new one is unwrapped to prove that it can be, the old one if it is not in memory
		t.Errorf("%d wraps and %d unwraps, want one wrap of the new KEK and at most one unwrap of each of two", wraps, unwraps)
	}
	b.wantNoLayers()

	if uses := fmt.Sprint(tl.KeyUse()); uses != fmt.Sprintf("map[2:%d]", manyDEKs) {
		t.Errorf("uses: %s", uses)
	}
	b.readAll(tl)
	if b.store.bytes["read layers"] == 0 {
		t.Error("reading pages reads no layers: the meter does not work")
	}
	if err := tl.Close(); err != nil {
		t.Fatal(err)
	}
	again := b.open()
	defer again.Close()
	b.readAll(again)
}

func (b *bench) wantNoLayers() {
	b.t.Helper()
	b.store.mu.Lock()
	defer b.store.mu.Unlock()
	for _, how := range []string{"read layers", "written layers"} {
		if n := b.store.bytes[how]; n != 0 {
			b.t.Errorf("%s: %d bytes", how, n)
		}
	}
	if b.store.bytes["written documents"] == 0 {
		b.t.Error("no document was written: the meter does not work")
	}
}
