package pagesvc

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/keyring"
	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/internal/seal"
	"github.com/holdfastdb/holdfast/internal/walrec"
	"github.com/holdfastdb/holdfast/pageserver"
)

// wal is the committed log of one branch, as the safekeepers would have it.
type wal struct {
	ring            keyring.Ring
	project, branch string

	mu      sync.Mutex
	chunks  []*pb.SealedWAL
	end     pg.LSN
	more    chan struct{} // closed when there are more chunks
	durable pg.LSN        // as reported
	bytes   int
	first   []byte // the first chunk's plaintext
	epoch   uint64 // of the chunks that are added
	deaf    bool   // reports of durability are lost

	// spoil damages the third chunk: what it returns is sealed instead, nil: nothing.
	spoil func(c *pb.SealedWAL, plain []byte) []byte
}

func newWAL(ring keyring.Ring, start pg.LSN) *wal {
	return &wal{ring: ring, project: project, branch: branch, end: start, more: make(chan struct{})}
}

// feed adds the records from the log's end to the record that begins at last, in chunks of
// random sizes.
func (w *wal) feed(t testing.TB, dir string, last pg.LSN) {
	t.Helper()
	start := w.end
	sc := walrec.NewScanner(start)
	var raw []byte // from begin on
	begin, done := start, false
	for seg := start.SegmentStart(); !done; seg += pg.WALSegmentSize {
		b, err := os.ReadFile(filepath.Join(dir, "pg_wal", pg.WALFileName(seg)))
		if err != nil {
			t.Fatal(err)
		}
		if seg < start {
			b = b[start-seg:]
		}
		if begin >= seg+pg.WALSegmentSize {
			continue
		}
		raw = append(raw, b...)
		sc.Feed(b)
		limit := rand.IntN(1 << 16)
		for !done {
			rec, ok, err := sc.Next()
			if err != nil {
				t.Fatal(err)
			}
			if !ok {
				break
			}
			done = rec.LSN == last
			n := int(rec.End - begin)
			if rec.IsSwitch {
				n = int((rec.LSN + pg.LSN(len(rec.Data))).Align() - begin)
			}
			if rec.IsSwitch || done || n > limit {
				w.add(t, begin, rec.End, raw[:n])
				raw, begin, limit = raw[n:], rec.End, rand.IntN(1<<16)
			}
			if rec.IsSwitch {
				raw = nil
				break
			}
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	close(w.more)
	w.more = make(chan struct{})
}

func (w *wal) add(t testing.TB, begin, end pg.LSN, plain []byte) {
	sc := seal.Context{Purpose: seal.PurposeWAL, Project: w.project, Branch: w.branch, Object: "wal"}
	key, wrapped, err := w.ring.Generate(t.Context(), sc)
	if err != nil {
		t.Fatal(err)
	}
	sealed, err := seal.SealWAL(nil, key, sc, begin, end, 1, plain)
	if err != nil {
		t.Fatal(err)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	c := &pb.SealedWAL{BeginLsn: uint64(begin), EndLsn: uint64(end), Object: "wal", Epoch: w.epoch,
		WrappedDek: wrapped, Counter: 1, Ciphertext: sealed}
	if w.spoil != nil && len(w.chunks) == 2 {
		if other := w.spoil(c, plain); other != nil {
			c.Counter = 2
			if c.Ciphertext, err = seal.SealWAL(nil, key, sc, begin, end, 2, other); err != nil {
				t.Fatal(err)
			}
		}
	}
	if w.first == nil {
		w.first = bytes.Clone(plain)
	}
	w.chunks = append(w.chunks, c)
	w.end = end
	w.bytes += len(plain)
}

// source is one follower's connection to the log.
type source struct{ *wal }

var _ pageserver.WALSource = source{}

func (s source) Follow(ctx context.Context, from pg.LSN, fn func([]*pb.SealedWAL, pg.LSN) error) error {
	next := 0
	for {
		s.mu.Lock()
		for next < len(s.chunks) && pg.LSN(s.chunks[next].EndLsn) <= from {
			next++
		}
		n := min(next+1+rand.IntN(64), len(s.chunks))
		chunks, end, more := s.chunks[next:n], s.end, s.more
		s.mu.Unlock()
		if len(chunks) > 0 {
			if err := fn(chunks, end); err != nil {
				return err
			}
			next = n
			continue
		}
		select {
		case <-more:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (s source) ReportDurable(_ context.Context, lsn pg.LSN) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.deaf {
		return errors.New("test: the report is lost")
	}
	s.durable = max(s.durable, lsn)
	return nil
}

func (s source) Close() error { return nil }
