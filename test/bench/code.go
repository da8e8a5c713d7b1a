package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"time"
)

func (b *bench) profileDir() string { return filepath.Join(b.dir, "profiles") }

// sealing are the functions in which sealing spends its time: AES-GCM of the standard
// library, by its packages' names.
var sealing = regexp.MustCompile(`crypto/(internal/)?(fips140/)?(aes|cipher)`)

// profiled matches a line of `go tool pprof -top`: flat time, percentages, name.
var profiled = regexp.MustCompile(`^\s*([0-9.]+)(ms|s|mins|us)\s+[0-9.]+%\s+[0-9.]+%\s+\S+\s+[0-9.]+%\s+(.*)$`)

// code measures what a whole run cannot show: the share of the machine that sealing takes,
// and the cost of redo of one record.
func (b *bench) code(ctx context.Context) error {
	if err := b.sealingShare(ctx); err != nil {
		return err
	}
	return b.goBenchmarks(ctx)
}

// sealingShare runs TPC-B over processes that profile themselves. What share of all CPU time
// of the machine goes into AES-GCM is the most that a run without it could win.
func (b *bench) sealingShare(ctx context.Context) error {
	if err := b.holdfast.Stop(); err != nil {
		return err
	}
	if err := os.RemoveAll(b.profileDir()); err != nil {
		return err
	}
	if err := os.MkdirAll(b.profileDir(), 0o700); err != nil {
		return err
	}
	if err := b.holdfast.Start(ctx); err != nil {
		return err
	}
	if _, err := b.holdfast.Target().Run(ctx, "pgbench", "-i", "-q", "-s", "10"); err != nil {
		return err
	}
	began := time.Now()
	if _, _, err := b.pgbench(ctx, b.holdfast.Target(), 8); err != nil {
		return err
	}
	took := time.Since(began).Seconds()
	if err := b.holdfast.Stop(); err != nil { // the profiles are written at the end
		return err
	}
	files, err := filepath.Glob(filepath.Join(b.profileDir(), "*.pprof"))
	if err != nil || len(files) == 0 {
		return fmt.Errorf("no profiles in %s: %w", b.profileDir(), err)
	}
	out, err := exec.CommandContext(ctx, "go", append([]string{"tool", "pprof", "-top", "-nodecount=100000", "-nodefraction=0"}, files...)...).Output()
	if err != nil {
		return fmt.Errorf("go tool pprof: %w", err)
	}
	var spent float64
	for line := range strings.Lines(string(out)) {
		m := profiled.FindStringSubmatch(strings.TrimRight(line, "\n"))
		if m == nil || !sealing.MatchString(m[3]) {
			continue
		}
		v, err := strconv.ParseFloat(m[1], 64)
		if err != nil {
			return err
		}
		spent += v * map[string]float64{"us": 1e-6, "ms": 1e-3, "s": 1, "mins": 60}[m[2]]
	}
	if spent == 0 {
		return fmt.Errorf("no time in AES-GCM was found in the profiles %v", files)
	}
	b.report.add(row{what: "sealing's share of the machine's CPU", unit: "%", target: 3, atMost: true,
		values: map[string]float64{"holdfast": 100 * spent / (took * float64(runtime.NumCPU()))}})
	if b.profile {
		fmt.Println(strings.Join(firstLines(string(out), 45), "\n"))
	}
	return nil
}

func firstLines(s string, n int) []string {
	lines := strings.Split(s, "\n")
	return lines[:min(n, len(lines))]
}

// goBenchmark matches a result line of `go test -bench`.
var goBenchmark = regexp.MustCompile(`^(Benchmark\S+?)(?:-\d+)?\s+\d+\s+([0-9.]+) ns/op(.*)$`)

// goBenchmarks runs the packages' own benchmarks of redo and of sealing.
func (b *bench) goBenchmarks(ctx context.Context) error {
	cmd := exec.CommandContext(ctx, "go", "test", "-run", "^$", "-bench", ".", "-benchtime", "200ms",
		"./pageserver/redo/...", "./internal/seal", "./internal/walrec")
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("go test -bench: %w\n%s", err, out)
	}
	for line := range strings.Lines(string(out)) {
		if m := goBenchmark.FindStringSubmatch(strings.TrimSpace(line)); m != nil {
			ns, err := strconv.ParseFloat(m[2], 64)
			if err != nil {
				return err
			}
			b.report.add(row{what: strings.TrimPrefix(m[1], "Benchmark"), unit: "us", values: map[string]float64{"holdfast": ns / 1000}})
		}
	}
	return nil
}
