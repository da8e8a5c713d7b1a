//go:build !cgo

package revocation

import "testing"

func withToken(t *testing.T) *customer {
	t.Skip("a program without cgo has no PKCS#11")
	return nil
}
