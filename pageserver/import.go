package pageserver

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/auxfile"
	"github.com/holdfastdb/holdfast/internal/blob"
	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/internal/rpc"
	"github.com/holdfastdb/holdfast/pageserver/ingest"
	"github.com/holdfastdb/holdfast/pageserver/keyspace"
	"github.com/holdfastdb/holdfast/pageserver/timeline"
)

// Bounds of an import. The files are held in memory until all came: on disk they would be
// plaintext (K1). An initdb'd directory has 24 MB without its WAL.
const (
	maxImport     = 512 << 20
	maxImportFile = 256 << 20
	maxImportData = 1 << 20
)

// Import makes a branch from a data directory that was shut down cleanly. The branch begins
// at the end of the directory's WAL. A branch that was imported whole is left as it is.
func (s *Server) Import(stream grpc.ClientStreamingServer[pb.ImportRequest, pb.ImportResponse]) error {
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	cfg := s.timelineConfig(first.Project, first.Branch)
	if err := cfg.Validate(); err != nil {
		return rpc.Error(codes.InvalidArgument, nil, "%v", err)
	}
	s.imports.Lock()
	defer s.imports.Unlock()
	u := &upload{files: make(map[string][]byte)}
	for r := first; ; {
		if err := u.add(r); err != nil {
			return rpc.Error(codes.InvalidArgument, nil, "importing branch %s: %v", first.Branch, err)
		}
		if r.Last {
			break
		}
		if r, err = stream.Recv(); errors.Is(err, io.EOF) {
			return rpc.Error(codes.InvalidArgument, nil, "importing branch %s: the stream ended before its last file", first.Branch)
		} else if err != nil {
			return err
		}
	}
	entries, lsn, err := u.entries()
	if err != nil {
		return rpc.Error(codes.InvalidArgument, nil, "importing branch %s: %v", first.Branch, err)
	}
	if b, _ := s.branch(first.Project, first.Branch); b != nil {
		lsn, err = b.importedAt(stream.Context()) // to open it here would take it from its own follower
	} else {
		lsn, err = importBranch(stream.Context(), cfg, entries, lsn)
	}
	if err != nil {
		code, detail := classify(err)
		return rpc.Error(code, detail, "importing branch %s: %v", first.Branch, err)
	}
	return stream.SendAndClose(&pb.ImportResponse{Lsn: uint64(lsn)})
}

// importBranch makes the branch durable in one layer, so that it is there whole or not at
// all: the manifest alone, without the state in that layer, is no branch.
func importBranch(ctx context.Context, cfg timeline.Config, entries []timeline.Entry, lsn pg.LSN) (start pg.LSN, err error) {
	cfg.FlushBytes, cfg.FlushAge, cfg.Materialize = 2*maxImport, -1, nil
	tl, err := timeline.Create(ctx, cfg, lsn)
	if errors.Is(err, blob.ErrExists) {
		tl, err = timeline.Open(ctx, cfg)
	}
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, tl.Close()) }()
	h, err := tl.Get(ctx, keyspace.Checkpoint(), tl.LastLSN())
	switch {
	case err != nil:
		return 0, err
	case h.Base != nil:
		return importedAt(ctx, tl)
	case tl.LastLSN() != lsn:
		return 0, fmt.Errorf("an import that began at %v did not finish, and this one is for %v: use a new branch", tl.LastLSN(), lsn)
	}
	if err := tl.Put(ctx, entries, lsn); err != nil {
		return 0, err
	}
	return lsn, tl.Flush(ctx)
}

func (b *branch) importedAt(ctx context.Context) (pg.LSN, error) {
	tl, err := b.timeline(ctx)
	if err != nil {
		return 0, err
	}
	return importedAt(ctx, tl)
}

// importedAt is where an imported branch begins.
func importedAt(ctx context.Context, tl *timeline.Timeline) (pg.LSN, error) {
	h, err := tl.Get(ctx, keyspace.AuxFile(startFile), tl.LastLSN())
	if err != nil {
		return 0, err
	}
	if h.Base == nil {
		return 0, errors.New("the branch was not made by an import")
	}
	_, data, err := auxfile.Parse(h.Base.Data)
	if err != nil {
		return 0, err
	}
	return pg.ParseLSN(string(data))
}

// startFile is the name under which the branch's first LSN is kept among the aux files.
const startFile = "holdfast.start"

// upload gathers a data directory's files.
type upload struct {
	files map[string][]byte
	total int
}

// keptFiles are files outside relations and SLRU areas that a branch keeps.
var keptFiles = []string{"PG_VERSION", "postgresql.conf", "postgresql.auto.conf", "pg_hba.conf", "pg_ident.conf"}

func wanted(name string) bool {
	_, _, isRel := pg.ParseRelPath(name)
	_, _, isSLRU := pg.ParseSLRUPath(name)
	_, base := splitDir(name)
	return isRel || isSLRU || name == "global/pg_control" || slices.Contains(keptFiles, name) ||
		(strings.HasPrefix(name, "base/") && (base == "PG_VERSION" || base == "pg_filenode.map")) || name == "global/pg_filenode.map"
}

func splitDir(name string) (dir, base string) {
	i := strings.LastIndexByte(name, '/')
	return name[:i+1], name[i+1:]
}

func (u *upload) add(r *pb.ImportRequest) error {
	if r.Path == "" {
		return nil
	}
	if err := auxfile.CheckPath(r.Path); err != nil {
		return err
	}
	if !wanted(r.Path) {
		return nil
	}
	have := u.files[r.Path]
	switch {
	case r.Offset != uint64(len(have)):
		return fmt.Errorf("file %s: data at offset %d, but %d bytes came before", r.Path, r.Offset, len(have))
	case len(r.Data) > maxImportData:
		return fmt.Errorf("file %s: %d bytes at once, want at most %d", r.Path, len(r.Data), maxImportData)
	case len(have)+len(r.Data) > maxImportFile || u.total+len(r.Data) > maxImport:
		return fmt.Errorf("file %s: a directory to import has at most %d bytes, and %d in one file", r.Path, maxImport, maxImportFile)
	}
	u.files[r.Path] = append(have, r.Data...)
	u.total += len(r.Data)
	return nil
}

// entries makes the branch's first versions, all at the end of the directory's WAL.
func (u *upload) entries() ([]timeline.Entry, pg.LSN, error) {
	data, ok := u.files["global/pg_control"]
	if !ok {
		return nil, 0, errors.New("global/pg_control is missing")
	}
	ctl, err := pg.ParseControlFile(data)
	if err != nil {
		return nil, 0, err
	}
	if err := checkControl(ctl); err != nil {
		return nil, 0, err
	}
	b := &builder{lsn: checkpointEnd(ctl.CheckPoint), sizes: make(map[pg.RelTag]uint32), slru: make(map[pg.SLRUKind][]uint32)}
	names := make([]string, 0, len(u.files))
	for name := range u.files {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		if err := b.file(name, u.files[name]); err != nil {
			return nil, 0, fmt.Errorf("file %s: %w", name, err)
		}
	}
	b.finish(ctl)
	return b.out, b.lsn, b.complete()
}

func checkControl(ctl *pg.ControlFile) error {
	switch {
	case ctl.State != pg.DBShutdowned:
		return fmt.Errorf("pg_control: the cluster is in state %d, not shut down cleanly (%d)", ctl.State, pg.DBShutdowned)
	case ctl.CheckPointCopy.TimelineID != pg.Timeline:
		return fmt.Errorf("pg_control: PostgreSQL timeline %d, only %d is supported", ctl.CheckPointCopy.TimelineID, pg.Timeline)
	case ctl.ChecksumVersion != 0:
		return errors.New("pg_control: data checksums are on; they are not needed here and not supported: pg_checksums --disable")
	case ctl.CheckPoint != ctl.CheckPointCopy.Redo:
		return fmt.Errorf("pg_control: the last checkpoint at %v is no shutdown checkpoint: its redo point is %v", ctl.CheckPoint, ctl.CheckPointCopy.Redo)
	}
	return nil
}

// checkpointEnd is the end of a shutdown checkpoint's record that begins at lsn: a record
// header, the header of the main data, the checkpoint; and page headers where it crosses one.
func checkpointEnd(lsn pg.LSN) pg.LSN {
	left := pg.LSN(24 + 2 + pg.CheckPointSize)
	for {
		room := lsn.PageStart() + pg.WALPageSize - lsn
		if left <= room {
			return (lsn + left).Align()
		}
		left -= room
		lsn = (lsn + room).SkipPageHeader()
	}
}

// builder turns files into versions.
type builder struct {
	lsn   pg.LSN
	out   []timeline.Entry
	sizes map[pg.RelTag]uint32
	slru  map[pg.SLRUKind][]uint32

	databases, maps int
}

func (b *builder) put(key keyspace.Key, data []byte) {
	b.out = append(b.out, timeline.Entry{Key: key, Value: timeline.Value{LSN: b.lsn, Kind: timeline.Image, Data: data}})
}

func (b *builder) file(name string, data []byte) error {
	if tag, segment, ok := pg.ParseRelPath(name); ok {
		return b.relation(tag, segment, data)
	}
	if kind, first, ok := pg.ParseSLRUPath(name); ok {
		return b.pages(data, func(i uint32, page []byte) {
			b.slru[kind] = append(b.slru[kind], first+i)
			b.put(keyspace.SLRUPage(kind, first+i), page)
		})
	}
	dir, base := splitDir(name)
	tablespace, db := pg.GlobalTablespaceOid, pg.Oid(0)
	if dir != "global/" && dir != "" {
		tag, _, ok := pg.ParseRelPath(dir + "1")
		if !ok {
			return errors.New("it is in no database's folder")
		}
		tablespace, db = tag.Tablespace, tag.Database
	}
	switch {
	case name == "global/pg_control":
	case base == "pg_filenode.map":
		b.maps++
		b.put(keyspace.RelMap(tablespace, db), data)
	case base == "PG_VERSION" && string(data) != ingest.VersionFile:
		return fmt.Errorf("the data directory is of PostgreSQL %q, want 15", data)
	case base == "PG_VERSION" && dir != "":
		b.databases++
		b.put(keyspace.Database(tablespace, db), data)
	default:
		b.put(keyspace.AuxFile(name), auxfile.Marshal(name, data))
	}
	return nil
}

func (b *builder) pages(data []byte, fn func(i uint32, page []byte)) error {
	if len(data)%pg.BlockSize != 0 {
		return fmt.Errorf("%d bytes are no whole number of pages", len(data))
	}
	for i := 0; i < len(data)/pg.BlockSize; i++ {
		fn(uint32(i), data[i*pg.BlockSize:][:pg.BlockSize])
	}
	return nil
}

func (b *builder) relation(tag pg.RelTag, segment int, data []byte) error {
	first := uint32(segment) * pg.RelSegmentBlocks
	b.sizes[tag] = max(b.sizes[tag], first+uint32(len(data)/pg.BlockSize))
	return b.pages(data, func(i uint32, page []byte) {
		b.put(keyspace.RelPage(tag, pg.BlockNumber(first+i)), page)
	})
}

// finish adds what is made from all files: sizes, lists, the state.
func (b *builder) finish(ctl *pg.ControlFile) {
	for tag, blocks := range b.sizes {
		b.put(keyspace.RelSize(tag), []byte{byte(blocks), byte(blocks >> 8), byte(blocks >> 16), byte(blocks >> 24)})
	}
	for kind, pages := range b.slru {
		b.put(keyspace.SLRUExtents(kind), ingest.MarshalSLRUPages(pages))
	}
	b.put(keyspace.AuxFile(startFile), auxfile.Marshal(startFile, []byte(b.lsn.String())))
	state := ingest.State{PrevRecord: ctl.CheckPoint, Control: *ctl, EarlyOffsets: -1}
	b.put(keyspace.Checkpoint(), state.Marshal())
}

func (b *builder) complete() error {
	switch {
	case b.databases == 0 || b.maps != b.databases+1:
		return fmt.Errorf("%d database folders and %d relation maps: want a map for each, and the shared one", b.databases, b.maps)
	case len(b.slru[pg.CLog]) == 0 || len(b.slru[pg.MultiXactOffsets]) == 0:
		return errors.New("pg_xact or pg_multixact/offsets has no files")
	}
	return nil
}
