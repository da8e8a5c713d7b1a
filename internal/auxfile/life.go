package auxfile

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"strconv"

	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/internal/seal"
)

// A message of a life:
//
//	0  2, the form
//	1  number, uint64, little-endian
//	9  the changes, sealed as seal.SealWAL does with the life's epoch and the number as its stretch
//	   and the number as its counter
//
// What tells a forged message from a genuine one is the tag. What was written before has a
// number that is not above the last one's, and is refused by that alone.
const (
	form        = 2
	atNumber    = 1
	messageHead = 9
)

// KeySize is the size of a life's key, in bytes.
const KeySize = seal.KeySize

// A Life is one incarnation of a compute, as the writer of messages. It is not safe for concurrent
// use.
type Life struct {
	key     *seal.Key
	context seal.Context
	epoch   uint64
	number  uint64 // the last message's
}

// NewLife makes a life and what tells its key, for a KeyRecord: before anybody else can write to
// the log in this epoch.
func NewLife(ctx context.Context, keys Generator, project, branch string, epoch uint64) (*Life, []byte, error) {
	var raw [KeySize]byte
	defer clear(raw[:])
	rand.Read(raw[:]) // never fails
	sealed, err := sealFile(ctx, keys, keyContext(project, branch, epoch), raw[:])
	if err != nil {
		return nil, nil, fmt.Errorf("sealing the key of messages about files: %w", err)
	}
	key, err := seal.NewKey(raw[:])
	if err != nil {
		return nil, nil, err
	}
	return &Life{key: key, context: messageContext(project, branch), epoch: epoch}, sealed, nil
}

// Wipe forgets the key.
func (l *Life) Wipe() { l.key.Wipe() }

// Seal makes a message's content. Its number is used up, whatever becomes of the message.
func (l *Life) Seal(changes []Change) ([]byte, error) {
	plain, err := marshalBounded(changes)
	defer clear(plain)
	if err != nil {
		return nil, err
	}
	l.number++
	head := make([]byte, messageHead, messageHead+len(plain)+seal.TagSize)
	head[0] = form
	binary.LittleEndian.PutUint64(head[atNumber:], l.number)
	return seal.SealWAL(head, l.key, l.context, pg.LSN(l.epoch), pg.LSN(l.number), l.number, plain)
}

func keyContext(project, branch string, epoch uint64) seal.Context {
	return seal.Context{Purpose: seal.PurposeSecret, Project: project, Branch: branch, Object: "key of aux files, epoch " + strconv.FormatUint(epoch, 10)}
}

func messageContext(project, branch string) seal.Context {
	return seal.Context{Purpose: seal.PurposeSecret, Project: project, Branch: branch, Object: "aux files of a life"}
}

// OpenKey gives the key that a KeyRecord of an epoch tells. Errors are as Open's.
func OpenKey(ctx context.Context, open seal.OpenFunc, project, branch string, epoch uint64, sealed []byte) ([]byte, error) {
	key, err := openFile(ctx, open, keyContext(project, branch, epoch), sealed)
	if err == nil && len(key) != KeySize {
		return nil, fmt.Errorf("%w: a key of %d bytes", ErrUnreadable, len(key))
	}
	return key, err
}

// ErrForged is a message that is not the life's, or was written before.
var ErrForged = errors.New("not a message of this life, or one that was written before")

// A Reader reads the messages of one life. It asks nobody.
type Reader struct {
	key     *seal.Key
	context seal.Context
	epoch   uint64
}

// NewReader makes a Reader from a life's key.
func NewReader(project, branch string, epoch uint64, key []byte) (*Reader, error) {
	k, err := seal.NewOpenKey(append([]byte(nil), key...)) // which wipes it
	if err != nil {
		return nil, err
	}
	return &Reader{key: k, context: messageContext(project, branch), epoch: epoch}, nil
}

// Wipe forgets the key.
func (r *Reader) Wipe() { r.key.Wipe() }

// Open gives what a message says, and its number, which must be above last. It fails with
// ErrForged or ErrUnreadable.
func (r *Reader) Open(message []byte, last uint64) ([]Change, uint64, error) {
	if len(message) < messageHead+seal.TagSize || len(message) > messageHead+MaxContent+seal.TagSize || message[0] != form {
		return nil, last, ErrForged
	}
	number := binary.LittleEndian.Uint64(message[atNumber:])
	if number <= last {
		return nil, last, ErrForged
	}
	plain, err := seal.OpenWAL(nil, r.key, r.context, pg.LSN(r.epoch), pg.LSN(number), number, message[messageHead:])
	switch {
	case errors.Is(err, seal.ErrDamaged):
		return nil, last, ErrForged
	case err != nil:
		return nil, last, err
	}
	changes, err := parseOpened(plain)
	return changes, number, err
}
