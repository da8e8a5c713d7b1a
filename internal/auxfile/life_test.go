package auxfile

import (
	"bytes"
	"context"
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/holdfastdb/holdfast/internal/keyring/keyringtest"
	"github.com/holdfastdb/holdfast/internal/seal"
)

// newLife makes a life, and a reader that got its key from the log.
func newLife(t *testing.T, ring *keyringtest.Ring, branch string, epoch uint64) (*Life, *Reader) {
	t.Helper()
	ctx := context.Background()
	life, told, err := NewLife(ctx, ring, "p", branch, epoch)
	if err != nil {
		t.Fatal(err)
	}
	sealed, ok := KeyMessage(KeyRecord(told))
	if !ok || !bytes.Equal(sealed, told) {
		t.Fatal("the record of a key is not recognized")
	}
	key, err := OpenKey(ctx, ring.Open, "p", branch, epoch, sealed)
	if err != nil {
		t.Fatal(err)
	}
	r, err := NewReader("p", branch, epoch, key)
	if err != nil {
		t.Fatal(err)
	}
	for what, err := range map[string]error{
		"another epoch":  openKeyErr(ring, branch, epoch+1, sealed),
		"another branch": openKeyErr(ring, branch+"x", epoch, sealed),
		"changed":        openKeyErr(ring, branch, epoch, append(bytes.Clone(sealed[:len(sealed)-1]), sealed[len(sealed)-1]^1)),
	} {
		if !errors.Is(err, seal.ErrDamaged) {
			t.Errorf("a key for %s: %v, want %v", what, err, seal.ErrDamaged)
		}
	}
	return life, r
}

func openKeyErr(ring *keyringtest.Ring, branch string, epoch uint64, sealed []byte) error {
	_, err := OpenKey(context.Background(), ring.Open, "p", branch, epoch, sealed)
	return err
}

func TestALifesMessages(t *testing.T) {
	ring := keyringtest.New()
	life, r := newLife(t, ring, "b", 7)
	want := []Change{{Path: Settings, Content: []byte("a")}}
	var messages [][]byte
	for range 3 {
		m, err := life.Seal(want)
		if err != nil {
			t.Fatal(err)
		}
		messages = append(messages, m)
	}
	last := uint64(0)
	for i, m := range [][]byte{messages[0], messages[2]} { // the second did not get into the log
		changes, number, err := r.Open(m, last)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, changes); diff != "" || number != uint64(2*i+1) {
			t.Errorf("message %d (-want +got):\n%s", number, diff)
		}
		last = number
	}
	refused := func(what string, r *Reader, m []byte) {
		t.Helper()
		if changes, number, err := r.Open(m, last); !errors.Is(err, ErrForged) || changes != nil || number != last {
			t.Errorf("%s: %v, %d, %v; want %v", what, changes, number, err, ErrForged)
		}
	}
	for _, m := range messages {
		refused("written again", r, m)
	}
	fresh, err := life.Seal(want)
	if err != nil {
		t.Fatal(err)
	}
	for i := range fresh {
		forged := bytes.Clone(fresh)
		forged[i] ^= 0x80
		refused("changed", r, forged)
		refused("cut", r, fresh[:i])
	}
	_, later := newLife(t, ring, "b", 8)
	_, elsewhere := newLife(t, ring, "c", 7)
	refused("of an older life", later, fresh)
	refused("of another branch", elsewhere, fresh)
	old, err := Seal(context.Background(), ring, "p", "b", want)
	if err != nil {
		t.Fatal(err)
	}
	refused("of the old form", r, old)
	refused("too large", r, append(fresh, make([]byte, MaxContent)...))
	if _, _, err := r.Open(fresh, last); err != nil {
		t.Error(err)
	}
	if _, err := life.Seal([]Change{{Path: Settings, Content: make([]byte, MaxContent)}}); err == nil {
		t.Error("a message that is too large was made")
	}
}

// BenchmarkForged is what a message costs that somebody writes to hold ingest up.
func BenchmarkForged(b *testing.B) {
	ring := keyringtest.New()
	life, told, err := NewLife(context.Background(), ring, "p", "b", 7)
	if err != nil {
		b.Fatal(err)
	}
	key, err := OpenKey(context.Background(), ring.Open, "p", "b", 7, told)
	if err != nil {
		b.Fatal(err)
	}
	r, err := NewReader("p", "b", 7, key)
	if err != nil {
		b.Fatal(err)
	}
	again, err := life.Seal([]Change{{Path: Settings, Content: []byte("a")}})
	if err != nil {
		b.Fatal(err)
	}
	forged, err := life.Seal([]Change{{Path: Settings, Content: []byte("b")}})
	if err != nil {
		b.Fatal(err)
	}
	forged[len(forged)-1] ^= 1
	for name, m := range map[string][]byte{"again": again, "forged": forged, "junk": []byte("hello")} {
		b.Run(name, func(b *testing.B) {
			for range b.N {
				if _, _, err := r.Open(m, 1); err != ErrForged {
					b.Fatal(err)
				}
			}
		})
	}
}
