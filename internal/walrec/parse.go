package walrec

import (
	"fmt"

	"github.com/holdfastdb/holdfast/internal/pg"
)

// What a record's header is followed by (xlogrecord.h): fragments' headers, each beginning
// with an id, then the blocks' images and data, then the main data.
const (
	idDataShort = 255
	idDataLong  = 254
	idOrigin    = 253
	idTopXid    = 252
	maxBlockID  = 32

	forkMask  = 0x0F
	hasImage  = 0x10
	hasData   = 0x20
	willInit  = 0x40
	sameRel   = 0x80
	imageHole = 0x01 // bimg_info from here on
	imageUse  = 0x02
	imagePGLZ = 0x04
	imageLZ4  = 0x08
	imageZSTD = 0x10

	imageCompressed = imagePGLZ | imageLZ4 | imageZSTD
)

// Parse decodes a record. raw is RawRecord.Data; the Record's slices point into it.
func Parse(raw []byte, lsn, end pg.LSN) (*Record, error) {
	r := new(Record)
	if err := ParseInto(r, raw, lsn, end); err != nil {
		return nil, err
	}
	return r, nil
}

// ParseInto is Parse into a Record whose memory is used again.
func ParseInto(r *Record, raw []byte, lsn, end pg.LSN) error {
	if len(raw) < headerSize || len(raw) > maxRecord || le.Uint32(raw) != uint32(len(raw)) {
		return fmt.Errorf("WAL record at %v: %d bytes do not begin with a header that says so", lsn, len(raw))
	}
	*r = Record{LSN: lsn, End: end, Prev: pg.LSN(le.Uint64(raw[atPrev:])), Xid: pg.TransactionID(le.Uint32(raw[atXid:])),
		RmID: raw[atRmID], Info: raw[atInfo], Blocks: r.Blocks[:0], Raw: raw}
	p := parser{b: raw[headerSize:], rec: r}
	if err := p.headers(); err != nil {
		return fmt.Errorf("WAL record at %v (%s): %w", lsn, Name(r.RmID, r.Info), err)
	}
	p.data()
	return nil
}

// HeaderOnly is the Record of one that was skimmed: without main data and blocks.
func HeaderOnly(raw RawRecord) Record {
	h := raw.Data
	return Record{LSN: raw.LSN, End: raw.End, Prev: pg.LSN(le.Uint64(h[atPrev:])), Xid: pg.TransactionID(le.Uint32(h[atXid:])),
		RmID: h[atRmID], Info: h[atInfo], Raw: h}
}

// parser reads from b; rec gets what it finds. Reading past the end gives zeros and sets
// short.
type parser struct {
	b       []byte
	rec     *Record
	short   bool
	payload int // bytes that the headers read so far announce
	main    int // of them, of the main data
}

func (p *parser) take(n int) []byte {
	if n > len(p.b) {
		p.short, p.b = true, nil
		return zeros[:n]
	}
	v := p.b[:n]
	p.b = p.b[n:]
	return v
}

var zeros [16]byte // of any field's size

func (p *parser) u8() uint8   { return p.take(1)[0] }
func (p *parser) u16() uint16 { return le.Uint16(p.take(2)) }
func (p *parser) u32() uint32 { return le.Uint32(p.take(4)) }

// headers reads the fragments' headers and checks that what they announce is what is left.
func (p *parser) headers() error {
	for done := false; !done && !p.short && len(p.b) > p.payload; {
		switch id := p.u8(); {
		case id == idDataShort:
			p.main, done = int(p.u8()), true
		case id == idDataLong:
			p.main, done = int(p.u32()), true
		case id == idOrigin:
			p.rec.Origin = p.u16()
		case id == idTopXid:
			p.rec.TopXid = pg.TransactionID(p.u32())
		case id <= maxBlockID:
			if err := p.block(id); err != nil {
				return fmt.Errorf("block reference %d: %w", id, err)
			}
		default:
			return fmt.Errorf("fragment id %d is not known", id)
		}
	}
	p.payload += p.main
	if p.short || len(p.b) != p.payload {
		return fmt.Errorf("its headers announce %d bytes, %d follow them", p.payload, len(p.b))
	}
	return nil
}

func (p *parser) block(id uint8) error {
	if n := len(p.rec.Blocks); n > 0 && p.rec.Blocks[n-1].ID >= id {
		return fmt.Errorf("it comes after number %d", p.rec.Blocks[n-1].ID)
	}
	flags := p.u8()
	b := Block{ID: id, WillInit: flags&willInit != 0, HasImage: flags&hasImage != 0}
	b.dataLength = p.u16()
	if (flags&hasData != 0) != (b.dataLength != 0) {
		return fmt.Errorf("data flag %v, but %d bytes of data", flags&hasData != 0, b.dataLength)
	}
	if b.HasImage {
		if err := p.image(&b); err != nil {
			return err
		}
	}
	b.Rel.Fork = pg.ForkNumber(flags & forkMask)
	if b.Rel.Fork > pg.InitFork {
		return fmt.Errorf("fork number %d", b.Rel.Fork)
	}
	switch {
	case flags&sameRel == 0:
		b.Rel.RelFileNode = pg.RelFileNode{Tablespace: pg.Oid(p.u32()), Database: pg.Oid(p.u32()), Relation: pg.Oid(p.u32())}
	case len(p.rec.Blocks) == 0:
		return fmt.Errorf("same relation as the one before, and there is none")
	default:
		b.Rel.RelFileNode = p.rec.Blocks[len(p.rec.Blocks)-1].Rel.RelFileNode
	}
	b.Block = pg.BlockNumber(p.u32())
	p.payload += int(b.dataLength) + int(b.imageLength)
	p.rec.Blocks = append(p.rec.Blocks, b)
	return nil
}

func (p *parser) image(b *Block) error {
	b.imageLength, b.holeOffset, b.bimgInfo = p.u16(), p.u16(), p.u8()
	b.ApplyImage = b.bimgInfo&imageUse != 0
	hole, compressed := b.bimgInfo&imageHole != 0, b.bimgInfo&imageCompressed
	switch {
	case compressed&(compressed-1) != 0:
		return fmt.Errorf("page image with flags %#02x", b.bimgInfo)
	case compressed != 0 && hole:
		b.holeLength = p.u16()
	case compressed == 0 && b.imageLength <= pg.BlockSize:
		b.holeLength = pg.BlockSize - b.imageLength
	}
	if hole != (b.holeLength != 0) || hole != (b.holeOffset != 0) ||
		int(b.holeOffset)+int(b.holeLength) > pg.BlockSize ||
		compressed == 0 && int(b.imageLength)+int(b.holeLength) != pg.BlockSize ||
		compressed != 0 && b.imageLength >= pg.BlockSize {
		return fmt.Errorf("page image of %d bytes with flags %#02x and a hole of %d at %d",
			b.imageLength, b.bimgInfo, b.holeLength, b.holeOffset)
	}
	return nil
}

// data points the record's slices at its payload, whose length headers has checked.
func (p *parser) data() {
	part := func(n int) []byte {
		v := p.b[:n:n]
		p.b = p.b[n:]
		return v
	}
	for i := range p.rec.Blocks {
		b := &p.rec.Blocks[i]
		b.image = part(int(b.imageLength))
		b.Data = part(int(b.dataLength))
	}
	p.rec.MainData = part(p.main)
}
