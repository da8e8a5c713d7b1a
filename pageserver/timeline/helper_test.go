package timeline

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sort"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/holdfastdb/holdfast/internal/blob"
	"github.com/holdfastdb/holdfast/internal/keyring/keyringtest"
	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/pageserver/keyspace"
)

// memStore is a bucket in memory.
type memStore struct {
	mu      sync.Mutex
	objects map[string][]byte
	etags   map[string]int
	next    int
}

var _ blob.Store = (*memStore)(nil)

func newMemStore() *memStore {
	return &memStore{objects: make(map[string][]byte), etags: make(map[string]int)}
}

func (s *memStore) setLocked(key string, data []byte) blob.ETag {
	s.next++
	s.objects[key], s.etags[key] = data, s.next
	return blob.ETag(fmt.Sprint(s.next))
}

func (s *memStore) etag(key string) blob.ETag { return blob.ETag(fmt.Sprint(s.etags[key])) }

func (s *memStore) Get(ctx context.Context, key string) ([]byte, blob.ETag, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	data, ok := s.objects[key]
	if !ok {
		return nil, "", blob.ErrNotFound
	}
	return bytes.Clone(data), s.etag(key), ctx.Err()
}

func (s *memStore) GetRange(ctx context.Context, key string, p []byte, off int64) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	data, ok := s.objects[key]
	if !ok {
		return 0, blob.ErrNotFound
	}
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	return bytes.NewReader(data).ReadAt(p, off)
}

func (s *memStore) Head(ctx context.Context, key string) (blob.Info, error) {
	data, etag, err := s.Get(ctx, key)
	return blob.Info{Key: key, Size: int64(len(data)), ETag: etag}, err
}

func (s *memStore) Create(ctx context.Context, key string, r io.Reader, size int64) (blob.ETag, error) {
	data, err := io.ReadAll(r)
	if err != nil || int64(len(data)) != size {
		return "", fmt.Errorf("%d bytes, want %d: %w", len(data), size, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.objects[key]; ok {
		return "", blob.ErrExists
	}
	if err := ctx.Err(); err != nil {
		return "", err
	}
	return s.setLocked(key, data), nil
}

func (s *memStore) Swap(ctx context.Context, key string, data []byte, old blob.ETag) (blob.ETag, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.objects[key]; !ok {
		return "", blob.ErrNotFound
	}
	if s.etag(key) != old {
		return "", blob.ErrPrecondition
	}
	if err := ctx.Err(); err != nil {
		return "", err
	}
	return s.setLocked(key, bytes.Clone(data)), nil
}

func (s *memStore) Delete(ctx context.Context, key string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.objects, key)
	return ctx.Err()
}

func (s *memStore) List(ctx context.Context, prefix string, fn func(blob.Info) error) error {
	for _, key := range s.keys(prefix) {
		info, err := s.Head(ctx, key)
		if errors.Is(err, blob.ErrNotFound) {
			continue
		}
		if err != nil {
			return err
		}
		if err := fn(info); err != nil {
			return err
		}
	}
	return nil
}

func (s *memStore) keys(prefix string) (keys []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for key := range s.objects {
		if strings.HasPrefix(key, prefix) {
			keys = append(keys, key)
		}
	}
	sort.Strings(keys)
	return keys
}

// change damages an object.
func (s *memStore) change(key string, fn func([]byte) []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.setLocked(key, fn(bytes.Clone(s.objects[key])))
}

const testStart = pg.LSN(0x1000000)

func testConfig(t testing.TB, store blob.Store, ring *keyringtest.Ring) Config {
	return Config{Project: "proj", Branch: "main", Store: store, Ring: ring, Dir: t.TempDir(),
		Materialize: materialize, Log: slog.New(slog.DiscardHandler), FlushAge: -1, CompactAfter: -1,
		retryMin: 100 * time.Microsecond, retryMax: 2 * time.Millisecond}
}

// evaluate is the test's redo: a value is its base and its changes, one after the other.
func evaluate(h History) string {
	if !h.Exists() {
		return "absent"
	}
	s := "none:"
	if h.Origin != nil {
		s = "copy of " + evaluate(h.Origin.History) + ":"
	}
	if h.Base != nil {
		s = string(h.Base.Data)
	}
	for _, c := range h.Changes {
		s += string(c.Data)
	}
	return s
}

var errUnsupported = errors.New("no redo for this record")

// materialize fails for keys of odd blocks whose changes contain an x.
func materialize(key keyspace.Key, h History) ([]byte, error) {
	if !h.hasBase() {
		return nil, errors.New("no base")
	}
	s := evaluate(h)
	if key[17]%2 == 1 && strings.Contains(s, "x") {
		return nil, errUnsupported
	}
	return []byte(s), nil
}

func pageKey(block int) keyspace.Key {
	return keyspace.RelPage(pg.RelTag{RelFileNode: pg.RelFileNode{Tablespace: 1663, Database: 5, Relation: 16384}}, pg.BlockNumber(block))
}

func sizeKey(rel int) keyspace.Key {
	return keyspace.RelSize(pg.RelTag{RelFileNode: pg.RelFileNode{Tablespace: 1663, Database: 5, Relation: pg.Oid(rel)}})
}

// model is what a timeline must agree with.
type model struct {
	versions map[keyspace.Key][]Value
	last     pg.LSN
}

func newModel() *model {
	return &model{versions: make(map[keyspace.Key][]Value), last: testStart}
}

// forget drops what is above lsn, as a crash does.
func (m *model) forget(lsn pg.LSN) {
	m.last = lsn
	for k, vs := range m.versions {
		i := slices.IndexFunc(vs, func(v Value) bool { return v.LSN > lsn })
		if i >= 0 {
			m.versions[k] = vs[:i]
		}
	}
}

func (m *model) add(entries []Entry, upTo pg.LSN) {
	for _, e := range entries {
		m.versions[e.Key] = append(m.versions[e.Key], e.Value)
	}
	m.last = upTo
}

func (m *model) history(key keyspace.Key, lsn pg.LSN) History {
	var c collector
	for _, v := range slices.Backward(m.versions[key]) {
		if v.LSN <= lsn && c.add(v.LSN, v.Kind, v.Data) {
			break
		}
	}
	return c.result()
}

func (m *model) keys() []keyspace.Key {
	var keys []keyspace.Key
	for k := range m.versions {
		keys = append(keys, k)
	}
	slices.SortFunc(keys, keyspace.Key.Compare)
	return keys
}

// scan gives what Scan must give, in lines.
func (m *model) scan(from, to keyspace.Key, lsn pg.LSN) string {
	var out strings.Builder
	for _, key := range m.keys() {
		if key.Compare(from) >= 0 && key.Compare(to) < 0 {
			if h := m.history(key, lsn); h.Base != nil {
				fmt.Fprintf(&out, "%x %s %s\n", key[:], h.Base.LSN, h.Base.Data)
			}
		}
	}
	return out.String()
}

// randomEntries gives one batch, with records of several entries at one LSN.
func (m *model) randomEntries(rng *rand.Rand, keys int) (entries []Entry, upTo pg.LSN) {
	lsn := m.last
	for range rng.IntN(12) {
		lsn += pg.LSN(8 * (1 + rng.IntN(20)))
		for range 1 + rng.IntN(3) {
			entries = append(entries, randomEntry(rng, keys, lsn))
		}
	}
	return entries, lsn + pg.LSN(8*rng.IntN(2))
}

func randomEntry(rng *rand.Rand, keys int, lsn pg.LSN) Entry {
	if rng.IntN(6) == 0 {
		kind := Image
		if rng.IntN(4) == 0 {
			kind = Tombstone
		}
		return Entry{sizeKey(rng.IntN(keys)), randomValue(rng, lsn, kind)}
	}
	kind := Delta
	switch n := rng.IntN(20); {
	case n < 2:
		kind = Image
	case n < 3:
		kind = Init
	case n < 4:
		kind = Tombstone
	}
	block := rng.IntN(keys)
	if rng.IntN(3) == 0 {
		block = rng.IntN(2) // hot
	}
	return Entry{pageKey(block), randomValue(rng, lsn, kind)}
}

func randomValue(rng *rand.Rand, lsn pg.LSN, kind ValueKind) Value {
	v := Value{LSN: lsn, Kind: kind}
	if kind == Tombstone {
		return v
	}
	text := fmt.Sprintf("<%d:%x>", kind, rng.Uint32())
	if kind != Delta && rng.IntN(10) == 0 {
		text += strings.Repeat("large", 500)
	}
	if kind == Delta && rng.IntN(30) == 0 {
		text += "x"
	}
	v.Data = []byte(text)
	return v
}

func mustPut(t testing.TB, tl *Timeline, m *model, entries []Entry, upTo pg.LSN) {
	t.Helper()
	if err := tl.Put(t.Context(), entries, upTo); err != nil {
		t.Fatalf("Put: %v", err)
	}
	m.add(entries, upTo)
}

// checkRead compares one key at one LSN.
func checkRead(t testing.TB, tl *Timeline, m *model, key keyspace.Key, lsn pg.LSN) {
	t.Helper()
	horizon := tl.HorizonLSN()
	h, err := tl.Get(t.Context(), key, lsn)
	switch {
	case lsn > m.last:
		if !errors.Is(err, ErrNotYet) {
			t.Fatalf("Get at %s, beyond %s: %v, want ErrNotYet", lsn, m.last, err)
		}
	case lsn < horizon:
		if !errors.Is(err, ErrTooOld) {
			t.Fatalf("Get at %s, below %s: %v, want ErrTooOld", lsn, horizon, err)
		}
	case errors.Is(err, ErrTooOld) && lsn < tl.HorizonLSN(): // it moved meanwhile
	case err != nil:
		t.Fatalf("Get(%x, %s): %v", key[:], lsn, err)
	default:
		if got, want := evaluate(h), evaluate(m.history(key, lsn)); got != want {
			t.Fatalf("Get(%x, %s)\n got %.300s\nwant %.300s", key[:], lsn, got, want)
		}
		checkShape(t, h, lsn)
	}
}

// checkShape sees that a history is in order.
func checkShape(t testing.TB, h History, lsn pg.LSN) {
	t.Helper()
	last := pg.LSN(0)
	if h.Base != nil {
		last = h.Base.LSN
		if h.Base.Kind != Image && h.Base.Kind != Init {
			t.Fatalf("base of kind %d", h.Base.Kind)
		}
	}
	for _, c := range h.Changes {
		if c.Kind != Delta || c.LSN < last || c.LSN > lsn {
			t.Fatalf("change of kind %d at %s after %s, read at %s", c.Kind, c.LSN, last, lsn)
		}
		last = c.LSN
	}
}

// checkAll compares all keys at the newest LSN and at some others.
func checkAll(t testing.TB, tl *Timeline, m *model, rng *rand.Rand) {
	t.Helper()
	for _, key := range m.keys() {
		checkRead(t, tl, m, key, m.last)
		checkRead(t, tl, m, key, randomLSN(rng, m))
	}
	for range 3 {
		checkScan(t, tl, m, rng)
	}
}

func randomLSN(rng *rand.Rand, m *model) pg.LSN {
	return testStart + pg.LSN(rng.Uint64N(uint64(m.last-testStart)+1))
}

func checkScan(t testing.TB, tl *Timeline, m *model, rng *rand.Rand) {
	t.Helper()
	from, to := keyspace.KindRange(keyspace.KindRelSize)
	if rng.IntN(2) == 0 {
		from, to = sizeKey(rng.IntN(20)), sizeKey(rng.IntN(40))
	}
	lsn := m.last
	if rng.IntN(2) == 0 {
		lsn = max(randomLSN(rng, m), tl.HorizonLSN())
	}
	var out strings.Builder
	err := tl.Scan(t.Context(), from, to, lsn, func(key keyspace.Key, v Value) error {
		fmt.Fprintf(&out, "%x %s %s\n", key[:], v.LSN, v.Data)
		return nil
	})
	if errors.Is(err, ErrTooOld) && lsn < tl.HorizonLSN() {
		return
	}
	if err != nil {
		t.Fatalf("Scan at %s: %v", lsn, err)
	}
	if got, want := out.String(), m.scan(from, to, lsn); got != want {
		t.Fatalf("Scan(%x, %x, %s)\ngot\n%s\nwant\n%s", from[:], to[:], lsn, got, want)
	}
}
