package pagesvc

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/test/stock"
	"github.com/holdfastdb/holdfast/test/testenv"
)

// A recording is the WAL of pgbench: its initialization, and transactions.
type recording struct {
	settings map[string]string // beside the tests' own
	once     sync.Once
	initial  string
	dir      string
	failed   error
}

var (
	recorded recording
	// checkable is recorded with the page that each record makes, as for Config.VerifyRedo.
	checkable = recording{settings: map[string]string{"wal_consistency_checking": "all"}}
)

const (
	benchScale        = 5
	benchTransactions = 5000 // for each of two clients
)

func (r *recording) make(b *testing.B) {
	testenv.NeedPostgres(b)
	r.once.Do(func() {
		root := testenv.TempDir(noCleanup{b})
		all := maps.Clone(settings)
		maps.Copy(all, r.settings)
		s, err := stock.New(context.Background(), root, "stock", all)
		if err != nil {
			r.failed = err
			return
		}
		r.initial, r.dir = filepath.Join(root, "initial"), s.Dir
		snapshot(b, s.Dir, r.initial)
		if r.failed = s.Start(context.Background()); r.failed != nil {
			return
		}
		pgbench := func(args ...string) {
			if _, err := s.Target().Run(context.Background(), "pgbench", args...); err != nil {
				b.Fatal(err)
			}
		}
		pgbench("-i", "-q", "-s", fmt.Sprint(benchScale))
		pgbench("-n", "-c", "2", "-t", fmt.Sprint(benchTransactions))
		r.failed = s.Stop()
	})
	if r.failed != nil {
		b.Fatal(r.failed)
	}
}

// loadedWorld is a page server that has ingested the recorded WAL; took is how long that took.
func loadedWorld(b *testing.B, r *recording) (w *world, took time.Duration) {
	r.make(b)
	w = newWorld(b, testenv.TempDir(b))
	w.end()
	w.config.VerifyRedo = r.settings != nil
	w.begin()
	start, err := w.importDir(r.initial)
	if err != nil {
		b.Fatal(err)
	}
	w.log.end = start
	w.log.feed(b, r.dir, loadDirectory(b, r.dir).Control.CheckPoint)
	begun := time.Now()
	w.attach()
	w.wait(w.log.end)
	return w, time.Since(begun)
}

func BenchmarkIngest(b *testing.B) { benchIngest(b, &recorded) }

// BenchmarkVerify ingests and compares each record.
func BenchmarkVerify(b *testing.B) { benchIngest(b, &checkable) }

func benchIngest(b *testing.B, r *recording) {
	var total time.Duration
	var bytes int
	for range b.N {
		w, took := loadedWorld(b, r)
		total += took
		bytes += w.log.bytes
		w.end()
	}
	b.ReportMetric(float64(bytes)/total.Seconds()/1e6, "MB/s")
	b.ReportMetric(0, "ns/op")
}

// BenchmarkGetPages reads random blocks of pgbench_accounts after all transactions, over the
// service.
func BenchmarkGetPages(b *testing.B) {
	w, _ := loadedWorld(b, &recorded)
	r, err := w.client.ListRelations(b.Context(), &pb.ListRelationsRequest{At: w.point(w.log.end, true), Tablespace: 1663, Database: 5})
	if err != nil {
		b.Fatal(err)
	}
	biggest := slices.MaxFunc(r.Relations, func(x, y *pb.RelationSize) int { return int(x.Blocks) - int(y.Blocks) })
	for _, count := range []uint32{1, 16, 128} {
		b.Run(fmt.Sprintf("pages=%d", count), func(b *testing.B) {
			w.benchReads(b, count, func() (*pb.RelFork, uint32) {
				return &pb.RelFork{Tablespace: 1663, Database: 5, Relation: biggest.Relation}, rand.Uint32N(biggest.Blocks - count)
			})
		})
	}
	b.Run("free space map", func(b *testing.B) { // of 4069 heap blocks, each read for its slot
		w.benchReads(b, 1, func() (*pb.RelFork, uint32) {
			return &pb.RelFork{Tablespace: 1663, Database: 5, Relation: biggest.Relation, Fork: 1}, 2
		})
	})
	for _, f := range r.Relations { // pgbench's branches: a few pages that every transaction changes
		if f.Relation < 16384 || f.Fork != 0 || f.Blocks == 0 || f.Blocks > 200 {
			continue
		}
		b.Run(fmt.Sprintf("hot relation %d of %d blocks", f.Relation, f.Blocks), func(b *testing.B) {
			w.benchReads(b, 1, func() (*pb.RelFork, uint32) {
				return &pb.RelFork{Tablespace: 1663, Database: 5, Relation: f.Relation}, rand.Uint32N(f.Blocks)
			})
		})
	}
}

func (w *world) benchReads(b *testing.B, count uint32, what func() (*pb.RelFork, uint32)) {
	times := make([]time.Duration, 0, b.N)
	for range b.N {
		rel, block := what()
		begun := time.Now()
		_, err := w.client.GetPages(b.Context(), &pb.GetPagesRequest{At: w.point(w.log.end, true), Block: block, Count: count, Rel: rel})
		if err != nil {
			b.Fatal(err)
		}
		times = append(times, time.Since(begun))
	}
	slices.Sort(times)
	b.ReportMetric(float64(times[len(times)/2].Microseconds()), "p50-µs")
	b.ReportMetric(float64(times[len(times)*99/100].Microseconds()), "p99-µs")
}
