package oracle

import (
	"fmt"
	"os"
	"testing"

	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/internal/walrec"
)

// usable counts the bytes of WAL before a place, page headers left out.
func usable(l pg.LSN) int64 {
	const page = pg.WALPageSize - 24 // what a page holds; a segment's first one has 16 less
	segments, in := int64(l/pg.WALSegmentSize), int64(l%pg.WALSegmentSize)
	n := segments*(pg.WALSegmentSize/pg.WALPageSize*page-16) + in/pg.WALPageSize*page
	if in >= pg.WALPageSize {
		n -= 16
	}
	return n + max(0, in%pg.WALPageSize-int64(pg.WALPageHeaderSize(l.PageStart())))
}

// recordPositions begins records at places of a page from which they go on on the next page, and
// on the next segment: all places of a page, and the last ones of a segment. (Each place of a
// segment's last page would take a segment; internal/walrec's tests lay such records themselves.)
func recordPositions(t *testing.T, cluster *server) {
	begins := map[pg.LSN]bool{}
	var wanted []pg.LSN
	scenario{
		from:     cluster,
		settings: map[string]string{"autovacuum": "off", "wal_buffers": "16MB", "wal_consistency_checking": ""},
		quick:    true,
		work: func(s *server, c *session) {
			position := func() pg.LSN {
				at, err := pg.ParseLSN(c.rows("SELECT pg_current_wal_insert_lsn()")[0][0])
				if err != nil {
					t.Fatal(err)
				}
				return at
			}
			cross := func(at pg.LSN) {
				const overhead = 24 + 5 + 24 + 1 // headers of a record, of its data and of a message, and an empty prefix
				c.exec(fmt.Sprintf("SELECT pg_logical_emit_message(false, '', repeat('x', %d))", usable(at)-usable(position())-overhead))
				if position() == at { // else another process wrote, too
					wanted = append(wanted, at)
				}
				c.exec(fmt.Sprintf("SELECT pg_logical_emit_message(false, '', repeat('y', %d))", pg.WALPageSize))
			}
			page := position().PageStart() + 2*pg.WALPageSize
			for in := pg.LSN(24); in < pg.WALPageSize; in += 8 {
				cross(page + in)
				page = position().PageStart() + 2*pg.WALPageSize
				if page.SegmentStart() == page {
					page += pg.WALPageSize
				}
			}
			first := pg.LSN(pg.WALPageSize - 96)
			if os.Getenv("HOLDFAST_SOAK") != "" {
				first = pg.WALPageSize - 512
			}
			for in := first; in < pg.WALPageSize; in += 8 {
				cross(position().SegmentStart() + pg.WALSegmentSize - pg.WALPageSize + in)
			}
			t.Logf("%d places", len(wanted))
			if most := (pg.WALPageSize - 24 + 96) / 8; len(wanted) < most-10 {
				t.Errorf("records began at %d of %d places", len(wanted), most)
			}
		},
		seen: func(rec *walrec.Record) { begins[rec.LSN] = true },
	}.run(t)
	for _, at := range wanted {
		if !begins[at] {
			t.Errorf("no record was read at %v", at)
		}
	}
}
