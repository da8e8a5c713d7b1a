// Package revocation takes the customer's key away in the middle of everything, and holds what is
// left against invariants K1 to K3: whole clusters, every role a process of its own, a ledger that writes,
// and each kind of KMS through its own client.
package revocation
