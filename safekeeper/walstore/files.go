package walstore

import (
	"encoding/json"
	"fmt"
	"os"

	"go.etcd.io/raft/v3/raftpb"
)

const (
	spareName    = "spare.tmp"
	snapshotName = "snapshot"
	snapMagic    = "HFRAFTSN"
	zeroChunk    = 1 << 20
)

func logName(seq uint64) string { return fmt.Sprintf("%016x.log", seq) }

// takeNext gives the file that follows the current one, with room for at least need bytes.
func (s *Store) takeNext(need int64) (*logFile, error) {
	s.prep.Lock()
	defer s.prep.Unlock()
	next := s.prep.next
	if next != nil && next.size < need {
		if err := next.f.Close(); err != nil {
			return nil, err
		}
		next, s.prep.next = nil, nil
	}
	if next == nil {
		var err error
		if next, err = s.makeFile(s.w.cur.seq+1, max(need, s.opt.FileBytes)); err != nil {
			return nil, err
		}
	}
	s.prep.next = nil
	s.mu.Lock() // before prep is let go: Prepare must not make this file again
	s.mu.files = append(s.mu.files, next)
	s.mu.Unlock()
	return next, nil
}

// Prepare makes the next file ready if the current one is half full, so that no commit
// waits for that. Failing is no harm: Write tries again when it needs the file.
func (s *Store) Prepare() error {
	s.prep.Lock()
	defer s.prep.Unlock()
	s.mu.RLock()
	cur := s.mu.files[len(s.mu.files)-1]
	var last uint32
	if n := len(s.mu.ents); n > 0 && s.mu.ents[n-1].file == cur {
		last = s.mu.ents[n-1].off
	}
	s.mu.RUnlock()
	if s.prep.next != nil || int64(last) < cur.size/2 {
		return nil
	}
	next, err := s.makeFile(cur.seq+1, s.opt.FileBytes)
	if err == nil {
		s.prep.next = next
	}
	return err
}

// makeFile makes a log file durable, empty and allocated. The caller holds prep, or is alone.
func (s *Store) makeFile(seq uint64, size int64) (_ *logFile, err error) {
	temp := s.path(spareName)
	f, err := s.fs.Open(temp, true)
	if err != nil {
		return nil, fmt.Errorf("making log file %d: %w", seq, err)
	}
	defer func() {
		if err != nil {
			f.Close()
			s.prep.spare = ""
			_ = s.fs.Remove(temp) // gives back what a full disk lacks; the error at hand says why
			err = fmt.Errorf("making log file %s of %d bytes: %w", s.path(logName(seq)), size, err)
		}
	}()
	had, err := f.Size()
	if err != nil {
		return nil, err
	}
	if had > size {
		size = had
	}
	zeros := make([]byte, min(zeroChunk, size))
	for at := had; at < size; at += int64(len(zeros)) {
		if _, err := f.WriteAt(zeros[:min(int64(len(zeros)), size-at)], at); err != nil {
			return nil, err
		}
	}
	lf := &logFile{f: f, path: s.path(logName(seq)), seq: seq, salt: s.opt.Random(), size: size}
	if _, err := f.WriteAt(marshalFileHeader(seq, lf.salt), 0); err != nil {
		return nil, err
	}
	if err := f.Sync(); err != nil {
		return nil, err
	}
	if err := s.fs.Rename(temp, lf.path); err != nil {
		return nil, err
	}
	s.prep.spare = ""
	return lf, s.fs.SyncDir(s.dir)
}

// retire takes a log file out of use: it becomes the spare, or goes.
func (s *Store) retire(f *logFile) error {
	f.use.Lock() // waits for those who still read it
	err := f.f.Close()
	f.use.Unlock()
	if err != nil {
		return err
	}
	s.prep.Lock()
	defer s.prep.Unlock()
	if s.prep.spare == "" && f.size == s.opt.FileBytes {
		s.prep.spare = s.path(spareName)
		err = s.fs.Rename(f.path, s.prep.spare)
	} else {
		err = s.fs.Remove(f.path)
	}
	if err != nil {
		return err
	}
	return s.fs.SyncDir(s.dir) // files go in order, and none comes back under its old name
}

// savedSnapshot is the payload of the snapshot document.
type savedSnapshot struct {
	Index, Term uint64
	Data        []byte
}

func (s *Store) saveSnapshot(index, term uint64, data []byte) (*raftpb.Snapshot, error) {
	payload, err := json.Marshal(savedSnapshot{Index: index, Term: term, Data: data})
	if err != nil {
		return nil, err
	}
	if err := WriteDoc(s.fs, s.path(snapshotName), snapMagic, payload); err != nil {
		return nil, err
	}
	return s.makeSnapshot(savedSnapshot{Index: index, Term: term, Data: data}), nil
}

func (s *Store) makeSnapshot(v savedSnapshot) *raftpb.Snapshot {
	return &raftpb.Snapshot{Data: v.Data, Metadata: &raftpb.SnapshotMetadata{
		Index: new(v.Index), Term: new(v.Term), ConfState: &raftpb.ConfState{Voters: s.voters}}}
}

func (s *Store) loadSnapshot() (*raftpb.Snapshot, error) {
	payload, err := ReadDoc(s.fs, s.path(snapshotName), snapMagic)
	if os.IsNotExist(err) {
		return s.makeSnapshot(savedSnapshot{}), nil
	}
	if err != nil {
		return nil, err
	}
	var v savedSnapshot
	if err := json.Unmarshal(payload, &v); err != nil {
		return nil, fmt.Errorf("%s: %w", s.path(snapshotName), err)
	}
	return s.makeSnapshot(v), nil
}

// installSnapshot replaces the whole log by a snapshot from the leader.
func (s *Store) installSnapshot(snap *raftpb.Snapshot) error {
	s.snapshots.Lock()
	defer s.snapshots.Unlock()
	m := snap.GetMetadata()
	saved, err := s.saveSnapshot(m.GetIndex(), m.GetTerm(), snap.GetData())
	if err != nil {
		return err
	}
	// A crash after this line starts from the snapshot: recovery drops the entries.
	s.w.pending = s.w.pending[:0]
	s.w.reset = false
	s.mu.Lock()
	s.cutLocked(0)
	s.mu.snap = saved
	n := len(s.mu.files) - 1
	s.w.replaced = append(s.w.replaced, s.mu.files[:n:n]...)
	s.mu.files = s.mu.files[n:]
	s.mu.floor = s.w.cur
	s.mu.Unlock()
	s.w.reset = true
	return s.putReset()
}

// putReset writes down that the snapshot replaced the log before this place.
func (s *Store) putReset() error {
	m := s.snapshot().GetMetadata()
	_, err := s.put(record{kind: kindReset, index: m.GetIndex(), term: m.GetTerm()})
	s.w.reset = err != nil
	return err
}

func (s *Store) retireAll(files []*logFile) error {
	for _, f := range files {
		if err := s.retire(f); err != nil {
			return err
		}
	}
	return nil
}

// Oldest is the index of the last entry in the oldest log file, if that is not being written
// to: what Compact could let go next. first is the first entry that is held.
func (s *Store) Oldest() (first, last uint64, ok bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.mu.files[0] == s.mu.floor {
		return 0, 0, false
	}
	base := s.mu.snap.GetMetadata().GetIndex()
	n := 0
	for n < len(s.mu.ents) && s.mu.ents[n].file == s.mu.files[0] {
		n++
	}
	return base + 1, base + uint64(n), true
}

// Compact makes the state after entry index, as data, the snapshot, and lets the entries up
// to index go, with the files that hold no later one.
func (s *Store) Compact(index uint64, data []byte) error {
	s.snapshots.Lock()
	defer s.snapshots.Unlock()
	term, err := s.Term(index)
	if err != nil {
		return fmt.Errorf("compacting the log up to %d: %w", index, err)
	}
	snap := s.snapshot()
	had := snap.GetMetadata().GetIndex()
	if index > had {
		if snap, err = s.saveSnapshot(index, term, data); err != nil {
			return err
		}
	}
	s.mu.Lock()
	s.mu.ents = append([]position(nil), s.mu.ents[index-had:]...)
	for len(s.mu.recent) > len(s.mu.ents) {
		s.mu.bytes -= int64(len(s.mu.recent[0].GetData()))
		s.mu.recent = s.mu.recent[1:]
	}
	s.mu.snap = snap
	keep := s.mu.floor
	if len(s.mu.ents) > 0 && s.mu.ents[0].file.seq < keep.seq {
		keep = s.mu.ents[0].file
	}
	n := 0
	for s.mu.files[n].seq < keep.seq {
		n++
	}
	old := s.mu.files[:n:n]
	s.mu.files = s.mu.files[n:]
	s.mu.Unlock()
	return s.retireAll(old)
}
