// Command runtests runs `go test` over the packages given, shows failures in full and
// everything else in a line, and ends with a count. With HOLDFAST_REQUIRE=1 a skipped test
// counts as a failure: `make test` must not pass by leaving out what it could not run.
package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"sort"
	"strings"
	"syscall"
	"time"
)

// event is a line of `go test -json` (go doc test2json).
type event struct {
	Action  string
	Package string
	Test    string
	Output  string
	Elapsed float64
	// ImportPath is set in place of Package by build events.
	ImportPath string
}

type results struct {
	passed, failed, skipped int
	failures, skips         []string
	output                  map[string]*strings.Builder // by package and test
	broken                  map[string]bool             // packages that do not build
}

func main() {
	if len(os.Args) < 3 {
		fmt.Fprintln(os.Stderr, "usage: runtests NAME [go test's arguments and packages]")
		os.Exit(2)
	}
	ok, err := run(os.Args[1], os.Args[2:])
	if err != nil {
		fmt.Fprintln(os.Stderr, "runtests:", err)
	}
	if !ok || err != nil {
		os.Exit(1)
	}
}

func run(name string, args []string) (bool, error) {
	began := time.Now()
	cmd := exec.Command("go", append([]string{"test", "-json"}, args...)...)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return false, err
	}
	if err := cmd.Start(); err != nil {
		return false, err
	}
	forwardSignals(cmd.Process)
	r := results{output: make(map[string]*strings.Builder), broken: make(map[string]bool)}
	lines := bufio.NewScanner(out)
	lines.Buffer(nil, 16<<20)
	for lines.Scan() {
		var e event
		if json.Unmarshal(lines.Bytes(), &e) != nil {
			fmt.Println(lines.Text())
			continue
		}
		r.add(e)
	}
	err = cmd.Wait()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		return false, err
	}
	strict := os.Getenv("HOLDFAST_REQUIRE") != ""
	ok := err == nil && r.failed == 0 && (!strict || r.skipped == 0)
	r.print(name, strict, time.Since(began))
	return ok, nil
}

func forwardSignals(p *os.Process) {
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	go func() {
		for s := range signals {
			_ = p.Signal(s) // it ends by itself else
		}
	}()
}

func (r *results) add(e event) {
	pkg := strings.TrimPrefix(e.Package, "github.com/holdfastdb/holdfast/")
	key := pkg + " " + e.Test
	switch e.Action {
	case "output", "build-output":
		if e.Action == "build-output" {
			key = "build " + strings.Fields(e.ImportPath + " ")[0]
			fmt.Print(e.Output)
		}
		if r.output[key] == nil {
			r.output[key] = &strings.Builder{}
		}
		r.output[key].WriteString(e.Output)
		// What a long test tells about itself (seeds, counts) is shown as it comes.
		if _, said, ok := strings.Cut(e.Output, "SHOW: "); ok {
			fmt.Printf("      %s: %s", e.Test, said)
		}
	case "pass":
		if e.Test != "" {
			r.passed++
			delete(r.output, key)
		} else {
			fmt.Printf("ok    %-40s %6.1fs\n", pkg, e.Elapsed)
		}
	case "skip":
		if e.Test != "" {
			r.skipped++
			r.skips = append(r.skips, key+": "+lastSaid(r.output[key]))
		}
	case "fail":
		switch {
		case e.Test != "":
			r.failed++
			r.failures = append(r.failures, key)
		default:
			fmt.Printf("FAIL  %-40s %6.1fs\n", pkg, e.Elapsed)
			r.failures = append(r.failures, key)
			r.broken[pkg] = true
		}
	}
}

// lastSaid is a skipped test's reason.
func lastSaid(b *strings.Builder) string {
	if b == nil {
		return ""
	}
	for _, line := range strings.Split(b.String(), "\n") {
		if line = strings.TrimSpace(line); line != "" && !strings.HasPrefix(line, "===") && !strings.HasPrefix(line, "---") {
			return line
		}
	}
	return ""
}

// unfinished lists the tests of failed packages that neither passed nor failed: they ran when
// the package panicked or its time was up, and what they said tells where they hung.
func (r *results) unfinished() []string {
	known := make(map[string]bool)
	for _, f := range r.failures {
		known[f] = true
	}
	for _, s := range r.skips {
		known[strings.SplitN(s, ":", 2)[0]] = true
	}
	var list []string
	for key := range r.output {
		if pkg, _, _ := strings.Cut(key, " "); r.broken[pkg] && !known[key] {
			list = append(list, key)
		}
	}
	return list
}

func (r *results) print(name string, strict bool, took time.Duration) {
	r.failures = append(r.failures, r.unfinished()...)
	sort.Strings(r.failures)
	for _, f := range r.failures {
		if b := r.output[f]; b != nil {
			fmt.Printf("\n=== %s\n%s", f, b)
		}
	}
	sort.Strings(r.skips)
	for _, s := range r.skips {
		fmt.Println("skipped:", s)
	}
	// A package that failed without a failed test did not build, panicked or timed out.
	failed := r.failed
	if failed == 0 {
		failed = len(r.broken)
	}
	if strict && r.skipped > 0 {
		fmt.Println("a skipped test counts as a failure here (HOLDFAST_REQUIRE)")
		failed += r.skipped
		r.skipped = 0
	}
	fmt.Printf("%s: %d passed, %d failed, %d skipped in %.0fs\n", name, r.passed, failed, r.skipped, took.Seconds())
}
