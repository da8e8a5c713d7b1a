package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/holdfastdb/holdfast/test/pgtools"
)

// A suite is one of PostgreSQL's own, which one call of pg_regress or
// pg_isolation_regress runs against a server that runs already.
type suite struct {
	name      string
	dir       string // in the source
	isolation bool
	tests     []string // empty: the suite's schedule
	options   []string
	pgOptions string // settings of its sessions
}

// excluded are the modules whose suites cannot run against an endpoint, or do not test a server
// as it is installed.
var excluded = map[string]string{
	"basic_archive":   "needs archive_mode, which is off by design: the safekeepers keep the WAL",
	"dblink":          "connects to its own server through the Unix socket without a password, which endpoints do not offer",
	"postgres_fdw":    "connects to its own server through the Unix socket without a password, which endpoints do not offer",
	"sepgsql":         "needs SELinux",
	"bool_plperl":     "needs PL/Perl, a package of its own",
	"hstore_plperl":   "needs PL/Perl, a package of its own",
	"jsonb_plperl":    "needs PL/Perl, a package of its own",
	"hstore_plpython": "needs PL/Python, a package of its own",
	"jsonb_plpython":  "needs PL/Python, a package of its own",
	"ltree_plpython":  "needs PL/Python, a package of its own",
}

// inherent are the tests that fail on any endpoint, and why. One that passes is reported, too.
var inherent = map[string]string{
	"regress/tablespace":      "is about tablespaces, which endpoints refuse, in-place ones too: nothing of them would be in the pageserver",
	"citext/create_index_acl": "makes an in-place tablespace",
}

// settings are what the suites expect of a server, where it differs from an endpoint's.
var settings = map[string]string{
	"max_prepared_transactions": "10", "wal_level": "logical", "max_replication_slots": "4", "max_wal_senders": "10",
	"shared_preload_libraries": "pg_stat_statements", "compute_query_id": "regress", "max_connections": "100", "shared_buffers": "128MB",
	"timezone": "America/Los_Angeles", "datestyle": "Postgres, MDY",
}

func (s *source) suites(ctx context.Context) ([]suite, error) {
	list := []suite{
		{name: "regress", dir: "src/test/regress", options: []string{"--schedule=parallel_schedule", "--max-connections=20"}},
		{name: "isolation", dir: "src/test/isolation", isolation: true, options: []string{"--schedule=isolation_schedule"}},
	}
	modules, err := filepath.Glob(filepath.Join(s.dir, "contrib", "*", "Makefile"))
	if err != nil {
		return nil, err
	}
	for _, m := range modules {
		more, err := s.module(ctx, filepath.Base(filepath.Dir(m)))
		if err != nil {
			return nil, err
		}
		list = append(list, more...)
	}
	return list, nil
}

// module asks a contrib module's makefile what it tests.
func (s *source) module(ctx context.Context, name string) ([]suite, error) {
	if excluded[name] != "" {
		return nil, nil
	}
	dir := filepath.Join("contrib", name)
	cmd := exec.CommandContext(ctx, "make", "-s", "--no-print-directory", "-C", filepath.Join(s.dir, dir),
		"--eval=print-tests: ; @echo '$(REGRESS)|$(ISOLATION)|$(filter --load-extension%,$(REGRESS_OPTS))'", "print-tests")
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("asking the makefile of contrib/%s for its tests: %w", name, err)
	}
	parts := strings.Split(strings.TrimSpace(string(out)), "|")
	if len(parts) != 3 {
		return nil, fmt.Errorf("the makefile of contrib/%s says %q", name, out)
	}
	var list []suite
	options := append([]string{"--dbname=contrib_regression"}, strings.Fields(parts[2])...)
	var pgOptions string
	if name == "test_decoding" {
		pgOptions = "-c logical_decoding_work_mem=64kB" // its logical.conf
	}
	if tests := strings.Fields(parts[0]); len(tests) > 0 {
		list = append(list, suite{name: name, dir: dir, tests: tests, options: options, pgOptions: pgOptions})
	}
	if tests := strings.Fields(parts[1]); len(tests) > 0 {
		list = append(list, suite{name: name + "/isolation", dir: dir, isolation: true, tests: tests,
			options: []string{"--dbname=isolation_regression"}, pgOptions: pgOptions})
	}
	return list, nil
}

// result is what a suite said.
type result struct {
	suite    suite
	passed   int
	failed   []string
	expected []string // failed, as is inherent
	took     time.Duration
	err      error
	diffs    string // file
}

func (s *source) run(ctx context.Context, t pgtools.Target, q suite, out string) result {
	r := result{suite: q, diffs: filepath.Join(out, "regression.diffs")}
	bin, err := pgtools.Dir()
	if err != nil {
		r.err = err
		return r
	}
	// The server, another user, writes into some of these.
	for _, d := range []string{out, filepath.Join(out, "results"), filepath.Join(out, "output_iso"), filepath.Join(out, "output_iso", "results")} {
		if r.err = errors.Join(os.MkdirAll(d, 0o777), os.Chmod(d, 0o777)); r.err != nil {
			return r
		}
	}
	program := "src/test/regress/pg_regress"
	if q.isolation {
		program = "src/test/isolation/pg_isolation_regress"
	}
	config, err := t.Config()
	if err != nil {
		r.err = err
		return r
	}
	args := []string{"--bindir=" + bin, "--inputdir=.", "--outputdir=" + out, "--dlpath=" + filepath.Join(s.dir, "src/test/regress"),
		"--host=" + config.Host, fmt.Sprintf("--port=%d", config.Port), "--user=" + config.User}
	args = append(append(args, q.options...), q.tests...)
	cmd := exec.CommandContext(ctx, filepath.Join(s.dir, program), args...)
	cmd.Dir = filepath.Join(s.dir, q.dir)
	cmd.Env = append(t.Env(), "PGOPTIONS="+q.pgOptions, "PATH="+filepath.Join(s.dir, "src/test/isolation")+":"+os.Getenv("PATH"))
	cmd.WaitDelay = 5 * time.Second
	begun := time.Now()
	text, err := cmd.CombinedOutput()
	r.took = time.Since(begun)
	for line := range strings.Lines(string(text)) {
		name, verdict, ok := strings.Cut(line, " ... ")
		name = strings.TrimSpace(strings.TrimPrefix(strings.TrimSpace(name), "test "))
		switch verdict = strings.TrimSpace(verdict); {
		case !ok:
		case strings.HasPrefix(verdict, "ok"):
			if r.passed++; inherent[q.name+"/"+name] != "" {
				r.failed = append(r.failed, name+" (passed, though it is on the list of inherent differences)")
			}
		case strings.HasPrefix(verdict, "FAILED"), strings.HasPrefix(verdict, "failed"):
			if inherent[q.name+"/"+name] != "" {
				r.expected = append(r.expected, name)
			} else {
				r.failed = append(r.failed, name)
			}
		}
	}
	slices.Sort(r.failed)
	if err != nil && len(r.failed)+len(r.expected) == 0 || r.passed+len(r.failed)+len(r.expected) == 0 {
		r.err = fmt.Errorf("%s: %w:\n%s", program, err, text)
	}
	return r
}
