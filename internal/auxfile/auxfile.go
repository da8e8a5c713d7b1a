// Package auxfile is how a file that PostgreSQL's WAL does not describe gets into the branch's
// log, in its place among the WAL: as a logical message (pg_logical_emit_message) that the
// compute has its Postgres write before the file's new content shows.
//
// Any user may write such messages. So the message is a sealed file, under a DEK that only
// who holds a lease on the project can make: what does not open is somebody else's message
// and means nothing.
package auxfile

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"path"
	"strings"

	"github.com/holdfastdb/holdfast/internal/seal"
)

// Prefix is the logical messages' prefix.
const Prefix = "holdfast.aux"

// Bounds of a file. A record takes its sealed content whole.
const (
	maxPath    = 1024
	MaxContent = 1 << 20
)

// Carried tells whether the log carries the file: for now ALTER SYSTEM's settings.
func Carried(name string) bool { return name == "postgresql.auto.conf" }

// Marshal makes a file's value: length of the path 2 | path | content.
func Marshal(name string, content []byte) []byte {
	b := make([]byte, 0, 2+len(name)+len(content))
	b = binary.LittleEndian.AppendUint16(b, uint16(len(name)))
	b = append(b, name...)
	return append(b, content...)
}

// Parse reads a file's value. Its content is a part of b.
func Parse(b []byte) (name string, content []byte, err error) {
	if len(b) < 2 || int(binary.LittleEndian.Uint16(b)) > len(b)-2 {
		return "", nil, fmt.Errorf("an aux file's value of %d bytes is too short for its path", len(b))
	}
	n := int(binary.LittleEndian.Uint16(b))
	name = string(b[2 : 2+n])
	return name, b[2+n:], CheckPath(name)
}

// CheckPath refuses paths that are not plain and relative to a data directory.
func CheckPath(name string) error {
	if name == "" || len(name) > maxPath || name != path.Clean(name) || path.IsAbs(name) ||
		name == ".." || strings.HasPrefix(name, "../") || strings.ContainsRune(name, 0) {
		return fmt.Errorf("%q is no path of a file in a data directory", name)
	}
	return nil
}

func sealContext(project, branch string) seal.Context {
	return seal.Context{Purpose: seal.PurposeSecret, Project: project, Branch: branch, Object: "aux file"}
}

// Generator makes DEKs; keyring.Ring is one.
type Generator interface {
	Generate(ctx context.Context, c seal.Context) (key *seal.Key, wrapped []byte, err error)
}

// Seal makes a message's content.
func Seal(ctx context.Context, keys Generator, project, branch, name string, content []byte) ([]byte, error) {
	if len(content) > MaxContent {
		return nil, fmt.Errorf("file %s has %d bytes; the most that the log carries is %d", name, len(content), MaxContent)
	}
	sc := sealContext(project, branch)
	key, wrapped, err := keys.Generate(ctx, sc)
	if err != nil {
		return nil, err
	}
	defer key.Wipe()
	var sealed bytes.Buffer
	w, err := seal.NewWriter(&sealed, key, wrapped, sc)
	if err != nil {
		return nil, err
	}
	if _, err := w.Write(Marshal(name, content)); err != nil {
		return nil, err
	}
	if _, err := w.Finish(); err != nil {
		return nil, err
	}
	return sealed.Bytes(), nil
}

// Open gives the value in a message.
func Open(ctx context.Context, open seal.OpenFunc, project, branch string, message []byte) ([]byte, error) {
	r, err := seal.NewReader(ctx, bytes.NewReader(message), int64(len(message)), sealContext(project, branch), open)
	if err != nil {
		return nil, err
	}
	value := make([]byte, r.Size())
	if _, err := r.ReadAt(value, 0); err != nil && err != io.EOF {
		return nil, err
	}
	name, _, err := Parse(value)
	if err == nil && !Carried(name) {
		err = fmt.Errorf("the log does not carry a file %q", name)
	}
	return value, err
}

// Layout of xl_logical_message (message.h).
const (
	atPrefixSize  = 8
	atMessageSize = 16
	atText        = 24
)

// Message gives the sealed content of a logical message's data, and whether it has our
// prefix at all.
func Message(data []byte) (sealed []byte, ok bool) {
	const want = Prefix + "\x00"
	if len(data) < atText {
		return nil, false
	}
	prefix, size := binary.LittleEndian.Uint64(data[atPrefixSize:]), binary.LittleEndian.Uint64(data[atMessageSize:])
	text := data[atText:]
	if prefix != uint64(len(want)) || !bytes.HasPrefix(text, []byte(want)) || size != uint64(len(text)-len(want)) {
		return nil, false
	}
	return text[len(want):], true
}
