package timeline

import (
	"context"
	"math/rand/v2"
	"testing"

	"github.com/holdfastdb/holdfast/internal/blob/dirblob"
	"github.com/holdfastdb/holdfast/internal/keyring/keyringtest"
	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/pageserver/keyspace"
)

const (
	benchPages = 20000
	deltaSize  = 150 // as pgbench's records
)

// benchTimeline is over a directory; redo makes a page of random bytes in its first half.
func benchTimeline(b *testing.B, change func(*Config)) *Timeline {
	b.Helper()
	store, err := dirblob.Open(b.TempDir())
	if err != nil {
		b.Fatal(err)
	}
	cfg := testConfig(b, store, keyringtest.New())
	rng := rand.New(rand.NewPCG(1, 1))
	cfg.Materialize = func(keyspace.Key, History) ([]byte, error) { return randomPage(rng), nil }
	cfg.HistoryBytes = 1
	if change != nil {
		change(&cfg)
	}
	tl, err := Create(b.Context(), cfg, testStart)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { tl.Close() })
	return tl
}

func randomPage(rng *rand.Rand) []byte {
	page := make([]byte, pg.BlockSize)
	for i := range page[:pg.BlockSize/2] {
		page[i] = byte(rng.Uint32())
	}
	return page
}

// deltas makes batches of 500 records for random pages.
func deltas(rng *rand.Rand, lsn pg.LSN) ([]Entry, pg.LSN) {
	batch := make([]Entry, 500)
	data := make([]byte, deltaSize*len(batch))
	for i := range data {
		if i%3 == 0 {
			data[i] = byte(rng.Uint32())
		}
	}
	for i := range batch {
		lsn += deltaSize
		batch[i] = Entry{pageKey(rng.IntN(benchPages)), Value{LSN: lsn, Kind: Delta, Data: data[i*deltaSize:][:deltaSize]}}
	}
	return batch, lsn
}

func putDeltas(b *testing.B, tl *Timeline, rng *rand.Rand, batches int) {
	b.Helper()
	for range batches {
		batch, lsn := deltas(rng, tl.LastLSN())
		if err := tl.Put(b.Context(), batch, lsn); err != nil {
			b.Fatal(err)
		}
	}
}

func putImages(b *testing.B, tl *Timeline, rng *rand.Rand) {
	b.Helper()
	lsn := tl.LastLSN()
	for i := range benchPages {
		e := Entry{pageKey(i), Value{LSN: lsn, Kind: Image, Data: randomPage(rng)}}
		if err := tl.Put(b.Context(), []Entry{e}, lsn); err != nil {
			b.Fatal(err)
		}
	}
	if err := tl.Flush(b.Context()); err != nil {
		b.Fatal(err)
	}
}

// BenchmarkPut includes flushing in the background.
func BenchmarkPut(b *testing.B) {
	tl := benchTimeline(b, nil)
	rng := rand.New(rand.NewPCG(2, 2))
	putImages(b, tl, rng)
	batches := make([][]Entry, 100)
	for i := range batches {
		batches[i], _ = deltas(rng, 0)
	}
	b.SetBytes(int64(len(batches[0]) * deltaSize))
	for i := 0; b.Loop(); i++ {
		lsn, batch := tl.LastLSN(), batches[i%len(batches)]
		for i := range batch {
			lsn += deltaSize
			batch[i].LSN = lsn
		}
		if err := tl.Put(b.Context(), batch, lsn); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkFlush(b *testing.B) {
	tl := benchTimeline(b, func(c *Config) { c.FlushBytes = 1 << 40 })
	rng := rand.New(rand.NewPCG(3, 3))
	b.SetBytes(400 * 500 * deltaSize)
	for b.Loop() {
		b.StopTimer()
		putDeltas(b, tl, rng, 400)
		b.StartTimer()
		if err := tl.Flush(b.Context()); err != nil {
			b.Fatal(err)
		}
	}
}

func benchGet(b *testing.B, tl *Timeline) {
	b.Helper()
	rng := rand.New(rand.NewPCG(4, 4))
	lsn := tl.LastLSN()
	for b.Loop() {
		if _, err := tl.Get(b.Context(), pageKey(rng.IntN(benchPages)), lsn); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkGetImage(b *testing.B) {
	for name, cache := range map[string]int64{"cached": 1 << 30, "uncached": 1} {
		b.Run(name, func(b *testing.B) {
			tl := benchTimeline(b, func(c *Config) { c.BlockCacheBytes = cache })
			rng := rand.New(rand.NewPCG(5, 5))
			putImages(b, tl, rng)
			if err := tl.Compact(b.Context()); err != nil {
				b.Fatal(err)
			}
			for i := range benchPages {
				if _, err := tl.Get(b.Context(), pageKey(i), tl.LastLSN()); err != nil {
					b.Fatal(err)
				}
			}
			benchGet(b, tl)
		})
	}
}

// BenchmarkGetDeltas reads pages with about 10 changes in the open layer over an image in a file.
func BenchmarkGetDeltas(b *testing.B) {
	tl := benchTimeline(b, func(c *Config) { c.BlockCacheBytes, c.FlushBytes = 1<<30, 1<<40 })
	rng := rand.New(rand.NewPCG(6, 6))
	putImages(b, tl, rng)
	putDeltas(b, tl, rng, 400)
	benchGet(b, tl)
}

// BenchmarkCompact merges six L0 files of 30 MB of changes with bases of 160 MB. Throughput is of
// the changes.
func BenchmarkCompact(b *testing.B) {
	tl := benchTimeline(b, func(c *Config) { c.FlushBytes = 1 << 40 })
	rng := rand.New(rand.NewPCG(7, 7))
	putImages(b, tl, rng)
	if err := tl.Compact(b.Context()); err != nil {
		b.Fatal(err)
	}
	b.SetBytes(6 * 400 * 500 * deltaSize)
	for b.Loop() {
		b.StopTimer()
		for range 6 {
			putDeltas(b, tl, rng, 400)
			if err := tl.Flush(b.Context()); err != nil {
				b.Fatal(err)
			}
		}
		b.StartTimer()
		if err := tl.Compact(context.Background()); err != nil {
			b.Fatal(err)
		}
	}
}
