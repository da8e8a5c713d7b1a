package walstate

import (
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/holdfastdb/holdfast/internal/pg"
)

// sealedUnder appends [begin, end) under a DEK.
func sealedUnder(object, wrapped string, begin, end uint64) Command {
	return Command{Kind: KindAppend, Branch: 1, Epoch: 1, Begin: pg.LSN(begin), End: pg.LSN(end), Object: []byte(object), WrappedDEK: []byte(wrapped)}
}

// forms tells the index in one line.
func forms(b *Branch) string {
	var list []string
	for _, d := range b.DEKs {
		list = append(list, fmt.Sprintf("%s=%s[%d,%d)", d.Object, d.Wrapped, uint64(d.Begin), uint64(d.End)))
	}
	return strings.Join(list, " ")
}

func wantForms(t *testing.T, s *State, want string) {
	t.Helper()
	if got := forms(s.Branch(1)); got != want {
		t.Errorf("the index is %s, want %s", got, want)
	}
}

func restored(t *testing.T, s *State) *State {
	t.Helper()
	image, err := s.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	back, err := Restore(image)
	if err != nil {
		t.Fatal(err)
	}
	return back
}

func TestWrappedFormsAreKept(t *testing.T) {
	s := New()
	apply(t, s, Command{Kind: KindCreateBranch, Name: Name{"p", "b"}, Begin: 8}, nil)
	apply(t, s, Command{Kind: KindOpenEpoch, Branch: 1}, nil)
	apply(t, s, sealedUnder("x", "x1", 8, 16), nil)
	apply(t, s, sealedUnder("x", "x1", 16, 24), nil)
	apply(t, s, sealedUnder("y", "y1", 24, 32), nil)
	apply(t, s, sealedUnder("y", "y1", 40, 48), ErrGap) // what is refused is not sealed WAL
	wantForms(t, s, "x=x1[8,24) y=y1[24,32)")

	rewrap := Command{Kind: KindRewrap, Branch: 1, Rewraps: []Rewrap{
		{[]byte("x"), []byte("x1"), []byte("x2")},
		{[]byte("y"), []byte("not so"), []byte("y2")}, // re-wrapped by somebody else meanwhile
		{[]byte("gone"), []byte("g1"), []byte("g2")},
	}}
	apply(t, s, rewrap, nil)
	apply(t, s, rewrap, nil) // the same again changes nothing
	wantForms(t, s, "x=x2[8,24) y=y1[24,32)")
	rewrap.Rewraps = []Rewrap{{[]byte("y"), []byte("y1"), []byte("y2")}}
	apply(t, s, rewrap, nil)
	apply(t, s, sealedUnder("y", "y1", 32, 40), nil) // the leader knows the old form
	wantForms(t, s, "x=x2[8,24) y=y2[24,40)")

	b := s.Branch(1)
	for lsn, want := range map[pg.LSN]string{8: "x2", 16: "x2", 24: "", 40: ""} {
		if got := string(b.Wrapped("x", lsn)); got != want {
			t.Errorf("the form of x at %d is %q, want %q", lsn, got, want)
		}
	}
	if diff := cmp.Diff(b.DEKs, restored(t, s).Branch(1).DEKs); diff != "" {
		t.Errorf("a snapshot loses %s", diff)
	}

	// A DEK is known as long as the log has WAL under it, though nobody needs that.
	apply(t, s, Command{Kind: KindDurable, Branch: 1, Begin: 24}, nil)
	wantForms(t, s, "x=x2[8,24) y=y2[24,40)")
	s.Forget(b.Chunks[0].Index)
	wantForms(t, s, "x=x2[8,24) y=y2[24,40)")
	s.Forget(b.Chunks[0].Index)
	wantForms(t, s, "y=y2[24,40)")
	apply(t, s, Command{Kind: KindDurable, Branch: 1, Begin: 40}, nil)
	s.Forget(s.Applied())
	wantForms(t, s, "")
}

// TestSnapshotFromBeforeTheIndex: of what an older program archived nobody knows the DEKs, until it is in layers.
func TestSnapshotFromBeforeTheIndex(t *testing.T) {
	s := New()
	apply(t, s, Command{Kind: KindCreateBranch, Name: Name{"p", "b"}, Begin: 8}, nil)
	apply(t, s, Command{Kind: KindOpenEpoch, Branch: 1}, nil)
	apply(t, s, sealedUnder("x", "x1", 8, 24), nil)
	apply(t, s, Command{Kind: KindArchived, Branch: 1, Begin: 8, End: 24}, nil)
	s.Branch(1).DEKs = nil // as such a program had it
	image, err := s.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	old, err := Restore([]byte(strings.Replace(string(image), `"Version":2`, `"Version":1`, 1)))
	if err != nil {
		t.Fatal(err)
	}
	if at := old.Branch(1).Unindexed; at != 24 {
		t.Errorf("unindexed up to %d, want 24", at)
	}
	if at := restored(t, old).Branch(1).Unindexed; at != 24 {
		t.Errorf("after another snapshot, unindexed up to %d, want 24", at)
	}
	apply(t, old, Command{Kind: KindDurable, Branch: 1, Begin: 24}, nil)
	if at := old.Branch(1).Unindexed; at != 0 {
		t.Errorf("once it is in layers, unindexed up to %d, want 0", at)
	}
	if _, err := Restore([]byte(strings.Replace(string(image), `"Version":2`, `"Version":3`, 1))); err == nil {
		t.Error("a snapshot of a later program is taken")
	}
}
