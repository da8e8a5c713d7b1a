package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/internal/rpc"
	"github.com/holdfastdb/holdfast/test/cluster"
)

// startEndpoint kills the endpoint and times its start from nothing: from the command to
// the first row of a table.
func (b *bench) startEndpoint(ctx context.Context, query string) (float64, error) {
	if _, err := b.holdfast.CLI(ctx, "endpoint", "kill"); err != nil {
		return 0, err
	}
	began := time.Now()
	if _, err := b.holdfast.CLI(ctx, "endpoint", "start"); err != nil {
		return 0, err
	}
	conn, err := b.holdfast.Target().WaitConnect(ctx)
	if err != nil {
		return 0, err
	}
	defer conn.Close(ctx)
	var n int64
	if err := conn.QueryRow(ctx, query).Scan(&n); err != nil {
		return 0, err
	}
	return time.Since(began).Seconds(), nil
}

func (b *bench) starts(ctx context.Context, what, query string, before func() error) error {
	var v []float64
	for range b.options.starts {
		if before != nil {
			if err := before(); err != nil {
				return err
			}
		}
		s, err := b.startEndpoint(ctx, query)
		if err != nil {
			return err
		}
		v = append(v, s)
	}
	b.progress("%-28s %s", what, list(v))
	b.report.add(row{what: what, unit: "s", values: map[string]float64{"holdfast": median(v)}, target: 1, atMost: true})
	return nil
}

const firstRow = "SELECT abalance FROM pgbench_accounts LIMIT 1"

func (b *bench) startSmall(ctx context.Context) error {
	if _, err := b.holdfast.Target().Run(ctx, "pgbench", "-i", "-q", "-s", "1"); err != nil {
		return err
	}
	return b.starts(ctx, "start to first row, scale 1", firstRow, nil)
}

func (b *bench) startLarge(ctx context.Context) error {
	b.progress("loading scale %d into holdfast", b.largeScale)
	if _, err := b.holdfast.Target().Run(ctx, "pgbench", "-i", "-q", "-s", strconv.Itoa(b.largeScale)); err != nil {
		return err
	}
	return b.starts(ctx, fmt.Sprintf("start to first row, scale %d", b.largeScale), firstRow, nil)
}

// startWithWAL starts with much WAL since the last checkpoint, which a stock server would
// have to replay.
func (b *bench) startWithWAL(ctx context.Context) error {
	t := b.holdfast.Target()
	if _, err := t.Run(ctx, "pgbench", "-i", "-q", "-s", "1"); err != nil {
		return err
	}
	var wal pg.LSN
	err := b.starts(ctx, "start to first row, much WAL", firstRow, func() error {
		if err := t.Exec(ctx, "CHECKPOINT"); err != nil {
			return err
		}
		from, err := lsn(ctx, t)
		if err != nil {
			return err
		}
		err = t.Exec(ctx, "CREATE TABLE IF NOT EXISTS churn (i int, v text)", "TRUNCATE churn",
			"INSERT INTO churn SELECT i, repeat('v', 200) FROM generate_series(1, 500000) i")
		if err != nil {
			return err
		}
		to, err := lsn(ctx, t)
		wal = to - from
		return err
	})
	b.progress("that was %d MiB of WAL since the last checkpoint", wal>>20)
	return err
}

// pageserver is a connection to the page server, and what the endpoint's branch is called.
func (b *bench) pageserver(ctx context.Context) (client pb.PageServerClient, at *pb.ReadPoint, closeConn func() error, err error) {
	st, err := b.holdfast.Status(ctx)
	if err != nil {
		return nil, nil, nil, err
	}
	if len(st.Endpoints) == 0 {
		return nil, nil, nil, fmt.Errorf("no endpoint")
	}
	conn, err := rpc.Dial(b.holdfast.Socket(cluster.Pageserver))
	if err != nil {
		return nil, nil, nil, err
	}
	at = &pb.ReadPoint{Project: st.Endpoints[0].Project, Branch: st.Endpoints[0].Branch, Latest: true}
	return pb.NewPageServerClient(conn), at, conn.Close, nil
}

// getPage asks the page server for single random pages of the largest table.
func (b *bench) getPage(ctx context.Context) error {
	conn, err := b.holdfast.Target().Connect(ctx)
	if err != nil {
		return err
	}
	defer conn.Close(ctx)
	var path string
	var blocks int64
	err = conn.QueryRow(ctx, "SELECT pg_relation_filepath(oid), pg_relation_size(oid) / 8192 FROM pg_class WHERE relkind = 'r' ORDER BY pg_relation_size(oid) DESC LIMIT 1").Scan(&path, &blocks)
	if err != nil {
		return err
	}
	parts := strings.Split(path, "/") // base/DATABASE/RELATION
	database, err := strconv.ParseUint(parts[1], 10, 32)
	if err != nil {
		return err
	}
	relation, err := strconv.ParseUint(parts[2], 10, 32)
	if err != nil {
		return err
	}
	client, at, closeConn, err := b.pageserver(ctx)
	if err != nil {
		return err
	}
	defer closeConn()
	rel := &pb.RelFork{Tablespace: uint32(pg.DefaultTablespaceOid), Database: uint32(database), Relation: uint32(relation)}
	for _, askers := range []int{1, 8} {
		times, err := askPages(ctx, client, at, rel, uint32(blocks), askers, time.Duration(b.seconds)*time.Second)
		if err != nil {
			return err
		}
		slices.Sort(times)
		for _, p := range []float64{0.5, 0.99} {
			b.report.add(row{what: fmt.Sprintf("GetPage p%.0f, %d at once", 100*p, askers), unit: "ms",
				values: map[string]float64{"holdfast": percentile(times, p)}})
		}
		b.progress("GetPage, %d at once: %d pages of %d, %.0f/s", askers, len(times), blocks, float64(len(times))/float64(b.seconds))
	}
	return nil
}

// askPages returns how long each question took, in milliseconds.
func askPages(ctx context.Context, client pb.PageServerClient, at *pb.ReadPoint, rel *pb.RelFork, blocks uint32, askers int, d time.Duration) ([]float64, error) {
	var mu sync.Mutex
	var all []float64
	var firstErr error
	var wg sync.WaitGroup
	end := time.Now().Add(d)
	for range askers {
		wg.Go(func() {
			var times []float64
			var err error
			for err == nil && time.Now().Before(end) {
				began := time.Now()
				_, err = client.GetPages(ctx, &pb.GetPagesRequest{At: at, Rel: rel, Block: rand.Uint32N(blocks), Count: 1})
				times = append(times, float64(time.Since(began).Microseconds())/1000)
			}
			mu.Lock()
			defer mu.Unlock()
			all = append(all, times...)
			if firstErr == nil {
				firstErr = err
			}
		})
	}
	wg.Wait()
	return all, firstErr
}

// ingest lets WAL gather while the page server is down, and times how it catches up.
func (b *bench) ingest(ctx context.Context) error {
	t := b.holdfast.Target()
	if err := t.Exec(ctx, "CREATE TABLE IF NOT EXISTS gathered (i int, v text)", "SELECT 1"); err != nil {
		return err
	}
	from, err := lsn(ctx, t)
	if err != nil {
		return err
	}
	if err := b.holdfast.Kill(cluster.Pageserver); err != nil {
		return err
	}
	writeCtx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	err = t.Exec(writeCtx, "INSERT INTO gathered SELECT i, repeat('v', 200) FROM generate_series(1, 700000) i")
	cancel()
	if startErr := b.holdfast.StartRole(cluster.Pageserver); err != nil || startErr != nil {
		return fmt.Errorf("writing while the page server is down: %w", firstOf(err, startErr))
	}
	to, err := lsn(ctx, t)
	if err != nil {
		return err
	}
	var began time.Time
	for {
		st, err := b.holdfast.Status(ctx)
		if err != nil {
			return err
		}
		var at pg.LSN // 0 until it is attached
		for _, br := range st.Pageserver.Branches {
			at = br.IngestedLSN
		}
		if at > 0 && began.IsZero() {
			began = time.Now()
			from = max(from, at)
		}
		if at >= to {
			break
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(20 * time.Millisecond):
		}
	}
	if from >= to {
		return fmt.Errorf("it had caught up before the first look")
	}
	b.report.add(row{what: "ingest, catching up", unit: "MiB/s", values: map[string]float64{"holdfast": float64(to-from) / (1 << 20) / time.Since(began).Seconds()}})
	return nil
}

func firstOf(errs ...error) error {
	for _, e := range errs {
		if e != nil {
			return e
		}
	}
	return nil
}

// written gathers what runs wrote to the disk, and how much WAL they made, by system. The
// other systems are idle meanwhile. The kernel's count for a process (/proc/PID/io) will not do:
// it counts a large folio whole for each byte that is changed in it.
type written struct{ disk, wal map[string]float64 }

// during runs fn and adds what the system wrote.
func (w *written) during(ctx context.Context, dir string, s system, fn func() error) error {
	lsn0, err := lsn(ctx, s.target)
	if err != nil {
		return err
	}
	disk0, err := diskWritten(dir)
	if err != nil {
		return err
	}
	if err := fn(); err != nil {
		return err
	}
	disk1, err := diskWritten(dir)
	if err != nil {
		return err
	}
	lsn1, err := lsn(ctx, s.target)
	if err != nil {
		return err
	}
	w.disk[s.name] += float64(disk1 - disk0)
	w.wal[s.name] += float64(lsn1 - lsn0)
	return nil
}

// ratio is bytes on the disk per byte of WAL.
func (w *written) ratio() map[string]float64 {
	r := make(map[string]float64)
	for name, wal := range w.wal {
		if wal > 0 {
			r[name] = w.disk[name] / wal
		}
	}
	return r
}

// diskWritten is how many bytes were written to the disk that holds dir since the machine's
// start.
func diskWritten(dir string) (uint64, error) {
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		return 0, err
	}
	file := fmt.Sprintf("/sys/dev/block/%d:%d/stat", unix.Major(st.Dev), unix.Minor(st.Dev))
	data, err := os.ReadFile(file)
	if err != nil {
		return 0, err
	}
	const sectorsWritten, sectorSize = 6, 512 // Documentation/block/stat.rst
	f := strings.Fields(string(data))
	if len(f) <= sectorsWritten {
		return 0, fmt.Errorf("%s has %d fields", file, len(f))
	}
	sectors, err := strconv.ParseUint(f[sectorsWritten], 10, 64)
	return sectors * sectorSize, err
}
