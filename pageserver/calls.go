package pageserver

import (
	"context"
	"errors"
	"fmt"

	"google.golang.org/grpc/codes"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/internal/rpc"
	"github.com/holdfastdb/holdfast/pageserver/ingest"
	"github.com/holdfastdb/holdfast/pageserver/keyspace"
	"github.com/holdfastdb/holdfast/pageserver/pageread"
	"github.com/holdfastdb/holdfast/pageserver/timeline"
)

// maxPages is the most pages of one call.
const maxPages = 128

// reader reads a branch at one LSN.
type reader struct {
	b   *branch
	tl  *timeline.Timeline
	lsn pg.LSN
}

// at waits until the branch has what is asked for. The wait is bounded.
func (s *Server) at(ctx context.Context, p *pb.ReadPoint) (*reader, error) {
	b, err := s.branch(p.GetProject(), p.GetBranch())
	if err != nil {
		return nil, err
	}
	waitCtx, cancel := context.WithTimeout(ctx, s.cfg.WaitLimit)
	defer cancel()
	tl, err := b.timeline(waitCtx)
	if err != nil {
		return nil, b.status(err)
	}
	lsn := pg.LSN(p.GetLsn())
	if err := tl.WaitFor(waitCtx, lsn); err != nil {
		if waitCtx.Err() != nil && ctx.Err() == nil {
			return nil, lateError(b, lsn, tl.LastLSN())
		}
		if why := b.reason(); why != nil {
			err = why
		}
		return nil, b.status(err)
	}
	if p.GetLatest() {
		lsn = tl.LastLSN()
	}
	// W2: a compute that was fenced and does not know it would take pages of its successor's
	// WAL for its own. The epoch is known before its WAL shows, and looked at after the LSN.
	if now := b.epoch.Load(); p.GetEpoch() != 0 && p.GetEpoch() < now {
		return nil, rpc.Error(codes.FailedPrecondition, &pb.ErrorDetail{Reason: pb.ErrorDetail_FENCED},
			"branch %s: epoch %d is fenced, WAL of epoch %d was ingested", p.GetBranch(), p.GetEpoch(), now)
	}
	b.answering.Add(1)
	return &reader{b, tl, lsn}, nil
}

// done is called when nothing of what was read is held any more.
func (rd *reader) done() { rd.b.answering.Add(-1) }

// reason is why the branch stopped for good, or nil.
func (b *branch) reason() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.mu.ended {
		return b.mu.err
	}
	return nil
}

// GetPages reads pages of a relation or of an SLRU area.
func (s *Server) GetPages(ctx context.Context, r *pb.GetPagesRequest) (*pb.GetPagesResponse, error) {
	if r.Count < 1 || r.Count > maxPages {
		return nil, rpc.Error(codes.InvalidArgument, nil, "%d pages asked for, want 1 to %d", r.Count, maxPages)
	}
	if (r.Rel == nil) == (r.Slru == 0) {
		return nil, rpc.Error(codes.InvalidArgument, nil, "either a relation or an SLRU area is to be asked for")
	}
	rd, err := s.at(ctx, r.At)
	if err != nil {
		return nil, err
	}
	defer rd.done()
	resp := &pb.GetPagesResponse{Lsn: uint64(rd.lsn)}
	if r.Rel != nil {
		resp.Pages, err = rd.relPages(ctx, r.Rel, r.Block, r.Count)
	} else {
		resp.Pages, err = rd.slruPages(ctx, r.Slru, r.Block, r.Count)
	}
	if err := rd.mayAnswer(err); err != nil {
		clear(resp.Pages)
		return nil, err
	}
	return resp, nil
}

// mayAnswer is asked right before what was read leaves, with the error of reading it: past the
// lease's end there is no answer (K2), however long ago the pages were made.
func (rd *reader) mayAnswer(err error) error {
	if err == nil {
		err = rd.b.srv.cfg.Ring.Live(rd.b.name.project, rd.b.name.branch)
	}
	return rd.b.status(err)
}

func (rd *reader) relPages(ctx context.Context, rel *pb.RelFork, block, count uint32) ([]byte, error) {
	tag, err := relTag(rel)
	if err != nil {
		return nil, err
	}
	blocks, exists, err := rd.size(ctx, tag)
	switch {
	case err != nil:
		return nil, err
	case !exists:
		return nil, rpc.Error(codes.NotFound, nil, "there is no %v at %v on branch %s", tag, rd.lsn, rd.b.name.branch)
	case block >= blocks:
		return nil, nil
	}
	count = min(count, blocks-block)
	pages := make([]byte, int(count)*pg.BlockSize)
	for i := range count {
		key := keyspace.RelPage(tag, pg.BlockNumber(block+i))
		if err := pageread.Page(ctx, rd.tl, key, rd.lsn, page(pages, i)); err != nil {
			return nil, err
		}
	}
	return pages, nil
}

func page(pages []byte, i uint32) []byte { return pages[int(i)*pg.BlockSize:][:pg.BlockSize] }

// size is the number of blocks in a fork.
func (rd *reader) size(ctx context.Context, tag pg.RelTag) (blocks uint32, exists bool, err error) {
	h, err := rd.tl.Get(ctx, keyspace.RelSize(tag), rd.lsn)
	if err != nil || h.Base == nil {
		return 0, false, err
	}
	blocks, err = ingest.ParseSize(h.Base)
	return blocks, true, err
}

func relTag(r *pb.RelFork) (pg.RelTag, error) {
	if err := checkTablespace(r.Tablespace); err != nil {
		return pg.RelTag{}, err
	}
	if r.Fork > uint32(pg.InitFork) {
		return pg.RelTag{}, rpc.Error(codes.InvalidArgument, nil, "there is no fork %d", r.Fork)
	}
	return pg.RelTag{RelFileNode: pg.RelFileNode{Tablespace: pg.Oid(r.Tablespace), Database: pg.Oid(r.Database),
		Relation: pg.Oid(r.Relation)}, Fork: pg.ForkNumber(r.Fork)}, nil
}

func checkTablespace(oid uint32) error {
	if t := pg.Oid(oid); t != pg.DefaultTablespaceOid && t != pg.GlobalTablespaceOid {
		return rpc.Error(codes.FailedPrecondition, nil,
			"tablespace %d is outside the data directory: what is in it is not kept; move the objects to pg_default", oid)
	}
	return nil
}

// slruPages stops at the first page that does not exist.
func (rd *reader) slruPages(ctx context.Context, kind, first, count uint32) ([]byte, error) {
	exist, err := rd.slruExist(ctx, kind)
	if err != nil {
		return nil, err
	}
	var pages []byte
	for i := range count {
		if !exist[first+i] {
			break
		}
		pages = append(pages, make([]byte, pg.BlockSize)...)
		if err := pageread.Page(ctx, rd.tl, keyspace.SLRUPage(pg.SLRUKind(kind), first+i), rd.lsn, page(pages, i)); err != nil {
			return nil, err
		}
	}
	if pages == nil {
		return nil, rpc.Error(codes.NotFound, nil, "there is no page %d of %s at %v on branch %s",
			first, pg.SLRUKind(kind).Dir(), rd.lsn, rd.b.name.branch)
	}
	return pages, nil
}

func (rd *reader) slruExist(ctx context.Context, kind uint32) (map[uint32]bool, error) {
	list, err := rd.slruList(ctx, kind)
	exist := make(map[uint32]bool, len(list))
	for _, p := range list {
		exist[p] = true
	}
	return exist, err
}

func (rd *reader) slruList(ctx context.Context, kind uint32) ([]uint32, error) {
	if kind < uint32(pg.CLog) || kind > uint32(pg.CommitTS) {
		return nil, rpc.Error(codes.InvalidArgument, nil, "there is no SLRU area %d", kind)
	}
	h, err := rd.tl.Get(ctx, keyspace.SLRUExtents(pg.SLRUKind(kind)), rd.lsn)
	if err != nil || h.Base == nil {
		return nil, err
	}
	return ingest.SLRUPages(h.Base.Data)
}

// ListSLRU lists the pages of an SLRU area.
func (s *Server) ListSLRU(ctx context.Context, r *pb.ListSLRURequest) (*pb.ListSLRUResponse, error) {
	rd, err := s.at(ctx, r.At)
	if err != nil {
		return nil, err
	}
	defer rd.done()
	pages, err := rd.slruList(ctx, r.Slru)
	if err := rd.mayAnswer(err); err != nil {
		return nil, err
	}
	return &pb.ListSLRUResponse{Pages: pages, Lsn: uint64(rd.lsn)}, nil
}

// ListRelations lists the forks in a database's folder.
func (s *Server) ListRelations(ctx context.Context, r *pb.ListRelationsRequest) (*pb.ListRelationsResponse, error) {
	if err := checkTablespace(r.Tablespace); err != nil {
		return nil, err
	}
	rd, err := s.at(ctx, r.At)
	if err != nil {
		return nil, err
	}
	defer rd.done()
	resp := &pb.ListRelationsResponse{Lsn: uint64(rd.lsn)}
	from, to := keyspace.DatabaseRange(keyspace.KindRelSize, pg.Oid(r.Tablespace), pg.Oid(r.Database))
	err = rd.tl.Scan(ctx, from, to, rd.lsn, func(key keyspace.Key, v timeline.Value) error {
		k, err := keyspace.Parse(key)
		blocks, err2 := ingest.ParseSize(&v)
		if err := errors.Join(err, err2); err != nil {
			return err
		}
		resp.Relations = append(resp.Relations, &pb.RelationSize{Relation: uint32(k.Rel.Relation), Fork: uint32(k.Rel.Fork), Blocks: blocks})
		return nil
	})
	if err != nil {
		err = fmt.Errorf("listing database %d at %v: %w", r.Database, rd.lsn, err)
	}
	if err := rd.mayAnswer(err); err != nil {
		return nil, err
	}
	return resp, nil
}
