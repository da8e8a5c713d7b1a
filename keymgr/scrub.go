package keymgr

import (
	"time"

	"github.com/holdfastdb/holdfast/internal/hardening"
	"github.com/holdfastdb/holdfast/keymgr/kmshttp"
)

// settle is how long a call to the KMS that was under way may keep its connection, and so its buffers.
const settle = providerTimeout

// scrub removes from memory what wiped KEKs have left elsewhere: in the buffers of the connections by which
// they came, and in what the heap holds free. It is done again when calls that were under way have ended.
func (s *Server) scrub() {
	s.wg.Go(func() {
		for again := range 2 {
			kmshttp.DropConnections()
			hardening.Scrub()
			if again > 0 {
				return
			}
			select {
			case <-s.ctx.Done():
				return
			case <-time.After(settle):
			}
		}
	})
}
