package seal

import "fmt"

// Context names the one object that a DEK may seal. It is the AAD of the DEK's wrap
// and part of the AAD of every chunk sealed under it, so neither a wrapped DEK nor
// ciphertext opens in another place.
type Context struct {
	Purpose Purpose
	Project string
	Branch  string
	Object  string // a WAL segment's id, a layer's name
}

// Purpose keeps keys for one kind of object from opening another.
type Purpose string

// The purposes of DEKs.
const (
	PurposeWAL   Purpose = "wal"
	PurposeLayer Purpose = "layer"
	// PurposeSecret is for small documents the manager keeps, such as a first password.
	PurposeSecret Purpose = "secret"
)

func (c Context) String() string {
	return fmt.Sprintf("%s of project %s, branch %s, object %s", c.Purpose, c.Project, c.Branch, c.Object)
}
