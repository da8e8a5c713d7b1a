package walstore

import (
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"strconv"
	"strings"

	"go.etcd.io/raft/v3/raftpb"
)

// Open reads the log in dir, or makes an empty one, and is ready to go on where it ends. A
// torn tail, which a crash leaves, is cut off; damage is an error (ErrDamaged) and changes
// nothing. voters are the members of the group.
func Open(dir string, voters []uint64, opt Options) (_ *Store, err error) {
	if opt.FS == nil {
		opt.FS = OS{}
	}
	if opt.FileBytes == 0 {
		opt.FileBytes = defaultFileBytes
	}
	if opt.CacheBytes == 0 {
		opt.CacheBytes = defaultCacheBytes
	}
	if opt.Random == nil {
		opt.Random = rand.Uint64
	}
	if opt.Log == nil {
		opt.Log = slog.New(slog.DiscardHandler)
	}
	s := &Store{dir: dir, opt: opt, fs: opt.FS, log: opt.Log, voters: voters}
	defer func() {
		if err != nil {
			for _, f := range s.mu.files {
				f.f.Close()
			}
			err = s.explain(err)
		}
	}()
	if err := s.fs.MkdirAll(dir); err != nil {
		return nil, err
	}
	snap, err := s.loadSnapshot()
	if err != nil {
		return nil, err
	}
	s.mu.snap = snap
	if err := s.recoverFiles(); err != nil {
		return nil, err
	}
	return s, nil
}

// explain adds to damage what can be done about it.
func (s *Store) explain(err error) error {
	if errors.Is(err, ErrDamaged) {
		return fmt.Errorf("%w; this replica does not start, so that it serves nothing wrong. Its peers have what it holds: delete %s and start again, and it is rebuilt from them", err, s.dir)
	}
	return fmt.Errorf("opening the log in %s: %w", s.dir, err)
}

// scan gathers what the log files say, in order.
type scan struct {
	ents  []position
	first uint64 // index of ents[0]; meaningless when there are none
	hard  raftpb.HardState
	reset uint64 // of the last reset record
	ended bool   // the last file read has an end record
}

func (s *Store) recoverFiles() error {
	seqs, err := s.listFiles()
	if err != nil {
		return err
	}
	var sc scan
	for i, seq := range seqs {
		f, b, err := s.openFile(seq)
		if err != nil {
			return err
		}
		s.mu.files = append(s.mu.files, f)
		if i > 0 && !sc.ended {
			if err := s.takePrepared(f, b, i == len(seqs)-1); err != nil {
				return err
			}
			break
		}
		sc.ended = false
		if err := s.scanFile(f, b, &sc); err != nil {
			return err
		}
	}
	if len(seqs) == 0 || sc.ended {
		if err := s.startFile(seqs); err != nil {
			return err
		}
	}
	return s.adopt(&sc)
}

// startFile makes the file that new records go to.
func (s *Store) startFile(seqs []uint64) error {
	seq := uint64(1)
	if len(seqs) > 0 {
		seq = seqs[len(seqs)-1] + 1
	}
	f, err := s.makeFile(seq, s.opt.FileBytes)
	if err != nil {
		return err
	}
	s.mu.files = append(s.mu.files, f)
	s.w.cur, s.w.off, s.w.synced = f, fileHeader, fileHeader
	return nil
}

func (s *Store) listFiles() ([]uint64, error) {
	names, err := s.fs.List(s.dir)
	if err != nil {
		return nil, err
	}
	var seqs []uint64
	for _, name := range names {
		if strings.HasSuffix(name, ".tmp") { // half-made when a crash came
			if err := s.fs.Remove(s.path(name)); err != nil {
				return nil, err
			}
			continue
		}
		hex, isLog := strings.CutSuffix(name, ".log")
		if !isLog {
			continue
		}
		seq, err := strconv.ParseUint(hex, 16, 64)
		if err != nil {
			return nil, fmt.Errorf("%s is not a log file's name", s.path(name))
		}
		if n := len(seqs); n > 0 && seqs[n-1]+1 != seq {
			return nil, fmt.Errorf("%w: log file %s is missing", ErrDamaged, s.path(logName(seqs[n-1]+1)))
		}
		seqs = append(seqs, seq)
	}
	if len(seqs) == 0 && s.mu.snap.GetMetadata().GetIndex() > 0 {
		return nil, fmt.Errorf("%w: there is a snapshot and no log file", ErrDamaged)
	}
	return seqs, nil
}

func (s *Store) openFile(seq uint64) (*logFile, []byte, error) {
	path := s.path(logName(seq))
	f, err := s.fs.Open(path, false)
	if err != nil {
		return nil, nil, err
	}
	b, err := readAll(f)
	if err == nil {
		var salt uint64
		if salt, err = parseFileHeader(b, seq); err == nil {
			return &logFile{f: f, path: path, seq: seq, salt: salt, size: int64(len(b))}, b, nil
		}
	}
	f.Close()
	return nil, nil, fmt.Errorf("%s: %w", path, err)
}

// takePrepared takes the file that was made ready and not begun. One with records in it
// means that the end of the file before was lost.
func (s *Store) takePrepared(f *logFile, b []byte, isLast bool) error {
	before := s.mu.files[len(s.mu.files)-2]
	if _, ok := findRecord(b, fileHeader, f.salt, 0); ok || !isLast {
		return fmt.Errorf("%s: %w at offset %d: the log goes on in the next file and its end is not here", before.path, ErrDamaged, s.w.off)
	}
	s.mu.files = s.mu.files[:len(s.mu.files)-1]
	s.prep.next = f
	return nil
}

// findRecord looks from offset at on for a record whose "durable" is at least min.
func findRecord(b []byte, at int, salt uint64, min int64) (off int, ok bool) {
	for ; at+recordHeader <= len(b); at += 8 {
		if le.Uint64(b[at+8:]) != salt {
			continue
		}
		if r, ok := parseRecord(b[at:], salt); ok && int64(r.durable) >= min {
			return at, true
		}
	}
	return 0, false
}

func (s *Store) scanFile(f *logFile, b []byte, sc *scan) error {
	at := fileHeader
	for {
		r, ok := parseRecord(b[at:], f.salt)
		if !ok {
			break
		}
		if err := sc.take(f, at, r); err != nil {
			return fmt.Errorf("%s at offset %d: %w", f.path, at, err)
		}
		if r.kind == kindMark { // the next batch overwrites it
			break
		}
		at += recordSize(len(r.payload))
		if r.kind == kindEnd {
			sc.ended = true
			break
		}
	}
	s.w.cur, s.w.off, s.w.synced = f, int64(at), int64(at)
	if sc.ended {
		return nil
	}
	return s.checkTail(f, b, at)
}

// checkTail looks at what follows the last good record, which ends at offset at.
func (s *Store) checkTail(f *logFile, b []byte, at int) error {
	if later, ok := findRecord(b, at, f.salt, int64(at)+1); ok {
		return fmt.Errorf("%s: %w at offset %d: what stands there is no record, and the record at %d says that it was on the disk", f.path, ErrDamaged, at, later)
	}
	from := at
	if r, ok := parseRecord(b[at:], f.salt); ok && r.kind == kindMark {
		from = at + recordHeader
	}
	_, remnants := findRecord(b, from, f.salt, 0)
	torn := from == at && len(b) >= at+recordHeader && le.Uint64(b[at+8:]) == f.salt
	if !torn && !remnants {
		return nil
	}
	s.log.Warn("cut off the torn end of the log: a write that a crash interrupted and nobody was told of", "file", f.path, "offset", at)
	if _, err := f.f.WriteAt(make([]byte, len(b)-at), int64(at)); err != nil {
		return fmt.Errorf("cutting off the torn end of %s: %w", f.path, err)
	}
	return s.sync(f)
}

// take adds one record to what the log says.
func (sc *scan) take(f *logFile, at int, r record) error {
	switch r.kind {
	case kindEntry:
		n := uint64(len(sc.ents))
		if n == 0 {
			sc.first = r.index
		}
		if r.index < sc.first {
			// A leader replaced the log from an entry on that was in a file since let go.
			sc.ents, sc.first, n = nil, r.index, 0
		}
		if r.index > sc.first+n || n == 0 && sc.reset != 0 && r.index > sc.reset+1 {
			return fmt.Errorf("%w: entry %d stands where entries %d to %d could", ErrDamaged, r.index, sc.first, sc.first+n)
		}
		sc.ents = append(sc.ents[:r.index-sc.first], position{file: f, off: uint32(at), size: uint32(len(r.payload)), term: r.term})
	case kindHardState:
		if len(r.payload) != 8 {
			return fmt.Errorf("%w: hard state of %d bytes", ErrDamaged, len(r.payload))
		}
		sc.hard = raftpb.HardState{Term: new(r.term), Vote: new(le.Uint64(r.payload)), Commit: new(r.index)}
	case kindReset:
		sc.ents, sc.reset = nil, r.index
	case kindEnd, kindMark:
	default:
		return fmt.Errorf("record of kind %d is not known to this version", r.kind)
	}
	return nil
}

// adopt brings the entries and the snapshot together.
func (s *Store) adopt(sc *scan) error {
	m := s.mu.snap.GetMetadata()
	base, n := m.GetIndex(), uint64(len(sc.ents))
	switch last := sc.first + n - 1; {
	case n == 0:
		s.w.reset = base != sc.reset
	case sc.first > base+1:
		return fmt.Errorf("%w: the log begins with entry %d, the snapshot ends at %d", ErrDamaged, sc.first, base)
	case sc.first == base+1:
		s.mu.ents = sc.ents
	case last < base || sc.ents[base-sc.first].term != m.GetTerm():
		// The snapshot came from the leader and replaced all this.
		s.w.reset = true
	default:
		s.mu.ents = sc.ents[base+1-sc.first:]
	}
	s.mu.floor = s.w.cur
	h := &sc.hard
	// A commit index that was written with entries which a torn tail lost is too high.
	commit := min(max(h.GetCommit(), base), s.lastLocked())
	s.w.hardState = raftpb.HardState{Term: new(h.GetTerm()), Vote: new(h.GetVote()), Commit: new(commit)}
	s.mu.hard = &raftpb.HardState{Term: new(h.GetTerm()), Vote: new(h.GetVote()), Commit: new(commit)}
	return nil
}
