package ingest

import (
	"context"
	"errors"
	"testing"

	"github.com/holdfastdb/holdfast/internal/auxfile"
	"github.com/holdfastdb/holdfast/internal/keyring/keyringtest"
	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/internal/seal"
)

// lifeBench is a bench whose core reads lives' messages, and counts what it asks of the keys' holder.
type lifeBench struct {
	*bench
	ring  *keyringtest.Ring
	calls int
}

func newLifeBench(t *testing.T) *lifeBench {
	b := &lifeBench{bench: newBench(t), ring: keyringtest.New()}
	b.enter("b", 1)
	return b
}

// enter has the records come of a branch's epoch.
func (b *lifeBench) enter(branch string, epoch uint64) {
	open := func(ctx context.Context, c seal.Context, wrapped []byte) (*seal.Key, error) {
		b.calls++
		return b.ring.Open(ctx, c, wrapped)
	}
	passOver := func(err error) error {
		if errors.Is(err, seal.ErrDamaged) {
			return nil
		}
		return err
	}
	b.core.Project, b.core.Branch, b.core.Epoch = "p", branch, epoch
	b.core.Aux = func(ctx context.Context, sealed []byte) ([]auxfile.Change, error) {
		changes, err := auxfile.Open(ctx, open, "p", branch, sealed)
		return changes, passOver(err)
	}
	b.core.AuxKey = func(ctx context.Context, epoch uint64, sealed []byte) ([]byte, error) {
		key, err := auxfile.OpenKey(ctx, open, "p", branch, epoch, sealed)
		return key, passOver(err)
	}
}

// begin begins a life in the epoch, and gives the record that tells its key.
func (b *lifeBench) begin() (*auxfile.Life, []byte) {
	b.t.Helper()
	life, told, err := auxfile.NewLife(b.t.Context(), b.ring, "p", b.core.Branch, b.core.Epoch)
	if err != nil {
		b.t.Fatal(err)
	}
	b.apply(rmLogicalMsg, 0, 0, auxfile.KeyRecord(told))
	return life, auxfile.KeyRecord(told)
}

// set makes a message that sets the settings; it does not apply it.
func (b *lifeBench) set(life *auxfile.Life, content string) []byte {
	b.t.Helper()
	changes := []auxfile.Change{{Path: auxfile.Settings, Content: []byte(content)}}
	sealed, err := []byte(nil), error(nil)
	if life == nil {
		sealed, err = auxfile.Seal(b.t.Context(), b.ring, "p", b.core.Branch, changes)
	} else {
		sealed, err = life.Seal(changes)
	}
	if err != nil {
		b.t.Fatal(err)
	}
	return auxfile.Record(sealed)
}

func (b *lifeBench) message(data []byte) { b.t.Helper(); b.apply(rmLogicalMsg, 0, 0, data) }

func (b *lifeBench) want(settings string) {
	b.t.Helper()
	if got, _ := b.auxFile(auxfile.Settings); string(got) != settings {
		b.t.Errorf("the settings are %q, want %q", got, settings)
	}
}

// What users write, or write again, changes nothing and asks nobody, also after ingest was interrupted.
func TestForgedMessagesAreDropped(t *testing.T) {
	b := newLifeBench(t)
	life, told := b.begin()
	calls := b.calls
	first := b.set(life, "first")
	b.message(first)
	b.want("first")
	b.message(b.set(life, "second"))
	old := b.set(nil, "of the old form")
	other, otherTold, err := auxfile.NewLife(t.Context(), b.ring, "p", "b", 1) // a superuser's guess at best
	if err != nil {
		t.Fatal(err)
	}
	forged := [][]byte{first, old, told, auxfile.KeyRecord(otherTold), b.set(other, "with a key of their own"), auxfile.Record(nil),
		auxfile.Record([]byte("hello")), auxfile.KeyRecord(nil)}
	for round := range 2 {
		for i, m := range forged {
			before := b.core.Forged
			b.message(m)
			b.want("second")
			if b.core.Forged != before+1 {
				t.Errorf("round %d: forged message %d was not counted", round, i)
			}
		}
		b.restart() // from the stored state
		b.enter("b", 1)
	}
	b.message(b.set(life, "third"))
	b.want("third")
	if b.calls != calls {
		t.Errorf("%d calls were made for messages of a life whose key is known", b.calls-calls)
	}
}

// An older compute's messages are read in their form; one that comes after a newer one's does
// not make that one's count.
func TestLivesFollowOneAnother(t *testing.T) {
	b := newLifeBench(t)
	b.message(b.set(nil, "old compute"))
	b.want("old compute")
	calls := b.calls
	for range 3 { // a user of the old compute's
		b.message(auxfile.KeyRecord([]byte("no key")))
	}
	if b.calls != calls {
		t.Errorf("%d calls for junk, want 0: it is no sealed file", b.calls-calls)
	}
	b.message(b.set(nil, "old compute still"))
	b.want("old compute still")

	b.enter("b", 2)
	life, told := b.begin()
	b.message(b.set(life, "two"))
	last := b.set(life, "two again")
	b.enter("b", 3)
	b.message(told) // before the new life's key: of another epoch, so it does not open
	b.message(last)
	b.want("two")

	b.enter("b", 4)
	life, _ = b.begin()
	b.message(b.set(life, "four"))
	b.want("four")

	// A copy of the branch goes on from its state, and its epochs may have the same numbers.
	b.restart()
	b.enter("copy", 4)
	child, _ := b.begin()
	b.message(b.set(child, "the copy's"))
	b.want("the copy's")
	b.message(b.set(life, "the parent's"))
	b.want("the copy's")
}

func TestSlotsChangeIsTold(t *testing.T) {
	b := newLifeBench(t)
	life, _ := b.begin()
	b.message(b.set(life, "x"))
	if b.core.SlotsChanged {
		t.Error("settings are taken for a slot")
	}
	sealed, err := life.Seal([]auxfile.Change{{Path: "pg_replslot/s/state", Removed: true}})
	if err != nil {
		t.Fatal(err)
	}
	b.message(auxfile.Record(sealed))
	if !b.core.SlotsChanged {
		t.Error("a slot's change is not told")
	}
}

// State of the version before is read, and written in today's.
func TestOldStateIsRead(t *testing.T) {
	b := newBench(t)
	s := *b.core.State()
	s.Epoch, s.Life = 5, Life{}
	s.Origins = map[uint16]pg.LSN{1: 7}
	now := s.Marshal()
	old := append([]byte{oldVersion}, now[1:len(now)-lifeFixed]...)
	got, err := ParseState(old)
	if err != nil || got.Epoch != 5 || got.Origins[1] != 7 || got.Life.Key != nil {
		t.Errorf("%+v, %v", got, err)
	}
	for n := range old {
		if _, err := ParseState(old[:n]); err == nil {
			t.Fatalf("an old state cut to %d bytes was taken", n)
		}
	}
	s.Life = Life{Branch: "b", Epoch: 5, Last: 9, Key: make([]byte, auxfile.KeySize)}
	whole := s.Marshal()
	got, err = ParseState(whole)
	if err != nil || got.Life.Branch != "b" || got.Life.Last != 9 || got.Life.Epoch != 5 || len(got.Life.Key) != auxfile.KeySize {
		t.Errorf("%+v, %v", got.Life, err)
	}
	for n := range len(whole) - 1 {
		if _, err := ParseState(whole[:n]); err == nil {
			t.Fatalf("a state cut to %d bytes was taken", n)
		}
	}
}
