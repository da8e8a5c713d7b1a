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
		dst := keyspace.Dir{Database: f.oid(), Tablespace: f.oid()}
		src := keyspace.Dir{Database: f.oid(), Tablespace: f.oid()}
		if f.bad {
			return errShort
		}
		return c.copyDatabase(dst, src)
	case createWALLog:
		dst := keyspace.Dir{Database: f.oid(), Tablespace: f.oid()}
		if f.bad {
			return errShort
		}
		c.put(keyspace.Database(dst.Tablespace, dst.Database), timeline.Image, []byte(VersionFile))
		return nil
	case drop:
		db, n := f.oid(), f.u32()
		if f.bad || uint64(n)*4 > uint64(len(f.b)) {
			return errShort
		}
		for range n {
			if err := c.dropDatabase(keyspace.Dir{Database: db, Tablespace: f.oid()}); err != nil {
				return err
			}
		}
		return nil
	}
	return fmt.Errorf("unknown kind %#02x", c.rec.Info&infoMask)
}

// A fork is a key of a kind that has a number of blocks: RelSize, or Dropped.
type fork struct {
	tag    pg.RelTag
	blocks uint32
}

// forks lists the forks in a folder. It reads what is stored: see Barrier.
func (c *Core) forks(kind keyspace.Kind, d keyspace.Dir) ([]fork, error) {
	var list []fork
	from, to := keyspace.DatabaseRange(kind, d.Tablespace, d.Database)
	err := c.look.Scan(c.ctx, from, to, c.last, func(key keyspace.Key, v timeline.Value) error {
		k, err := keyspace.Parse(key)
		if err != nil {
			return err
		}
		blocks, err := ParseSize(&v)
		list = append(list, fork{k.Rel, blocks})
		return err
	})
	return list, err
}

func (c *Core) dropDatabase(d keyspace.Dir) error {
	forks, err := c.forks(keyspace.KindRelSize, d)
	if err != nil {
		return err
	}
	c.put(keyspace.Copy(d), timeline.Tombstone, nil)
	for _, f := range forks {
		if err := c.drop(f.tag); err != nil {
			return err
		}
	}
	clear(c.marks)
	c.put(keyspace.Database(d.Tablespace, d.Database), timeline.Tombstone, nil)
	c.put(keyspace.RelMap(d.Tablespace, d.Database), timeline.Tombstone, nil)
	return nil
}

// maxSources bounds how many folders a page may have to be looked for in: a copy of a copy of
// a copy, so many times, is made page by page.
const maxSources = 32

// copyDatabase makes a folder as a copy of another, as both stand before the record. Sizes
// are copied, pages are not: the Copy key says where they are (docs/decisions/0011).
func (c *Core) copyDatabase(dst, src keyspace.Dir) error {
	if dst == src {
		return fmt.Errorf("database %d is copied over itself", src.Database)
	}
	sources, err := c.sources(src)
	if err != nil {
		return err
	}
	paged := len(sources) > c.maxSources
	if paged {
		err = c.copyPages(dst, src)
	} else {
		err = c.copySizes(dst, src)
	}
	if err != nil {
		return err
	}
	h, err := c.look.Get(c.ctx, keyspace.RelMap(src.Tablespace, src.Database), c.last)
	if err != nil {
		return err
	}
	if h.Base != nil {
		c.put(keyspace.RelMap(dst.Tablespace, dst.Database), timeline.Image, append([]byte(nil), h.Base.Data...))
	}
	c.put(keyspace.Database(dst.Tablespace, dst.Database), timeline.Image, []byte(VersionFile))
	if !paged { // last, so that nothing of the copy is staged above it
		c.put(keyspace.Copy(dst), timeline.Image, timeline.MarshalSources(sources))
	}
	return nil
}

// sources is where the pages of a copy of src are.
func (c *Core) sources(src keyspace.Dir) ([]timeline.Source, error) {
	h, err := c.look.Get(c.ctx, keyspace.Copy(src), c.last)
	if err != nil {
		return nil, err
	}
	list := []timeline.Source{{Dir: src, UpTo: c.rec.End}}
	if h.Base == nil {
		return list, nil
	}
	older, err := timeline.ParseSources(h.Base.Data)
	list[0].Above = h.Base.LSN
	return append(list, older...), err
}

// copySizes gives dst the sizes of src's forks. Their graves are src's, whose pages a copy would
// show as src would; and dst's own: while it is a copy they hide nothing, but they do when it
// was dropped and is made again.
func (c *Core) copySizes(dst, src keyspace.Dir) error {
	c.put(keyspace.RelMap(dst.Tablespace, dst.Database), timeline.Tombstone, nil)
	var tags []pg.RelTag
	rels := make(map[pg.RelTag]relation)
	for _, d := range []keyspace.Dir{dst, src} {
		for _, kind := range []keyspace.Kind{keyspace.KindDropped, keyspace.KindRelSize} {
			list, err := c.forks(kind, d)
			if err != nil {
				return err
			}
			for _, f := range list {
				f.tag.Tablespace, f.tag.Database = dst.Tablespace, dst.Database
				r, known := rels[f.tag]
				if !known {
					tags = append(tags, f.tag)
				}
				if kind == keyspace.KindRelSize && d == src {
					r.exists, r.blocks = true, f.blocks
				} else {
					r.grave = max(r.grave, f.blocks)
				}
				rels[f.tag] = r
			}
		}
	}
	for _, tag := range tags {
		if err := c.copySize(tag, rels[tag]); err != nil {
			return err
		}
	}
	clear(c.marks)
	return nil
}

// copySize stores what a fork is by being copied.
func (c *Core) copySize(tag pg.RelTag, r relation) error {
	if r.grave > 0 {
		c.put(keyspace.Dropped(tag), timeline.Image, c.u32(r.grave))
	}
	if r.exists {
		c.put(keyspace.RelSize(tag), timeline.Image, c.u32(r.blocks))
	} else {
		c.put(keyspace.RelSize(tag), timeline.Tombstone, nil)
	}
	c.sizes[tag] = r
	return c.stage()
}

// copyPages makes an image of each page.
func (c *Core) copyPages(dst, src keyspace.Dir) error {
	if err := c.dropDatabase(dst); err != nil {
		return err
	}
	forks, err := c.forks(keyspace.KindRelSize, src)
	if err != nil {
		return err
	}
	for _, f := range forks {
		if err := c.copyFork(dst, f.tag); err != nil {
			return err
		}
	}
	return nil
}

func (c *Core) copyFork(dst keyspace.Dir, from pg.RelTag) error {
	r, err := c.relation(from)
	if err != nil {
		return err
	}
	to := from
	to.Tablespace, to.Database = dst.Tablespace, dst.Database
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
