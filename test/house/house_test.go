package house

import (
	"bufio"
	"bytes"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const module = "github.com/holdfastdb/holdfast"

// components never import one another: they meet in internal/api.
var components = []string{"keymgr", "safekeeper", "pageserver", "compute", "manager"}

// adapters are the only packages, with what is below them, that may import what is named.
var adapters = map[string][]string{
	"github.com/hanwen/go-fuse":                       {"compute/pgfs"},
	"go.etcd.io/raft":                                 {"safekeeper"},
	"github.com/cockroachdb/pebble":                   {"safekeeper", "pageserver"},
	"github.com/aws/aws-sdk-go-v2/service/kms":        {"keymgr/awskms"},
	"github.com/aws/aws-sdk-go-v2/service/sts":        {"keymgr/awskms"},
	"github.com/aws/aws-sdk-go-v2/service/s3":         {"internal/blob/s3blob"},
	"github.com/Azure/azure-sdk-for-go":               {"keymgr/azurekv"},
	"github.com/aws/smithy-go":                        {"keymgr/awskms"},
	"cloud.google.com/go/kms":                         {"keymgr/gcpkms"},
	"google.golang.org/api":                           {"keymgr/gcpkms"},
	"github.com/openbao/openbao":                      {"keymgr/transit"},
	"github.com/hashicorp/vault":                      {"keymgr/transit"},
	"github.com/spf13/cobra":                          {"cmd/holdfast"},
	"github.com/miekg/pkcs11":                         {"keymgr/pkcs11"},
	"github.com/holdfastdb/holdfast/keymgr/localkms":  {"cmd/holdfast", "keymgr/kmsopen"},
	"github.com/holdfastdb/holdfast/internal/keyring": {"keymgr", "safekeeper", "pageserver", "compute", "manager", "cmd/holdfast", "internal/walclient", "internal/keyring"},
}

type file struct {
	path    string // relative to the module
	pkg     string // folder relative to the module
	test    bool
	imports []string
	hasDoc  bool
	lines   int
	made    bool // by a generator
	source  []byte
}

func load(t *testing.T) []file {
	t.Helper()
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	var files []file
	err = filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			if name := d.Name(); path != root && (strings.HasPrefix(name, ".") || name == "testdata" || name == "data" || name == "bin") {
				return filepath.SkipDir
			}
			return nil
		}
		if filepath.Ext(path) != ".go" {
			return nil
		}
		src, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		parsed, err := parser.ParseFile(token.NewFileSet(), path, src, parser.ImportsOnly|parser.ParseComments)
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		f := file{path: rel, pkg: filepath.Dir(rel), test: strings.HasSuffix(rel, "_test.go"), source: src,
			hasDoc: parsed.Doc != nil, lines: bytes.Count(src, []byte("\n")), made: bytes.Contains(src[:min(len(src), 8192)], []byte("DO NOT EDIT"))}
		for _, i := range parsed.Imports {
			p, err := strconv.Unquote(i.Path.Value)
			if err != nil {
				return err
			}
			f.imports = append(f.imports, p)
		}
		files = append(files, f)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(files) < 20 {
		t.Fatalf("only %d Go files were found below %s", len(files), root)
	}
	return files
}

// within tells whether a path is pkg or below it.
func within(path, pkg string) bool { return path == pkg || strings.HasPrefix(path, pkg+"/") }

func componentOf(path string) string {
	for _, c := range components {
		if within(path, c) {
			return c
		}
	}
	return ""
}

// cmd → component → its subpackages → internal; test may use all, nothing uses test.
func TestImportsGoOneWay(t *testing.T) {
	for _, f := range load(t) {
		for _, imp := range f.imports {
			own, isOwn := strings.CutPrefix(imp, module+"/")
			if !isOwn {
				continue
			}
			from, to := componentOf(f.pkg), componentOf(own)
			switch {
			case within(f.pkg, "test") || within(f.pkg, "cmd"):
				if within(own, "cmd") {
					t.Errorf("%s imports %s: nothing imports a command", f.path, own)
				}
				if within(f.pkg, "cmd") && within(own, "test") {
					t.Errorf("%s imports %s: only tests import test", f.path, own)
				}
			case within(own, "cmd") || within(own, "test") && !f.test:
				t.Errorf("%s imports %s: only tests import test, nothing imports a command", f.path, own)
			case from == "" && to != "":
				t.Errorf("%s imports %s: what components share knows no component", f.path, own)
			case from != "" && to != "" && from != to && !f.test:
				t.Errorf("%s imports %s: components never import one another", f.path, own)
			}
		}
	}
}

func TestEachDependencyHasItsPlace(t *testing.T) {
	for _, f := range load(t) {
		if within(f.pkg, "test") || f.test {
			continue
		}
		for _, imp := range f.imports {
			for dep, places := range adapters {
				if within(imp, dep) && !slices.ContainsFunc(places, func(p string) bool { return within(f.pkg, p) }) {
					t.Errorf("%s imports %s, which belongs only in %s", f.path, imp, strings.Join(places, ", "))
				}
			}
		}
	}
}

func TestEachPackageSaysItsIdea(t *testing.T) {
	documented, first := make(map[string]bool), make(map[string]string)
	for _, f := range load(t) {
		if f.test {
			continue
		}
		if first[f.pkg] == "" {
			first[f.pkg] = f.path
		}
		documented[f.pkg] = documented[f.pkg] || f.hasDoc || f.made
	}
	for pkg, path := range first {
		if !documented[pkg] {
			t.Errorf("package %s has no doc comment (put one in %s)", pkg, path)
		}
	}
}

// maxLines is more than a file should have (500); above it a file has two subjects.
const maxLines = 700

func TestFilesAreShort(t *testing.T) {
	for _, f := range load(t) {
		if f.lines > maxLines && !f.made {
			t.Errorf("%s has %d lines, the most is %d: divide it", f.path, f.lines, maxLines)
		}
	}
}

var (
	// unfinished marks work that was left; with an issue's number it has an owner.
	unfinished = regexp.MustCompile(`\b(TODO|FIXME|XXX|HACK)\b(\(#\d+\))?`)
	stub       = regexp.MustCompile(`(?i)panic\("(not implemented|unimplemented|todo)`)
	// machine is what belongs to one machine or one registry.
	machine = regexp.MustCompile(`/work/(main|shared)|/root/|/home/[a-z]+/`)
)

func TestNothingIsLeftUndone(t *testing.T) {
	for _, f := range load(t) {
		if f.made || f.pkg == "test/house" {
			continue
		}
		lines := bufio.NewScanner(bytes.NewReader(f.source))
		lines.Buffer(nil, 1<<20)
		for n := 1; lines.Scan(); n++ {
			line := lines.Text()
			if m := unfinished.FindStringSubmatch(line); m != nil && m[2] == "" {
				t.Errorf("%s:%d: %s without an issue, as in %s(#12)", f.path, n, m[1], m[1])
			}
			if stub.MatchString(line) || machine.MatchString(line) {
				t.Errorf("%s:%d: a stub, or a path of one machine: %s", f.path, n, strings.TrimSpace(line))
			}
		}
	}
}
