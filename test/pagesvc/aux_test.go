package pagesvc

import (
	"bytes"
	"context"
	"errors"
	"sync/atomic"
	"testing"

	"google.golang.org/grpc/codes"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/auxfile"
	"github.com/holdfastdb/holdfast/internal/keyring"
	"github.com/holdfastdb/holdfast/internal/seal"
)

// refusingRing refuses for a while to open the keys of messages about aux files.
type refusingRing struct {
	keyring.Ring
	refuses atomic.Bool
	asked   chan struct{} // gets one for each refusal
}

func (r *refusingRing) Open(ctx context.Context, c seal.Context, wrapped []byte) (*seal.Key, error) {
	if c.Purpose == seal.PurposeSecret && r.refuses.Load() {
		select {
		case r.asked <- struct{}{}:
		default:
		}
		return nil, errors.New("test: the key manager does not do that")
	}
	return r.Ring.Open(ctx, c, wrapped)
}

// settings is what ALTER SYSTEM's file holds at the log's end.
func (w *world) settings() string {
	w.t.Helper()
	w.wait(w.log.end)
	r, err := w.client.StartupState(w.t.Context(), &pb.StartupStateRequest{At: w.point(w.log.end, false)})
	if err != nil {
		w.t.Fatal(err)
	}
	for _, f := range r.Files {
		if f.Path == auxfile.Settings {
			return string(f.Data)
		}
	}
	return ""
}

// A message of the compute's is not taken for somebody else's while its key is not to be had.
func TestAuxMessageWaitsForItsKey(t *testing.T) {
	w := imported(t)
	w.end()
	ring := &refusingRing{Ring: w.ring, asked: make(chan struct{}, 1)}
	w.config.Ring = ring
	w.begin()
	w.attach()
	w.say(auxfile.Change{Path: auxfile.Settings, Content: []byte("before")})
	if got := w.settings(); got != "before" {
		t.Fatalf("the settings are %q", got)
	}
	ring.refuses.Store(true)
	w.say(auxfile.Change{Path: auxfile.Settings, Content: []byte("after")})
	<-ring.asked
	ring.refuses.Store(false)
	if got := w.settings(); got != "after" {
		t.Errorf("the settings are %q: the message was passed over", got)
	}
}

// Whatever a user writes under the messages' prefix holds nothing up.
func TestMessagesOfOthersArePassedOver(t *testing.T) {
	w := imported(t)
	const size = 300 << 10
	sealed, err := auxfile.Seal(t.Context(), w.ring, project, branch, []auxfile.Change{{Path: auxfile.Settings, Content: make([]byte, size)}})
	if err != nil {
		t.Fatal(err)
	}
	changed := func(at int) []byte {
		b := bytes.Clone(sealed)
		b[at] ^= 0x40
		return b
	}
	foreign := [][]byte{nil, []byte("hello"), changed(0), changed(8), changed(10), changed(12),
		changed(16), changed(17), changed(40), changed(size / 2), changed(len(sealed) - 1), sealed[:size]}
	w.say(auxfile.Change{Path: auxfile.Settings, Content: []byte("ours")})
	for _, b := range foreign {
		w.wait(w.log.end)
		w.sayRaw(b)
	}
	if got := w.settings(); got != "ours" {
		t.Errorf("the settings are %.40q", got)
	}
}

func TestAuxMessageThatMakesNoSenseStopsTheBranch(t *testing.T) {
	w := imported(t)
	start := w.log.end
	w.say(auxfile.Change{Path: "pg_hba.conf", Content: []byte("x")})
	wantCode(t, w.pgClass(t.Context(), w.point(w.log.end, true)), codes.DataLoss, pb.ErrorDetail_BAD_WAL, "pg_hba.conf")
	wantCode(t, w.pgClass(t.Context(), w.point(start, true)), codes.DataLoss, pb.ErrorDetail_BAD_WAL)
}
