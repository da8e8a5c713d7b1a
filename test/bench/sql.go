package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/test/pgtools"
)

// pgbench's own words.
var (
	saysTPS     = regexp.MustCompile(`(?m)^tps = ([0-9.]+)`)
	saysLatency = regexp.MustCompile(`(?m)^latency average = ([0-9.]+) ms`)
)

func (b *bench) pgbench(ctx context.Context, t pgtools.Target, clients int, args ...string) (tps, latencyMS float64, err error) {
	threads := min(clients, 2)
	args = append([]string{"-n", "-c", strconv.Itoa(clients), "-j", strconv.Itoa(threads), "-T", strconv.Itoa(b.seconds)}, args...)
	out, err := t.Run(ctx, "pgbench", args...)
	if err != nil {
		return 0, 0, err
	}
	for re, into := range map[*regexp.Regexp]*float64{saysTPS: &tps, saysLatency: &latencyMS} {
		m := re.FindStringSubmatch(out)
		if m == nil {
			return 0, 0, fmt.Errorf("pgbench did not say its result:\n%s", out)
		}
		if *into, err = strconv.ParseFloat(m[1], 64); err != nil {
			return 0, 0, err
		}
	}
	return tps, latencyMS, nil
}

// interleaved runs measure over every system, rounds times, beginning with another system
// each round, and returns the medians.
func (b *bench) interleaved(ctx context.Context, what string, measure func(context.Context, system) (float64, error)) (map[string]float64, error) {
	values := make(map[string][]float64)
	for round := range b.rounds {
		for i := range b.systems {
			s := b.systems[(i+round)%len(b.systems)]
			// What earlier runs left to be written is not this run's.
			if err := s.target.Exec(ctx, "CHECKPOINT"); err != nil {
				return nil, fmt.Errorf("%s: %w", s.name, err)
			}
			v, err := measure(ctx, s)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", s.name, err)
			}
			values[s.name] = append(values[s.name], v)
		}
	}
	medians := make(map[string]float64)
	for name, v := range values {
		medians[name] = median(v)
		b.progress("%-28s %-12s %s", what, name, list(v))
	}
	return medians, nil
}

func (b *bench) load(ctx context.Context) error {
	took := make(map[string]float64)
	for _, s := range b.systems {
		b.progress("loading scale %d into %s", b.scale, s.name)
		began := time.Now()
		if _, err := s.target.Run(ctx, "pgbench", "-i", "-q", "-s", strconv.Itoa(b.scale)); err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
		took[s.name] = time.Since(began).Seconds()
	}
	b.report.add(row{what: fmt.Sprintf("pgbench -i, scale %d", b.scale), unit: "s", values: took})
	return nil
}

func (b *bench) tpcb(ctx context.Context) error {
	w := written{disk: make(map[string]float64), wal: make(map[string]float64)}
	for _, clients := range []int{1, 8, 32} {
		what := fmt.Sprintf("TPC-B, %d clients", clients)
		v, err := b.interleaved(ctx, what, func(ctx context.Context, s system) (tps float64, err error) {
			err = w.during(ctx, b.dir, s, func() (err error) {
				tps, _, err = b.pgbench(ctx, s.target, clients)
				return err
			})
			return tps, err
		})
		if err != nil {
			return err
		}
		b.report.add(row{what: what, unit: "TPS", values: v, against: "synchronous", target: 1.0})
	}
	b.report.add(row{what: "written to the disk per byte of WAL, TPC-B", unit: "B/B", values: w.ratio()})
	return nil
}

func (b *bench) selectOnly(ctx context.Context) error {
	for _, clients := range []int{1, 8} {
		what := fmt.Sprintf("select-only, %d clients", clients)
		v, err := b.interleaved(ctx, what, func(ctx context.Context, s system) (float64, error) {
			tps, _, err := b.pgbench(ctx, s.target, clients, "-S")
			return tps, err
		})
		if err != nil {
			return err
		}
		b.report.add(row{what: what, unit: "TPS", values: v, against: "single", target: 0.85})
	}
	return nil
}

func (b *bench) commitLatency(ctx context.Context) error {
	script := filepath.Join(b.dir, "commit.sql")
	if err := os.WriteFile(script, []byte("INSERT INTO commits (v) VALUES ('one row, one commit');\n"), 0o644); err != nil {
		return err
	}
	for _, s := range b.systems {
		if err := s.target.Exec(ctx, "CREATE TABLE IF NOT EXISTS commits (id bigserial PRIMARY KEY, v text)"); err != nil {
			return err
		}
	}
	v, err := b.interleaved(ctx, "commit latency, 1 client", func(ctx context.Context, s system) (float64, error) {
		_, ms, err := b.pgbench(ctx, s.target, 1, "-f", script)
		return ms, err
	})
	if err != nil {
		return err
	}
	b.report.add(row{what: "commit latency, 1 client", unit: "ms", values: v, against: "synchronous", target: 1.3, atMost: true})
	return nil
}

// rows is a stream of text rows of about 128 bytes, without end.
type rows struct {
	block []byte
	off   int
}

func newRows() *rows {
	var b strings.Builder
	for i := range 8192 {
		fmt.Fprintf(&b, "%d\t%064x\tsome text of a row that is copied in\n", i, uint64(i)*0x9e3779b97f4a7c15)
	}
	return &rows{block: []byte(b.String())}
}

func (r *rows) Read(p []byte) (int, error) {
	n := copy(p, r.block[r.off:])
	r.off = (r.off + n) % len(r.block)
	return n, nil
}

// wholeRows ends a stream of n blocks.
func wholeRows(n int64) io.Reader {
	r := newRows()
	return io.LimitReader(r, max(n/int64(len(r.block)), 1)*int64(len(r.block)))
}

func (b *bench) copyIn(ctx context.Context) error {
	rounds := b.rounds
	b.rounds = min(3, b.rounds)
	defer func() { b.rounds = rounds }()
	what := fmt.Sprintf("COPY of %d MiB", b.copyMiB)
	v, err := b.interleaved(ctx, what, func(ctx context.Context, s system) (float64, error) {
		conn, err := s.target.Connect(ctx)
		if err != nil {
			return 0, err
		}
		defer conn.Close(ctx)
		if _, err := conn.Exec(ctx, "DROP TABLE IF EXISTS copied; CREATE TABLE copied (i int, h text, t text)"); err != nil {
			return 0, err
		}
		began := time.Now()
		if _, err := conn.PgConn().CopyFrom(ctx, wholeRows(int64(b.copyMiB)<<20), "COPY copied FROM STDIN"); err != nil {
			return 0, err
		}
		rate := float64(b.copyMiB) / time.Since(began).Seconds()
		_, err = conn.Exec(ctx, "DROP TABLE copied")
		return rate, err
	})
	if err != nil {
		return err
	}
	b.report.add(row{what: what, unit: "MiB/s", values: v, against: "synchronous", target: 0.8})
	return nil
}

// lsn is where a server's WAL ends.
func lsn(ctx context.Context, t pgtools.Target) (pg.LSN, error) {
	conn, err := t.Connect(ctx)
	if err != nil {
		return 0, err
	}
	defer conn.Close(ctx)
	var text string
	if err := conn.QueryRow(ctx, "SELECT pg_current_wal_flush_lsn()::text").Scan(&text); err != nil {
		return 0, err
	}
	return pg.ParseLSN(text)
}
