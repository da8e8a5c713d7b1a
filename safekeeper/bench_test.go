package safekeeper

import (
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// BenchmarkCommit is one client that appends 512 bytes and waits until they are committed,
// over and over: the way of a single connection's COMMIT. The metric fdatasync is what a bare
// write and fdatasync of as many bytes takes on the same disk.
func BenchmarkCommit(b *testing.B) {
	c := newCluster(b, Config{}, false)
	c.startAll()
	_, a := c.open(c.client(branch))
	w := newWAL(startLSN)
	c.appendSome(a, w, 200, 450)
	w.all = nil
	ctx := c.ctx()
	times := make([]time.Duration, 0, b.N)
	b.ResetTimer()
	for b.Loop() {
		begin, wal := w.record(450)
		at := time.Now()
		if err := a.Send(begin, wal, false); err != nil {
			b.Fatal(err)
		}
		if err := a.Wait(ctx, w.at); err != nil {
			b.Fatal(err)
		}
		times = append(times, time.Since(at))
	}
	b.StopTimer()
	slices.Sort(times)
	b.ReportMetric(float64(times[len(times)/2].Microseconds()), "p50-µs")
	b.ReportMetric(float64(times[len(times)*99/100].Microseconds()), "p99-µs")
	b.ReportMetric(float64(bareSync(b, c.dir).Microseconds()), "fdatasync-µs")
}

func bareSync(b *testing.B, dir string) time.Duration {
	f, err := os.Create(filepath.Join(dir, "bare"))
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	if _, err := f.Write(make([]byte, 4<<20)); err != nil {
		b.Fatal(err)
	}
	f.Sync()
	var times []time.Duration
	for i := range 1000 {
		at := time.Now()
		if _, err := f.WriteAt(make([]byte, 512), int64(i)*704); err != nil {
			b.Fatal(err)
		}
		if err := unix.Fdatasync(int(f.Fd())); err != nil {
			b.Fatal(err)
		}
		times = append(times, time.Since(at))
	}
	slices.Sort(times)
	return times[len(times)/2]
}

// BenchmarkStream is one client that appends 64 KiB records without waiting for each.
func BenchmarkStream(b *testing.B) {
	c := newCluster(b, Config{}, false)
	c.startAll()
	_, a := c.open(c.client(branch))
	w := newWAL(startLSN)
	c.appendSome(a, w, 10, 450)
	b.SetBytes(64 << 10)
	b.ResetTimer()
	for b.Loop() {
		begin, wal := w.record(64 << 10)
		w.all = w.all[:0]
		if err := a.Send(begin, wal, false); err != nil {
			b.Fatal(err)
		}
	}
	if err := a.Wait(c.ctx(), w.at); err != nil {
		b.Fatal(err)
	}
}
