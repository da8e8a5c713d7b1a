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
			if _, err := Decode(b[:n]); err == nil && c.Kind != KindAppend {
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
