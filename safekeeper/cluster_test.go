package safekeeper

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/blob"
	"github.com/holdfastdb/holdfast/internal/blob/dirblob"
	"github.com/holdfastdb/holdfast/internal/keyring"
	"github.com/holdfastdb/holdfast/internal/keyring/keyringtest"
	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/internal/rpc"
	"github.com/holdfastdb/holdfast/internal/seal"
	"github.com/holdfastdb/holdfast/internal/walclient"
	"github.com/holdfastdb/holdfast/internal/walrec"
	"github.com/holdfastdb/holdfast/safekeeper/walstore"
	"github.com/holdfastdb/holdfast/safekeeper/walstore/walstoretest"
)

const (
	project = "aa01"
	branch  = "bb01"
)

// cluster is three safekeepers over Unix sockets. Their disks are in memory (disks) or,
// if that is nil, folders.
type cluster struct {
	t     testing.TB
	dir   string
	ring  *keyringtest.Ring
	blob  blob.Store
	peers map[uint64]string
	disks map[uint64]*walstoretest.FS
	nodes map[uint64]*node
	cfg   Config // what all have in common
}

type node struct {
	srv *Server
	rpc *grpc.Server
}

func newCluster(t testing.TB, cfg Config, inMemory bool) *cluster {
	t.Helper()
	dir, err := os.MkdirTemp("", "sk") // t.TempDir is too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	c := &cluster{t: t, dir: dir, ring: keyringtest.New(), peers: map[uint64]string{}, nodes: map[uint64]*node{}, cfg: cfg}
	bucket := filepath.Join(dir, "bucket")
	if err := os.MkdirAll(bucket, 0o700); err != nil {
		t.Fatal(err)
	}
	if c.blob, err = dirblob.Open(bucket); err != nil {
		t.Fatal(err)
	}
	if inMemory {
		c.disks = map[uint64]*walstoretest.FS{}
	}
	for id := uint64(1); id <= 3; id++ {
		c.peers[id] = fmt.Sprintf("unix:%s/run/s%d", dir, id)
		if inMemory {
			c.disks[id] = walstoretest.New()
		}
	}
	t.Cleanup(func() {
		for id := range c.peers {
			c.stop(id)
		}
		c.ring.Close()
		os.RemoveAll(dir)
	})
	return c
}

func (c *cluster) startAll() {
	c.t.Helper()
	for id := range c.peers {
		c.start(id)
	}
	for id := range c.peers { // until then, a new cluster does not outlive a loss
		c.waitJoined(id)
	}
}

func (c *cluster) folder(id uint64) string { return filepath.Join(c.dir, fmt.Sprintf("node%d", id)) }

func (c *cluster) start(id uint64) {
	c.t.Helper()
	if err := c.tryStart(id); err != nil {
		c.t.Fatal(err)
	}
}

func (c *cluster) tryStart(id uint64) error {
	cfg := c.cfg
	cfg.NodeID, cfg.Dir, cfg.Peers, cfg.Ring, cfg.Blob = id, c.folder(id), c.peers, c.ring, c.blob
	if cfg.Tick == 0 {
		cfg.Tick = 15 * time.Millisecond
	}
	if testing.Verbose() {
		cfg.Logger = slog.New(slog.NewTextHandler(os.Stderr, nil)).With("node", id)
	}
	if c.disks != nil {
		cfg.Store.FS = c.disks[id]
	}
	srv, err := New(cfg)
	if err != nil {
		return err
	}
	l, err := rpc.Listen(c.peers[id])
	if err != nil {
		return err
	}
	n := &node{srv: srv, rpc: rpc.NewServer()}
	srv.Register(n.rpc)
	go n.rpc.Serve(l)
	c.nodes[id] = n
	return nil
}

func (c *cluster) stop(id uint64) {
	n := c.nodes[id]
	if n == nil {
		return
	}
	delete(c.nodes, id)
	n.rpc.Stop()
	n.srv.Close()
}

// kill stops a node as SIGKILL does, or, with a rng, as a power failure does.
func (c *cluster) kill(id uint64, rng *rand.Rand) {
	n := c.nodes[id]
	delete(c.nodes, id)
	if rng != nil {
		c.disks[id].Crash(rng)
	} else {
		c.disks[id].Kill()
	}
	n.rpc.Stop()
	n.srv.abort() // fails: its disk is gone
}

func (c *cluster) addrs() []string { return []string{c.peers[1], c.peers[2], c.peers[3]} }

func (c *cluster) client(branch string) *walclient.Client {
	c.t.Helper()
	cl, err := walclient.New(project, branch, c.addrs(), nil)
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() { cl.Close() })
	return cl
}

// leader waits until a node leads the branch's group.
func (c *cluster) leader(branch string) uint64 {
	c.t.Helper()
	for range 1000 {
		for id, n := range c.nodes {
			g, _ := n.srv.groupOf(nameOf(branch))
			if _, err := g.Leadership(); err == nil {
				return id
			}
		}
		time.Sleep(10 * time.Millisecond)
	}
	c.t.Fatal("no node leads")
	return 0
}

func (c *cluster) ctx() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	c.t.Cleanup(cancel)
	return ctx
}

const startLSN = pg.LSN(0x1000028)

// walMaker makes valid WAL.
type walMaker struct {
	at, prev pg.LSN
	all      []byte // all that was made, from start on
	start    pg.LSN
	n        int
}

func newWAL(at pg.LSN) *walMaker { return &walMaker{at: at, start: at} }

// record makes the next record, with size bytes of data.
func (w *walMaker) record(size int) (begin pg.LSN, wal []byte) {
	data := bytes.Repeat([]byte{byte(w.n)}, size)
	copy(data, fmt.Sprintf("record %d ", w.n))
	w.n++
	begin = w.at
	rec := walrec.Build(21, 0x10, 7, w.prev, data)
	wal, end := walrec.PlaceRecord(begin, rec, 42)
	w.prev = begin.SkipPageHeader()
	w.at = end
	w.all = append(w.all, wal...)
	return begin, wal
}

// appendSome appends n records and waits for the last.
func (c *cluster) appendSome(a *walclient.Appender, w *walMaker, n, size int) {
	c.t.Helper()
	for range n {
		begin, wal := w.record(size)
		if err := a.Send(begin, wal, false); err != nil {
			c.t.Fatal(err)
		}
	}
	if err := a.Wait(c.ctx(), w.at); err != nil {
		c.t.Fatalf("waiting for %s: %v", w.at, err)
	}
}

// open makes the branch, an epoch and an appender.
func (c *cluster) open(cl *walclient.Client) (walclient.Epoch, *walclient.Appender) {
	c.t.Helper()
	if err := cl.CreateBranch(c.ctx(), startLSN); err != nil {
		c.t.Fatal(err)
	}
	e, err := cl.OpenEpoch(c.ctx(), "test")
	if err != nil {
		c.t.Fatal(err)
	}
	a := cl.Append(e.Number, e.End)
	c.t.Cleanup(a.Close)
	return e, a
}

// read gives the plain WAL [from, until) as node id has it.
func (c *cluster) read(id uint64, branch string, from, until pg.LSN) ([]byte, error) {
	conn, err := rpc.Dial(c.peers[id])
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	s, err := pb.NewSafekeeperClient(conn).Read(c.ctx(), &pb.ReadRequest{Project: project, Branch: branch, FromLsn: uint64(from), UntilLsn: uint64(until)})
	if err != nil {
		return nil, err
	}
	var out []byte
	for at := from; at < until; {
		r, err := s.Recv()
		if err != nil {
			return out, err
		}
		for _, ch := range r.GetChunks() {
			plain, err := c.unseal(branch, ch)
			if err != nil {
				return out, err
			}
			if pg.LSN(ch.GetBeginLsn()) > at {
				return out, fmt.Errorf("chunk begins at %s, want %s", pg.LSN(ch.GetBeginLsn()), at)
			}
			out = append(out, plain[at-pg.LSN(ch.GetBeginLsn()):]...)
			at = pg.LSN(ch.GetEndLsn())
		}
	}
	return out, nil
}

func (c *cluster) unseal(branch string, ch *pb.SealedWAL) ([]byte, error) {
	sc := seal.Context{Purpose: seal.PurposeWAL, Project: project, Branch: branch, Object: ch.GetObject()}
	key, err := c.ring.Open(context.Background(), sc, ch.GetWrappedDek())
	if err != nil {
		return nil, err
	}
	return seal.OpenWAL(nil, key, sc, pg.LSN(ch.GetBeginLsn()), pg.LSN(ch.GetEndLsn()), ch.GetCounter(), ch.GetCiphertext())
}

// mustHold makes sure that every node that runs serves exactly what w made.
func (c *cluster) mustHold(branch string, w *walMaker) {
	c.t.Helper()
	c.mustHoldOn(branch, w, 0)
}

// mustHoldOn leaves one node out.
func (c *cluster) mustHoldOn(branch string, w *walMaker, but uint64) {
	c.t.Helper()
	for id := range c.nodes {
		if id == but {
			continue
		}
		got, err := c.readRetry(id, branch, w.start, w.at)
		// A replica that is behind may still have a former branch of the name, which was deleted.
		for range 500 {
			if err != nil || bytes.Equal(got, w.all) {
				break
			}
			time.Sleep(20 * time.Millisecond)
			got, err = c.readRetry(id, branch, w.start, w.at)
		}
		if err != nil {
			c.t.Fatalf("reading from node %d: %v", id, err)
		}
		if !bytes.Equal(got, w.all) {
			c.t.Fatalf("node %d: %d bytes read differ from the %d written", id, len(got), len(w.all))
		}
	}
}

// readRetry reads from a node that may still have to catch up.
func (c *cluster) readRetry(id uint64, branch string, from, until pg.LSN) (b []byte, err error) {
	for range 500 {
		b, err = c.read(id, branch, from, until)
		// A replica that was restarted may not know yet of commands that it had applied.
		if code := status.Code(err); code != codes.Unavailable && code != codes.NotFound && !errors.Is(err, keyring.ErrRetired) {
			return b, err
		}
		time.Sleep(20 * time.Millisecond)
	}
	return b, err
}

func small() Config {
	return Config{Store: walstore.Options{FileBytes: 64 << 10, CacheBytes: 16 << 10}, RetainBytes: 256 << 10, ArchiveBytes: 512 << 10}
}
