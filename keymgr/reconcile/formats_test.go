package reconcile

import (
	"bytes"
	"compress/gzip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// The files in testdata were written by hand after the documented shapes; no real service made them.
func TestFormats(t *testing.T) {
	at := func(s string) time.Time {
		v, err := time.Parse(time.RFC3339Nano, s)
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	const arn = "arn:aws:kms:eu-central-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab"
	trail := []Call{
		{at("2026-05-01T12:00:00Z"), []string{"r-1"}, arn, "Decrypt", "arn:aws:sts::111122223333:assumed-role/holdfast/s", ""},
		{at("2026-05-01T12:00:05Z"), []string{"r-2"}, arn, "Decrypt", "arn:aws:sts::111122223333:assumed-role/holdfast/s", "DisabledException"},
	}
	const google = "projects/p/locations/europe/keyRings/r/cryptoKeys/k"
	for file, want := range map[string][]Call{
		"cloudtrail-records.json":       trail,
		"cloudtrail-lookup-events.json": trail,
		"gcp.json": {
			{at("2026-05-01T12:00:00.25Z"), []string{"holdfast-1", "i1"}, google, "Decrypt", "keymgr@demo.iam.gserviceaccount.com", ""},
			{at("2026-05-01T12:00:05Z"), []string{"holdfast-2", "i2"}, google, "Encrypt", "keymgr@demo.iam.gserviceaccount.com", "status 9"},
		},
		"azure.json": {
			{at("2026-05-01T12:00:00.2691226Z"), []string{"c-1"}, "https://v.vault.azure.net/keys/orders/0123", "KeyUnwrap", "app", ""},
			{at("2026-05-01T12:00:05Z"), []string{"c-2"}, "https://v.vault.azure.net/keys/orders/0123", "KeyUnwrap", "app", "403 Forbidden"},
		},
		"vault.json": {
			{at("2026-05-01T12:00:00.5Z"), []string{"v-1", "holdfast-9"}, "transit/keys/orders", "update transit/decrypt/orders", "token", ""},
			{at("2026-05-01T12:00:05Z"), []string{"v-2"}, "transit/keys/orders", "update transit/decrypt/orders", "token", "1 error occurred: permission denied"},
			{at("2026-05-01T12:00:09Z"), []string{"v-3"}, "transit/keys/orders", "update transit/decrypt/orders", "token", noResponse},
		},
	} {
		data, err := os.ReadFile(filepath.Join("testdata", file))
		if err != nil {
			t.Fatal(err)
		}
		format, _, _ := strings.Cut(strings.TrimSuffix(file, ".json"), "-")
		got, err := Read(format, bytes.NewReader(data))
		if diff := cmp.Diff(want, got); diff != "" || err != nil {
			t.Errorf("%s: %v %s", file, err, diff)
		}
		var packed bytes.Buffer
		w := gzip.NewWriter(&packed)
		if _, err := w.Write(data); err != nil || w.Close() != nil {
			t.Fatal(err)
		}
		if got, err := Read(format, &packed); err != nil || len(got) != len(want) {
			t.Errorf("%s, packed: %d calls, %v", file, len(got), err)
		}
		if _, err := Read(format, bytes.NewReader(data[:len(data)/2])); err == nil {
			t.Errorf("%s, cut in the middle: no error", file)
		}
	}
	if _, err := Read("splunk", strings.NewReader("")); err == nil || !strings.Contains(err.Error(), "cloudtrail") {
		t.Errorf("unknown format: %v", err)
	}
}

func TestSameKey(t *testing.T) {
	const arn = "arn:aws:kms:eu-central-1:111122223333:key/1234abcd"
	for _, tc := range []struct {
		cmk, key string
		want     bool
	}{
		{"aws-kms:" + arn, arn, true}, {"aws-kms:" + arn, "1234abcd", true}, {"aws-kms:" + arn, "4abcd", false}, {"aws-kms:" + arn, "", false},
		{"gcp-kms:projects/p/k", "projects/p/k/cryptoKeyVersions/3", true}, {"gcp-kms:projects/p/k", "projects/p/k2", false},
		{"azure-kv:https://v/keys/o", "https://v/keys/o/0123", true}, {"azure-kv:https://v/keys/o", "keys/o", true},
		{"vault:transit/keys/o", "transit/keys/o", true}, {"dev", "dev", true},
	} {
		if got := sameKey(tc.cmk, tc.key); got != tc.want {
			t.Errorf("sameKey(%q, %q) = %v", tc.cmk, tc.key, got)
		}
	}
}

func FuzzRead(f *testing.F) {
	files, err := filepath.Glob("testdata/*.json")
	if err != nil || len(files) == 0 {
		f.Fatalf("no seeds: %v", err)
	}
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		for _, format := range slices.Clone(Formats) {
			_, _ = Read(format, bytes.NewReader(data)) // must not panic
		}
	})
}
