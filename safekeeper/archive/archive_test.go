package archive

import (
	"context"
	"testing"

	"github.com/holdfastdb/holdfast/internal/blob/dirblob"
	"github.com/holdfastdb/holdfast/safekeeper/walstate"
)

func TestPutAndGet(t *testing.T) {
	store, err := dirblob.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	ctx, name := context.Background(), walstate.Name{Project: "aa", Branch: "bb"}
	cmds := []walstate.Command{
		{Begin: 8, End: 24, Counter: 1, Epoch: 3, Object: []byte("o"), WrappedDEK: []byte("w"), Ciphertext: []byte("first")},
		{Begin: 24, End: 48, Counter: 2, Epoch: 3, Object: []byte("o"), WrappedDEK: []byte("w"), Ciphertext: []byte("second")},
	}
	w := NewWriter()
	for i := range cmds {
		w.Add(&cmds[i])
	}
	raw := append([]byte(nil), w.buf...)
	a, err := w.Put(ctx, store, name)
	if err != nil || a.Begin != 8 || a.End != 48 {
		t.Fatalf("%+v, %v", a, err)
	}
	w.buf = raw // as another leader would write it
	if again, err := w.Put(ctx, store, name); err != nil || again != a {
		t.Errorf("the same stretch again: %+v, %v", again, err)
	}
	chunks, err := Get(ctx, store, name, a)
	if err != nil || len(chunks) != 2 || string(chunks[1].GetCiphertext()) != "second" || chunks[0].GetEpoch() != 3 {
		t.Errorf("%v, %v", chunks, err)
	}
	whole := w.buf
	for i := range whole {
		damaged := append([]byte(nil), whole...)
		damaged[i] ^= 4
		if _, err := parse(damaged); err == nil {
			t.Errorf("a flipped bit at %d is not seen", i)
		}
		if _, err := parse(whole[:i]); err == nil {
			t.Errorf("cut to %d bytes, it is taken", i)
		}
	}
}
