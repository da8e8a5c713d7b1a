package config

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestBadFilesAreNamedWithTheReason(t *testing.T) {
	for _, tc := range []struct{ name, yaml, want string }{
		{"unknown field", "id: 1\nlisten: unix:/x\ntypo: 3\n", "line 3: field typo not found"},
		{"empty", "", "is empty"},
		{"no id", "listen: unix:/x\n", "id is missing"},
		{"not among peers", "id: 2\npeers: {1: unix:/a}\n", "own id 2"},
		{"missing dir", "id: 1\npeers: {1: unix:/a}\nlisten: unix:/a\n", "dir is missing"},
		{"not yaml", "id: [", "yaml"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "sk.yaml")
			if err := os.WriteFile(file, []byte(tc.yaml), 0o600); err != nil {
				t.Fatal(err)
			}
			err := Load(file, &Safekeeper{})
			if err == nil || !strings.Contains(err.Error(), tc.want) || !strings.Contains(err.Error(), file) {
				t.Errorf("got %v, want an error with the file's name and %q", err, tc.want)
			}
		})
	}
}

func TestSaveThenLoad(t *testing.T) {
	want := Compute{Project: "p", Branch: "b", Name: "main", Dir: "/d", Listen: "127.0.0.1:1", Keymgr: "unix:/k",
		Safekeepers: []string{"unix:/1"}, Pageserver: "unix:/p", Settings: map[string]string{"work_mem": "1MB"}, CacheBytes: 5}
	file := filepath.Join(t.TempDir(), "c.yaml")
	if err := Save(file, want); err != nil {
		t.Fatal(err)
	}
	var got Compute
	if err := Load(file, &got); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestHookOfTheKeyManager(t *testing.T) {
	whole := KeyHook{Listen: "127.0.0.1:1", TokenFile: "/t"}
	negative := -time.Second
	for name, tc := range map[string]struct {
		change func(*Keymgr)
		want   string
	}{
		"as it should be": {func(*Keymgr) {}, ""},
		"no token":        {func(c *Keymgr) { c.Hook.TokenFile = "" }, "hook.token_file is missing"},
		"no key":          {func(c *Keymgr) { c.Hook.CertFile = "/c" }, "both of cert_file and key_file"},
		"no certificate":  {func(c *Keymgr) { c.Hook.CAFile = "/ca" }, "cert_file is missing"},
		"negative grace":  {func(c *Keymgr) { c.Grace = &negative }, "grace cannot be negative"},
	} {
		h := whole
		c := Keymgr{Listen: "unix:/k", Dir: "/d", Bucket: "/b", LocalKMS: "/l", Hook: &h}
		tc.change(&c)
		err := c.Validate()
		if (err == nil) != (tc.want == "") || err != nil && !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v, want %q", name, err, tc.want)
		}
	}
}
