// Command bench measures Holdfast against two set-ups of stock PostgreSQL on the same disk
// with the same settings: (i) a primary that waits for one of two synchronous standbys,
// three copies as here, and (ii) a single server without copies. Runs are interleaved and
// medians are printed, beside what is aimed at.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/holdfastdb/holdfast/test/cluster"
	"github.com/holdfastdb/holdfast/test/pgtools"
	"github.com/holdfastdb/holdfast/test/proc"
	"github.com/holdfastdb/holdfast/test/stock"
)

// options are the size of the measurement.
type options struct {
	short       bool
	seconds     int // of one pgbench run
	rounds      int
	scale       int
	largeScale  int // of the database that an endpoint is started on
	starts      int
	copyMiB     int
	dir         string
	only        *regexp.Regexp
	noHoldfast  bool
	profile     bool
	keep        bool
	cacheBytes  int64
	sharedBufMB int
}

func parseOptions() (options, error) {
	var o options
	var only string
	flag.BoolVar(&o.short, "short", false, "a quick look: fewer, shorter and smaller runs")
	flag.IntVar(&o.seconds, "seconds", 0, "length of one pgbench run (20; short: 5)")
	flag.IntVar(&o.rounds, "rounds", 0, "runs of each kind, of which the median counts (5; short: 3)")
	flag.IntVar(&o.scale, "scale", 30, "pgbench scale")
	flag.StringVar(&o.dir, "dir", os.TempDir(), "where the servers' folders are made")
	flag.StringVar(&only, "only", "", "a regular expression of the measurements to make: tpcb select commit copy start getpage ingest replay roles code")
	flag.BoolVar(&o.noHoldfast, "stock-only", false, "measure the stock set-ups only")
	flag.BoolVar(&o.profile, "profile", false, "keep CPU profiles of Holdfast's processes and print what is on top")
	flag.BoolVar(&o.keep, "keep", false, "leave the folders, to repeat a part of a replay: bench replay-part ingest FOLDER/replay PROFILE")
	flag.Int64Var(&o.cacheBytes, "cache-bytes", 0, "the endpoint's local store (0: the default)")
	flag.IntVar(&o.sharedBufMB, "shared-buffers", 128, "shared_buffers of every server, in MB")
	flag.Parse()
	if flag.NArg() > 0 {
		return o, fmt.Errorf("unexpected argument %q", flag.Arg(0))
	}
	re, err := regexp.Compile(only)
	if err != nil {
		return o, fmt.Errorf("-only: %w", err)
	}
	o.only = re
	o.starts, o.largeScale, o.copyMiB = 5, 100, 1024
	seconds, rounds := 20, 5
	if o.short {
		seconds, rounds = 5, 3
		o.starts, o.largeScale, o.copyMiB = 3, o.scale, 128
	}
	if o.seconds == 0 {
		o.seconds = seconds
	}
	if o.rounds == 0 {
		o.rounds = rounds
	}
	return o, nil
}

func (o options) wants(name string) bool { return o.only.MatchString(name) }

// settings are the same for every server.
func (o options) settings() map[string]string {
	return map[string]string{"shared_buffers": fmt.Sprintf("%dMB", o.sharedBufMB), "max_wal_size": "4GB", "checkpoint_timeout": "15min", "max_connections": "100"}
}

// system is one set-up that is measured.
type system struct {
	name   string
	target pgtools.Target
}

// bench holds what runs.
type bench struct {
	options
	dir      string
	holdfast *cluster.Cluster
	systems  []system // holdfast, (i), (ii); without holdfast if it is not measured
	stock    []*stock.Server
	report   report
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if len(os.Args) == 5 && os.Args[1] == replayPart {
		if err := runReplayPart(ctx, os.Args[2], os.Args[3], os.Args[4]); err != nil {
			fmt.Fprintln(os.Stderr, "bench:", err)
			os.Exit(1)
		}
		return
	}
	if err := run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context) (err error) {
	o, err := parseOptions()
	if err != nil {
		return err
	}
	b := &bench{options: o}
	if b.dir, err = os.MkdirTemp(o.dir, "hf-bench-"); err != nil {
		return err
	}
	if err := os.Chmod(b.dir, 0o711); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.close()) }()
	fmt.Printf("%d cores, %s, scale %d, shared_buffers %d MB, medians of %d interleaved runs of %ds\n",
		runtime.NumCPU(), runtime.GOARCH, o.scale, o.sharedBufMB, o.rounds, o.seconds)
	if b.wants("replay") { // alone on the machine
		if err := b.measure(ctx, "replay", b.replay); err != nil {
			return err
		}
	}
	if err := b.compare(ctx); err != nil {
		return err
	}
	b.report.print(os.Stdout)
	return nil
}

// compare makes what is measured of running servers.
func (b *bench) compare(ctx context.Context) error {
	started := false
	for _, m := range []struct {
		name  string
		stock bool // it measures the stock set-ups too
		do    func(context.Context) error
	}{
		{"start", false, b.startSmall},
		{"tpcb select", true, b.load},
		{"tpcb", true, b.tpcb},
		{"select", true, b.selectOnly},
		{"commit", true, b.commitLatency},
		{"copy", true, b.copyIn},
		{"start", false, b.startWithWAL},
		{"getpage", false, b.getPage},
		{"ingest", false, b.ingest},
		{"start", false, b.startLarge},
		{"roles", false, b.roles},
		{"code", false, b.code},
	} {
		if !slices.ContainsFunc(strings.Fields(m.name), b.wants) || !m.stock && b.noHoldfast {
			continue
		}
		if !started {
			if err := b.start(ctx); err != nil {
				return err
			}
			started = true
		}
		if err := b.measure(ctx, m.name, m.do); err != nil {
			return err
		}
	}
	return nil
}

// measure runs one measurement. That it fails is reported at the end and does not keep the
// others; only the end of ctx does.
func (b *bench) measure(ctx context.Context, name string, do func(context.Context) error) error {
	err := do(ctx)
	if err == nil || ctx.Err() != nil {
		return err
	}
	b.report.failed(name, err)
	if b.holdfast != nil {
		fmt.Fprintln(os.Stderr, b.holdfast.Logs())
	}
	fmt.Fprintf(os.Stderr, "bench: %s: %v\n", name, err)
	return nil
}

func (b *bench) progress(format string, args ...any) {
	fmt.Printf("%s  %s\n", time.Now().Format("15:04:05"), fmt.Sprintf(format, args...))
}

func (b *bench) start(ctx context.Context) error {
	if !b.noHoldfast {
		dir := filepath.Join(b.dir, "holdfast") // of its own: the end of a cluster is that nothing runs there
		if err := os.Mkdir(dir, 0o711); err != nil {
			return err
		}
		c, err := cluster.New(cluster.Options{Dir: dir, Separate: true, Settings: b.settings(), CacheBytes: b.cacheBytes})
		if err != nil {
			return err
		}
		if b.profile || b.wants("code") {
			if err := os.Setenv("HOLDFAST_PROFILE", b.profileDir()); err != nil {
				return err
			}
			if err := os.MkdirAll(b.profileDir(), 0o700); err != nil {
				return err
			}
		}
		b.holdfast = c
		b.progress("starting Holdfast")
		if err := c.Start(ctx); err != nil {
			return err
		}
		b.systems = append(b.systems, system{"holdfast", c.Target()})
	}
	if !b.wants("tpcb") && !b.wants("select") && !b.wants("commit") && !b.wants("copy") {
		return nil
	}
	b.progress("starting stock PostgreSQL with two synchronous standbys, and alone")
	primary, err := b.newStock(ctx, "primary")
	if err != nil {
		return err
	}
	for _, name := range []string{"s1", "s2"} {
		standby, err := primary.NewStandby(ctx, b.dir, name, b.settings())
		if err != nil {
			return err
		}
		if err := b.startStock(ctx, standby); err != nil {
			return err
		}
	}
	if err := primary.Synchronous(ctx, "s1", "s2"); err != nil {
		return err
	}
	single, err := b.newStock(ctx, "single")
	if err != nil {
		return err
	}
	b.systems = append(b.systems, system{"synchronous", primary.Target()}, system{"single", single.Target()})
	return nil
}

func (b *bench) newStock(ctx context.Context, name string) (*stock.Server, error) {
	s, err := stock.New(ctx, b.dir, name, b.settings())
	if err != nil {
		return nil, err
	}
	return s, b.startStock(ctx, s)
}

func (b *bench) startStock(ctx context.Context, s *stock.Server) error {
	b.stock = append(b.stock, s)
	return s.Start(ctx)
}

func (b *bench) close() error {
	var errs []error
	if b.holdfast != nil {
		errs = append(errs, b.holdfast.KillAll())
	}
	for i := len(b.stock) - 1; i >= 0; i-- {
		errs = append(errs, b.stock[i].Kill())
	}
	if b.keep {
		b.progress("left: %s", b.dir)
		return errors.Join(errs...)
	}
	return errors.Join(append(errs, proc.RemoveAll(b.dir))...)
}
