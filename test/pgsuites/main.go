// Command pgsuites runs PostgreSQL's own test suites against an endpoint: regress, isolation,
// and those of the contrib modules that need no special server. Then it asks whether what they
// left behind outlives the endpoint.
//
// The suites come from the source package of the installed server, which apt fetches; nothing
// of it is committed here. With -consistency the server adds to each WAL record the pages that
// it must produce (wal_consistency_checking), and the pageserver compares what its redo makes. With
// -verify-pages the endpoint compares the pages that it wrote with the pageserver's.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"maps"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/holdfastdb/holdfast/test/cluster"
	"github.com/holdfastdb/holdfast/test/pgtools"
	"github.com/holdfastdb/holdfast/test/proc"
)

type options struct {
	cache, dir  string
	only        *regexp.Regexp
	consistency bool
	witness     bool
	seed        uint64
	verifyPages bool
}

func parseOptions() (options, error) {
	var o options
	var only string
	cache, err := os.UserCacheDir()
	if err != nil || os.Geteuid() == 0 {
		cache = "/var/cache" // the server, another user, reads there
	}
	flag.StringVar(&o.cache, "cache", filepath.Join(cache, "holdfast"), "where PostgreSQL's source is kept")
	flag.StringVar(&o.dir, "dir", os.TempDir(), "where the cluster's folder is made")
	flag.StringVar(&only, "only", "", "a regular expression of the suites to run")
	flag.BoolVar(&o.consistency, "consistency", false, "compare what redo makes of each record (wal_consistency_checking)")
	flag.BoolVar(&o.witness, "witness", true, "after each suite, compare the pageserver with a stock server that recovers the same WAL")
	flag.Uint64Var(&o.seed, "seed", uint64(time.Now().UnixNano()), "of the LSNs that -witness draws")
	flag.BoolVar(&o.verifyPages, "verify-pages", false, "compare each page that leaves the endpoint's local store, made small, with the pageserver's")
	flag.Parse()
	if o.only, err = regexp.Compile(only); err != nil {
		return o, fmt.Errorf("-only: %w", err)
	}
	return o, nil
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	o, err := parseOptions()
	if err == nil {
		err = run(ctx, o)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "pgsuites:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, o options) (err error) {
	src, err := fetchSource(ctx, o.cache)
	if err != nil {
		return err
	}
	suites, err := src.suites(ctx)
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp(o.dir, "hf-suites-")
	if err != nil {
		return err
	}
	// The server's user passes through.
	if err := errors.Join(os.Chmod(dir, 0o755), os.Mkdir(filepath.Join(dir, "cluster"), 0o711)); err != nil {
		return err
	}
	set := maps.Clone(settings)
	if o.consistency {
		set["wal_consistency_checking"] = "all"
	}
	opts := cluster.Options{Dir: filepath.Join(dir, "cluster"), Separate: true, Settings: set, VerifyRedo: o.consistency, VerifyPages: o.verifyPages}
	if o.witness {
		opts.HistoryBytes = 1 << 50 // all of it
	}
	if o.verifyPages {
		opts.CacheBytes = smallCache
		set["shared_buffers"] = "8MB" // so that Postgres writes what it changes
	}
	c, err := cluster.New(opts)
	if err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, c.KillAll())
		if err == nil {
			err = proc.RemoveAll(dir)
		} else {
			fmt.Println("what is left is in", dir)
		}
	}()
	if err := c.Start(ctx); err != nil {
		return err
	}
	var obs *observer
	if o.witness {
		if obs, err = observe(ctx, c, filepath.Join(dir, "witness"), o.seed); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, obs.close()) }()
	}
	failed := runSuites(ctx, o, src, suites, c, obs, filepath.Join(dir, "out"))
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if o.consistency {
		failed = append(failed, checks(ctx, c)...)
	}
	if o.verifyPages {
		failed = append(failed, pageChecks(ctx, c)...)
	}
	failed = append(failed, outlives(ctx, c, dir)...)
	if len(failed) > 0 {
		return fmt.Errorf("failed: %s", strings.Join(failed, "; "))
	}
	return nil
}

func runSuites(ctx context.Context, o options, src *source, suites []suite, c *cluster.Cluster, obs *observer, out string) (failed []string) {
	passed := 0
	for _, q := range suites {
		if !o.only.MatchString(q.name) {
			continue
		}
		one := func() {
			r := src.run(ctx, c.Target(), q, filepath.Join(out, strings.ReplaceAll(q.name, "/", "-")))
			passed += r.passed
			fmt.Printf("%-28s %3d passed, %d failed in %.0fs %s\n", q.name, r.passed, len(r.failed), r.took.Seconds(), strings.Join(r.failed, " "))
			for _, name := range r.expected {
				fmt.Printf("    differs, as is inherent: %s: %s\n", name, inherent[q.name+"/"+name])
			}
			switch {
			case r.err != nil:
				failed = append(failed, fmt.Sprintf("%s: %v", q.name, r.err))
			case len(r.failed) > 0:
				failed = append(failed, fmt.Sprintf("%s: %s (%s)", q.name, strings.Join(r.failed, " "), r.diffs))
			}
		}
		if obs == nil {
			one()
		} else {
			differs := obs.during(ctx, q.name, one)
			failed = append(failed, differs...)
		}
		if ctx.Err() != nil {
			return failed
		}
	}
	fmt.Printf("%d tests passed\n", passed)
	for _, name := range slices.Sorted(maps.Keys(excluded)) {
		fmt.Printf("not run: %s: %s\n", name, excluded[name])
	}
	return failed
}

// smallCache is less than what the suites write.
const smallCache = 8 << 20

// pageChecks stops the endpoint in order, which compares all that it still holds, and starts it
// again.
func pageChecks(ctx context.Context, c *cluster.Cluster) (failed []string) {
	for _, do := range []string{"stop", "start"} {
		if _, err := c.CLI(ctx, "endpoint", do); err != nil {
			return append(failed, err.Error())
		}
	}
	list := c.PageChecks()
	for _, p := range list {
		fmt.Println(p.Line)
		if !p.Whole || p.Mismatched > 0 || p.Compared == 0 {
			failed = append(failed, fmt.Sprintf("pages were not all compared, or differ (the log says where): %s", p.Line))
		}
	}
	if len(list) == 0 {
		failed = append(failed, "the endpoint did not tell what it compared")
	}
	return failed
}

// checks waits until the pageserver has ingested all WAL, and prints what it compared.
func checks(ctx context.Context, c *cluster.Cluster) (failed []string) {
	var list []cluster.RedoCheck
	if _, err := waitIngested(ctx, c, func(found []cluster.RedoCheck) { list = found }); err != nil {
		return []string{err.Error()}
	}
	var total uint64
	for _, r := range list {
		fmt.Printf("%-32s %9d pages compared\n", r.Record, r.Checked)
		total += r.Checked
		if r.Mismatches+r.Failed > 0 {
			failed = append(failed, fmt.Sprintf("%s: %d differ and %d could not be made of %d: %s", r.Record, r.Mismatches, r.Failed, r.Checked, r.First))
		}
	}
	fmt.Printf("%d pages of %d kinds of records compared with PostgreSQL's own\n", total, len(list))
	if total == 0 {
		failed = append(failed, "nothing was compared")
	}
	return failed
}

// outlives kills the endpoint, whose pages then all come from the pageserver, and wants the
// same dump of each database and sound indexes.
func outlives(ctx context.Context, c *cluster.Cluster, dir string) (failed []string) {
	databases, err := databases(ctx, c.Target())
	if err != nil {
		return []string{err.Error()}
	}
	dump := func(when string) {
		for _, db := range databases {
			if err := c.Target().InDatabase(db).Dump(ctx, filepath.Join(dir, db+"."+when), "--no-unlogged-table-data"); err != nil {
				failed = append(failed, fmt.Sprintf("the dump of %s %s the kill: %v", db, when, err))
			}
		}
	}
	dump("before")
	for _, do := range []string{"kill", "start"} {
		if _, err := c.CLI(ctx, "endpoint", do); err != nil {
			return append(failed, err.Error())
		}
	}
	dump("after")
	for _, db := range databases {
		diff, err := pgtools.FirstDifference(filepath.Join(dir, db+".before"), filepath.Join(dir, db+".after"))
		if err != nil || diff != "" {
			failed = append(failed, fmt.Sprintf("database %s is another after a kill: %s %v", db, diff, err))
		}
		if err := c.Target().InDatabase(db).Amcheck(ctx); err != nil {
			failed = append(failed, fmt.Sprintf("database %s: %v", db, err))
		}
	}
	fmt.Printf("%d databases were compared before and after a kill of the endpoint\n", len(databases))
	return failed
}

func databases(ctx context.Context, t pgtools.Target) (list []string, err error) {
	conn, err := t.Connect(ctx)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, conn.Close(ctx)) }()
	rows, err := conn.Query(ctx, "SELECT datname::text FROM pg_database WHERE datallowconn ORDER BY 1")
	if err != nil {
		return nil, err
	}
	for rows.Next() {
		var name string
		if err := rows.Scan(&name); err != nil {
			return nil, err
		}
		list = append(list, name)
	}
	return list, rows.Err()
}
