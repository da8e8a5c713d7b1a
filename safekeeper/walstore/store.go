package walstore

import (
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"sync"

	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
)

// Options of a Store; the zero value is what a server uses.
type Options struct {
	FS         FS            // nil: OS
	FileBytes  int64         // size of a log file; 0: 16 MiB
	CacheBytes int64         // newest entries kept in memory; 0: 8 MiB
	Random     func() uint64 // for salts; nil: a good source
	Log        *slog.Logger
}

const (
	defaultFileBytes  = 16 << 20
	defaultCacheBytes = 8 << 20
)

// Store is one group's log. Write, Mark, HalfFull and Close are for one goroutine at a time,
// and Compact and Oldest for one; the methods of raft.Storage, Entry, Bytes and Prepare
// may run beside them, but for Close.
type Store struct {
	dir string
	opt Options
	fs  FS
	log *slog.Logger

	// w belongs to the writer.
	w struct {
		cur       *logFile
		off       int64 // where the next record goes
		synced    int64 // below it, cur is on the disk
		marked    bool  // a mark stands at off
		reset     bool  // a reset record must precede the next entry
		buf       []byte
		pending   []located  // written, not yet in mu.ents
		replaced  []*logFile // a snapshot stands in their place; retired once that is in the log
		hardState raftpb.HardState
		broken    error // a write's outcome is unknown: only a restart tells
	}

	// snapshots serializes those who replace the snapshot.
	snapshots sync.Mutex

	prep struct {
		sync.Mutex
		next  *logFile // ready to go on in, or nil
		spare string   // a file to take again, or ""
	}

	mu struct {
		sync.RWMutex
		files  []*logFile // in order, the current one last
		floor  *logFile   // the first file that may hold what a Write has not made visible yet
		ents   []position // of entries snap.index+1 and on
		snap   *raftpb.Snapshot
		hard   *raftpb.HardState
		recent []*raftpb.Entry // the newest entries, contiguous to the last one
		bytes  int64           // of data in recent
	}
	voters []uint64
}

var _ raft.Storage = (*Store)(nil)

type position struct {
	file *logFile
	off  uint32
	size uint32 // of the data
	term uint64
}

type located struct {
	index uint64
	pos   position
	entry *raftpb.Entry
}

// logFile is an open log file. Whoever reads it outside of Store.mu holds use.
type logFile struct {
	f    File
	path string
	seq  uint64
	salt uint64
	size int64
	use  sync.RWMutex
}

// A Batch is what one MsgStorageAppend asks for.
type Batch struct {
	HardState *raftpb.HardState // nil: unchanged
	Entries   []*raftpb.Entry
	Snapshot  *raftpb.Snapshot // nil: none
}

// errBroken is the answer after a failure whose outcome is unknown.
var errBroken = errors.New("an earlier write to the log failed: restart the replica")

// Write makes the batches durable, in order, with one fdatasync, and then visible to
// readers. If it fails because the disk is full (IsFull), nothing became visible and the same batches
// may be written again; after any other failure the Store takes no more.
func (s *Store) Write(batches []Batch) error {
	if s.w.broken != nil {
		return fmt.Errorf("%w (%v)", errBroken, s.w.broken)
	}
	reset := s.w.reset
	had := raftpb.HardState{Term: s.w.hardState.Term, Vote: s.w.hardState.Vote, Commit: s.w.hardState.Commit}
	err := s.write(batches)
	if err != nil {
		s.w.pending = s.w.pending[:0]
		s.w.buf = s.w.buf[:0]
		s.w.reset = s.w.reset || reset
		s.w.hardState.Term, s.w.hardState.Vote, s.w.hardState.Commit = had.Term, had.Vote, had.Commit
		if !IsFull(err) {
			s.w.broken = err
		}
	}
	return err
}

func (s *Store) write(batches []Batch) error {
	s.setFloor()
	defer s.setFloor()
	mustSync := false
	for _, b := range batches {
		if !raft.IsEmptySnap(b.Snapshot) {
			if err := s.installSnapshot(b.Snapshot); err != nil {
				return err
			}
			mustSync = true
		}
		for _, e := range b.Entries {
			if err := s.putEntry(e); err != nil {
				return err
			}
			mustSync = true
		}
		if !raft.IsEmptyHardState(b.HardState) {
			hs, had := b.HardState, &s.w.hardState
			changed := hs.GetTerm() != had.GetTerm() || hs.GetVote() != had.GetVote()
			had.Term, had.Vote, had.Commit = new(hs.GetTerm()), new(hs.GetVote()), new(hs.GetCommit())
			// A commit index alone is no promise to anyone: it goes with the next batch.
			if !changed && len(b.Entries) == 0 {
				continue
			}
			if err := s.putHardState(); err != nil {
				return err
			}
			mustSync = mustSync || changed
		}
	}
	if err := s.flush(mustSync); err != nil {
		return err
	}
	s.publish()
	old := s.w.replaced
	s.w.replaced = nil
	return s.retireAll(old)
}

// setFloor keeps Compact from files that a Write is about to refer to.
func (s *Store) setFloor() {
	s.mu.Lock()
	s.mu.floor = s.w.cur
	s.mu.Unlock()
}

func (s *Store) putEntry(e *raftpb.Entry) error {
	if e.GetType() != raftpb.EntryNormal {
		return fmt.Errorf("entry %d has type %v: membership does not change by entries here", e.GetIndex(), e.GetType())
	}
	if s.w.reset {
		if err := s.putReset(); err != nil {
			return err
		}
	}
	off, err := s.put(record{kind: kindEntry, index: e.GetIndex(), term: e.GetTerm(), payload: e.GetData()})
	if err != nil {
		return err
	}
	s.w.pending = append(s.w.pending, located{index: e.GetIndex(), entry: e,
		pos: position{file: s.w.cur, off: uint32(off), size: uint32(len(e.GetData())), term: e.GetTerm()}})
	return nil
}

func (s *Store) putHardState() error {
	h := &s.w.hardState
	_, err := s.put(record{kind: kindHardState, index: h.GetCommit(), term: h.GetTerm(), payload: le.AppendUint64(nil, h.GetVote())})
	return err
}

// put adds a record to the buffer, going on in the next file where this one is full, and
// tells its offset in the current file.
func (s *Store) put(r record) (int64, error) {
	need := int64(recordSize(len(r.payload)))
	at := s.w.off + int64(len(s.w.buf))
	if at+need+recordHeader > s.w.cur.size { // recordHeader: room for the end record
		if err := s.nextFile(need); err != nil {
			return 0, err
		}
		at = s.w.off + int64(len(s.w.buf))
	}
	r.durable = uint32(s.w.synced)
	s.w.buf = appendRecord(s.w.buf, s.w.cur.salt, r)
	return at, nil
}

// flush writes the buffer.
func (s *Store) flush(mustSync bool) error {
	if len(s.w.buf) > 0 {
		s.w.marked = false
		if _, err := s.w.cur.f.WriteAt(s.w.buf, s.w.off); err != nil {
			return fmt.Errorf("writing the log %s at %d: %w", s.w.cur.path, s.w.off, err)
		}
		if mustSync {
			if err := s.sync(s.w.cur); err != nil {
				return err
			}
		}
		s.w.off += int64(len(s.w.buf))
		if cap(s.w.buf) > 4<<20 {
			s.w.buf = nil
		}
		s.w.buf = s.w.buf[:0]
	} else if mustSync && s.w.synced < s.w.off {
		if err := s.sync(s.w.cur); err != nil {
			return err
		}
	}
	if mustSync {
		s.w.synced = s.w.off
	}
	return nil
}

// sync fails for good: after a failed fdatasync the kernel may take lost pages for clean.
func (s *Store) sync(f *logFile) error {
	if err := f.f.Sync(); err != nil {
		return fmt.Errorf("fdatasync of the log %s: %v", f.path, err)
	}
	return nil
}

// nextFile ends the current file and goes on in the next, which has room for need bytes.
func (s *Store) nextFile(need int64) error {
	// Room first: a full disk must leave all as it is.
	next, err := s.takeNext(need + fileHeader + 4*recordHeader)
	if err != nil {
		return err
	}
	s.w.buf = appendRecord(s.w.buf, s.w.cur.salt, record{kind: kindEnd, durable: uint32(s.w.synced)})
	if err := s.flush(true); err != nil {
		return fmt.Errorf("%v", err) // final even where the disk is full: next is taken
	}
	s.w.cur, s.w.off, s.w.synced = next, fileHeader, fileHeader
	return s.putHardState()
}

// publish makes what was written visible.
func (s *Store) publish() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, l := range s.w.pending {
		s.addLocked(l)
		s.w.pending[i].entry = nil
	}
	s.w.pending = s.w.pending[:0]
	h := &s.w.hardState
	s.mu.hard = &raftpb.HardState{Term: new(h.GetTerm()), Vote: new(h.GetVote()), Commit: new(h.GetCommit())}
}

// addLocked appends an entry to the index; one that was there, and all after it, give way.
func (s *Store) addLocked(l located) {
	base := s.mu.snap.GetMetadata().GetIndex()
	n := l.index - base - 1
	if n < uint64(len(s.mu.ents)) {
		s.cutLocked(n)
	}
	s.mu.ents = append(s.mu.ents, l.pos)
	s.mu.recent = append(s.mu.recent, l.entry)
	s.mu.bytes += int64(len(l.entry.GetData()))
	drop := 0
	for s.mu.bytes > s.opt.CacheBytes && drop < len(s.mu.recent)-1 {
		s.mu.bytes -= int64(len(s.mu.recent[drop].GetData()))
		s.mu.recent[drop] = nil
		drop++
	}
	s.mu.recent = s.mu.recent[drop:]
}

// cutLocked keeps the first n entries of the index.
func (s *Store) cutLocked(n uint64) {
	gone := min(uint64(len(s.mu.ents))-n, uint64(len(s.mu.recent)))
	keep := uint64(len(s.mu.recent)) - gone
	for i := keep; i < uint64(len(s.mu.recent)); i++ {
		s.mu.bytes -= int64(len(s.mu.recent[i].GetData()))
		s.mu.recent[i] = nil
	}
	s.mu.recent = s.mu.recent[:keep]
	s.mu.ents = s.mu.ents[:n]
}

// Mark proves, for a later start, that all before the current end is on the disk. It is
// cheap, and for a quiet moment: nothing waits for it.
func (s *Store) Mark() error {
	if s.w.marked || s.w.broken != nil || s.w.synced != s.w.off || s.w.off+recordHeader > s.w.cur.size {
		return nil
	}
	b := appendRecord(nil, s.w.cur.salt, record{kind: kindMark, durable: uint32(s.w.synced)})
	if _, err := s.w.cur.f.WriteAt(b, s.w.off); err != nil {
		return fmt.Errorf("marking the log %s: %w", s.w.cur.path, err)
	}
	s.w.marked = true
	return nil
}

// HalfFull tells that it is time to Prepare.
func (s *Store) HalfFull() bool { return s.w.off >= s.w.cur.size/2 }

// Close marks the log and closes its files.
func (s *Store) Close() error {
	var errs []error
	if s.w.broken == nil {
		if s.w.synced != s.w.off {
			errs = append(errs, s.flush(true))
		}
		errs = append(errs, s.Mark())
		errs = append(errs, s.sync(s.w.cur))
	}
	s.prep.Lock()
	defer s.prep.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, f := range s.mu.files {
		f.use.Lock()
		errs = append(errs, f.f.Close())
		f.use.Unlock()
	}
	if s.prep.next != nil {
		errs = append(errs, s.prep.next.f.Close())
	}
	return errors.Join(errs...)
}

func (s *Store) path(name string) string { return filepath.Join(s.dir, name) }
