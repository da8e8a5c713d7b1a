// Package archive keeps stretches of sealed WAL as objects in the bucket, so that a branch
// whose page server lags does not fill the safekeepers' disks. The chunks go as they are:
// the same ciphertext, with the wrapped DEK beside it.
//
// An object is named by what it holds, projects/<p>/branches/<b>/wal/<begin>-<end>, in 16
// hexadecimal digits each. The log is the same on every replica, so two leaders that
// archive the same stretch write the same bytes.
//
//	0  magic "HFWALAR1"
//	8  chunks: length u32, then a marshalled pb.SealedWAL
//	   CRC-32C of all before it, u32
package archive

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"

	"google.golang.org/protobuf/proto"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/blob"
	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/safekeeper/walstate"
)

const magic = "HFWALAR1"

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Key names the object that holds a stretch.
func Key(n walstate.Name, a walstate.Archived) string {
	return fmt.Sprintf("projects/%s/branches/%s/wal/%016X-%016X", n.Project, n.Branch, uint64(a.Begin), uint64(a.End))
}

// Chunk makes an accepted append into what readers get. It aliases c.
func Chunk(c *walstate.Command) *pb.SealedWAL {
	return &pb.SealedWAL{BeginLsn: uint64(c.Begin), EndLsn: uint64(c.End), Object: string(c.Object), WrappedDek: c.WrappedDEK,
		Counter: c.Counter, Ciphertext: c.Ciphertext, Epoch: c.Epoch}
}

// Writer gathers contiguous chunks into one object.
type Writer struct {
	buf        []byte
	begin, end pg.LSN
}

// NewWriter makes an empty Writer.
func NewWriter() *Writer { return &Writer{} }

// Size is how many bytes were gathered; 0: no chunk.
func (w *Writer) Size() int { return len(w.buf) }

// Add adds the chunk that follows.
func (w *Writer) Add(c *walstate.Command) {
	if len(w.buf) == 0 {
		w.buf, w.begin = append(w.buf, magic...), c.Begin
	}
	at := len(w.buf)
	w.buf = append(w.buf, 0, 0, 0, 0)
	w.buf, _ = proto.MarshalOptions{}.MarshalAppend(w.buf, Chunk(c)) // fails only on text that is not UTF-8; object ids are ours
	binary.LittleEndian.PutUint32(w.buf[at:], uint32(len(w.buf)-at-4))
	w.end = c.End
}

// Put writes the object. One that is there already holds the same.
func (w *Writer) Put(ctx context.Context, store blob.Store, n walstate.Name) (walstate.Archived, error) {
	w.buf = binary.LittleEndian.AppendUint32(w.buf, crc32.Checksum(w.buf, castagnoli))
	a := walstate.Archived{Begin: w.begin, End: w.end, Bytes: uint64(len(w.buf))}
	key := Key(n, a)
	_, err := store.Create(ctx, key, bytes.NewReader(w.buf), int64(len(w.buf)))
	if errors.Is(err, blob.ErrExists) {
		var info blob.Info
		if info, err = store.Head(ctx, key); err == nil && info.Size != int64(len(w.buf)) {
			err = fmt.Errorf("the object there has %d bytes, this stretch %d", info.Size, len(w.buf))
		}
	}
	if err != nil {
		return a, fmt.Errorf("archiving WAL as %s: %w", key, err)
	}
	return a, nil
}

// Get reads an archived stretch.
func Get(ctx context.Context, store blob.Store, n walstate.Name, a walstate.Archived) ([]*pb.SealedWAL, error) {
	key := Key(n, a)
	b, _, err := store.Get(ctx, key)
	if err != nil {
		return nil, fmt.Errorf("reading archived WAL %s: %w", key, err)
	}
	chunks, err := parse(b)
	if err != nil {
		return nil, fmt.Errorf("archived WAL %s is damaged: %w", key, err)
	}
	at := uint64(a.Begin)
	for _, c := range chunks {
		if c.BeginLsn != at || c.EndLsn <= at {
			return nil, fmt.Errorf("archived WAL %s is damaged: a chunk begins at %v, want %v", key, pg.LSN(c.BeginLsn), pg.LSN(at))
		}
		at = c.EndLsn
	}
	if at != uint64(a.End) {
		return nil, fmt.Errorf("archived WAL %s is damaged: it ends at %v", key, pg.LSN(at))
	}
	return chunks, nil
}

func parse(b []byte) ([]*pb.SealedWAL, error) {
	if len(b) < len(magic)+4 || string(b[:len(magic)]) != magic {
		return nil, fmt.Errorf("%d bytes without the right magic", len(b))
	}
	body := b[:len(b)-4]
	if crc32.Checksum(body, castagnoli) != binary.LittleEndian.Uint32(b[len(body):]) {
		return nil, errors.New("its CRC is wrong")
	}
	var chunks []*pb.SealedWAL
	for rest := body[len(magic):]; len(rest) > 0; {
		if len(rest) < 4 || uint64(binary.LittleEndian.Uint32(rest)) > uint64(len(rest)-4) {
			return nil, errors.New("a chunk is cut off")
		}
		n := int(binary.LittleEndian.Uint32(rest))
		c := new(pb.SealedWAL)
		if err := proto.Unmarshal(rest[4:4+n], c); err != nil {
			return nil, err
		}
		chunks, rest = append(chunks, c), rest[4+n:]
	}
	return chunks, nil
}
