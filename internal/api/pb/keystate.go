package pb

// States of a key, as KeyStatusResponse and KeyNotice name them. The key manager's lease machine decides which
// it is (keymgr/lease).
const (
	KeyUnknown     = "unknown" // not checked yet
	KeyActive      = "active"
	KeyGrace       = "grace"
	KeyRevoked     = "revoked"
	KeyUnreachable = "unreachable"
	KeyResuming    = "resuming"
)

// KeyUsable tells whether a node that asks for a lease in this state may get one.
func KeyUsable(state string) bool {
	return state == KeyActive || state == KeyGrace || state == KeyResuming
}
