package walstore

import (
	"fmt"

	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
)

func (s *Store) snapshot() *raftpb.Snapshot {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.mu.snap
}

// InitialState implements raft.Storage.
func (s *Store) InitialState() (*raftpb.HardState, *raftpb.ConfState, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	h := s.mu.hard
	// The commit index is written lazily: a snapshot may be ahead of it.
	commit := max(h.GetCommit(), s.mu.snap.GetMetadata().GetIndex())
	hs := &raftpb.HardState{Term: new(h.GetTerm()), Vote: new(h.GetVote()), Commit: new(commit)}
	return hs, &raftpb.ConfState{Voters: s.voters}, nil
}

// FirstIndex implements raft.Storage.
func (s *Store) FirstIndex() (uint64, error) {
	return s.snapshot().GetMetadata().GetIndex() + 1, nil
}

// LastIndex implements raft.Storage.
func (s *Store) LastIndex() (uint64, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.lastLocked(), nil
}

func (s *Store) lastLocked() uint64 {
	return s.mu.snap.GetMetadata().GetIndex() + uint64(len(s.mu.ents))
}

// Term implements raft.Storage.
func (s *Store) Term(i uint64) (uint64, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	m := s.mu.snap.GetMetadata()
	switch {
	case i < m.GetIndex():
		return 0, raft.ErrCompacted
	case i == m.GetIndex():
		return m.GetTerm(), nil
	case i > s.lastLocked():
		return 0, raft.ErrUnavailable
	}
	return s.mu.ents[i-m.GetIndex()-1].term, nil
}

// Snapshot implements raft.Storage.
func (s *Store) Snapshot() (*raftpb.Snapshot, error) { return s.snapshot(), nil }

// Entries implements raft.Storage.
func (s *Store) Entries(lo, hi, maxSize uint64) ([]*raftpb.Entry, error) {
	s.mu.RLock()
	base, last := s.mu.snap.GetMetadata().GetIndex(), s.lastLocked()
	s.mu.RUnlock()
	if lo <= base {
		return nil, raft.ErrCompacted
	}
	if hi > last+1 {
		return nil, raft.ErrUnavailable
	}
	var out []*raftpb.Entry
	var size uint64
	for i := lo; i < hi; i++ {
		e, err := s.Entry(i)
		if err != nil {
			return nil, err
		}
		// What raft counts is the encoded size: the data, and some bytes about it.
		if size += uint64(len(e.GetData())) + 24; size > maxSize && len(out) > 0 {
			break
		}
		out = append(out, e)
	}
	return out, nil
}

// Entry reads one entry: from memory, or from its file with its CRC checked. Its data must
// not be changed. raft.ErrCompacted: it is held no more.
func (s *Store) Entry(i uint64) (*raftpb.Entry, error) {
	s.mu.RLock()
	base, last := s.mu.snap.GetMetadata().GetIndex(), s.lastLocked()
	switch {
	case i <= base:
		s.mu.RUnlock()
		return nil, raft.ErrCompacted
	case i > last:
		s.mu.RUnlock()
		return nil, raft.ErrUnavailable
	}
	if n := last - i; n < uint64(len(s.mu.recent)) {
		e := s.mu.recent[uint64(len(s.mu.recent))-1-n]
		s.mu.RUnlock()
		return e, nil
	}
	p := s.mu.ents[i-base-1]
	p.file.use.RLock()
	defer p.file.use.RUnlock()
	s.mu.RUnlock()
	b := make([]byte, recordHeader+int(p.size))
	if _, err := p.file.f.ReadAt(b, int64(p.off)); err != nil {
		return nil, fmt.Errorf("reading entry %d from %s at %d: %w", i, p.file.path, p.off, err)
	}
	r, ok := parseRecord(b, p.file.salt)
	if !ok || r.kind != kindEntry || r.index != i || r.term != p.term {
		return nil, fmt.Errorf("entry %d in %s at offset %d: %w", i, p.file.path, p.off, ErrDamaged)
	}
	return &raftpb.Entry{Index: new(i), Term: new(p.term), Type: raftpb.EntryNormal.Enum(), Data: r.payload}, nil
}

// Bytes is the size of the log files.
func (s *Store) Bytes() int64 {
	s.mu.RLock()
	defer s.mu.RUnlock()
	var n int64
	for _, f := range s.mu.files {
		n += f.size
	}
	return n
}
