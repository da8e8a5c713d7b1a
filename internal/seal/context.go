package seal

import (
	"encoding/binary"
	"fmt"
)

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

// maxContextPart bounds each part of a context, in bytes.
const maxContextPart = 1024

// contextVersion begins every encoded context.
const contextVersion = "holdfast context v1\n"

func (c Context) String() string {
	return fmt.Sprintf("%s of project %s, branch %s, object %s", c.Purpose, c.Project, c.Branch, c.Object)
}

func (c Context) parts() [4]string {
	return [4]string{string(c.Purpose), c.Project, c.Branch, c.Object}
}

// Validate says what of c cannot be. A branch may be absent: some objects are a project's.
func (c Context) Validate() error {
	if c.Purpose == "" || c.Project == "" || c.Object == "" {
		return fmt.Errorf("sealing context %q: purpose, project and object are required", c.String())
	}
	for _, part := range c.parts() {
		if len(part) > maxContextPart {
			return fmt.Errorf("sealing context of project %.40q: a part of it has %d bytes, the most is %d", c.Project, len(part), maxContextPart)
		}
	}
	return nil
}

// AppendTo appends c's one encoding (version 1), which is injective: two different
// contexts never have the same bytes. c must be valid.
func (c Context) AppendTo(dst []byte) []byte {
	dst = append(dst, contextVersion...)
	for _, part := range c.parts() {
		dst = binary.LittleEndian.AppendUint16(dst, uint16(len(part)))
		dst = append(dst, part...)
	}
	return dst
}
