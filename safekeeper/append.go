package safekeeper

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/internal/seal"
	"github.com/holdfastdb/holdfast/internal/walrec"
	"github.com/holdfastdb/holdfast/safekeeper/group"
	"github.com/holdfastdb/holdfast/safekeeper/walstate"
)

const (
	maxAppend      = 32 << 20 // bytes of WAL in one request
	maxUncommitted = 64 << 20 // bytes of WAL of a branch between proposed and committed
	dekBytes       = 32 << 20 // WAL sealed under one DEK
	// maxWhole is above which size a record may come in pieces. They are checked as they pass by;
	// none is put together here.
	maxWhole   = 16 << 20
	keyTimeout = 10 * time.Second
)

// groupWriters are the writers of the branches of one group, for as long as this replica
// leads it.
type groupWriters struct {
	sync.Mutex
	lead    *group.Leadership
	writers map[uint32]*writer
}

// writer is the leader's side of one branch's log: it knows where the log ends with all that
// is proposed, and holds the DEK under which it seals.
//
// A DEK is made by this leader for this branch and lives only here, so its counters never
// meet those of another leader. Invariant: what follows mu changes only under it, and
// proposals are queued under it, so they are in the log in the order of their LSNs.
type writer struct {
	s    *Server
	g    *group.Group
	lead *group.Leadership
	name walstate.Name
	no   uint32

	mu       sync.Mutex
	epoch    uint64
	tail     pg.LSN
	begun    pg.LSN // where the record begins that tail is inside of, or the pieces of it; 0: it is at a record's end
	scanner  *walrec.Scanner
	key      *seal.Key
	context  seal.Context
	wrapped  []byte
	counter  uint64
	sealed   int64 // bytes under key
	segments int
	made     []made // see unapplied
	noShred  func() // of key
	left     bool   // see leave

	// shut ends what waits with WAL in hand when the lease is over: see shred.
	shut struct {
		sync.Mutex
		waits context.Context
		cut   context.CancelFunc
	}
}

// writer gives the branch's writer under the present leadership.
func (s *Server) writer(g *group.Group, gw *groupWriters, n walstate.Name) (*writer, error) {
	lead, err := g.Leadership()
	if err != nil {
		return nil, s.failure(g, n, err)
	}
	b, err := lookup(g, n)
	if err != nil {
		return nil, err
	}
	gw.Lock()
	defer gw.Unlock()
	if gw.lead != lead {
		if gw.lead != nil && gw.lead.Term > lead.Term {
			return nil, s.failure(g, n, group.ErrNotLeader)
		}
		for _, old := range gw.writers {
			go old.leave()
		}
		gw.lead, gw.writers = lead, map[uint32]*writer{}
	}
	w := gw.writers[b.No]
	if w == nil {
		w = newWriter(s, g, lead, n, b.No)
		gw.writers[b.No] = w
	}
	return w, nil
}

// Append implements pb.SafekeeperServer (W1, W2, W3).
func (s *Server) Append(stream pb.Safekeeper_AppendServer) error {
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	n, err := checkName(first.GetProject(), first.GetBranch())
	if err != nil {
		return err
	}
	g, gw := s.groupOf(n)
	w, err := s.writer(g, gw, n)
	if err != nil {
		return err
	}
	sub, cancel := g.Subscribe(w.no)
	defer cancel()
	received := make(chan error, 1)
	ask := make(chan struct{}, 1)
	go func() { received <- w.receive(stream, first, ask) }()
	var told, held pg.LSN
	for {
		force := false
		select {
		case err := <-received:
			if errors.Is(err, io.EOF) {
				return nil
			}
			return s.failure(g, n, err)
		case <-w.lead.Done:
			go w.leave() // it may have to wait for a call for a key
			_, err := g.Leadership()
			if err == nil {
				err = group.ErrNotLeader
			}
			return s.failure(g, n, err)
		case <-stream.Context().Done():
			return status.FromContextError(stream.Context().Err()).Err()
		case <-ask:
			force = true
		case <-sub.C:
		}
		b, err := lookup(g, n)
		switch {
		case err != nil:
			return err
		case b.Epoch != first.GetEpoch():
			return fenced(n, first.GetEpoch(), b.Epoch)
		case b.End == told && b.Held == held && !force: // pieces are answered, too: the leader is not silent
			continue
		}
		told, held = b.End, b.Held
		if err := stream.Send(&pb.AppendResponse{CommittedLsn: uint64(told)}); err != nil {
			return err
		}
	}
}

// receive takes the stream's requests until it ends. It asks for an answer to what brings
// nothing new.
func (w *writer) receive(stream pb.Safekeeper_AppendServer, req *pb.AppendRequest, ask chan<- struct{}) error {
	epoch := req.GetEpoch()
	for {
		fresh, err := w.append(stream.Context(), epoch, pg.LSN(req.GetBeginLsn()), req.GetWal(), req.GetPartial())
		clear(req.GetWal()) // what is kept of it is sealed; the plaintext must not outlive the lease (K2)
		if err != nil {
			return err
		}
		if !fresh {
			select {
			case ask <- struct{}{}:
			default:
			}
		}
		if req, err = stream.Recv(); err != nil {
			return err
		}
	}
}

// append checks, seals and proposes one request; fresh is false if the log has it already.
func (w *writer) append(ctx context.Context, epoch uint64, begin pg.LSN, wal []byte, partial bool) (fresh bool, err error) {
	if len(wal) > maxAppend {
		return false, status.Errorf(codes.InvalidArgument, "branch %s: %d bytes of WAL in one request, at most %d are possible", w.name, len(wal), maxAppend)
	}
	if err := w.waitForRoom(ctx); err != nil {
		return false, err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.enter(epoch); err != nil {
		return false, err
	}
	if len(wal) == 0 {
		return false, nil
	}
	if begin > w.tail {
		return false, gap(w.name, begin, w.tail)
	}
	known := w.tail - begin
	if known >= pg.LSN(len(wal)) { // sent again: what is in the log already stays as it is
		return false, nil
	}
	wal = wal[known:]
	kind, scan := walstate.KindAppend, w.scan
	if partial {
		kind, scan = walstate.KindPiece, w.scanPiece
	}
	end, err := scan(wal)
	if err != nil {
		w.startOver()
		return false, err
	}
	data, err := w.seal(ctx, kind, end, wal)
	if err != nil {
		w.startOver()
		return false, err
	}
	switch {
	case !partial:
		w.begun = 0
	case w.begun == 0:
		w.begun = w.tail
	}
	w.tail = end
	w.g.Propose(w.lead, data)
	return true, nil
}

// startOver goes back to the last record's end: the scanner does not go on in the middle of one,
// and pieces that are under way are sent again.
func (w *writer) startOver() {
	if w.begun != 0 {
		w.tail, w.begun = w.begun, 0
	}
	w.scanner.Reset(w.tail)
}

// scanPiece makes sure that wal, which continues the log, is a piece of one record that goes on.
func (w *writer) scanPiece(wal []byte) (pg.LSN, error) {
	defer w.scanner.Wipe()
	w.scanner.Feed(wal)
	_, ok, err := w.scanner.Next()
	if err == nil && (ok || !w.scanner.Skims()) {
		err = fmt.Errorf("%d bytes are no piece of one record of more than %d bytes", len(wal), maxWhole)
	}
	if err != nil {
		return 0, badWAL(w.name, w.tail, err)
	}
	return w.tail + pg.LSN(len(wal)), nil
}

// enter makes sure that epoch is the one that may append. The first append of an epoch
// begins at the end of what is applied: older epochs' appends that are still under way will
// be refused when they apply.
func (w *writer) enter(epoch uint64) error {
	b, err := lookup(w.g, w.name)
	if err != nil {
		return err
	}
	switch {
	case epoch > b.Epoch || epoch == 0:
		return status.Errorf(codes.InvalidArgument, "branch %s: epoch %d was not opened", w.name, epoch)
	case epoch < b.Epoch:
		return fenced(w.name, epoch, b.Epoch)
	case epoch != w.epoch:
		w.epoch, w.tail, w.begun = epoch, b.End, 0
		w.scanner = walrec.NewScanner(b.End)
		w.scanner.Skim(func(_ uint8, size int) bool { return size > maxWhole })
	}
	return nil
}

// scan makes sure that wal, which continues the log, is whole records, and tells their end.
func (w *writer) scan(wal []byte) (pg.LSN, error) {
	begin := w.tail
	defer w.scanner.Wipe() // whole records were fed, or the caller starts over
	w.scanner.Feed(wal)
	for {
		rec, ok, err := w.scanner.Next()
		if err != nil {
			return 0, badWAL(w.name, begin, err)
		}
		end := w.scanner.Pos()
		switch covered := begin + pg.LSN(len(wal)); {
		case ok && rec.IsSwitch && rec.LSN < covered && covered < end: // the rest of the segment is not carried
			return end, nil
		case ok && end == covered:
			return end, nil
		case !ok:
			return 0, badWAL(w.name, begin, fmt.Errorf("the last record in %d bytes ends at %s, not at %s", len(wal), end, covered))
		}
	}
}

// seal makes the command that appends [tail, end).
func (w *writer) seal(ctx context.Context, kind walstate.Kind, end pg.LSN, wal []byte) ([]byte, error) {
	if w.key == nil || w.sealed+int64(len(wal)) > dekBytes {
		if err := w.newKey(ctx); err != nil {
			return nil, err
		}
	}
	data, err := w.sealUnderKey(kind, end, wal)
	if errors.Is(err, seal.ErrWiped) { // the lease ended since; perhaps there is a new one
		if err := w.newKey(ctx); err != nil {
			return nil, err
		}
		data, err = w.sealUnderKey(kind, end, wal)
	}
	return data, err
}

func (w *writer) sealUnderKey(kind walstate.Kind, end pg.LSN, wal []byte) ([]byte, error) {
	w.counter++
	c := walstate.Command{Kind: kind, Branch: w.no, Epoch: w.epoch, Begin: w.tail, End: end,
		Counter: w.counter, Object: []byte(w.context.Object), WrappedDEK: w.wrapped}
	data, err := seal.SealWAL(c.AppendPrefix(len(wal)+seal.TagSize), w.key, w.context, w.tail, end, w.counter, wal)
	if err == nil {
		w.sealed += int64(len(wal))
	}
	return data, err
}

// leave lets go of what the writer holds in plaintext, and of the lease, for good: it leads no more, or its branch is
// deleted.
func (w *writer) leave() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.left, w.key = true, nil
	if w.scanner != nil {
		w.scanner.Wipe()
	}
	w.noShred()
	w.noShred = func() {}
}

// newKey makes a DEK for the next segment.
func (w *writer) newKey(ctx context.Context) error {
	if w.left {
		return group.ErrNotLeader
	}
	ctx, cancel := w.bounded(ctx)
	defer cancel()
	w.key = nil
	w.noShred()
	w.noShred = func() {}
	w.segments++
	c := seal.Context{Purpose: seal.PurposeWAL, Project: w.name.Project, Branch: w.name.Branch,
		Object: fmt.Sprintf("%d-%d-%d-%d-%08x", w.no, w.lead.Term, w.s.cfg.NodeID, w.segments, rand.Uint32())}
	key, wrapped, err := w.s.cfg.Ring.Generate(ctx, c)
	if err != nil {
		return fmt.Errorf("a key for the WAL: %w", err)
	}
	w.key, w.wrapped, w.context, w.counter, w.sealed = key, wrapped, c, 0, 0
	w.noShred = w.s.cfg.Ring.OnShred(w.name.Project, w.name.Branch, w.shred)
	w.noteMade(c.Object, wrapped)
	return nil
}

// waitForRoom waits while too much is proposed and not committed.
func (w *writer) waitForRoom(ctx context.Context) error {
	if w.room() {
		return nil
	}
	sub, cancel := w.g.Subscribe(w.no)
	defer cancel()
	shut := w.waits()
	for !w.room() {
		select {
		case <-sub.C:
		case <-shut.Done():
			return errShut
		case <-w.lead.Done:
			return group.ErrNotLeader
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

func (w *writer) room() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	b, err := lookup(w.g, w.name)
	return err != nil || w.tail < b.Held+maxUncommitted
}
