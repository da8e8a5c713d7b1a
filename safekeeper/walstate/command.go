// Package walstate is the state machine that the safekeepers replicate: which branches
// exist, which epoch may append to each, where each log ends and where each stretch of it
// is kept. It is pure: a command and its Raft index go in, a Result comes out, and every
// replica comes to the same state from the same log.
//
// What applies decides: a leader checks an append before it proposes it, but only Apply, which
// demands the current epoch (W2) and the exact end of the log (W3), accepts it.
//
// A command is a Raft entry's data:
//
//	byte 0      kind
//	bytes 1-8   proposal id: who waits for the result looks for it
//	rest        by kind; integers little-endian, strings and byte fields behind their
//	            length (uint16)
//	  1 CreateBranch  start uint64, project, branch
//	  2 OpenEpoch     branch number uint32, node
//	  3 Append        branch number uint32, epoch, begin, end, counter uint64, object,
//	                  wrapped DEK, then the ciphertext to the entry's end
//	  4 Durable       branch number uint32, lsn uint64
//	  5 Archived      branch number uint32, begin, end uint64, bytes uint64
//	  6 Rewrap        branch number uint32, count uint16, then for each DEK its object, its
//	                  wrapped form so far and the one that takes its place
//	  7 DeleteBranch  branch number uint32
//	  8 Piece         as Append: a piece of a record, which the record's last piece, an
//	                  Append, makes part of the log
//	  9 DropPieces    branch number uint32, end uint64: forget pieces that end there
package walstate

import (
	"encoding/binary"
	"fmt"

	"github.com/holdfastdb/holdfast/internal/pg"
)

// Kind is what a command does.
type Kind uint8

// The commands.
const (
	KindCreateBranch Kind = iota + 1
	KindOpenEpoch
	KindAppend
	KindDurable
	KindArchived
	KindRewrap
)

// KindDeleteBranch forgets a branch. Its number is not given out again.
const KindDeleteBranch Kind = 7

// Large records.
const (
	KindPiece      Kind = 8
	KindDropPieces Kind = 9
)

// A Command is one decoded Raft entry. Its byte fields alias the entry.
type Command struct {
	Kind   Kind
	ID     uint64 // proposal id; 0: nobody waits
	Branch uint32 // branch number, but for CreateBranch
	Name   Name   // CreateBranch
	Node   string // OpenEpoch: who asks, for the log

	Epoch      uint64 // Append, Piece
	Begin, End pg.LSN // CreateBranch, Durable, DropPieces: Begin only
	Counter    uint64
	Object     []byte
	WrappedDEK []byte
	Ciphertext []byte

	Bytes uint64 // Archived: the object's size

	Rewraps []Rewrap // Rewrap: at most MaxRewraps
}

// Name names a branch.
type Name struct{ Project, Branch string }

func (n Name) String() string { return n.Project + "/" + n.Branch }

// maxField bounds a string or a wrapped key in a command, in bytes.
const maxField = 4096

// appendOverhead is what an Append command adds to its ciphertext, less its two fields.
const appendOverhead = 1 + 8 + 4 + 4*8 + 2 + 2

var le = binary.LittleEndian

// Encode appends the command's form to dst.
func (c *Command) Encode(dst []byte) []byte {
	dst = append(dst, byte(c.Kind))
	dst = le.AppendUint64(dst, c.ID)
	switch c.Kind {
	case KindCreateBranch:
		dst = le.AppendUint64(dst, uint64(c.Begin))
		dst = appendField(dst, c.Name.Project)
		return appendField(dst, c.Name.Branch)
	case KindOpenEpoch:
		dst = le.AppendUint32(dst, c.Branch)
		return appendField(dst, c.Node)
	case KindAppend, KindPiece:
		dst = c.encodeAppendHeader(dst)
		return append(dst, c.Ciphertext...)
	case KindDurable, KindDropPieces:
		dst = le.AppendUint32(dst, c.Branch)
		return le.AppendUint64(dst, uint64(c.Begin))
	case KindArchived:
		dst = le.AppendUint32(dst, c.Branch)
		dst = le.AppendUint64(dst, uint64(c.Begin))
		dst = le.AppendUint64(dst, uint64(c.End))
		return le.AppendUint64(dst, c.Bytes)
	case KindRewrap:
		return appendRewraps(le.AppendUint32(dst, c.Branch), c.Rewraps)
	case KindDeleteBranch:
		return le.AppendUint32(dst, c.Branch)
	}
	panic(fmt.Sprintf("walstate: command kind %d does not exist", c.Kind)) // kinds are constants of this package
}

// AppendPrefix begins an Append or Piece command to which the caller then appends the ciphertext:
// so the ciphertext is made where it stays. extra is the room to reserve for it.
func (c *Command) AppendPrefix(extra int) []byte {
	dst := make([]byte, 0, appendOverhead+len(c.Object)+len(c.WrappedDEK)+extra)
	dst = append(dst, byte(c.Kind))
	dst = le.AppendUint64(dst, c.ID)
	return c.encodeAppendHeader(dst)
}

// encodeAppendHeader appends an Append command's fields, up to the ciphertext.
func (c *Command) encodeAppendHeader(dst []byte) []byte {
	dst = le.AppendUint32(dst, c.Branch)
	dst = le.AppendUint64(dst, c.Epoch)
	dst = le.AppendUint64(dst, uint64(c.Begin))
	dst = le.AppendUint64(dst, uint64(c.End))
	dst = le.AppendUint64(dst, c.Counter)
	dst = appendField(dst, c.Object)
	return appendField(dst, c.WrappedDEK)
}

func appendField[T string | []byte](dst []byte, s T) []byte {
	dst = le.AppendUint16(dst, uint16(len(s)))
	return append(dst, s...)
}

// Decode reads a command. Its byte fields alias data.
func Decode(data []byte) (c Command, err error) {
	d := decoder{rest: data}
	c.Kind, c.ID = Kind(d.byte()), d.uint64()
	switch c.Kind {
	case KindCreateBranch:
		c.Begin = pg.LSN(d.uint64())
		c.Name = Name{Project: string(d.field()), Branch: string(d.field())}
	case KindOpenEpoch:
		c.Branch, c.Node = d.uint32(), string(d.field())
	case KindAppend, KindPiece:
		c.Branch, c.Epoch = d.uint32(), d.uint64()
		c.Begin, c.End, c.Counter = pg.LSN(d.uint64()), pg.LSN(d.uint64()), d.uint64()
		c.Object, c.WrappedDEK = d.field(), d.field()
		c.Ciphertext, d.rest = d.rest, nil
	case KindDurable, KindDropPieces:
		c.Branch, c.Begin = d.uint32(), pg.LSN(d.uint64())
	case KindArchived:
		c.Branch = d.uint32()
		c.Begin, c.End, c.Bytes = pg.LSN(d.uint64()), pg.LSN(d.uint64()), d.uint64()
	case KindRewrap:
		c.Branch = d.uint32()
		c.Rewraps = d.rewraps()
	case KindDeleteBranch:
		c.Branch = d.uint32()
	default:
		return Command{}, fmt.Errorf("WAL command of kind %d is not known to this version", c.Kind)
	}
	if d.short || len(d.rest) > 0 {
		return Command{}, fmt.Errorf("WAL command of kind %d, %d bytes: short=%t, %d bytes too many", c.Kind, len(data), d.short, len(d.rest))
	}
	return c, nil
}

type decoder struct {
	rest  []byte
	short bool
}

// take gives the next n bytes, or n zeros if there are not so many.
func (d *decoder) take(n int) []byte {
	if d.short || len(d.rest) < n {
		d.short = true
		return make([]byte, min(n, 8))
	}
	b := d.rest[:n:n]
	d.rest = d.rest[n:]
	return b
}

func (d *decoder) byte() byte     { return d.take(1)[0] }
func (d *decoder) uint32() uint32 { return le.Uint32(d.take(4)) }
func (d *decoder) uint64() uint64 { return le.Uint64(d.take(8)) }

func (d *decoder) field() []byte {
	n := int(le.Uint16(d.take(2)))
	if n > maxField {
		d.short = true
	}
	if d.short {
		return nil
	}
	return d.take(n)
}
