// Package shredding tests what a revocation does on each role of a cluster of processes, and what ends
// those that cannot do it themselves.
package shredding
