// Package localkms pins local-kms, somebody else's AWS KMS for tests, against which the AWS adapter
// and kmsim are held. It is a module of its own: nothing of Holdfast depends on it.
package localkms
