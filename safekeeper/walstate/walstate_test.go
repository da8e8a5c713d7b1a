package walstate

import (
	"bytes"
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/holdfastdb/holdfast/internal/pg"
)

func commands() []Command {
	return []Command{
		{Kind: KindCreateBranch, ID: 1, Name: Name{"p", "b"}, Begin: 8},
		{Kind: KindOpenEpoch, ID: 2, Branch: 1, Node: "n"},
		{Kind: KindAppend, Branch: 1, Epoch: 1, Begin: 8, End: 24, Counter: 7, Object: []byte("o"), WrappedDEK: []byte("w"), Ciphertext: []byte("cc")},
		{Kind: KindDurable, ID: 3, Branch: 1, Begin: 16},
		{Kind: KindArchived, ID: 4, Branch: 1, Begin: 8, End: 24, Bytes: 99},
		{Kind: KindRewrap, ID: 5, Branch: 1, Rewraps: []Rewrap{{[]byte("o"), []byte("w"), []byte("w2")}, {[]byte("p"), []byte("x"), []byte("x2")}}},
		{Kind: KindDeleteBranch, ID: 5, Branch: 1},
		{Kind: KindPiece, Branch: 1, Epoch: 1, Begin: 8, End: 24, Counter: 7, Object: []byte("o"), WrappedDEK: []byte("w"), Ciphertext: []byte("cc")},
		{Kind: KindDropPieces, ID: 5, Branch: 1, Begin: 16},
	}
}

func TestCommandsComeBackAsTheyWent(t *testing.T) {
	for _, c := range commands() {
		b := c.Encode(nil)
		got, err := Decode(b)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(c, got); diff != "" {
			t.Error(diff)
		}
		for n := range b {
			if _, err := Decode(b[:n]); err == nil && c.Kind != KindAppend && c.Kind != KindPiece {
				t.Errorf("kind %d cut to %d of %d bytes is taken", c.Kind, n, len(b))
			}
		}
	}
}

func FuzzDecode(f *testing.F) {
	for _, c := range commands() {
		f.Add(c.Encode(nil))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if c, err := Decode(b); err == nil && !bytes.Equal(c.Encode(nil), b) {
			t.Errorf("%x is read as %+v, which is written as %x", b, c, c.Encode(nil))
		}
	})
}

// apply applies a command that must have the given outcome.
func apply(t *testing.T, s *State, c Command, want error) Result {
	t.Helper()
	r, err := s.Apply(s.Applied()+1, c.Encode(nil))
	if err != nil {
		t.Fatal(err)
	}
	if !errors.Is(r.Err, want) {
		t.Fatalf("%+v: %v, want %v", c, r.Err, want)
	}
	return r
}

func TestWhatAppliesDecides(t *testing.T) {
	s := New()
	app := func(epoch uint64, begin, end uint64) Command {
		return Command{Kind: KindAppend, Branch: 1, Epoch: epoch, Begin: pg.LSN(begin), End: pg.LSN(end)}
	}
	open := Command{Kind: KindOpenEpoch, Branch: 1}
	create := Command{Kind: KindCreateBranch, Name: Name{"p", "b"}, Begin: 8}
	apply(t, s, open, ErrNoBranch)
	apply(t, s, create, nil)
	apply(t, s, create, nil) // idempotent
	create.Begin = 16
	apply(t, s, create, ErrOtherStart)
	apply(t, s, app(1, 8, 16), ErrFenced) // no epoch is open
	if r := apply(t, s, open, nil); r.Epoch != 1 || r.Start != 8 || r.End != 8 {
		t.Errorf("first epoch: %+v", r)
	}
	apply(t, s, app(1, 8, 16), nil)
	apply(t, s, app(1, 8, 16), ErrGap)
	apply(t, s, app(1, 24, 32), ErrGap)
	apply(t, s, app(1, 16, 32), nil)
	if r := apply(t, s, open, nil); r.Epoch != 2 || r.End != 32 {
		t.Errorf("second epoch: %+v", r)
	}
	apply(t, s, app(1, 32, 40), ErrFenced) // W2
	apply(t, s, app(2, 32, 40), nil)

	apply(t, s, Command{Kind: KindDurable, Branch: 1, Begin: 48}, ErrBadInterval)
	apply(t, s, Command{Kind: KindArchived, Branch: 1, Begin: 16, End: 32}, ErrGap) // leaves 8 to 16 out
	apply(t, s, Command{Kind: KindArchived, Branch: 1, Begin: 8, End: 32}, nil)
	if b, from, to := s.Needs(s.Applied()); b == nil || from != 32 || to != 40 {
		t.Errorf("needed: %v to %v", from, to)
	}
	r := apply(t, s, Command{Kind: KindDurable, Branch: 1, Begin: 40}, nil)
	if len(r.Dropped) != 1 || r.Dropped[0].End != 32 {
		t.Errorf("dropped %v", r.Dropped)
	}
	if b, _, _ := s.Needs(s.Applied()); b != nil {
		t.Error("WAL that is durable elsewhere is needed")
	}
	s.Forget(s.Branch(1).Chunks[0].Index)
	if _, ok := s.Branch(1).Find(8); ok {
		t.Error("a forgotten chunk is found")
	}
	if _, ok := s.Branch(1).Find(17); !ok {
		t.Error("a chunk that is there is not found")
	}

	b, err := s.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	back, err := Restore(b)
	if err != nil {
		t.Fatal(err)
	}
	want := *s.Branch(1)
	want.Chunks = nil
	if diff := cmp.Diff(want, *back.Branch(1)); diff != "" || back.Applied() != s.Applied() {
		t.Error(diff)
	}
	for n := range b {
		if _, err := Restore(b[:n]); err == nil {
			t.Errorf("a snapshot cut to %d bytes is taken", n)
		}
	}
}

// A number that came back would give a deleted branch's entries, which are in the log still, to another.
func TestADeletedBranchsNumberIsNotGivenOutAgain(t *testing.T) {
	s := New()
	first, second := Command{Kind: KindCreateBranch, Name: Name{"p", "a"}, Begin: 8}, Command{Kind: KindCreateBranch, Name: Name{"p", "b"}, Begin: 8}
	apply(t, s, first, nil)
	apply(t, s, Command{Kind: KindOpenEpoch, Branch: 1}, nil)
	apply(t, s, Command{Kind: KindAppend, Branch: 1, Epoch: 1, Begin: 8, End: 24}, nil)
	apply(t, s, Command{Kind: KindArchived, Branch: 1, Begin: 8, End: 16, Bytes: 9}, nil)
	if r := apply(t, s, Command{Kind: KindDeleteBranch, Branch: 1}, nil); len(r.Dropped) != 1 || r.Branch == nil {
		t.Errorf("deleted: %+v, want its archive dropped", r)
	}
	apply(t, s, Command{Kind: KindDeleteBranch, Branch: 1}, ErrNoBranch)
	apply(t, s, Command{Kind: KindAppend, Branch: 1, Epoch: 1, Begin: 24, End: 32}, ErrNoBranch) // was under way
	if b, _, _ := s.Needs(s.Applied()); b != nil || s.Lookup(first.Name) != nil {
		t.Error("WAL of a deleted branch is needed, or the branch found")
	}
	data, err := s.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	if s, err = Restore(data); err != nil {
		t.Fatal(err)
	}
	if r := apply(t, s, second, nil); r.Branch.No != 2 {
		t.Errorf("the next branch has number %d, want 2", r.Branch.No)
	}
	if r := apply(t, s, first, nil); r.Branch.No != 3 || r.Branch.End != 8 {
		t.Errorf("made anew: %+v, want number 3 and an empty log", r.Branch)
	}
}

// Pieces of a record are no part of the log until its last one comes, and hold the Raft log until then.
func TestPieces(t *testing.T) {
	cmd := func(kind Kind, epoch, begin, end uint64) Command {
		return Command{Kind: kind, Branch: 1, Epoch: epoch, Begin: pg.LSN(begin), End: pg.LSN(end), Object: []byte{byte('a' + begin/24)}, WrappedDEK: []byte("w")}
	}
	start := func(t *testing.T) *State {
		s := New()
		apply(t, s, Command{Kind: KindCreateBranch, Name: Name{"p", "b"}, Begin: 8}, nil)
		apply(t, s, Command{Kind: KindOpenEpoch, Branch: 1}, nil)
		apply(t, s, cmd(KindAppend, 1, 8, 16), nil)
		apply(t, s, cmd(KindPiece, 1, 16, 24), nil)
		apply(t, s, cmd(KindPiece, 1, 24, 32), nil)
		return s
	}
	want := func(t *testing.T, s *State, end, held pg.LSN, chunks, pieces int) {
		t.Helper()
		if b := s.Branch(1); b.End != end || b.Held != held || len(b.Chunks) != chunks || len(b.Pieces) != pieces {
			t.Fatalf("%+v; want end %v, held %v, %d chunks, %d pieces", b, end, held, chunks, pieces)
		}
		if pinned := s.Pinned(s.Applied()) != nil; pinned != (pieces > 0) {
			t.Fatalf("pinned: %v", pinned)
		}
		b := s.Branch(1)
		for i, d := range b.DEKs { // ascending, to the end of what there is
			if d.Begin >= d.End || i > 0 && d.Begin < b.DEKs[i-1].End {
				t.Fatalf("DEKs: %+v", b.DEKs)
			}
		}
		if n := len(b.DEKs); n == 0 || b.DEKs[n-1].End != max(b.End, b.Held) {
			t.Fatalf("DEKs: %+v", b.DEKs)
		}
	}
	for name, c := range map[string]struct {
		do           []Command
		err          error // the last one's
		end, held    pg.LSN
		chunks, open int
	}{
		"whole":            {[]Command{cmd(KindAppend, 1, 32, 40)}, nil, 40, 0, 4, 0},
		"and more":         {[]Command{cmd(KindAppend, 1, 32, 40), cmd(KindAppend, 1, 40, 48)}, nil, 48, 0, 5, 0},
		"a gap":            {[]Command{cmd(KindPiece, 1, 40, 48)}, ErrGap, 16, 32, 1, 2},
		"a gap at the end": {[]Command{cmd(KindAppend, 1, 40, 48)}, ErrGap, 16, 32, 1, 2},
		"twice":            {[]Command{cmd(KindPiece, 1, 24, 32)}, ErrGap, 16, 32, 1, 2},
		"empty":            {[]Command{cmd(KindPiece, 1, 32, 32)}, ErrGap, 16, 32, 1, 2},
		"sent again":       {[]Command{cmd(KindPiece, 1, 16, 24)}, nil, 16, 24, 1, 1},
		"given up":         {[]Command{cmd(KindAppend, 1, 16, 24)}, nil, 24, 0, 2, 0},
		"old epoch":        {[]Command{cmd(KindPiece, 0, 32, 40)}, ErrFenced, 16, 32, 1, 2},
		"new epoch":        {[]Command{{Kind: KindOpenEpoch, Branch: 1}}, nil, 16, 0, 1, 0},
		"the end, fenced":  {[]Command{{Kind: KindOpenEpoch, Branch: 1}, cmd(KindAppend, 1, 32, 40)}, ErrFenced, 16, 0, 1, 0},
		"the end of other": {[]Command{{Kind: KindOpenEpoch, Branch: 1}, cmd(KindAppend, 2, 32, 40)}, ErrGap, 16, 0, 1, 0},
		"dropped":          {[]Command{{Kind: KindDropPieces, Branch: 1, Begin: 32}}, nil, 16, 0, 1, 0},
		"dropped late":     {[]Command{{Kind: KindDropPieces, Branch: 1, Begin: 24}}, nil, 16, 32, 1, 2},
	} {
		t.Run(name, func(t *testing.T) {
			s := start(t)
			for i, cmd := range c.do {
				var err error
				if i == len(c.do)-1 {
					err = c.err
				}
				apply(t, s, cmd, err)
			}
			want(t, s, c.end, c.held, c.chunks, c.open)
		})
	}
	// A replica that begins from a snapshot in the middle comes to the same log. Its Raft log
	// does not have the pieces before: they are in the archive, or the snapshot would not be.
	s := start(t)
	b, err := s.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	back, err := Restore(b)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []*State{s, back} {
		apply(t, s, cmd(KindPiece, 1, 32, 40), nil)
		apply(t, s, cmd(KindAppend, 1, 40, 48), nil)
	}
	want(t, s, 48, 0, 5, 0)
	want(t, back, 48, 0, 2, 0)
	s.Forget(4)
	want(t, s, 48, 0, 3, 0)
}
