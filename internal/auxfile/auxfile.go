// Package auxfile is how a file that PostgreSQL's WAL does not describe gets into the branch's
// log, in its place among the WAL: as a logical message (pg_logical_emit_message) that the
// compute has its Postgres write before the file's new content shows.
//
// Any user may write such messages, and copy those that are there. So a compute begins its WAL,
// before Postgres runs, with a message that holds a key of its own (Life), sealed under a DEK that
// only who holds a lease on the project can make. Its later messages are sealed under that key, with
// numbers that rise: who reads them in order tells what is forged or written again without
// asking anybody.
//
// What is sealed is one Change after another:
//
//	1 set, 2 remove 1 | length of the path 2 | path | length of the content 4 | content
package auxfile

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"path"
	"strconv"
	"strings"

	"github.com/holdfastdb/holdfast/internal/seal"
)

// Prefixes of logical messages: those with changes, and the one with a life's key.
const (
	Prefix    = "holdfast.aux"
	KeyPrefix = "holdfast.auxkey"
)

// Bounds of a message. A record takes its sealed content whole.
const (
	maxPath    = 1024
	MaxContent = 16 << 20
)

// The files that the log carries, or folders of them.
const (
	Settings  = "postgresql.auto.conf" // ALTER SYSTEM
	Stats     = "pg_stat/pgstat.stat"  // cumulative statistics, as of a shutdown in order
	Slots     = "pg_replslot"
	Snapshots = "pg_logical/snapshots" // of logical decoding
	// Mappings are in WAL, but for their end.
	Mappings = "pg_logical/mappings"

	slotFile = "state"
	// unfinished ends the name of a slot's folder that is being made or removed.
	unfinished = ".tmp"
)

// Carried tells whether the log carries the file.
func Carried(name string) bool {
	dir, base := path.Split(name)
	switch {
	case name == Settings, name == Stats:
		return true
	case dir == Snapshots+"/":
		return path.Ext(base) == ".snap"
	case dir == Mappings+"/":
		return strings.HasPrefix(base, "map-")
	}
	slot, found := strings.CutPrefix(strings.TrimSuffix(dir, "/"), Slots+"/")
	return found && base == slotFile && slot != "" && !strings.Contains(slot, "/") && !strings.HasSuffix(slot, unfinished)
}

// A Change is what became of a file.
type Change struct {
	Path    string
	Content []byte
	Removed bool
}

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

// PartName names a part of a file that is kept in parts: where in the file it begins.
func PartName(file string, offset uint64) string { return file + "@" + strconv.FormatUint(offset, 10) }

// CutPart is the reverse of PartName; ok is false for a name of a whole file.
func CutPart(name string) (file string, offset uint64, ok bool) {
	file, digits, found := strings.Cut(name, "@")
	offset, err := strconv.ParseUint(digits, 10, 64)
	return file, offset, found && err == nil
}

const (
	opSet    = 1
	opRemove = 2
)

func marshalChanges(changes []Change) []byte {
	var b []byte
	for _, c := range changes {
		op := byte(opSet)
		if c.Removed {
			op = opRemove
		}
		b = append(b, op)
		b = binary.LittleEndian.AppendUint16(b, uint16(len(c.Path)))
		b = append(b, c.Path...)
		b = binary.LittleEndian.AppendUint32(b, uint32(len(c.Content)))
		b = append(b, c.Content...)
	}
	return b
}

var errShort = errors.New("a message of aux files is cut off")

// parseChanges reads what marshalChanges made. The contents are parts of b.
func parseChanges(b []byte) (changes []Change, err error) {
	for len(b) > 0 {
		if len(b) < 3 {
			return nil, errShort
		}
		op, n := b[0], int(binary.LittleEndian.Uint16(b[1:]))
		if b = b[3:]; len(b) < n+4 {
			return nil, errShort
		}
		c := Change{Path: string(b[:n]), Removed: op == opRemove}
		size := uint64(binary.LittleEndian.Uint32(b[n:]))
		if b = b[n+4:]; uint64(len(b)) < size {
			return nil, errShort
		}
		c.Content, b = b[:size:size], b[size:]
		switch err := CheckPath(c.Path); {
		case err != nil:
			return nil, err
		case op != opSet && op != opRemove:
			return nil, fmt.Errorf("a message of aux files has a change of kind %d", op)
		case !Carried(c.Path):
			return nil, fmt.Errorf("the log does not carry a file %q", c.Path)
		}
		changes = append(changes, c)
	}
	return changes, nil
}

func sealContext(project, branch string) seal.Context {
	return seal.Context{Purpose: seal.PurposeSecret, Project: project, Branch: branch, Object: "aux files"}
}

// Generator makes DEKs; keyring.Ring is one.
type Generator interface {
	Generate(ctx context.Context, c seal.Context) (key *seal.Key, wrapped []byte, err error)
}

// Seal makes a message's content in the old form, a sealed file with a DEK of its own. Computes of
// older versions wrote it; today's messages are a Life's.
func Seal(ctx context.Context, keys Generator, project, branch string, changes []Change) ([]byte, error) {
	plain, err := marshalBounded(changes)
	defer clear(plain)
	if err != nil {
		return nil, err
	}
	return sealFile(ctx, keys, sealContext(project, branch), plain)
}

func marshalBounded(changes []Change) ([]byte, error) {
	plain := marshalChanges(changes)
	if len(plain) > MaxContent {
		clear(plain)
		return nil, fmt.Errorf("file %s has %d bytes; the most that the log carries at once is %d", changes[len(changes)-1].Path, len(plain), MaxContent)
	}
	return plain, nil
}

// sealFile seals plain as a file with a DEK of its own.
func sealFile(ctx context.Context, keys Generator, sc seal.Context, plain []byte) ([]byte, error) {
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
	if _, err := w.Write(plain); err != nil {
		return nil, err
	}
	if _, err := w.Finish(); err != nil {
		return nil, err
	}
	return sealed.Bytes(), nil
}

// ErrUnreadable is a message that opened, so that it is the compute's, and makes no sense.
var ErrUnreadable = errors.New("a message of aux files was opened and cannot be read")

// Open gives what a message of the old form says. An error that is seal.ErrDamaged means that the message is somebody
// else's; ErrUnreadable, that it is not; any other says nothing of it.
func Open(ctx context.Context, open seal.OpenFunc, project, branch string, message []byte) ([]Change, error) {
	plain, err := openFile(ctx, open, sealContext(project, branch), message)
	if err != nil {
		return nil, err
	}
	return parseOpened(plain)
}

func openFile(ctx context.Context, open seal.OpenFunc, sc seal.Context, sealed []byte) ([]byte, error) {
	r, err := seal.NewReader(ctx, bytes.NewReader(sealed), int64(len(sealed)), sc, open)
	if err != nil {
		return nil, err
	}
	plain := make([]byte, r.Size())
	if _, err := r.ReadAt(plain, 0); err != nil && err != io.EOF {
		return nil, err
	}
	return plain, nil
}

func parseOpened(plain []byte) ([]Change, error) {
	changes, err := parseChanges(plain)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUnreadable, err)
	}
	return changes, nil
}

// Layout of xl_logical_message (message.h).
const (
	atPrefixSize  = 8
	atMessageSize = 16
	atText        = 24
)

// Message gives the sealed content of a logical message's data, and whether it has our
// prefix at all.
func Message(data []byte) (sealed []byte, ok bool) { return content(data, Prefix+"\x00") }

// KeyMessage is Message for a life's key.
func KeyMessage(data []byte) (sealed []byte, ok bool) { return content(data, KeyPrefix+"\x00") }

func content(data []byte, want string) (sealed []byte, ok bool) {
	if len(data) < atText {
		return nil, false
	}
	prefix, size := binary.LittleEndian.Uint64(data[atPrefixSize:]), binary.LittleEndian.Uint64(data[atMessageSize:])
	text := data[atText:]
	if prefix != uint64(len(want)) || len(text) < len(want) || string(text[:len(want)]) != want || size != uint64(len(text)-len(want)) {
		return nil, false
	}
	return text[len(want):], true
}

// Record is the data of a logical message that no Postgres writes: of no database and no
// transaction, so that nobody who decodes the log is shown it.
func Record(sealed []byte) []byte { return record(Prefix, sealed) }

// KeyRecord is Record for a life's key.
func KeyRecord(sealed []byte) []byte { return record(KeyPrefix, sealed) }

func record(prefix string, sealed []byte) []byte {
	b := make([]byte, atText, atText+len(prefix)+1+len(sealed))
	binary.LittleEndian.PutUint64(b[atPrefixSize:], uint64(len(prefix)+1))
	binary.LittleEndian.PutUint64(b[atMessageSize:], uint64(len(sealed)))
	b = append(b, prefix...)
	return append(append(b, 0), sealed...)
}
