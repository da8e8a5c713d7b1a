// Package keymgr keeps the key hierarchy: the customer's CMK in their KMS wraps a KEK for
// each project, which wraps a DEK for each object. The wrapped KEKs rest in the bucket; plaintext KEKs
// exist only in this process's memory, while the customer's KMS lets them be unwrapped, and
// nodes get DEKs only under a lease that rests on a fresh answer of the KMS.
//
// The server is stateless over the bucket but for its audit log. It may lose leases by
// a restart; nodes take out new ones. What a lease rests on, and when it ends, is decided by
// package lease; the checks of the CMK that it asks for are real unwraps of the project's KEK.
//
// Not trusted: the bucket (who can write it can destroy keys' wrapped forms, and so deny
// service, but moves no key to another project or object) and the network. Trusted: the KMS, with
// everything under its CMK, and this process's memory.
package keymgr
