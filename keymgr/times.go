package keymgr

import "github.com/holdfastdb/holdfast/keymgr/lease"

// DefaultTimes are the lease machine's times of a key manager that configures none.
func DefaultTimes() lease.Config {
	var c Config
	c.ensureDefaults()
	return c.times()
}
