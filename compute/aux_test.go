package compute

import (
	"context"
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/holdfastdb/holdfast/internal/auxfile"
)

// What waits goes with the next message, in the order in which it happened; what must not be
// lost is refused when it cannot be kept.
func TestAuxFilesAreKept(t *testing.T) {
	var sent []string
	var fail error
	k := &auxKeeper{
		seal: func(_ context.Context, changes []auxfile.Change) ([]byte, error) {
			var b strings.Builder
			for _, c := range changes {
				if b.WriteString(" " + c.Path); c.Removed {
					b.WriteString("-")
				}
			}
			return []byte(strings.TrimSpace(b.String())), nil
		},
		emit: func(_ context.Context, message []byte) error {
			if fail == nil {
				sent = append(sent, string(message))
			}
			return fail
		},
	}
	const snap, old, slot = "pg_logical/snapshots/0-1.snap", "pg_logical/snapshots/0-0.snap", "pg_replslot/s/state"
	k.begin([]string{snap}, []string{old})
	keep := func(want error, changes ...auxfile.Change) {
		t.Helper()
		if err := k.keep(t.Context(), changes); !errors.Is(err, want) || (want == nil) != (err == nil) {
			t.Errorf("keeping %v: %v, want %v", changes, err, want)
		}
	}
	broken := errors.New("broken")
	keep(nil, auxfile.Change{Path: snap, Removed: true})                 // waits
	keep(nil, auxfile.Change{Path: slot, Removed: true})                 // the branch does not have it
	keep(nil, auxfile.Change{Path: auxfile.Stats, Content: []byte("x")}) // not now
	keep(nil, auxfile.Change{Path: slot})                                // takes along what waited
	fail = errNotServing
	keep(errNotServing, auxfile.Change{Path: auxfile.Settings})
	keep(nil, auxfile.Change{Path: slot, Removed: true}) // waits for Postgres
	fail = broken
	keep(broken, auxfile.Change{Path: "pg_replslot/t/state"})
	fail = nil
	if err := k.flush(t.Context()); err != nil {
		t.Error(err)
	}
	fail = errNotServing
	keep(nil, auxfile.Change{Path: slot})
	last, err := k.last(t.Context(), auxfile.Change{Path: auxfile.Stats})
	if err != nil {
		t.Error(err)
	}
	want := []string{old + "- " + snap + "- " + slot, slot + "-", slot + " " + auxfile.Stats}
	if diff := cmp.Diff(want, append(sent, string(last))); diff != "" {
		t.Errorf("messages (-want +got):\n%s", diff)
	}
}
