package pg

import (
	"fmt"
	"path"
	"strconv"
	"strings"
)

// RelPath is the path of a file of a relation's fork, relative to the data directory:
// "base/5/1259_vm.1".
func RelPath(tag RelTag, segment int) string {
	dir := DatabasePath(tag.Tablespace, tag.Database)
	name := strconv.FormatUint(uint64(tag.Relation), 10)
	if tag.Fork != MainFork {
		name += "_" + tag.Fork.String()
	}
	if segment > 0 {
		name += "." + strconv.Itoa(segment)
	}
	return dir + "/" + name
}

// DatabasePath is a database's folder in a tablespace, relative to the data directory;
// "global" for the shared relations.
func DatabasePath(tablespace, database Oid) string {
	switch tablespace {
	case GlobalTablespaceOid:
		return "global"
	case DefaultTablespaceOid:
		return "base/" + strconv.FormatUint(uint64(database), 10)
	}
	return fmt.Sprintf("pg_tblspc/%d/PG_15_%d/%d", tablespace, CatalogVersion, database) // TABLESPACE_VERSION_DIRECTORY
}

// ParseRelPath is the reverse of RelPath for the two built-in tablespaces. ok is false for all
// else: other files, temporary relations, names that PostgreSQL would write differently.
func ParseRelPath(p string) (tag RelTag, segment int, ok bool) {
	dir, name := path.Split(p)
	switch {
	case dir == "global/":
		tag.Tablespace = GlobalTablespaceOid
	case strings.HasPrefix(dir, "base/"):
		tag.Tablespace = DefaultTablespaceOid
		if tag.Database, ok = parseOid(strings.TrimSuffix(dir[len("base/"):], "/")); !ok {
			return RelTag{}, 0, false
		}
	default:
		return RelTag{}, 0, false
	}
	name, seg, hasSeg := strings.Cut(name, ".")
	if hasSeg {
		n, isNumber := parseOid(seg)
		if !isNumber || n > (1<<32-1)/RelSegmentBlocks {
			return RelTag{}, 0, false
		}
		segment = int(n)
	}
	name, fork, hasFork := strings.Cut(name, "_")
	if hasFork {
		if tag.Fork, ok = parseFork(fork); !ok {
			return RelTag{}, 0, false
		}
	}
	if tag.Relation, ok = parseOid(name); !ok {
		return RelTag{}, 0, false
	}
	return tag, segment, true
}

func parseFork(suffix string) (ForkNumber, bool) {
	for f := FSMFork; f <= InitFork; f++ {
		if f.String() == suffix {
			return f, true
		}
	}
	return 0, false
}

// parseOid reads a decimal number from 1 on, without sign or leading zeros.
func parseOid(s string) (Oid, bool) {
	if s == "" || s[0] < '1' || s[0] > '9' {
		return 0, false
	}
	n, err := strconv.ParseUint(s, 10, 32)
	return Oid(n), err == nil
}

// SLRUPath is the segment file of an SLRU area that holds a page, relative to the data
// directory, and the page's offset in it.
func SLRUPath(kind SLRUKind, page uint32) (file string, offset int64) {
	return fmt.Sprintf("%s/%04X", kind.Dir(), page/SLRUPagesPerSegment), int64(page%SLRUPagesPerSegment) * BlockSize
}

// ParseSLRUPath is the reverse of SLRUPath: the area, and the first page of the file.
func ParseSLRUPath(p string) (kind SLRUKind, first uint32, ok bool) {
	dir, name := path.Split(p)
	for k := CLog; k <= CommitTS; k++ {
		if dir != k.Dir()+"/" {
			continue
		}
		n, isNumber := parseHex(name)
		if !isNumber || n > (1<<32-1)/SLRUPagesPerSegment || fmt.Sprintf("%04X", n) != name {
			return 0, 0, false
		}
		return k, uint32(n) * SLRUPagesPerSegment, true
	}
	return 0, 0, false
}

// segmentsPerID is how many WAL segments share the middle part of their names.
const segmentsPerID = 1 << 32 / WALSegmentSize

// WALFileName is the name, in pg_wal, of the segment file that holds an LSN.
func WALFileName(l LSN) string {
	n := uint64(l) / WALSegmentSize
	return fmt.Sprintf("%08X%08X%08X", uint32(Timeline), n/segmentsPerID, n%segmentsPerID)
}

// ParseWALFileName gives the LSN at which a segment file begins. ok is false for names
// that WALFileName does not make.
func ParseWALFileName(name string) (start LSN, ok bool) {
	if len(name) != 24 {
		return 0, false
	}
	id, ok1 := parseHex(name[8:16])
	seg, ok2 := parseHex(name[16:])
	if !ok1 || !ok2 || seg >= segmentsPerID {
		return 0, false
	}
	start = LSN(id<<32 | seg*WALSegmentSize)
	return start, WALFileName(start) == name
}

func parseHex(s string) (uint64, bool) {
	n, err := strconv.ParseUint(s, 16, 32)
	return n, err == nil
}
