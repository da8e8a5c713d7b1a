package oracle

import (
	"encoding/binary"
	"flag"
	"os"
	"path/filepath"
	"testing"

	"github.com/klauspost/compress/zstd"

	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/internal/walrec"
)

var rewrite = flag.Bool("rewrite", false, "write the corpora of walrec's and redo's own tests from this run")

// A corpus collects pages before and after records, some for each kind of record and block
// reference. Its file, compressed with zstd, has for each sample:
//
//	LSN 8 | end 8 | length of record 4 | number of block reference 4 | record | page before | page after
type corpus struct {
	seen map[[3]uint8]int
	file []byte
}

// wanted are the occurrences of a kind that are kept: early ones, and some of later phases.
var wanted = map[int]bool{0: true, 7: true, 150: true}

// take notes a block as it is before its record, and gives what to call after it.
func (c *corpus) take(rec *walrec.Record, b *walrec.Block, p []byte) (after func()) {
	key := [3]uint8{rec.RmID, rec.Info & 0xF0, b.ID}
	n := c.seen[key]
	c.seen[key]++
	if !wanted[n] {
		return func() {}
	}
	f := binary.LittleEndian.AppendUint64(c.file, uint64(rec.LSN))
	f = binary.LittleEndian.AppendUint64(f, uint64(rec.End))
	f = binary.LittleEndian.AppendUint32(f, uint32(len(rec.Raw)))
	f = binary.LittleEndian.AppendUint32(f, uint32(b.ID))
	f = append(f, rec.Raw...)
	f = append(f, p...)
	return func() { c.file = append(f, p...) }
}

func writeCompressed(t *testing.T, name string, b []byte) {
	t.Helper()
	w, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedBestCompression), zstd.WithWindowSize(8<<20))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, w.EncodeAll(b, nil), 0o644); err != nil {
		t.Fatal(err)
	}
}

// walStretch is a start LSN and the WAL from there on: all records between two switches,
// with some zeros, and the next segment's first pages.
func walStretch(t *testing.T, dir string, switches []walrec.RawRecord) []byte {
	t.Helper()
	if len(switches) < 3 {
		t.Fatalf("%d switch records, want 3", len(switches))
	}
	start, next := switches[1].End, switches[2]
	out := binary.LittleEndian.AppendUint64(nil, uint64(start))
	for _, part := range []struct {
		at   pg.LSN
		size int
	}{{start, int(next.LSN-start) + 2*pg.WALPageSize}, {next.End, 12 * pg.WALPageSize}} {
		b, err := os.ReadFile(filepath.Join(dir, pg.WALFileName(part.at)))
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, b[:part.size]...)
	}
	return out
}
