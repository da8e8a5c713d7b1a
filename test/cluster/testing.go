package cluster

import (
	"testing"
)

// ForTest prepares a cluster that ends with the test, and that shows its logs when the test
// has failed.
func ForTest(t testing.TB, o Options) *Cluster {
	t.Helper()
	c, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("logs:\n%s", c.Logs())
		}
		if err := c.KillAll(); err != nil {
			t.Error(err)
		}
	})
	return c
}
