package safekeeper

import (
	"bytes"
	"testing"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/internal/rpc"
	"github.com/holdfastdb/holdfast/internal/walclient"
	"github.com/holdfastdb/holdfast/safekeeper/walstore"
)

// pieceBytes is the size of the pieces in which tests send a record.
const pieceBytes = 1 << 20

// sendPieces sends a record in pieces, all or the first few.
func (c *cluster) sendPieces(a *walclient.Appender, begin pg.LSN, wal []byte, most int) {
	c.t.Helper()
	for i := 0; len(wal) > 0 && i < most; i++ {
		n := min(len(wal), int((begin+pieceBytes).PageStart()-begin))
		if err := a.Send(begin, wal[:n], n < len(wal)); err != nil {
			c.t.Fatal(err)
		}
		begin, wal = begin+pg.LSN(n), wal[n:]
	}
}

// A record that comes in pieces is in the log when all of it is, whoever leads meanwhile; a new
// epoch forgets the pieces of one that is not whole.
func TestLargeRecords(t *testing.T) {
	t.Parallel()
	cfg := small()
	cfg.Store = walstore.Options{FileBytes: 4 << 20, CacheBytes: 1 << 20}
	cfg.RetainBytes, cfg.ArchiveBytes = 8<<20, 1<<30 // files are let go, if nothing holds them
	c := newCluster(t, cfg, true)
	c.startAll()
	cl := c.client(branch)
	_, a := c.open(cl)
	w := newWAL(startLSN)
	c.appendSome(a, w, 3, 300)

	begin, wal := w.record(maxWhole + 5<<20)
	c.sendPieces(a, begin, wal, 1<<20)
	c.appendSome(a, w, 3, 300)
	c.mustHold(branch, w)

	begin, wal = w.record(maxWhole + 3<<20)
	c.sendPieces(a, begin, wal, 9)
	lead := c.leader(branch)
	c.kill(lead, nil)
	rest := int((begin + 9*pieceBytes).PageStart() - begin)
	c.sendPieces(a, begin+pg.LSN(rest), wal[rest:], 1<<20)
	c.appendSome(a, w, 2, 300)
	c.start(lead)
	c.mustHold(branch, w)

	// Half of a record, and a new compute.
	was := *w
	was.all = append([]byte(nil), w.all...)
	begin, wal = w.record(maxWhole + 3<<20)
	c.sendPieces(a, begin, wal, 5)
	*w = was
	e, err := cl.OpenEpoch(c.ctx(), "next")
	if err != nil {
		t.Fatal(err)
	}
	if e.End != w.at {
		t.Fatalf("the log ends at %v, want %v: a part of a record is in it", e.End, w.at)
	}
	b := cl.Append(e.Number, e.End)
	t.Cleanup(b.Close)
	c.appendSome(b, w, 3, 300)
	c.mustHold(branch, w)
	begin, wal = w.record(maxWhole + 1)
	c.sendPieces(b, begin, wal, 1<<20)
	c.appendSome(b, w, 1, 300)
	c.mustHold(branch, w)
}

// What is no piece of one large record is refused as one.
func TestBadPieces(t *testing.T) {
	t.Parallel()
	c, _, a, w := begin(t, true)
	a.Close()
	at, wal := w.record(40000)
	_, first := (&walMaker{at: at, start: at, prev: at - 8}).record(100)
	for name, wal := range map[string][]byte{"of a small record": wal[:16<<10], "a whole record": wal, "of another log": first, "junk": bytes.Repeat([]byte{7}, 8192)} {
		err := c.rawRequest(&pb.AppendRequest{Project: project, Branch: branch, Epoch: 1, BeginLsn: uint64(at), Wal: wal, Partial: true}, 0)
		if rpc.Reason(err) != pb.ErrorDetail_BAD_WAL {
			t.Errorf("%s: %v, want BAD_WAL", name, err)
		}
	}
	if err := c.raw(1, at, wal, w.at); err != nil {
		t.Error(err)
	}
	c.mustHold(branch, w)
}
