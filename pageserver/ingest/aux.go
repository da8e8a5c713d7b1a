package ingest

import (
	"fmt"
	"strings"

	"github.com/holdfastdb/holdfast/internal/auxfile"
	"github.com/holdfastdb/holdfast/pageserver/keyspace"
	"github.com/holdfastdb/holdfast/pageserver/timeline"
)

// message files what a logical message carries: nothing, but for ours.
func (c *Core) message() error {
	sealed, ok := auxfile.Message(c.rec.MainData)
	if !ok || c.Aux == nil {
		return nil
	}
	changes, err := c.Aux(c.ctx, sealed)
	if err != nil {
		return err
	}
	gone := make(map[string]bool) // mappings
	for _, ch := range changes {
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
