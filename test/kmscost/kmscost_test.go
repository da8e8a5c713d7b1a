package kmscost

import (
	"testing"
	"time"

	"github.com/holdfastdb/holdfast/keymgr"
)

// TestCallsAndCost prints the table of docs/keys.md: calls an hour for 1, 100 and 10,000 keys.
func TestCallsAndCost(t *testing.T) {
	times := Times{Lease: keymgr.DefaultTimes(), Tick: 250 * time.Millisecond}
	for _, mix := range Mixes {
		for _, keys := range []int{1, 100, 10_000} {
			if float64(keys)*mix.Awake < 1 {
				continue
			}
			span := time.Hour
			if keys > 100 {
				span = 20 * time.Second // so many are as many at each time: an hour is 180 times that
			}
			hour := float64(Calls(times, mix, keys, span, 1)) * float64(time.Hour) / float64(span)
			t.Logf("SHOW: %d keys, %s: %.0f calls an hour, $%.2f a month", keys, mix.Name, hour, Prices[0].Month(hour))
			awake := float64(keys) * mix.Awake
			if mix.Every > 0 {
				awake *= float64(mix.Burst+times.Lease.TTL) / float64(mix.Every)
			}
			if most := awake*float64(time.Hour)/float64(times.Lease.CheckInterval-times.Lease.Lead) + float64(keys); hour > most*1.05 {
				t.Errorf("%d keys, %s: %.0f calls an hour, want at most one a check interval and key in use: %.0f", keys, mix.Name, hour, most)
			}
			if least := awake * float64(time.Hour) / float64(2*times.Lease.CheckInterval); hour < least/2 {
				t.Errorf("%d keys, %s: %.0f calls an hour are fewer than leases rest on: %.0f", keys, mix.Name, hour, least)
			}
		}
	}
	for _, p := range Prices {
		t.Logf("SHOW: %s: $%.2f for 10,000 calls, $%.2f a month and key; one key in use all the time: $%.2f a month (%s)", p.Service, p.Per, p.Key, p.Month(900), p.Source)
	}
}
