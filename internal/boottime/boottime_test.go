package boottime

import (
	"sync"
	"testing"
	"time"
)

// Coarse never goes back by more than it is behind, and is never far from Now.
func TestCoarse(t *testing.T) {
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 20000 {
				before := Now()
				got := Coarse()
				after := Now()
				// Clocks are read one after the other: each reading may be held up for as long as the machine likes.
				if got < before-2*coarseFor-time.Second || got > after+coarseFor {
					t.Errorf("Coarse is %v, between %v and %v", got, before, after)
					return
				}
			}
		})
	}
	wg.Wait()
}

// After the machine slept the next reading is exact, if the last is old by the clock that stood still.
func TestCoarseAfterSleep(t *testing.T) {
	Coarse()
	coarse.boot.Store(int64(Now() - time.Hour)) // as if the machine had slept for an hour since
	coarse.running.Store(int64(time.Since(started) - 2*coarseFor))
	if got := Coarse(); got < Now()-time.Minute {
		t.Errorf("Coarse is behind by %v", Now()-got)
	}
}
