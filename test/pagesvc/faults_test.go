package pagesvc

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/internal/rpc"
	"github.com/holdfastdb/holdfast/internal/walrec"
	"github.com/holdfastdb/holdfast/pageserver/timeline"
	"github.com/holdfastdb/holdfast/test/datadir"
	"github.com/holdfastdb/holdfast/test/stock"
	"github.com/holdfastdb/holdfast/test/testenv"
)

// base is one initdb'd directory with some WAL after it, for all tests that need no other.
var base struct {
	once   sync.Once
	dir    string // as initdb made it
	after  string // after the workload
	last   pg.LSN // where its last record begins
	failed error
}

const marked = "CREATE TABLE marked (a int, d tsvector)"

func makeBase(t testing.TB) {
	testenv.NeedPostgres(t)
	base.once.Do(func() {
		root := testenv.TempDir(noCleanup{t})
		s, err := stock.New(context.Background(), root, "stock", settings)
		if err != nil {
			base.failed = err
			return
		}
		base.dir, base.after = filepath.Join(root, "initial"), s.Dir
		snapshot(t, s.Dir, base.dir)
		if base.failed = s.Start(context.Background()); base.failed != nil {
			return
		}
		run(t, s, "postgres", []string{marked, "CREATE INDEX marked_d ON marked USING gin (d)",
			"INSERT INTO marked SELECT i, to_tsvector('w' || i) FROM generate_series(1, 1000) i", "VACUUM marked"})
		if base.failed = s.Stop(); base.failed == nil {
			base.last = loadDirectory(t, s.Dir).Control.CheckPoint
		}
	})
	if base.failed != nil {
		t.Fatal(base.failed)
	}
}

// noCleanup keeps the folder until the process ends: TestMain removes it.
type noCleanup struct{ testing.TB }

func (n noCleanup) Cleanup(fn func()) { atExit = append(atExit, fn) }

var atExit []func()

func TestMain(m *testing.M) {
	code := m.Run()
	for _, fn := range atExit {
		fn()
	}
	os.Exit(code)
}

// imported is a world whose branch was imported from the base and has no WAL yet.
func imported(t testing.TB) *world {
	t.Helper()
	makeBase(t)
	w := newWorld(t, testenv.TempDir(t))
	start, err := w.importDir(base.dir)
	if err != nil {
		t.Fatal(err)
	}
	w.log.end = start
	w.attach()
	return w
}

func (w *world) pgClass(ctx context.Context, at *pb.ReadPoint) error {
	_, err := w.client.GetPages(ctx, &pb.GetPagesRequest{At: at, Count: 1, Rel: &pb.RelFork{Tablespace: 1663, Database: 5, Relation: 1259}})
	return err
}

func wantCode(t *testing.T, err error, code codes.Code, reason pb.ErrorDetail_Reason, words ...string) {
	t.Helper()
	if status.Code(err) != code || rpc.Reason(err) != reason {
		t.Errorf("have %v with reason %v: %v; want %v with %v", status.Code(err), rpc.Reason(err), err, code, reason)
	}
	for _, word := range words {
		if err != nil && !strings.Contains(err.Error(), word) {
			t.Errorf("%q does not say %q", err, word)
		}
	}
}

func TestRevokedKeyShutsTheBranchAndEnablingItResumes(t *testing.T) {
	w := imported(t)
	start := w.log.end
	w.log.feed(t, base.after, base.last)
	w.wait(w.log.end)
	w.ring.Revoke()
	wantCode(t, w.pgClass(t.Context(), w.point(start, true)), codes.PermissionDenied, pb.ErrorDetail_KEY_REVOKED)
	_, err := w.client.Attach(t.Context(), &pb.AttachRequest{Project: project, Branch: branch})
	wantCode(t, err, codes.PermissionDenied, pb.ErrorDetail_KEY_REVOKED)
	w.ring.Restore()
	for status.Code(w.pgClass(t.Context(), w.point(w.log.end, false))) != codes.OK { // the test's time limit bounds it
		time.Sleep(20 * time.Millisecond)
	}
}

func TestReadOfWhatIsNotThereYetIsBounded(t *testing.T) {
	w := imported(t)
	w.end()
	w.config.WaitLimit = 300 * time.Millisecond
	w.begin()
	w.attach()
	wantCode(t, w.pgClass(t.Context(), w.point(w.log.end+8, true)), codes.Unavailable, pb.ErrorDetail_UNSPECIFIED,
		(w.log.end + 8).String(), w.log.end.String())
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	wantCode(t, w.pgClass(ctx, w.point(w.log.end+8, true)), codes.DeadlineExceeded, pb.ErrorDetail_UNSPECIFIED)
}

func TestWrongRequests(t *testing.T) {
	w := imported(t)
	at := w.point(w.log.end, false)
	relation := func(tablespace, database, node, fork uint32) *pb.RelFork {
		return &pb.RelFork{Tablespace: tablespace, Database: database, Relation: node, Fork: fork}
	}
	for name, c := range map[string]struct {
		r    *pb.GetPagesRequest
		code codes.Code
	}{
		"no relation":      {&pb.GetPagesRequest{At: at, Count: 1}, codes.InvalidArgument},
		"no pages":         {&pb.GetPagesRequest{At: at, Rel: relation(1663, 5, 1259, 0)}, codes.InvalidArgument},
		"too many pages":   {&pb.GetPagesRequest{At: at, Rel: relation(1663, 5, 1259, 0), Count: 129}, codes.InvalidArgument},
		"both":             {&pb.GetPagesRequest{At: at, Rel: relation(1663, 5, 1259, 0), Slru: 1, Count: 1}, codes.InvalidArgument},
		"fork":             {&pb.GetPagesRequest{At: at, Rel: relation(1663, 5, 1259, 4), Count: 1}, codes.InvalidArgument},
		"tablespace":       {&pb.GetPagesRequest{At: at, Rel: relation(16500, 5, 1259, 0), Count: 1}, codes.FailedPrecondition},
		"missing relation": {&pb.GetPagesRequest{At: at, Rel: relation(1663, 5, 999999, 0), Count: 1}, codes.NotFound},
		"SLRU area":        {&pb.GetPagesRequest{At: at, Slru: 9, Count: 1}, codes.InvalidArgument},
		"SLRU page":        {&pb.GetPagesRequest{At: at, Slru: 1, Block: 500, Count: 1}, codes.NotFound},
		"branch":           {&pb.GetPagesRequest{At: &pb.ReadPoint{Project: project, Branch: "other"}, Slru: 1, Count: 1}, codes.NotFound},
	} {
		if _, err := w.client.GetPages(t.Context(), c.r); status.Code(err) != c.code {
			t.Errorf("%s: %v, want %v", name, err, c.code)
		}
	}
	r, err := w.client.GetPages(t.Context(), &pb.GetPagesRequest{At: at, Rel: relation(1663, 5, 1259, 0), Block: 1 << 20, Count: 8})
	if err != nil || len(r.Pages) != 0 {
		t.Errorf("beyond the end: %d bytes, %v; want none", len(r.GetPages()), err)
	}
	if _, err := w.client.Attach(t.Context(), &pb.AttachRequest{Project: project, Branch: "other"}); status.Code(err) != codes.NotFound {
		t.Errorf("attaching a branch that is not there: %v", err)
	}
	if _, err := w.client.Attach(t.Context(), &pb.AttachRequest{Project: project, Branch: "../x"}); status.Code(err) != codes.InvalidArgument {
		t.Errorf("attaching a branch with a path for a name: %v", err)
	}
}

// Each relation of a workload with every kind of index can be read.
func TestEveryRelationCanBeRead(t *testing.T) {
	w := imported(t)
	w.log.feed(t, base.after, base.last)
	at := w.point(w.log.end, false)
	w.wait(w.log.end)
	sizes, err := datadir.List(t.Context(), w.client, at, []pg.Oid{5})
	if err != nil {
		t.Fatal(err)
	}
	if len(sizes) < 100 {
		t.Errorf("the database has %d relations", len(sizes))
	}
	for tag, n := range sizes {
		if _, err := datadir.Relation(t.Context(), w.client, at, tag, n); err != nil {
			t.Errorf("%v: %v", tag, err)
		}
	}
}

func TestBadWALStopsTheBranchLoudly(t *testing.T) {
	for name, spoil := range map[string]func(c *pb.SealedWAL, plain []byte) []byte{
		"flipped ciphertext": func(c *pb.SealedWAL, _ []byte) []byte { c.Ciphertext[40] ^= 1; return nil },
		"moved":              func(c *pb.SealedWAL, _ []byte) []byte { c.EndLsn += 8; return nil },
		"flipped record":     func(_ *pb.SealedWAL, plain []byte) []byte { plain[len(plain)/2] ^= 1; return plain },
		"cut record":         func(_ *pb.SealedWAL, plain []byte) []byte { return plain[:len(plain)-16] },
	} {
		t.Run(name, func(t *testing.T) {
			w := imported(t)
			start := w.log.end
			w.log.spoil = spoil
			w.log.feed(t, base.after, base.last)
			wantCode(t, w.pgClass(t.Context(), w.point(w.log.end, true)), codes.DataLoss, pb.ErrorDetail_BAD_WAL, "0/")
			wantCode(t, w.pgClass(t.Context(), w.point(start, true)), codes.DataLoss, pb.ErrorDetail_BAD_WAL)
			st, err := w.client.Status(t.Context(), &pb.PageServerStatusRequest{})
			if err != nil || len(st.Branches) != 1 || st.Branches[0].Error == "" {
				t.Errorf("the status says nothing: %v, %v", st, err)
			}
		})
	}
}

func TestStatusTellsSizes(t *testing.T) {
	w := imported(t)
	w.log.feed(t, base.after, base.last)
	w.wait(w.log.end)
	st, err := w.client.Status(t.Context(), &pb.PageServerStatusRequest{})
	if err != nil || len(st.Branches) != 1 {
		t.Fatalf("%v, %v", st, err)
	}
	b := st.Branches[0]
	if b.Layers < 1 || b.LayerBytes == 0 || b.MemoryBytes == 0 || pg.LSN(b.IngestedLsn) != w.log.end || b.DurableLsn == 0 || b.Error != "" {
		t.Errorf("the branch is said to be %v", b)
	}
}

func TestStartupStateOnlyWhereItIsKnown(t *testing.T) {
	w := imported(t)
	w.log.feed(t, base.after, base.last)
	w.wait(w.log.end)
	_, err := w.client.StartupState(t.Context(), &pb.StartupStateRequest{At: w.point(base.last, false)})
	if code := status.Code(err); code != codes.FailedPrecondition {
		t.Errorf("in the middle: %v", err)
	}
	r, err := w.client.StartupState(t.Context(), &pb.StartupStateRequest{At: w.point(w.log.end, false)})
	if err != nil || pg.LSN(r.PrevRecordLsn) != base.last || len(r.Databases) != 3 {
		t.Errorf("at the end: %v, %v", r, err)
	}
}

func TestImportRefusesWhatItCannotServe(t *testing.T) {
	makeBase(t)
	control := loadDirectory(t, base.dir).Control
	for name, change := range map[string]func(*pg.ControlFile){
		"running":   func(c *pg.ControlFile) { c.State = pg.DBInProduction },
		"timeline":  func(c *pg.ControlFile) { c.CheckPointCopy.TimelineID = 2 },
		"checksums": func(c *pg.ControlFile) { c.ChecksumVersion = 1 },
		"redo":      func(c *pg.ControlFile) { c.CheckPointCopy.Redo-- },
	} {
		w := newWorld(t, testenv.TempDir(t))
		changed := *control
		change(&changed)
		wantCode(t, w.importOne("global/pg_control", changed.Marshal()), codes.InvalidArgument, pb.ErrorDetail_UNSPECIFIED, "pg_control")
		if _, err := w.client.Attach(t.Context(), &pb.AttachRequest{Project: project, Branch: branch}); status.Code(err) != codes.NotFound {
			t.Errorf("%s: after a refused import, attaching gives %v", name, err)
		}
	}
	w := newWorld(t, testenv.TempDir(t))
	wantCode(t, w.importOne("global/pg_control", control.Marshal()), codes.InvalidArgument, pb.ErrorDetail_UNSPECIFIED, "relation map")
	wantCode(t, w.importOne("global/1262", make([]byte, 100)), codes.InvalidArgument, pb.ErrorDetail_UNSPECIFIED)
	wantCode(t, w.importOne("../../etc/passwd", nil), codes.InvalidArgument, pb.ErrorDetail_UNSPECIFIED, "path")
}

func (w *world) importOne(path string, data []byte) error {
	stream, err := w.client.Import(w.t.Context())
	if err != nil {
		w.t.Fatal(err)
	}
	for _, r := range []*pb.ImportRequest{{Path: path, Data: data}, {Last: true}} {
		r.Project, r.Branch = project, branch
		if stream.Send(r) != nil {
			break // CloseAndRecv says why
		}
	}
	_, err = stream.CloseAndRecv()
	return err
}

// The end of the imported WAL is where the stock server's next record begins.
func TestImportEndsWhereTheNextRecordBegins(t *testing.T) {
	w := imported(t)
	start := w.log.end
	w.log.feed(t, base.after, base.last)
	first := walrec.NewScanner(start)
	first.Feed(w.log.first)
	rec, ok, err := first.Next()
	if err != nil || !ok {
		t.Fatalf("no record at %v: %v", start, err)
	}
	if want := loadDirectory(t, base.dir).Control.CheckPoint; walPrev(rec.Data) != want {
		t.Errorf("the first record says that the one before it is at %v, want the checkpoint at %v", walPrev(rec.Data), want)
	}
}

func walPrev(data []byte) pg.LSN { return pg.LSN(le.Uint64(data[8:])) }

// A compute that was fenced and has not heard of it must not read what its successor wrote,
// also when the page server has started again since and that WAL comes no more (W2).
func TestFencedComputeReadsNothingOfItsSuccessor(t *testing.T) {
	w := imported(t)
	w.end()
	w.withTimeline(timeline.Config{FlushAge: 20 * time.Millisecond})
	w.begin()
	w.attach()
	start := w.log.end
	read := func(epoch uint64) error {
		at := w.point(start, true)
		at.Epoch = epoch
		_, listErr := w.client.ListRelations(t.Context(), &pb.ListRelationsRequest{At: at, Tablespace: 1663, Database: 5})
		if err := w.pgClass(t.Context(), at); status.Code(err) != status.Code(listErr) {
			t.Errorf("reading a page: %v, listing relations: %v", err, listErr)
		}
		return listErr
	}
	if err := read(1); err != nil {
		t.Fatal(err)
	}
	w.log.epoch = 2
	w.log.feed(t, base.after, base.last)
	check := func() {
		t.Helper()
		wantCode(t, read(1), codes.FailedPrecondition, pb.ErrorDetail_FENCED, "epoch 1", "epoch 2")
		for _, epoch := range []uint64{0, 2, 3} {
			if err := read(epoch); err != nil {
				t.Errorf("epoch %d: %v", epoch, err)
			}
		}
	}
	w.wait(w.log.end)
	check()
	for isDurable := false; !isDurable; time.Sleep(10 * time.Millisecond) { // the test's time limit bounds it
		w.log.mu.Lock()
		isDurable = w.log.durable == w.log.end
		w.log.mu.Unlock()
	}
	w.log.mu.Lock()
	w.log.chunks = nil
	w.log.mu.Unlock()
	w.restart()
	check()
}

// A crash after a layer is durable and before the safekeepers hear of it loses nothing.
func TestCrashBetweenFlushAndReport(t *testing.T) {
	w := imported(t)
	w.end()
	w.log.deaf = true
	w.withTimeline(small)
	w.begin()
	w.attach()
	w.log.feed(t, base.after, base.last)
	for range 3 {
		w.wait(w.log.end)
		w.restart()
	}
	w.wait(w.log.end)
	c := &comparison{t: t, w: w, at: w.point(w.log.end, false), want: loadDirectory(t, base.after)}
	c.startup()
	if err := w.pgClass(t.Context(), c.at); err != nil {
		t.Error(err)
	}
}
