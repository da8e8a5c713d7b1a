package seal

import (
	"fmt"
	"math"
	"sync/atomic"
	"time"

	"github.com/holdfastdb/holdfast/internal/boottime"
)

// errExpired is ErrWiped for who branches: the key will be wiped as soon as somebody gets to it.
var errExpired = fmt.Errorf("%w: its lease has ended", ErrWiped)

// Term is the time within which keys may be used: that of a lease. All keys of a lease share one,
// so that each refuses use past the lease's end, even if nobody has woken yet to wipe it: after a
// machine slept, or when the process was stopped. It is safe for concurrent use.
type Term struct {
	end atomic.Int64 // on boottime's clock
}

// NewTerm makes a term that ends at a moment of boottime's clock.
func NewTerm(end time.Duration) *Term {
	t := &Term{}
	t.end.Store(int64(end))
	return t
}

// Endless is the term of keys that no lease bounds.
func Endless() *Term { return NewTerm(math.MaxInt64) }

// Extend moves the end. A term that has ended stays so.
func (t *Term) Extend(end time.Duration) {
	for {
		have := t.end.Load()
		if have <= int64(boottime.Now()) || t.end.CompareAndSwap(have, int64(end)) {
			return
		}
	}
}

// End ends the term now, for good.
func (t *Term) End() { t.end.Store(math.MinInt64) }

// Live tells whether the term lasts, by the exact clock.
func (t *Term) Live() bool { return boottime.Now() < time.Duration(t.end.Load()) }

// expired is for each use of a key: it must cost next to nothing.
func (t *Term) expired() bool {
	end := t.end.Load()
	return end != math.MaxInt64 && boottime.Coarse() >= time.Duration(end)
}

var endless = Endless()

// Bind bounds the key's use by a term. It is called before the key is given to anybody.
func (k *Key) Bind(t *Term) { k.term = t }
