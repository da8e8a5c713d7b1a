package safekeeper

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/blob"
	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/internal/rpc"
	"github.com/holdfastdb/holdfast/internal/walclient"
	"github.com/holdfastdb/holdfast/internal/walrec"
	"github.com/holdfastdb/holdfast/safekeeper/walstate"
)

func nameOf(branch string) walstate.Name { return walstate.Name{Project: project, Branch: branch} }

// begin starts a cluster with some WAL in it.
func begin(t *testing.T, inMemory bool) (*cluster, *walclient.Client, *walclient.Appender, *walMaker) {
	c := newCluster(t, small(), inMemory)
	c.startAll()
	cl := c.client(branch)
	_, a := c.open(cl)
	w := newWAL(startLSN)
	c.appendSome(a, w, 50, 300)
	return c, cl, a, w
}

func TestAppendAndRead(t *testing.T) {
	t.Parallel()
	c, cl, a, w := begin(t, false)
	c.appendSome(a, w, 3, 20000) // across pages
	c.mustHold(branch, w)
	if err := cl.CreateBranch(c.ctx(), startLSN); err != nil {
		t.Errorf("CreateBranch again: %v", err)
	}
	if err := cl.CreateBranch(c.ctx(), startLSN+8); status.Code(errors.Unwrap(err)) != codes.AlreadyExists {
		t.Errorf("CreateBranch elsewhere: %v, want AlreadyExists", err)
	}
	// From the middle of a chunk, the chunk comes as a whole.
	err := cl.Follow(c.ctx(), startLSN+400, func(chunks []*pb.SealedWAL, committed pg.LSN) error {
		if pg.LSN(chunks[0].GetBeginLsn()) > startLSN+400 || committed != w.at {
			t.Errorf("chunk from %s, committed %s", pg.LSN(chunks[0].GetBeginLsn()), committed)
		}
		return context.Canceled
	})
	if err != context.Canceled {
		t.Errorf("Follow: %v, want fn's error", err)
	}
	other := c.client("bb02") // most likely in another group
	_, b := c.open(other)
	w2 := newWAL(startLSN)
	c.appendSome(b, w2, 10, 100)
	c.mustHold("bb02", w2)
}

func TestSwitchRecord(t *testing.T) {
	t.Parallel()
	c, _, a, w := begin(t, false)
	wal, end := walrec.PlaceRecord(w.at, walrec.Build(0, 0x40, 0, w.prev, nil), 42)
	if err := a.Send(w.at, wal, false); err != nil {
		t.Fatal(err)
	}
	w.prev = w.at
	w.all = append(w.all, wal...)
	w.at = (end + pg.WALSegmentSize - 1).SegmentStart()
	c.appendSome(a, w, 5, 100)
	c.mustHold(branch, w)
}

func TestFailover(t *testing.T) {
	t.Parallel()
	c, _, a, w := begin(t, true)
	for round := range 3 {
		lead := c.leader(branch)
		for range 20 { // on its way when the leader dies
			at, wal := w.record(300)
			if err := a.Send(at, wal, false); err != nil {
				t.Fatal(err)
			}
		}
		var rng *rand.Rand // SIGKILL
		if round == 1 {
			rng = rand.New(rand.NewPCG(1, 2)) // power failure
		}
		c.kill(lead, rng)
		c.appendSome(a, w, 20, 300)
		c.mustHold(branch, w)
		c.start(lead)
		c.appendSome(a, w, 20, 300)
		c.mustHold(branch, w)
	}
}

func TestAllLosePower(t *testing.T) {
	t.Parallel()
	c, _, a, w := begin(t, true)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	for range 3 {
		for id := range c.peers {
			c.kill(id, rng)
		}
		c.startAll()
		c.appendSome(a, w, 30, 300)
		c.mustHold(branch, w)
	}
}

func TestLostDirectory(t *testing.T) {
	t.Parallel()
	c, _, a, w := begin(t, false)
	for id := uint64(1); id <= 3; id++ {
		c.stop(id)
		if err := os.RemoveAll(c.folder(id)); err != nil {
			t.Fatal(err)
		}
		c.start(id)
		c.appendSome(a, w, 20, 300)
		c.waitJoined(id)
		c.mustHold(branch, w)
	}
	// What was rebuilt counts: with any one of the others gone, nothing is missing.
	for id := uint64(1); id <= 3; id++ {
		c.stop(id)
		c.appendSome(a, w, 5, 300)
		c.mustHold(branch, w)
		c.start(id)
	}
}

func (c *cluster) waitJoined(id uint64) {
	c.t.Helper()
	for range 3000 {
		joined := true
		for _, g := range c.nodes[id].srv.groups {
			joined = joined && g.Status().Joined
		}
		if joined {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	c.t.Fatalf("node %d does not join", id)
}

func TestTwoLostDirectoriesAreNotGuessed(t *testing.T) {
	t.Parallel()
	c, _, _, w := begin(t, false)
	for id := uint64(1); id <= 3; id++ {
		c.stop(id)
	}
	for id := uint64(1); id <= 2; id++ {
		if err := os.RemoveAll(c.folder(id)); err != nil {
			t.Fatal(err)
		}
	}
	for id := range c.peers {
		c.start(id)
	}
	time.Sleep(time.Second) // long enough for an election, if there could be one
	for id, n := range c.nodes {
		g, _ := n.srv.groupOf(nameOf(branch))
		if _, err := g.Leadership(); err == nil {
			t.Errorf("node %d leads, after two of three disks were lost, and %s with them", id, w.at)
		}
	}
}

func TestFencing(t *testing.T) {
	t.Parallel()
	c, cl, a, w := begin(t, false)
	at, wal := w.record(100)
	e, err := cl.OpenEpoch(c.ctx(), "second")
	if err != nil {
		t.Fatal(err)
	}
	if e.Number != 2 || e.End != at {
		t.Errorf("second epoch %+v, want number 2 at %s", e, at)
	}
	b := cl.Append(e.Number, e.End)
	defer b.Close()
	_ = a.Send(at, wal, false) // it may have heard already
	if err := a.Wait(c.ctx(), w.at); !errors.Is(err, walclient.ErrFenced) {
		t.Errorf("the fenced appender: %v", err)
	}
	<-a.Done()
	if err := b.Send(at, wal, false); err != nil {
		t.Fatal(err)
	}
	c.appendSome(b, w, 10, 100)
	c.mustHold(branch, w)
}

// raw sends one request on a stream of its own and gives the error that ends it, or nil when
// it is committed up to commit.
func (c *cluster) raw(epoch uint64, at pg.LSN, wal []byte, commit pg.LSN) error {
	return c.rawRequest(&pb.AppendRequest{Project: project, Branch: branch, Epoch: epoch, BeginLsn: uint64(at), Wal: wal}, commit)
}

func (c *cluster) rawRequest(req *pb.AppendRequest, commit pg.LSN) error {
	conn, err := rpc.Dial(c.peers[c.leader(branch)])
	if err != nil {
		return err
	}
	defer conn.Close()
	s, err := pb.NewSafekeeperClient(conn).Append(c.ctx())
	if err != nil {
		return err
	}
	if err := s.Send(req); err != nil {
		return err
	}
	for {
		r, err := s.Recv()
		if err != nil {
			return err
		}
		if commit != 0 && pg.LSN(r.GetCommittedLsn()) >= commit {
			return nil
		}
	}
}

func TestBadAppends(t *testing.T) {
	t.Parallel()
	c, _, a, w := begin(t, false)
	a.Close()
	at, wal := w.record(100)
	damaged := bytes.Clone(wal)
	damaged[40] ^= 1
	for _, test := range []struct {
		name   string
		epoch  uint64
		at     pg.LSN
		wal    []byte
		reason pb.ErrorDetail_Reason
	}{
		{"gap", 1, at + 8, wal, pb.ErrorDetail_GAP},
		{"flipped bit", 1, at, damaged, pb.ErrorDetail_BAD_WAL},
		{"half a record", 1, at, wal[:64], pb.ErrorDetail_BAD_WAL},
		{"not WAL", 1, at, bytes.Repeat([]byte{7}, 100), pb.ErrorDetail_BAD_WAL},
		{"epoch that was not opened", 9, at, wal, pb.ErrorDetail_UNSPECIFIED},
	} {
		err := c.raw(test.epoch, test.at, test.wal, 0)
		if err == nil || rpc.Reason(err) != test.reason || !strings.Contains(err.Error(), branch) {
			t.Errorf("%s: %v, want %v", test.name, err, test.reason)
		}
		if d := rpc.Detail(err); test.reason == pb.ErrorDetail_GAP && pg.LSN(d.GetEndLsn()) != at {
			t.Errorf("GAP tells %s, the log ends at %s", pg.LSN(d.GetEndLsn()), at)
		}
	}
	// The log goes on after all that, and takes again what it has.
	for _, from := range []pg.LSN{startLSN, at} {
		if err := c.raw(1, from, w.all[from-startLSN:], w.at); err != nil {
			t.Errorf("appending again from %s: %v", from, err)
		}
	}
	c.mustHold(branch, w)
}

func TestFlippedBit(t *testing.T) {
	t.Parallel()
	c, _, a, w := begin(t, true)
	const id = 2
	dir := ""
	g, _ := c.nodes[id].srv.groupOf(nameOf(branch))
	for i, x := range c.nodes[id].srv.groups {
		if x == g {
			dir = filepath.Join(c.folder(id), fmt.Sprintf("group%d", i))
		}
	}
	c.mustHold(branch, w)
	c.stop(id)
	log := c.disks[id].Names(dir)[0]
	data := c.disks[id].Data(log)
	used := bytes.LastIndexFunc(data, func(r rune) bool { return r != 0 })
	for _, off := range []int{24, 70, used / 2, used - 100} {
		c.disks[id].Flip(log, int64(off))
		err := c.tryStart(id)
		if err == nil || !strings.Contains(err.Error(), log) || !strings.Contains(err.Error(), "offset") || !strings.Contains(err.Error(), "delete") {
			t.Fatalf("bit flipped at %d of %d: %v", off, used, err)
		}
		c.disks[id].Flip(log, int64(off)) // and back
	}
	c.disks[id].Flip(log, int64(used/2))
	c.disks[id].RemoveAll(dir)
	c.start(id)
	c.appendSome(a, w, 10, 300)
	c.waitJoined(id)
	c.mustHold(branch, w)
}

func TestFullDisk(t *testing.T) {
	t.Parallel()
	c, _, a, w := begin(t, true)
	lead := c.leader(branch)
	c.disks[lead].SetFree(0)
	c.appendSome(a, w, 500, 300) // more than what was allocated ahead
	c.mustHoldOn(branch, w, lead)
	for _, d := range c.disks {
		d.SetFree(0)
	}
	for range 1500 {
		at, wal := w.record(300)
		if err := a.Send(at, wal, false); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithTimeout(c.ctx(), 300*time.Millisecond)
	defer cancel()
	if err := a.Wait(ctx, w.at); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("with all disks full, Wait: %v", err)
	}
	for _, d := range c.disks {
		d.SetFree(-1)
	}
	c.appendSome(a, w, 10, 300)
	c.mustHold(branch, w)
}

func TestArchiveAndTruncation(t *testing.T) {
	t.Parallel()
	c, cl, a, w := begin(t, false)
	for range 8 { // 2.4 MB: far more than a log may keep
		c.appendSome(a, w, 300, 1000)
	}
	keys := c.waitArchived(1)
	c.mustHold(branch, w) // from the archive, then from the log
	for _, n := range c.nodes {
		g, _ := n.srv.groupOf(nameOf(branch))
		for i := 0; g.Store().Bytes() > 900<<10; i++ {
			if i == 1000 {
				t.Fatalf("the log still has %d bytes", g.Store().Bytes())
			}
			time.Sleep(10 * time.Millisecond)
		}
	}
	if err := cl.ReportDurable(c.ctx(), w.at); err != nil {
		t.Fatal(err)
	}
	c.waitArchived(-1)
	err := cl.Follow(c.ctx(), w.start, func([]*pb.SealedWAL, pg.LSN) error { return errors.New("was given WAL") })
	if !errors.Is(err, walclient.ErrTruncated) {
		t.Errorf("reading from the start, after %d objects were dropped: %v", len(keys), err)
	}
	if err := cl.ReportDurable(c.ctx(), w.at+8); status.Code(errors.Unwrap(err)) != codes.InvalidArgument {
		t.Errorf("durable beyond the end: %v", err)
	}
	for id := range c.peers { // the same after restarts
		c.stop(id)
	}
	c.startAll()
	from := len(w.all)
	c.appendSome(a, w, 20, 300)
	for id := range c.nodes {
		got, err := c.readRetry(id, branch, w.start+pg.LSN(from), w.at)
		if err != nil || !bytes.Equal(got, w.all[from:]) {
			t.Errorf("node %d: %v", id, err)
		}
	}
}

// waitArchived waits until there are at least n archived objects, or, if n is negative, none.
func (c *cluster) waitArchived(n int) (keys []string) {
	c.t.Helper()
	for range 2000 {
		keys = nil
		err := c.blob.List(c.ctx(), "projects/", func(i blob.Info) error { keys = append(keys, i.Key); return nil })
		if err != nil {
			c.t.Fatal(err)
		}
		if n < 0 && len(keys) == 0 || n >= 0 && len(keys) >= n {
			return keys
		}
		time.Sleep(10 * time.Millisecond)
	}
	c.t.Fatalf("%d archived objects, want %d", len(keys), n)
	return nil
}

func TestLaggingFollowerTakesASnapshot(t *testing.T) {
	t.Parallel()
	c, cl, a, w := begin(t, false)
	late := c.leader(branch)%3 + 1
	c.stop(late)
	for range 6 {
		c.appendSome(a, w, 300, 1000)
		if err := cl.ReportDurable(c.ctx(), w.at); err != nil {
			t.Fatal(err)
		}
	}
	g, _ := c.nodes[c.leader(branch)].srv.groupOf(nameOf(branch))
	for i := 0; ; i++ {
		if first, _ := g.Store().FirstIndex(); first > 500 {
			break
		}
		if i == 2000 {
			t.Fatal("the log is not shortened")
		}
		time.Sleep(10 * time.Millisecond)
	}
	c.start(late)
	from := len(w.all)
	c.appendSome(a, w, 20, 300)
	got, err := c.readRetry(late, branch, w.start+pg.LSN(from), w.at)
	if err != nil || !bytes.Equal(got, w.all[from:]) {
		t.Errorf("the late node: %v", err)
	}
	c.stop(late%3 + 1) // it counts in a quorum
	c.appendSome(a, w, 20, 300)
}

func TestNothingRestsInPlaintext(t *testing.T) {
	t.Parallel()
	c, _, a, w := begin(t, true)
	c.appendSome(a, w, 50, 1000)
	found := 0
	for id, fs := range c.disks {
		for _, name := range fs.Names(c.folder(id)) {
			if bytes.Contains(fs.Data(name), []byte("record ")) {
				t.Errorf("%s holds plaintext", name)
			}
			found += bytes.Count(fs.Data(name), []byte(branch))
		}
	}
	if !bytes.Contains(w.all, []byte("record ")) || found == 0 {
		t.Error("the search finds nothing where it must: it proves nothing")
	}
}

func TestRevokedKey(t *testing.T) {
	t.Parallel()
	c, cl, a, w := begin(t, false)
	c.ring.Revoke()
	at, wal := w.record(100)
	if err := c.raw(1, at, wal, 0); rpc.Reason(err) != pb.ErrorDetail_KEY_REVOKED || status.Code(err) != codes.PermissionDenied {
		t.Errorf("append under a revoked key: %v", err)
	}
	c.ring.Restore()
	if err := a.Send(at, wal, false); err != nil {
		t.Fatal(err)
	}
	c.appendSome(a, w, 10, 100)
	c.mustHold(branch, w)
	_ = cl
}

func TestStatus(t *testing.T) {
	t.Parallel()
	c, _, _, w := begin(t, false)
	st, err := c.nodes[c.leader(branch)].srv.Status(c.ctx(), &pb.SafekeeperStatusRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if len(st.GetGroups()) != groups || len(st.GetBranches()) != 1 || st.GetDiskBytes() == 0 {
		t.Fatalf("status %v", st)
	}
	if b := st.GetBranches()[0]; b.GetBranch() != branch || pg.LSN(b.GetEndLsn()) != w.at || b.GetEpoch() != 1 {
		t.Errorf("branch %v", b)
	}
}

func TestConfigurationErrors(t *testing.T) {
	t.Parallel()
	c := newCluster(t, small(), false)
	for name, cfg := range map[string]Config{
		"not among peers": {NodeID: 4, Dir: c.folder(1), Peers: c.peers},
		"even number":     {NodeID: 1, Dir: c.folder(1), Peers: map[uint64]string{1: c.peers[1], 2: c.peers[2]}},
		"address":         {NodeID: 1, Dir: c.folder(1), Peers: map[uint64]string{1: c.peers[1], 2: "10.0.0.1:1", 3: c.peers[3]}},
	} {
		if s, err := New(cfg); err == nil {
			s.Close()
			t.Errorf("%s: no error", name)
		}
	}
	c.start(1)
	if err := c.tryStart(1); err == nil || !strings.Contains(err.Error(), "in use") {
		t.Errorf("a second safekeeper on one directory: %v", err)
	}
}
