package ingest

import (
	"errors"
	"fmt"
	"strings"

	"github.com/holdfastdb/holdfast/internal/auxfile"
	"github.com/holdfastdb/holdfast/pageserver/keyspace"
	"github.com/holdfastdb/holdfast/pageserver/timeline"
)

// message files what a logical message carries: nothing, but for ours.
func (c *Core) message() error {
	if sealed, ok := auxfile.KeyMessage(c.rec.MainData); ok {
		return c.beginLife(sealed)
	}
	sealed, ok := auxfile.Message(c.rec.MainData)
	if !ok {
		return nil
	}
	changes, err := c.openMessage(sealed)
	if err != nil {
		return err
	}
	return c.fileChanges(changes)
}

// A Life is whose messages about files count: a compute's, from its key on to the next
// compute's first record.
type Life struct {
	Branch string
	Epoch  uint64
	Key    []byte // empty: what claimed to be its key was not
	Last   uint64 // number of the last message
}

// lives tells whether the life is that of the compute whose records come. Epochs are numbered
// anew on a branch's copy, which begins with its parent's state.
func (c *Core) lives() bool { return c.state.Life.Epoch == c.Epoch && c.state.Life.Branch == c.Branch }

// beginLife takes the key of a compute's messages. It comes with the first WAL of its epoch, which
// the agent writes before Postgres runs: so the first key is genuine, and any other is not
// looked at. An old compute tells no key; what a user passes off as one does not open, and that
// is tried once.
func (c *Core) beginLife(sealed []byte) error {
	if c.AuxKey == nil {
		return nil
	}
	if c.lives() {
		c.Forged++
		return nil
	}
	key, err := c.AuxKey(c.ctx, c.Epoch, sealed)
	if err != nil {
		return err
	}
	if key == nil {
		c.Forged++
	}
	c.forgetLife()
	c.state.Life = Life{Branch: c.Branch, Epoch: c.Epoch, Key: key}
	return nil
}

func (c *Core) forgetLife() {
	if c.life != nil {
		c.life.Wipe()
		c.life = nil
	}
}

// openMessage gives what a message says. Without a key of its life it is of the old form.
func (c *Core) openMessage(sealed []byte) ([]auxfile.Change, error) {
	if !c.lives() || len(c.state.Life.Key) == 0 {
		if c.Aux == nil {
			return nil, nil
		}
		return c.Aux(c.ctx, sealed)
	}
	if c.life == nil {
		life, err := auxfile.NewReader(c.Project, c.Branch, c.Epoch, c.state.Life.Key)
		if err != nil {
			return nil, err
		}
		c.life = life
	}
	changes, number, err := c.life.Open(sealed, c.state.Life.Last)
	if errors.Is(err, auxfile.ErrForged) {
		c.Forged++
		return nil, nil
	}
	c.state.Life.Last = number
	return changes, err
}

func (c *Core) fileChanges(changes []auxfile.Change) error {
	gone := make(map[string]bool) // mappings
	for _, ch := range changes {
		c.SlotsChanged = c.SlotsChanged || strings.HasPrefix(ch.Path, auxfile.Slots+"/")
		switch {
		case !ch.Removed:
			c.put(keyspace.AuxFile(ch.Path), timeline.Image, auxfile.Marshal(ch.Path, ch.Content))
		case strings.HasPrefix(ch.Path, auxfile.Mappings+"/"):
			gone[ch.Path] = true
		default:
			c.put(keyspace.AuxFile(ch.Path), timeline.Tombstone, nil)
		}
	}
	if len(gone) == 0 {
		return nil
	}
	return c.removeParts(gone)
}

const (
	rewriteHeader  = 40 // xl_heap_rewrite_mapping
	rewriteMapping = 36 // LogicalRewriteMappingData
)

// rewrite is heap_xlog_logical_rewrite: a part of a file of pg_logical/mappings, by which
// logical decoding finds catalog rows that a rewrite of their table has moved. Each record
// is kept under a name of its own: the file's, and where in it the record's part begins.
func (c *Core) rewrite() error {
	f := c.main()
	mapped, db, rel := f.u32(), f.u32(), f.u32()
	f.u32()
	offset, n := f.u64(), f.u32()
	f.u32()
	start := f.u64()
	if f.bad || uint64(n)*rewriteMapping > uint64(len(f.b)) {
		return errShort
	}
	name := auxfile.PartName(fmt.Sprintf("%s/map-%x-%x-%X_%X-%x-%x", auxfile.Mappings, db, rel, start>>32, uint32(start), mapped, uint32(c.rec.Xid)), offset)
	c.put(keyspace.AuxFile(name), timeline.Image, auxfile.Marshal(name, f.b[:n*rewriteMapping]))
	return nil
}

// removeParts removes files of pg_logical/mappings. It reads what is stored: a part that is
// not stored yet stays, and no start looks at it, since its LSN is below all slots'. A checkpoint
// removes many such files, so one scan is for all of a message's.
func (c *Core) removeParts(files map[string]bool) error {
	from, to := keyspace.KindRange(keyspace.KindAuxFile)
	return c.look.Scan(c.ctx, from, to, c.last, func(key keyspace.Key, v timeline.Value) error {
		name, _, err := auxfile.Parse(v.Data)
		if whole, _, ok := auxfile.CutPart(name); err == nil && ok && files[whole] {
			c.put(key, timeline.Tombstone, nil)
		}
		return err
	})
}
