package keymgr

import (
	"time"

	"github.com/holdfastdb/holdfast/internal/hardening"
	"github.com/holdfastdb/holdfast/keymgr/kmshttp"
)

// settle is how long a call to the KMS that was under way may keep its connection, and so its buffers.
const settle = providerTimeout

// scrub has removed from memory, soon, what wiped KEKs have left elsewhere: in the buffers of the connections
// by which they came, and in what the heap holds free. It waits for nothing.
func (s *Server) scrub() {
	select {
	case s.dirty <- struct{}{}:
	default: // a scrub that has not begun serves this call, too
	}
}

// keepScrubbed does what scrub asks for, and does it again when calls that were under way have ended. However
// many keys are revoked at once, one scrub at a time is at work, and connections are dropped as seldom.
func (s *Server) keepScrubbed() {
	defer s.wg.Done()
	var again <-chan time.Time
	for {
		select {
		case <-s.ctx.Done():
			return
		case <-s.dirty:
			again = time.After(settle)
		case <-again:
		}
		s.cfg.scrub()
	}
}

func scrubMemory() {
	kmshttp.DropConnections()
	hardening.Scrub()
}
