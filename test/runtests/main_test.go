package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// A module of its own, with one test of each outcome.
func TestOutcomesAreCounted(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{
		"go.mod":    "module example.test\n\ngo 1.26.0\n",
		"x_test.go": "package x\n\nimport \"testing\"\n\nfunc TestGood(t *testing.T) {}\nfunc TestSkipped(t *testing.T) { t.Skip(\"no such tool\") }\n",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	t.Chdir(dir)
	t.Setenv("GOFLAGS", "")
	t.Setenv("HOLDFAST_REQUIRE", "")
	if ok, err := run("unit", []string{"-count=1", "./..."}); err != nil || !ok {
		t.Errorf("a skipped test where that is allowed: %v, %v", ok, err)
	}
	t.Setenv("HOLDFAST_REQUIRE", "1")
	if ok, err := run("unit", []string{"-count=1", "./..."}); err != nil || ok {
		t.Errorf("a skipped test where that is a failure passed: %v", err)
	}
	bad := "package x\n\nimport \"testing\"\n\nfunc TestBad(t *testing.T) { t.Error(\"so\") }\n"
	if err := os.WriteFile(filepath.Join(dir, "bad_test.go"), []byte(bad), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("HOLDFAST_REQUIRE", "")
	if ok, err := run("unit", []string{"-count=1", "./..."}); err != nil || ok {
		t.Errorf("a failed test passed: %v", err)
	}
	if err := os.WriteFile(filepath.Join(dir, "bad_test.go"), []byte("package x\n\nnonsense\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if ok, err := run("unit", []string{"-count=1", "./..."}); err != nil || ok {
		t.Errorf("what does not build passed: %v", err)
	}
	// What hung says where.
	hung := "package x\n\nimport (\n\"testing\"\n\"time\"\n)\n\nfunc TestHung(t *testing.T) { t.Parallel(); time.Sleep(time.Hour) }\n"
	if err := os.WriteFile(filepath.Join(dir, "bad_test.go"), []byte(hung), 0o600); err != nil {
		t.Fatal(err)
	}
	r := results{output: map[string]*strings.Builder{}, broken: map[string]bool{}}
	r.add(event{Action: "output", Package: "p", Test: "TestHung", Output: "goroutine 7: here\n"})
	r.add(event{Action: "fail", Package: "p"})
	if got := r.unfinished(); len(got) != 1 || got[0] != "p TestHung" {
		t.Errorf("unfinished: %v", got)
	}
	if ok, err := run("unit", []string{"-count=1", "-timeout", "1s", "./..."}); err != nil || ok {
		t.Errorf("what hung passed: %v", err)
	}
}
