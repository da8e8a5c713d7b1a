package localkms

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/holdfastdb/holdfast/keymgr"
	"github.com/holdfastdb/holdfast/keymgr/providertest"
)

func open(t *testing.T, file string) *KMS {
	t.Helper()
	k, err := Open(file)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestConformance(t *testing.T) {
	providertest.Run(t, func(t *testing.T) providertest.Subject {
		file := filepath.Join(t.TempDir(), "keys.json")
		k := open(t, file)
		must(t, k.Create("dev"))
		// The customer acts through another handle, as from another process.
		console := open(t, file)
		return providertest.Subject{
			Provider: k, CMK: "dev", BindsAAD: true,
			Disable: func(t *testing.T) { must(t, console.Disable("dev")) },
			Enable:  func(t *testing.T) { must(t, console.Enable("dev")) },
			Rotate:  func(t *testing.T) { must(t, console.Rotate("dev")) },
			Cut:     func(t *testing.T) { must(t, os.Rename(file, file+".away")) },
		}
	})
}

func TestList(t *testing.T) {
	k := open(t, filepath.Join(t.TempDir(), "keys.json"))
	if keys, err := k.List(); err != nil || len(keys) != 0 {
		t.Errorf("a KMS without a file lists %v, %v", keys, err)
	}
	must(t, k.Create("b"))
	must(t, k.Create("a"))
	must(t, k.Rotate("b"))
	must(t, k.Disable("a"))
	got, err := k.List()
	want := []KeyInfo{{"a", Disabled, "1"}, {"b", Enabled, "2"}}
	if diff := cmp.Diff(want, got); diff != "" || err != nil {
		t.Errorf("List: %v %s", err, diff)
	}
	for name, err := range map[string]error{
		"create twice": k.Create("a"), "create nameless": k.Create(""), "disable an absent key": k.Disable("c"), "rotate an absent key": k.Rotate("c"),
	} {
		if err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func TestKeysAreBoundToTheirNames(t *testing.T) {
	k := open(t, filepath.Join(t.TempDir(), "keys.json"))
	must(t, k.Create("a"))
	must(t, k.Create("b"))
	ec := keymgr.EncryptionContext{Project: "p", KEKVersion: 1}
	w, err := k.Wrap(t.Context(), "a", ec, []byte("x"))
	must(t, err)
	if _, err := k.Unwrap(t.Context(), "b", ec, w.Ciphertext); err == nil {
		t.Error("key b unwrapped what key a wrapped")
	}
}

func TestBadFiles(t *testing.T) {
	dir := t.TempDir()
	for _, tc := range []struct {
		name, text, want string
		mode             os.FileMode
	}{
		{"others may read it", `{"format":1}`, "mode 644", 0o644},
		{"cut", `{"format":1,"keys":[{"na`, "damaged", 0o600},
		{"empty", ``, "damaged", 0o600},
		{"newer", `{"format":2}`, "format 2", 0o600},
		{"no versions", `{"format":1,"keys":[{"name":"a"}]}`, "without versions", 0o600},
		{"null key", `{"format":1,"keys":[null]}`, "damaged", 0o600},
		{"short key", `{"format":1,"keys":[{"name":"a","versions":[{"version":1,"key":"eA=="}]}]}`, "32 bytes", 0o600},
	} {
		file := filepath.Join(dir, strings.ReplaceAll(tc.name, " ", "-"))
		must(t, os.WriteFile(file, []byte(tc.text), tc.mode))
		must(t, os.Chmod(file, tc.mode))
		if _, err := Open(file); err == nil || !strings.Contains(err.Error(), tc.want) || !strings.Contains(err.Error(), file) {
			t.Errorf("%s: %v, want the file's name and %q", tc.name, err, tc.want)
		}
	}
}

// TestProcessesLoseNoChange makes keys from several processes at once.
func TestProcessesLoseNoChange(t *testing.T) {
	const processes, each = 3, 5
	if file := os.Getenv("LOCALKMS_TEST_FILE"); file != "" {
		k := open(t, file)
		for i := range each {
			must(t, k.Create(fmt.Sprintf("%d-%d", os.Getpid(), i)))
		}
		return
	}
	file := filepath.Join(t.TempDir(), "keys.json")
	var wg sync.WaitGroup
	for range processes {
		wg.Go(func() {
			cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestProcessesLoseNoChange$")
			cmd.Env = append(os.Environ(), "LOCALKMS_TEST_FILE="+file)
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Errorf("%v\n%s", err, out)
			}
		})
	}
	wg.Wait()
	if keys, err := open(t, file).List(); err != nil || len(keys) != processes*each {
		t.Errorf("%d keys, %v; want %d", len(keys), err, processes*each)
	}
	if st, err := os.Stat(file); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", st.Mode(), err)
	}
	left, err := filepath.Glob(file + ".new-*")
	if len(left) > 0 {
		t.Errorf("left behind: %v %v", left, errors.Join(err))
	}
}
