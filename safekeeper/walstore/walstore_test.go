package walstore_test

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"strings"
	"testing"

	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
	"golang.org/x/sys/unix"

	"github.com/holdfastdb/holdfast/safekeeper/walstore"
	"github.com/holdfastdb/holdfast/safekeeper/walstore/walstoretest"
)

const dir = "d"

type store struct {
	*walstore.Store
	t    *testing.T
	fs   *walstoretest.FS
	logs bytes.Buffer
}

func open(t *testing.T, fs *walstoretest.FS) *store {
	t.Helper()
	s, err := tryOpen(t, fs)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func tryOpen(t *testing.T, fs *walstoretest.FS) (*store, error) {
	s := &store{t: t, fs: fs}
	var err error
	s.Store, err = walstore.Open(dir, []uint64{1, 2, 3}, walstore.Options{FS: fs, FileBytes: 8 << 10, CacheBytes: 1 << 10,
		Log: slog.New(slog.NewTextHandler(&s.logs, nil))})
	return s, err
}

func entry(index, term uint64) *raftpb.Entry {
	return &raftpb.Entry{Index: new(index), Term: new(term), Type: raftpb.EntryNormal.Enum(),
		Data: fmt.Appendf(nil, "%d/%d %s", index, term, strings.Repeat("x", int(index%300)))}
}

// put writes entries first..last of a term, in one batch.
func (s *store) put(first, last, term uint64) {
	s.t.Helper()
	if err := s.tryPut(first, last, term); err != nil {
		s.t.Fatal(err)
	}
}

func (s *store) tryPut(first, last, term uint64) error {
	b := walstore.Batch{HardState: &raftpb.HardState{Term: new(term), Vote: new(uint64(2)), Commit: new(last)}}
	for i := first; i <= last; i++ {
		b.Entries = append(b.Entries, entry(i, term))
	}
	return s.Write([]walstore.Batch{b})
}

// holds checks that entries first..last are there, of this term, and nothing after.
func (s *store) holds(first, last, term uint64) {
	s.t.Helper()
	for i := first; i <= last; i++ {
		e, err := s.Entry(i)
		if err != nil {
			s.t.Fatalf("entry %d: %v", i, err)
		}
		if want := entry(i, term); !bytes.Equal(e.GetData(), want.GetData()) || e.GetTerm() != term {
			s.t.Fatalf("entry %d is %.20q of term %d", i, e.GetData(), e.GetTerm())
		}
	}
	if n, _ := s.LastIndex(); n != last {
		s.t.Fatalf("the last index is %d, want %d", n, last)
	}
}

func TestWriteAndOpenAgain(t *testing.T) {
	fs := walstoretest.New()
	s := open(t, fs)
	for i := uint64(1); i <= 200; i += 4 { // several files
		s.put(i, i+3, 1)
	}
	s.holds(1, 200, 1)
	s.put(150, 160, 2) // another leader's
	s.holds(150, 160, 2)
	fs.Kill()
	s = open(t, fs)
	s.holds(150, 160, 2)
	hs, cs, err := s.InitialState()
	if err != nil || hs.GetTerm() != 2 || hs.GetVote() != 2 || hs.GetCommit() != 160 || len(cs.GetVoters()) != 3 {
		t.Errorf("hard state %v, %v, %v", hs, cs, err)
	}
	ents, err := s.Entries(140, 161, 2000)
	if err != nil || len(ents) < 2 || len(ents) > 12 || ents[0].GetIndex() != 140 {
		t.Errorf("%d entries, %v", len(ents), err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestCompactAndSnapshot(t *testing.T) {
	fs := walstoretest.New()
	s := open(t, fs)
	s.put(1, 300, 1)
	size := s.Bytes()
	_, last, ok := s.Oldest()
	if !ok || last == 0 {
		t.Fatal("nothing can be let go")
	}
	if err := s.Compact(last, []byte("state")); err != nil {
		t.Fatal(err)
	}
	if s.Bytes() >= size {
		t.Errorf("%d bytes after compaction, %d before", s.Bytes(), size)
	}
	if _, err := s.Entry(last); !errors.Is(err, raft.ErrCompacted) {
		t.Errorf("a compacted entry: %v", err)
	}
	fs.Kill()
	s = open(t, fs)
	s.holds(last+1, 300, 1)
	snap, _ := s.Snapshot()
	if m := snap.GetMetadata(); m.GetIndex() != last || m.GetTerm() != 1 || string(snap.GetData()) != "state" {
		t.Errorf("snapshot %v", snap)
	}
	// A leader's snapshot replaces everything.
	snap = &raftpb.Snapshot{Data: []byte("new"), Metadata: &raftpb.SnapshotMetadata{Index: new(uint64(1000)), Term: new(uint64(3))}}
	if err := s.Write([]walstore.Batch{{Snapshot: snap}}); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if n, _ := s.LastIndex(); n != 1000 {
			t.Errorf("the last index is %d after a snapshot at 1000", n)
		}
		fs.Kill()
		s = open(t, fs)
	}
	s.put(1001, 1010, 3)
	fs.Kill()
	open(t, fs).holds(1001, 1010, 3)
}

// TestPowerFailures writes, loses power with a batch under way, and opens again: what was
// acknowledged is there, and of the batch a beginning or nothing.
func TestPowerFailures(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	fs := walstoretest.New()
	next := uint64(1)
	for range 100 {
		s := open(t, fs)
		last, _ := s.LastIndex()
		if last+1 < next {
			t.Fatalf("seed %d: entries up to %d were acknowledged, the log ends at %d", seed, next-1, last)
		}
		next = last + 1
		s.holds(1, last, 1)
		for range rng.IntN(5) {
			n := uint64(rng.IntN(30))
			s.put(next, next+n, 1)
			next += n + 1
			if rng.IntN(3) == 0 {
				if err := s.Mark(); err != nil {
					t.Fatal(err)
				}
			}
		}
		fs.FailSync(errors.New("test: power fails"))
		if err := s.tryPut(next, next+uint64(rng.IntN(40)), 1); err == nil {
			t.Fatal("a write without sync succeeds")
		}
		if err := s.tryPut(next, next, 1); err == nil {
			t.Fatal("a store takes more after a failed sync")
		}
		fs.FailSync(nil)
		fs.Crash(rng)
	}
}

// TestEveryFlippedBitIsSeen flips a bit in every record of a closed log.
func TestEveryFlippedBitIsSeen(t *testing.T) {
	fs := walstoretest.New()
	s := open(t, fs)
	for i := uint64(1); i <= 60; i++ {
		s.put(i, i, 1)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	for _, name := range fs.Names(dir) {
		data := fs.Data(name)
		used := bytes.LastIndexFunc(data, func(r rune) bool { return r != 0 }) - 48 // less the mark
		for off := 0; off < used; off += 13 {
			fs.Flip(name, int64(off))
			if got, err := tryOpen(t, fs); err == nil {
				// Padding between records is nobody's.
				if got.holds(1, 60, 1); strings.Contains(got.logs.String(), "torn") {
					t.Fatalf("bit flipped in %s at %d: taken for a torn end", name, off)
				}
			} else if !errors.Is(err, walstore.ErrDamaged) || !strings.Contains(err.Error(), name) || !strings.Contains(err.Error(), "offset") {
				t.Fatalf("bit flipped in %s at %d: %v", name, off, err)
			}
			fs.Flip(name, int64(off))
		}
	}
	open(t, fs).holds(1, 60, 1)
}

func TestMissingFilesAreSeen(t *testing.T) {
	for n := range 3 {
		fs := walstoretest.New()
		s := open(t, fs)
		s.put(1, 300, 1)
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		names := fs.Names(dir)
		if err := fs.Remove(names[n]); err != nil {
			t.Fatal(err)
		}
		if _, err := tryOpen(t, fs); !errors.Is(err, walstore.ErrDamaged) {
			t.Errorf("%s removed: %v", names[n], err)
		}
	}
}

func TestFlippedBitWhileRunning(t *testing.T) {
	fs := walstoretest.New()
	s := open(t, fs)
	s.put(1, 100, 1)
	fs.Flip(fs.Names(dir)[0], 700)
	for i := uint64(1); i <= 100; i++ {
		if e, err := s.Entry(i); err != nil {
			if !errors.Is(err, walstore.ErrDamaged) {
				t.Errorf("entry %d: %v", i, err)
			}
			return
		} else if !bytes.Equal(e.GetData(), entry(i, 1).GetData()) {
			t.Errorf("entry %d is served damaged", i)
		}
	}
	t.Error("no entry was found damaged")
}

func TestFullDisk(t *testing.T) {
	fs := walstoretest.New()
	s := open(t, fs)
	fs.SetFree(0)
	n := uint64(1)
	var err error
	for ; err == nil; n++ {
		err = s.tryPut(n, n, 1)
	}
	n--
	if !walstore.IsFull(err) || !errors.Is(err, unix.ENOSPC) || !strings.Contains(err.Error(), ".log") {
		t.Fatalf("on a full disk: %v", err)
	}
	s.holds(1, n-1, 1)
	fs.SetFree(-1)
	s.put(n, n+10, 1)
	s.holds(1, n+10, 1)
	fs.Kill()
	open(t, fs).holds(1, n+10, 1)
}
