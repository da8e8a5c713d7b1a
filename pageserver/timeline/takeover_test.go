package timeline

import (
	"context"
	"errors"
	"math/rand/v2"
	"testing"

	"github.com/holdfastdb/holdfast/internal/blob"
	"github.com/holdfastdb/holdfast/internal/keyring/keyringtest"
)

// overtaken is a bucket in which, once, another server is faster with a document.
type overtaken struct {
	*memStore
	before func()
}

func (s *overtaken) Swap(ctx context.Context, key string, data []byte, old blob.ETag) (blob.ETag, error) {
	if fn := s.before; fn != nil {
		s.before = nil
		fn()
	}
	return s.memStore.Swap(ctx, key, data, old)
}

// TestTwoServersOpenAtOnce: both read the same manifest and write the next one. If the two
// were the same, byte for byte, the slower one would take the faster one's for its own, and both
// would write layers under the same names (P2).
func TestTwoServersOpenAtOnce(t *testing.T) {
	store := newMemStore()
	cfg := testConfig(t, store, keyringtest.New())
	created, err := Create(t.Context(), cfg, testStart)
	if err != nil {
		t.Fatal(err)
	}
	created.Close()

	var faster *Timeline
	slow := cfg
	slow.Dir = t.TempDir()
	slow.Store = &overtaken{memStore: store, before: func() {
		if faster, err = Open(t.Context(), cfg); err != nil {
			t.Error(err)
		}
	}}
	slower, err := Open(t.Context(), slow)
	if err != nil {
		t.Fatal(err)
	}
	defer slower.Close()
	defer faster.Close()
	if faster.generation == slower.generation {
		t.Fatalf("both servers have generation %d", slower.generation)
	}
	m := newModel()
	entries, upTo := m.randomEntries(rand.New(rand.NewPCG(1, 21)), 10)
	if err := faster.Put(t.Context(), entries, upTo); err != nil {
		t.Fatal(err)
	}
	if err := faster.Flush(t.Context()); !errors.Is(err, ErrSuperseded) {
		t.Errorf("Flush of the faster one: %v, want ErrSuperseded", err)
	}
	mustPut(t, slower, m, entries, upTo)
	if err := slower.Flush(t.Context()); err != nil {
		t.Error(err)
	}
}
