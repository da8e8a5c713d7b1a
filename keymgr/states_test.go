package keymgr

import (
	"testing"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/keymgr/lease"
)

// The machine is pure and does not know the API: what it calls states is what the API does.
func TestStatesAreTheAPIs(t *testing.T) {
	for ours, theirs := range map[lease.State]string{
		lease.StateNone: pb.KeyUnknown, lease.Active: pb.KeyActive, lease.Grace: pb.KeyGrace, lease.Revoked: pb.KeyRevoked,
		lease.StateUnreachable: pb.KeyUnreachable, lease.Resuming: pb.KeyResuming,
	} {
		if string(ours) != theirs {
			t.Errorf("the machine says %q, the API %q", ours, theirs)
		}
	}
}
