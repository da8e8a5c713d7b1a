package ingest

import (
	"strings"
	"testing"
)

// What another version wrote is told from what is damaged, whatever its length; no cut is taken.
func TestStateRefuses(t *testing.T) {
	other := make([]byte, 100)
	other[0] = stateVersion + 1
	if _, err := ParseState(other); err == nil || !strings.Contains(err.Error(), "version") {
		t.Errorf("another version's state: %v", err)
	}
	cut := make([]byte, stateFixed)
	cut[0] = stateVersion
	for n := range cut {
		if _, err := ParseState(cut[:n]); err == nil {
			t.Fatalf("a state cut to %d bytes was taken", n)
		}
	}
	if _, err := ParseState(cut); err == nil {
		t.Error("a state of zeros was taken: pg_control has a CRC")
	}
}
