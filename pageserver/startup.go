package pageserver

import (
	"cmp"
	"context"
	"fmt"
	"slices"

	"google.golang.org/grpc/codes"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/auxfile"
	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/internal/rpc"
	"github.com/holdfastdb/holdfast/pageserver/ingest"
	"github.com/holdfastdb/holdfast/pageserver/keyspace"
	"github.com/holdfastdb/holdfast/pageserver/timeline"
)

// originsPath is where PostgreSQL reads the progress of replication origins at its start.
const originsPath = "pg_logical/replorigin_checkpoint"

// StartupState gives the files that a compute needs to start at an LSN: pg_control as after a
// shutdown checkpoint there, and what is small and needed at once. The counters are known at the
// ends of what was ingested together, so at the end of the log when nobody writes to it; for
// an LSN in between the call fails rather than guess.
func (s *Server) StartupState(ctx context.Context, r *pb.StartupStateRequest) (*pb.StartupStateResponse, error) {
	rd, err := s.at(ctx, r.At)
	if err != nil {
		return nil, err
	}
	defer rd.done()
	resp, err := rd.startup(ctx)
	if err := rd.mayAnswer(err); err != nil {
		return nil, err
	}
	return resp, nil
}

func (rd *reader) startup(ctx context.Context) (*pb.StartupStateResponse, error) {
	h, err := rd.tl.Get(ctx, keyspace.Checkpoint(), rd.lsn)
	if err != nil {
		return nil, err
	}
	if h.Base == nil {
		return nil, rpc.Error(codes.NotFound, nil, "branch %s has no state at %v", rd.b.name.branch, rd.lsn)
	}
	if h.Base.LSN != rd.lsn {
		return nil, rpc.Error(codes.FailedPrecondition, nil, "branch %s: the counters are known at %v, not at %v",
			rd.b.name.branch, h.Base.LSN, rd.lsn)
	}
	state, err := ingest.ParseState(h.Base.Data)
	if err != nil {
		return nil, &damage{fmt.Sprintf("reading the state at %v", rd.lsn), err}
	}
	resp := &pb.StartupStateResponse{Lsn: uint64(rd.lsn), PrevRecordLsn: uint64(state.PrevRecord)}
	ctl := state.Control
	ctl.State = pg.DBShutdowned
	ctl.MinRecoveryPoint, ctl.MinRecoveryTLI, ctl.BackupStart, ctl.BackupEnd, ctl.BackupEndRequired = 0, 0, 0, 0, false
	ctl.CheckPointCopy.OldestActiveXid = 0 // as in any shutdown checkpoint
	resp.ControlFile, resp.Checkpoint = ctl.Marshal(), ctl.CheckPointCopy.Marshal()
	add := func(path string, data []byte) {
		resp.Files = append(resp.Files, &pb.NamedFile{Path: path, Data: data})
	}
	if origins := state.OriginsFile(); origins != nil {
		add(originsPath, origins)
	}
	aux := auxFiles{at: rd.lsn, parts: make(map[string][]part)}
	for kind, fn := range rd.smallFiles(resp, add) {
		from, to := keyspace.KindRange(kind)
		if err := rd.tl.Scan(ctx, from, to, rd.lsn, fn); err != nil {
			return nil, err
		}
	}
	from, to := keyspace.KindRange(keyspace.KindAuxFile)
	if err := rd.tl.Scan(ctx, from, to, rd.lsn, aux.take); err != nil {
		return nil, err
	}
	aux.give(add)
	return resp, nil
}

// auxFiles gathers the aux files as of the log's end.
type auxFiles struct {
	at    pg.LSN
	whole []auxfile.Change
	parts map[string][]part // by the file's name
}

type part struct {
	offset uint64
	data   []byte
}

func (a *auxFiles) take(_ keyspace.Key, v timeline.Value) error {
	name, data, err := auxfile.Parse(v.Data)
	if err != nil || name == startFile {
		return err
	}
	if file, offset, ok := auxfile.CutPart(name); ok {
		a.parts[file] = append(a.parts[file], part{offset, data})
		return nil
	}
	// Statistics are good for the start that follows the shutdown they were kept at: after
	// anything else PostgreSQL begins without, as it does after a crash.
	if name == auxfile.Stats && v.LSN != a.at {
		return nil
	}
	a.whole = append(a.whole, auxfile.Change{Path: name, Content: data})
	return nil
}

func (a *auxFiles) give(add func(string, []byte)) {
	for _, c := range a.whole {
		add(c.Path, c.Content)
	}
	for file, parts := range a.parts {
		slices.SortFunc(parts, func(x, y part) int { return cmp.Compare(x.offset, y.offset) })
		var data []byte
		for _, p := range parts {
			if uint64(len(data)) != p.offset {
				break // its beginning was removed: no start looks at the rest
			}
			data = append(data, p.data...)
		}
		add(file, data)
	}
}

type scanFunc = func(keyspace.Key, timeline.Value) error

// smallFiles makes files from the values of the kinds that stand for files.
func (rd *reader) smallFiles(resp *pb.StartupStateResponse, add func(string, []byte)) map[keyspace.Kind]scanFunc {
	inDatabase := func(name string, each func(k keyspace.Parsed)) scanFunc {
		return func(key keyspace.Key, v timeline.Value) error {
			k, err := keyspace.Parse(key)
			if err != nil || checkTablespace(uint32(k.Rel.Tablespace)) != nil {
				return err
			}
			add(pg.DatabasePath(k.Rel.Tablespace, k.Rel.Database)+"/"+name, v.Data)
			each(k)
			return nil
		}
	}
	return map[keyspace.Kind]scanFunc{
		keyspace.KindDatabase: inDatabase("PG_VERSION", func(k keyspace.Parsed) {
			resp.Databases = append(resp.Databases, uint32(k.Rel.Database))
		}),
		keyspace.KindRelMap: inDatabase("pg_filenode.map", func(keyspace.Parsed) {}),
		keyspace.KindTwoPhase: func(key keyspace.Key, v timeline.Value) error {
			k, err := keyspace.Parse(key)
			add(fmt.Sprintf("pg_twophase/%08X", uint32(k.Xid)), v.Data)
			return err
		},
	}
}
