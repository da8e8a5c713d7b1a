package pagemask

import (
	"fmt"

	"github.com/holdfastdb/holdfast/internal/pg"
)

// A Need is something of the first copy that WAL lacks and the second copy has not.
type Need struct {
	At int // in the page
	// Xmin and Xmax are the running or ended transactions that can need the row's command ids;
	// zero: none.
	Xmin, Xmax pg.TransactionID
	// Multi says that a member of a multixact may need them, too.
	Multi bool
	// Cycle says that it is no row's: a vacuum that runs in this btree can need its cycle.
	Cycle bool
}

// Needs lists where two copies of a page, which are equal under Unlogged, differ in what that
// allows, and who can need it.
func Needs(have, other []byte, at Place) (list []Need) {
	switch {
	case at.Fork != pg.MainFork:
	case at.Kind == Btree && special(have) == specialLarge:
		for i := specialLarge + 12; i < pg.BlockSize; i++ {
			if (have[i]^other[i])&^btreeHint(i) != 0 {
				return []Need{{At: i, Cycle: true}}
			}
		}
	case at.Kind == Heap:
		for pos := headerSize; pos+4 <= int(le.Uint16(have[offLower:])); pos += 4 {
			if off, flags, size := item(have, pos); flags == lpNormal && size >= rowHeader && off+size <= len(have) {
				list = appendRow(list, have[off:off+size], other[off:off+size], off)
			}
		}
	}
	return list
}

func btreeHint(i int) byte {
	if i == specialLarge+12 {
		return btreeGarbage
	}
	return 0
}

func appendRow(list []Need, have, other []byte, off int) []Need {
	differs := -1
	for i := rowCid; i < rowInfomask2; i++ {
		if have[i] != other[i] {
			differs = i
			break
		}
	}
	info := le.Uint16(have[rowInfomask:])
	if differs < 0 && (info^le.Uint16(other[rowInfomask:]))&comboCid != 0 {
		differs = rowInfomask
	}
	if differs < 0 {
		return list
	}
	n := Need{At: off + differs}
	if xmin := le.Uint32(have[rowXmin:]); xmin >= firstNormal && info&xminBits != xminBits {
		n.Xmin = pg.TransactionID(xmin)
	}
	switch xmax := le.Uint32(have[rowXmax:]); {
	case info&xmaxInvalid != 0:
	case info&xmaxIsMulti != 0:
		n.Multi = info&xmaxLockOnly == 0
	case xmax >= firstNormal:
		n.Xmax = pg.TransactionID(xmax)
	}
	return append(list, n)
}

// Field names what a byte of a page belongs to, for messages.
func Field(p []byte, at Place, i int) string {
	switch {
	case at.Fork == pg.FSMFork && i >= headerSize:
		return "the free space map"
	case at.Fork == pg.VMFork && i >= headerSize:
		return "the visibility map"
	case i < headerSize:
		return headerField(i)
	case pg.IsNewPage(p):
		return "the content"
	case i >= special(p):
		return "the special area"
	case i < int(le.Uint16(p[offLower:])):
		return fmt.Sprintf("line pointer %d", (i-headerSize)/4+1)
	}
	for n, pos := 1, headerSize; pos+4 <= int(le.Uint16(p[offLower:])) && pos+4 <= len(p); n, pos = n+1, pos+4 {
		if off, _, size := item(p, pos); i >= off && i < off+size {
			if at.Kind == Heap {
				return fmt.Sprintf("%s of row %d", rowField(i-off), n)
			}
			return fmt.Sprintf("item %d", n)
		}
	}
	return "the space between rows"
}

func headerField(i int) string {
	for _, f := range [...]struct {
		end  int
		name string
	}{{8, "pd_lsn"}, {10, "pd_checksum"}, {12, "pd_flags"}, {14, "pd_lower"}, {16, "pd_upper"}, {18, "pd_special"}, {20, "pd_pagesize_version"}} {
		if i < f.end {
			return f.name
		}
	}
	return "pd_prune_xid"
}

func rowField(i int) string {
	for _, f := range [...]struct {
		end  int
		name string
	}{{4, "t_xmin"}, {8, "t_xmax"}, {12, "t_cid"}, {18, "t_ctid"}, {20, "t_infomask2"}, {22, "t_infomask"}, {23, "t_hoff"}} {
		if i < f.end {
			return f.name
		}
	}
	return "the content"
}
