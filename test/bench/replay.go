package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/test/proc"
	"github.com/holdfastdb/holdfast/test/stock"
)

// roomyMB is a shared_buffers that holds every page that the replayed WAL touches.
const roomyMB = 2048

// replaySettings are a compute's as far as they shape WAL, and keep all of it, without a checkpoint
// in its middle. Nothing need be durable: what is timed is redo.
func replaySettings(sharedBufMB int) map[string]string {
	return map[string]string{
		"shared_buffers": fmt.Sprintf("%dMB", sharedBufMB), "full_page_writes": "off", "wal_init_zero": "off", "wal_recycle": "off",
		"fsync": "off", "wal_keep_size": "64GB", "max_wal_size": "64GB", "checkpoint_timeout": "1h", "jit": "off",
		"checkpoint_flush_after": "0", "bgwriter_flush_after": "0", "backend_flush_after": "0", "wal_buffers": "16MB",
	}
}

// recording is WAL and what it begins from.
type recording struct {
	dir  string
	base *stock.Server // as initdb left it
	made *stock.Server // shut down after the WAL was made
	last pg.LSN        // where the last record begins
}

// replay replays the same WAL with stock PostgreSQL's crash recovery and with the page server's
// own code, in turns. Both begin from the same data directory, and find it and the WAL in the
// kernel's page cache. The page server gets the WAL sealed, as safekeepers send it, from a file
// instead of the network; it ends with all of it in sealed layers in a synced folder, and with
// every page made once that the WAL touches. Recovery ends with its pages in buffers.
func (b *bench) replay(ctx context.Context) error {
	r, err := b.recordWAL(ctx)
	if err != nil {
		return err
	}
	var t replayTimes
	for round := range b.rounds {
		runs := []func(context.Context, *recording) error{
			func(ctx context.Context, r *recording) error { return b.recover(ctx, r, b.sharedBufMB, &t.stock) },
			func(ctx context.Context, r *recording) error { return b.recover(ctx, r, roomyMB, &t.roomy) },
			func(ctx context.Context, r *recording) error { return runPart(ctx, b, r, partIngest, "", &t.ingest) },
			func(ctx context.Context, r *recording) error { return runPart(ctx, b, r, partIngest, "1", &t.oneCore) },
			func(ctx context.Context, r *recording) error { return runPart(ctx, b, r, partRedo, "", &t.redo) },
		}
		for i := range runs {
			if err := runs[(i+round)%len(runs)](ctx, r); err != nil {
				return err
			}
		}
	}
	b.reportReplay(&t)
	return nil
}

// replayTimes are the results of all rounds.
type replayTimes struct {
	stock, roomy    []recovery
	ingest, oneCore []ingestResult
	redo            []redoResult
}

// recordWAL makes WAL: the loading of pgbench's tables, and transactions.
func (b *bench) recordWAL(ctx context.Context) (*recording, error) {
	scale, transactions := 15, 150_000 // for each of two clients
	if b.short {
		scale, transactions = 5, 30_000
	}
	r := &recording{dir: filepath.Join(b.dir, "replay")}
	if err := os.Mkdir(r.dir, 0o711); err != nil {
		return nil, err
	}
	b.progress("making WAL: pgbench -i at scale %d, %d transactions", scale, 2*transactions)
	var err error
	if r.base, err = stock.New(ctx, r.dir, "base", replaySettings(b.sharedBufMB)); err != nil {
		return nil, err
	}
	if r.made, err = r.base.Copy(r.dir, "made"); err != nil {
		return nil, err
	}
	if err := b.startStock(ctx, r.made); err != nil {
		return nil, err
	}
	for _, args := range [][]string{
		{"-i", "-q", "-s", strconv.Itoa(scale)},
		{"-n", "-c", "2", "-j", "2", "-t", strconv.Itoa(transactions)},
	} {
		if _, err := r.made.Target().Run(ctx, "pgbench", args...); err != nil {
			return nil, err
		}
	}
	if err := r.made.Stop(); err != nil {
		return nil, err
	}
	ctl, err := readControl(r.made.Dir)
	if err != nil {
		return nil, err
	}
	r.last = ctl.CheckPoint
	return r, nil
}

func controlFile(dir string) string { return filepath.Join(dir, "global", "pg_control") }

func readControl(dir string) (*pg.ControlFile, error) {
	data, err := os.ReadFile(controlFile(dir))
	if err != nil {
		return nil, err
	}
	return pg.ParseControlFile(data)
}

// recovery is what stock PostgreSQL says of its redo.
type recovery struct {
	elapsed float64 // seconds
	cpu     float64 // of the startup process, seconds
}

// recover lets a copy of the base recover through all of the WAL, as after a crash.
func (b *bench) recover(ctx context.Context, r *recording, sharedBufMB int, to *[]recovery) error {
	s, err := r.base.Copy(r.dir, "crashed")
	if err != nil {
		return err
	}
	defer os.RemoveAll(s.Dir)
	if err := b.crashed(s, r, sharedBufMB); err != nil {
		return err
	}
	if err := b.startStock(ctx, s); err != nil {
		return err
	}
	if err := s.Kill(); err != nil {
		return err
	}
	log, err := os.ReadFile(s.Log())
	if err != nil {
		return err
	}
	v, err := parseRecovery(string(log), r.last)
	if err != nil {
		return err
	}
	b.progress("stock recovery, shared_buffers %d MB: %.2fs, %.2fs of a processor", sharedBufMB, v.elapsed, v.cpu)
	*to = append(*to, v)
	return nil
}

// crashed makes the copy look as if its server had crashed after the WAL was written.
func (b *bench) crashed(s *stock.Server, r *recording, sharedBufMB int) error {
	ctl, err := readControl(s.Dir)
	if err != nil {
		return err
	}
	ctl.State = pg.DBInProduction
	if err := os.WriteFile(controlFile(s.Dir), ctl.Marshal(), 0); err != nil { // it exists, and keeps its owner
		return err
	}
	if err := s.CopyWAL(r.made); err != nil {
		return err
	}
	if err := s.Configure(replaySettings(sharedBufMB)); err != nil {
		return err
	}
	unix.Sync() // what was just copied is not written out during redo
	return nil
}

var redoDone = regexp.MustCompile(`redo done at ([0-9A-F]+/[0-9A-F]+) system usage: CPU: user: ([0-9.]+) s, system: ([0-9.]+) s, elapsed: ([0-9.]+) s`)

// parseRecovery finds in a server's log how long redo took. It must have gone to the record at last.
func parseRecovery(log string, last pg.LSN) (recovery, error) {
	m := redoDone.FindStringSubmatch(log)
	if m == nil {
		return recovery{}, fmt.Errorf("the server did not say that its redo is done:\n%s", log)
	}
	if m[1] != last.String() {
		return recovery{}, fmt.Errorf("redo was done at %s, want %v:\n%s", m[1], last, log)
	}
	var v [3]float64
	for i := range v {
		var err error
		if v[i], err = strconv.ParseFloat(m[2+i], 64); err != nil {
			return recovery{}, err
		}
	}
	return recovery{elapsed: v[2], cpu: v[0] + v[1]}, nil
}

// runPart runs one of the parts in a process of its own, with GOMAXPROCS if it is given.
func runPart[T interface{ String() string }](ctx context.Context, b *bench, r *recording, name, procs string, to *[]T) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	profile := ""
	if b.profile {
		profile = filepath.Join(r.dir, name+procs+".pprof")
	}
	var out bytes.Buffer
	cmd := exec.CommandContext(ctx, self, replayPart, name, r.dir, profile)
	cmd.Stdout, cmd.Stderr = &out, os.Stderr
	cmd.Env = os.Environ()
	if procs != "" {
		cmd.Env = append(cmd.Env, "GOMAXPROCS="+procs)
	}
	if err := proc.Start(cmd); err != nil {
		return err
	}
	if err := cmd.Wait(); err != nil {
		return fmt.Errorf("replay, part %s: %w", name, err)
	}
	var v T
	if err := json.Unmarshal(out.Bytes(), &v); err != nil {
		return fmt.Errorf("replay, part %s says %q: %w", name, out.String(), err)
	}
	*to = append(*to, v)
	b.progress("holdfast, %s, GOMAXPROCS %q: %v", name, procs, v)
	if profile == "" {
		return nil
	}
	top, err := exec.CommandContext(ctx, "go", "tool", "pprof", "-top", "-nodecount=60", profile).Output()
	fmt.Println(string(top))
	return err
}

// column is the median of what pick takes out of each result.
func column[T any](list []T, pick func(*T) float64) float64 {
	v := make([]float64, len(list))
	for i := range list {
		v[i] = pick(&list[i])
	}
	return median(v)
}

func (b *bench) reportReplay(t *replayTimes) {
	first := t.ingest[0]
	mb := float64(first.Bytes) / 1e6
	holdfast := func(v float64) map[string]float64 { return map[string]float64{"holdfast": v} }
	both := func(v, stock float64) map[string]float64 { return map[string]float64{"holdfast": v, "single": stock} }
	elapsed := func(r *recovery) float64 { return r.elapsed }
	cpu := func(r *recovery) float64 { return r.cpu }
	built := func(r *ingestResult) float64 { return r.Built.Wall }

	b.report.add(
		row{what: fmt.Sprintf("replay of %.0f MB of WAL and %d pages", mb, first.Pages), unit: "s",
			values: both(column(t.ingest, built), column(t.stock, elapsed)), against: "single", target: 1, atMost: true},
		row{what: "  with shared_buffers for all of them", unit: "s",
			values: both(column(t.ingest, built), column(t.roomy, elapsed)), against: "single", target: 1, atMost: true},
		row{what: "  on one core", unit: "s",
			values: both(column(t.oneCore, built), column(t.stock, elapsed))},
		row{what: "  processor time", unit: "s",
			values: both(column(t.oneCore, func(r *ingestResult) float64 { return r.Built.CPU }), column(t.stock, cpu))},
		row{what: "  of it, making the pages", unit: "s",
			values: holdfast(column(t.oneCore, func(r *ingestResult) float64 { return r.Built.CPU - r.Flushed.CPU }))},
		row{what: "WAL ingested into layers, per core", unit: "MB/s", target: 200,
			values: holdfast(column(t.oneCore, func(r *ingestResult) float64 { return mb / r.Flushed.CPU }))},
		row{what: "WAL ingested into layers", unit: "MB/s",
			values: holdfast(column(t.ingest, func(r *ingestResult) float64 { return mb / r.Flushed.Wall }))},
	)
	for i, k := range t.redo[0].Kinds {
		pick := func(fn func(*redoKind) float64) float64 {
			return column(t.redo, func(r *redoResult) float64 { return fn(&r.Kinds[i]) })
		}
		b.report.add(
			row{what: fmt.Sprintf("redo of a %s record (%d of them)", k.Name, k.Records), unit: "us", target: 2, atMost: true,
				values: holdfast(pick(func(k *redoKind) float64 { return k.Microseconds }))},
			row{what: "  of it, decoding", unit: "us", values: holdfast(pick(func(k *redoKind) float64 { return k.Decoding }))},
			row{what: "  allocations", unit: "1", values: holdfast(pick(func(k *redoKind) float64 { return k.Allocations }))},
		)
	}
}
