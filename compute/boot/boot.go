// Package boot makes the files with which a stock Postgres starts at the end of a branch's
// log without replaying any WAL.
//
// Such a start is one of a server that was shut down in order: pg_control says so and names a
// CHECKPOINT_SHUTDOWN record at X, redo pointer included. That record is fabricated from
// the counters that the page server has as of the log's end, and laid where the log ends, so
// that it can be committed to the safekeepers as the first WAL of the new epoch. In pg_wal
// Postgres needs to find the page of X and the long header of the segment's first page;
// WAL before X it reads for replication slots only.
//
// The package is pure: Make turns what the safekeepers and the page server said into a Plan.
package boot

import (
	"errors"
	"fmt"
	"path"
	"strings"
	"time"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/auxfile"
	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/internal/walrec"
)

const (
	firstNormalXid         = 3    // FirstNormalTransactionId
	firstNormalUnloggedLSN = 1000 // FirstNormalUnloggedLSN
)

// Input is what a Plan is made of.
type Input struct {
	// End is where the branch's committed log ends, as OpenEpoch told.
	End pg.LSN
	// State is what the page server has as of End.
	State *pb.StartupStateResponse
	// Settings are what Postgres will be started with.
	Settings *Settings
	// Reset names settings of ALTER SYSTEM that are to be taken back.
	Reset []string
	// Page is what the log has between the start of End's page and End. It is needed where
	// somebody reads the WAL before End (OldestNeeded); nil: zeros behind a header do.
	Page []byte
	// First is the main data of a logical message that goes before the checkpoint; nil: there is none.
	First []byte
	// Now is stamped on the checkpoint.
	Now time.Time
}

// A File is a file of the data directory, to which Path is relative.
type File struct {
	Path string
	Data []byte
}

// A Plan is how to start.
type Plan struct {
	// WAL is what is fabricated, at its place in the log, [Begin, End): page headers, the message,
	// the record at Checkpoint, padding. It has to be committed to the safekeepers first.
	Begin, Checkpoint, End pg.LSN
	WAL                    []byte
	// Page is what stands in pg_wal between the start of Begin's page and Begin.
	Page []byte
	// Dirs and Files are to be made in this order: pg_control and the WAL come last, so that
	// a data directory without them is one that was not finished.
	Dirs     []string
	Files    []File
	SystemID uint64
	// Auto is what ALTER SYSTEM's file holds after Reset.
	Auto []byte
	// Stale are files that the branch still has and nobody needs any more.
	Stale []string
	// Broken tells why replication slots among the stale files cannot be read.
	Broken []error
}

// dirs are the directories that initdb makes and Postgres expects.
var dirs = []string{
	"base", "global", "pg_commit_ts", "pg_dynshmem", "pg_logical", "pg_logical/mappings", "pg_logical/snapshots",
	"pg_multixact", "pg_multixact/members", "pg_multixact/offsets", "pg_notify", "pg_replslot", "pg_serial",
	"pg_snapshots", "pg_stat", "pg_stat_tmp", "pg_subtrans", "pg_tblspc", "pg_twophase", "pg_wal",
	"pg_wal/archive_status", "pg_xact",
}

// Make makes the Plan.
func Make(in Input) (*Plan, error) {
	control, err := pg.ParseControlFile(in.State.ControlFile)
	if err != nil {
		return nil, fmt.Errorf("start-up state at %v: %w", in.End, err)
	}
	cp, err := pg.ParseCheckPoint(in.State.Checkpoint)
	if err != nil {
		return nil, fmt.Errorf("start-up state at %v: %w", in.End, err)
	}
	p := &Plan{Begin: in.End, SystemID: control.SystemID}
	if err := check(in, in.End.SkipPageHeader(), control, cp); err != nil {
		return nil, fmt.Errorf("start-up state at %v: %w", in.End, err)
	}
	at, prev := p.addFirst(in)
	p.Checkpoint = at.SkipPageHeader()
	fillCheckPoint(&cp, p.Checkpoint, in.Now)
	fillControl(control, cp)
	bytes, end := walrec.PlaceRecord(at, walrec.BuildCheckpointRecord(p.Checkpoint, prev, cp), control.SystemID)
	p.WAL, p.End = append(p.WAL, bytes...), end
	if p.Page = in.Page; p.Page == nil {
		p.Page = pagePrefix(p.Begin, control.SystemID)
	}

	p.Dirs = append(p.Dirs, dirs...)
	for _, db := range in.State.Databases {
		p.Dirs = append(p.Dirs, pg.DatabasePath(pg.DefaultTablespaceOid, pg.Oid(db)))
	}
	if err := p.addFiles(in); err != nil {
		return nil, err
	}
	p.addWAL(control.SystemID)
	p.Files = append(p.Files, File{Path: "global/pg_control", Data: control.Marshal()})
	return p, nil
}

// addFirst lays the message into the log. It gives where that ends, and where the last record
// before there begins.
func (p *Plan) addFirst(in Input) (end, last pg.LSN) {
	last = pg.LSN(in.State.PrevRecordLsn)
	if in.First == nil {
		return p.Begin, last
	}
	p.WAL, end = walrec.PlaceRecord(p.Begin, walrec.Build(walrec.RmLogicalMsg, 0, 0, last, in.First), p.SystemID)
	return end, p.Begin.SkipPageHeader()
}

func check(in Input, x pg.LSN, control *pg.ControlFile, cp pg.CheckPoint) error {
	prev := pg.LSN(in.State.PrevRecordLsn)
	switch {
	case pg.LSN(in.State.Lsn) != in.End:
		return fmt.Errorf("the page server answered with its state at %v", pg.LSN(in.State.Lsn))
	case in.End%8 != 0 || in.End < pg.WALSegmentSize:
		return errors.New("no record can end there")
	case prev == 0 || prev >= x: // what XLogReader checks of the link at X
		return fmt.Errorf("the record before it is said to begin at %v", prev)
	case pg.TransactionID(cp.NextXid) < firstNormalXid || cp.OldestXid < firstNormalXid || cp.NextMulti == 0 || cp.OldestMulti == 0:
		return fmt.Errorf("the counters are not those of a database: next xid %d, oldest xid %d, next multixact %d, oldest multixact %d",
			cp.NextXid, cp.OldestXid, cp.NextMulti, cp.OldestMulti)
	case control.ChecksumVersion != 0:
		return errors.New("data page checksums are enabled, which the page server does not compute: make the branch with checksums disabled (the seal covers integrity)")
	}
	return nil
}

func fillCheckPoint(cp *pg.CheckPoint, x pg.LSN, now time.Time) {
	cp.Redo = x
	cp.TimelineID, cp.PrevTimelineID = pg.Timeline, pg.Timeline
	cp.FullPageWrites = false // as in the settings: else Postgres begins with an FPW_CHANGE record
	cp.Time = now.Unix()
	cp.OldestActiveXid = 0 // nothing runs at a shutdown
}

// fillControl leaves the parameters that pg_control repeats as WAL told them last: where the
// settings differ now, Postgres says so with a PARAMETER_CHANGE record, without which the page
// server would not know that commit timestamps are kept from here on.
func fillControl(c *pg.ControlFile, cp pg.CheckPoint) {
	c.State, c.Time = pg.DBShutdowned, cp.Time
	c.CheckPoint, c.CheckPointCopy = cp.Redo, cp
	c.UnloggedLSN = max(c.UnloggedLSN, firstNormalUnloggedLSN)
	c.MinRecoveryPoint, c.MinRecoveryTLI, c.BackupStart, c.BackupEnd, c.BackupEndRequired = 0, 0, 0, 0, false
}

// pagePrefix is what pg_wal shows of begin's page before begin: a header and zeros.
func pagePrefix(begin pg.LSN, sysid uint64) []byte {
	start := begin.PageStart()
	if begin == start {
		return nil
	}
	page := make([]byte, begin-start)
	copy(page, pg.NewWALPageHeader(start, 0, sysid).Append(nil))
	return page
}

// addFiles adds the page server's files and those that are made here.
func (p *Plan) addFiles(in Input) error {
	own := map[string][]byte{
		"PG_VERSION":     []byte("15\n"),
		auxfile.Settings: nil,
	}
	slots := readSlots(in.State.Files)
	p.Broken = slots.broken
	for _, f := range in.State.Files {
		if !isPlainPath(f.Path) {
			return fmt.Errorf("start-up state at %v: file name %q is not one inside a data directory", in.End, f.Path)
		}
		if isOurs(f.Path) {
			continue
		}
		if slots.stale(f.Path) {
			p.Stale = append(p.Stale, f.Path)
			continue
		}
		delete(own, f.Path)
		data := f.Data
		if f.Path == auxfile.Settings {
			data = ResetSettings(data, in.Reset)
			p.Auto = data
		}
		if dir := path.Dir(f.Path); dir != "." {
			p.Dirs = append(p.Dirs, dir)
		}
		p.Files = append(p.Files, File{Path: f.Path, Data: data})
	}
	for _, name := range []string{"PG_VERSION", auxfile.Settings} {
		if data, ok := own[name]; ok {
			p.Files = append(p.Files, File{Path: name, Data: data})
		}
	}
	p.Files = append(p.Files, in.Settings.Files()...)
	return nil
}

// isOurs tells of files that are made anew at each start, whatever the branch has.
func isOurs(name string) bool {
	switch name {
	case "global/pg_control", "postgresql.conf", "pg_hba.conf", "pg_ident.conf", "postmaster.pid", "postmaster.opts", "server.crt", "server.key":
		return true
	}
	return strings.HasPrefix(name, "pg_wal/")
}

func isPlainPath(name string) bool {
	return name != "" && name != "." && path.Clean(name) == name && !path.IsAbs(name) && name != ".." && !strings.HasPrefix(name, "../")
}

// addWAL adds the segment file that holds the checkpoint record; two, if it crosses into
// the next.
func (p *Plan) addWAL(sysid uint64) {
	first := p.Begin.SegmentStart()
	last := p.End // of the last page; an End at a page's start needs nothing of that page
	if last != last.PageStart() {
		last = last.PageStart() + pg.WALPageSize
	}
	stream := make([]byte, last-first)
	copy(stream, pg.NewWALPageHeader(first, 0, sysid).Append(nil))
	copy(stream[p.Begin.PageStart()-first:], p.Page)
	copy(stream[p.Begin-first:], p.WAL)
	for len(stream) > 0 {
		n := min(len(stream), pg.WALSegmentSize)
		p.Files = append(p.Files, File{Path: "pg_wal/" + pg.WALFileName(first), Data: stream[:n]})
		stream, first = stream[n:], first+pg.WALSegmentSize
	}
}
