package ingest

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"

	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/pageserver/change"
	"github.com/holdfastdb/holdfast/pageserver/keyspace"
	"github.com/holdfastdb/holdfast/pageserver/redo"
	"github.com/holdfastdb/holdfast/pageserver/timeline"
)

// VersionFile is the content of PG_VERSION.
const VersionFile = "15\n"

// database is dbase_redo.
func (c *Core) database() error {
	const createFileCopy, createWALLog, drop = 0x00, 0x10, 0x20
	f := c.main()
	switch c.rec.Info & infoMask {
	case createFileCopy:
		dst := folder{database: f.oid(), tablespace: f.oid()}
		src := folder{database: f.oid(), tablespace: f.oid()}
		if f.bad {
			return errShort
		}
		return c.copyDatabase(dst, src)
	case createWALLog:
		dst := folder{database: f.oid(), tablespace: f.oid()}
		if f.bad {
			return errShort
		}
		c.put(keyspace.Database(dst.tablespace, dst.database), timeline.Image, []byte(VersionFile))
		return nil
	case drop:
		db, n := f.oid(), f.u32()
		if f.bad || uint64(n)*4 > uint64(len(f.b)) {
			return errShort
		}
		for range n {
			if err := c.dropDatabase(folder{database: db, tablespace: f.oid()}); err != nil {
				return err
			}
		}
		return nil
	}
	return fmt.Errorf("unknown kind %#02x", c.rec.Info&infoMask)
}

// folder is a database's folder in a tablespace.
type folder struct{ database, tablespace pg.Oid }

// forks lists the forks in a folder. It reads what is stored: see Barrier.
func (c *Core) forks(f folder) ([]pg.RelTag, error) {
	var tags []pg.RelTag
	from, to := keyspace.DatabaseRange(keyspace.KindRelSize, f.tablespace, f.database)
	err := c.look.Scan(c.ctx, from, to, c.last, func(key keyspace.Key, _ timeline.Value) error {
		k, err := keyspace.Parse(key)
		tags = append(tags, k.Rel)
		return err
	})
	return tags, err
}

func (c *Core) dropDatabase(f folder) error {
	tags, err := c.forks(f)
	if err != nil {
		return err
	}
	for _, tag := range tags {
		if err := c.drop(tag); err != nil {
			return err
		}
	}
	clear(c.marks)
	c.put(keyspace.Database(f.tablespace, f.database), timeline.Tombstone, nil)
	c.put(keyspace.RelMap(f.tablespace, f.database), timeline.Tombstone, nil)
	return nil
}

// copyDatabase makes a folder as a copy of another, as both stand before the record: each
// page becomes an image.
func (c *Core) copyDatabase(dst, src folder) error {
	if dst == src {
		return fmt.Errorf("database %d is copied over itself", src.database)
	}
	if err := c.dropDatabase(dst); err != nil {
		return err
	}
	tags, err := c.forks(src)
	if err != nil {
		return err
	}
	for _, tag := range tags {
		if err := c.copyFork(dst, tag); err != nil {
			return err
		}
	}
	h, err := c.look.Get(c.ctx, keyspace.RelMap(src.tablespace, src.database), c.last)
	if err != nil {
		return err
	}
	if h.Base != nil {
		c.put(keyspace.RelMap(dst.tablespace, dst.database), timeline.Image, append([]byte(nil), h.Base.Data...))
	}
	c.put(keyspace.Database(dst.tablespace, dst.database), timeline.Image, []byte(VersionFile))
	return nil
}

func (c *Core) copyFork(dst folder, from pg.RelTag) error {
	r, err := c.relation(from)
	if err != nil {
		return err
	}
	to := from
	to.Tablespace, to.Database = dst.tablespace, dst.database
	had, err := c.relation(to)
	if err != nil {
		return err
	}
	if err := c.resize(to, had, r.blocks); err != nil {
		return err
	}
	for b := pg.BlockNumber(0); uint32(b) < r.blocks; b++ {
		page := c.alloc(pg.BlockSize)
		err := c.look.Page(c.ctx, keyspace.RelPage(from, b), c.last, page)
		var unsupported *redo.UnsupportedError
		switch {
		case errors.As(err, &unsupported):
			c.put(keyspace.RelPage(to, b), timeline.Init, append([]byte{byte(change.Missing)}, unsupported.Record...))
		case err != nil:
			return err
		default:
			c.put(keyspace.RelPage(to, b), timeline.Image, page)
		}
		if err := c.stage(); err != nil {
			return err
		}
	}
	return nil
}

// tablespace refuses tablespaces outside the data directory: what is in one cannot be
// served, and is refused when it is read. The rest of the branch goes on.
func (c *Core) tablespace() error {
	const create = 0x00
	f := c.main()
	oid := f.oid()
	if f.bad {
		return errShort
	}
	if c.rec.Info&infoMask == create {
		c.refused[oid] = struct{}{}
	} else {
		delete(c.refused, oid)
	}
	return nil
}

// Refused lists the tablespaces whose creation was seen since the Core was made, and not yet
// that they were dropped.
func (c *Core) Refused() []pg.Oid {
	var list []pg.Oid
	for oid := range c.refused {
		list = append(list, oid)
	}
	return list
}

// Layout of pg_filenode.map (relmapper.c).
const (
	relMapSize  = 512
	relMapCRC   = 504
	relMapMagic = 0x592717
)

// relMap is relmap_redo.
func (c *Core) relMap() error {
	f := c.main()
	db, tablespace, n := f.oid(), f.oid(), f.u32()
	if f.bad || n != relMapSize || len(f.b) < relMapSize {
		return fmt.Errorf("a relation map of %d bytes, want %d", n, relMapSize)
	}
	data := append([]byte(nil), f.b[:relMapSize]...)
	binary.LittleEndian.PutUint32(data, relMapMagic)
	binary.LittleEndian.PutUint32(data[relMapCRC:], crc32.Checksum(data[:relMapCRC], pg.Castagnoli))
	c.put(keyspace.RelMap(tablespace, db), timeline.Image, data)
	return nil
}
