package safekeeper

import (
	"context"
	"errors"
	"fmt"
	"time"

	"go.etcd.io/raft/v3"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/safekeeper/archive"
	"github.com/holdfastdb/holdfast/safekeeper/group"
	"github.com/holdfastdb/holdfast/safekeeper/walstate"
)

// Limits of one ReadResponse.
const (
	readBytes  = 1 << 20
	readChunks = 4096

	// gather is how long what is committed waits for more to go with it. A reader that follows
	// small commits is woken this often at most, which leaves the processors to the commits;
	// a page that is asked for at the log's end waits this long at most.
	gather = 5 * time.Millisecond

	// leaderless is how often a reader's call checks that the group has a leader.
	leaderless = 3 * time.Second
)

// Read implements pb.SafekeeperServer. What it sends is committed; chunks go as they rest,
// sealed.
func (s *Server) Read(req *pb.ReadRequest, stream pb.Safekeeper_ReadServer) error {
	n, err := checkName(req.GetProject(), req.GetBranch())
	if err != nil {
		return err
	}
	g, _ := s.groupOf(n)
	b, err := lookup(g, n)
	if err != nil {
		return err
	}
	sub, cancel := g.Subscribe(b.No)
	defer cancel()
	r := reader{s: s, g: g, name: n, at: pg.LSN(req.GetFromLsn()), until: pg.LSN(req.GetUntilLsn())}
	if r.at < b.Start {
		return status.Errorf(codes.InvalidArgument, "branch %s: its log begins at %s, there is nothing at %s", n, b.Start, r.at)
	}
	look := time.NewTicker(leaderless)
	defer look.Stop()
	for {
		if err := r.send(stream); err != nil {
			return s.failure(g, n, err)
		}
		if r.until != 0 && r.at >= r.until {
			return nil
		}
		select {
		case <-time.After(gather):
		case <-stream.Context().Done():
			return status.FromContextError(stream.Context().Err()).Err()
		}
		select {
		case <-sub.C:
		case <-look.C: // cut off from the others, this replica hears nothing new: the reader tries another
			if g.Leader() == 0 {
				return s.failure(g, n, group.ErrNotLeader)
			}
		case <-g.Done():
			return s.failure(g, n, group.ErrStopped)
		case <-stream.Context().Done():
			return status.FromContextError(stream.Context().Err()).Err()
		}
	}
}

// reader is one Read call's position.
type reader struct {
	s         *Server
	g         *group.Group
	name      walstate.Name
	at, until pg.LSN // at: what was sent reaches to here
	told      pg.LSN // the committed end that was sent last
}

// plan is what to send next: chunks of the log, or an archived stretch.
type plan struct {
	end      pg.LSN
	chunks   []walstate.Chunk
	archived *walstate.Archived
	missing  bool
	begin    pg.LSN // of what is held, if at is missing
	durable  pg.LSN
}

// send sends all there is from at on.
func (r *reader) send(stream pb.Safekeeper_ReadServer) error {
	for {
		p, err := r.plan()
		if err != nil {
			return err
		}
		if p.missing {
			return r.missing(p)
		}
		chunks, err := r.load(stream.Context(), p)
		if errors.Is(err, raft.ErrCompacted) {
			continue // the log was shortened since: it is archived, or durable
		}
		if err != nil {
			return err
		}
		if len(chunks) > 0 {
			r.at = pg.LSN(chunks[len(chunks)-1].EndLsn)
		}
		if len(chunks) == 0 && p.end == r.told {
			return nil
		}
		r.told = p.end
		if err := stream.Send(&pb.ReadResponse{Chunks: chunks, CommittedLsn: uint64(p.end)}); err != nil {
			return err
		}
		if r.at >= p.end || r.until != 0 && r.at >= r.until {
			return nil
		}
	}
}

func (r *reader) plan() (p plan, err error) {
	err = noBranch(r.name)
	r.g.View(func(st *walstate.State) {
		b := st.Lookup(r.name)
		if b == nil {
			return
		}
		err = nil
		p.end, p.durable = b.End, b.Durable
		if r.at >= b.End {
			return
		}
		if i, ok := b.Find(r.at); ok {
			p.chunks = append(p.chunks, b.Chunks[i:min(len(b.Chunks), i+readChunks)]...)
			return
		}
		p.missing, p.begin = true, b.End
		if len(b.Chunks) > 0 {
			p.begin = b.Chunks[0].Begin
		}
		for i := len(b.Archive) - 1; i >= 0; i-- {
			if a := b.Archive[i]; a.Begin <= r.at && r.at < a.End {
				p.missing, p.archived = false, &a
				return
			}
		}
	})
	return p, err
}

// missing explains why there is nothing at at, though the log reaches beyond it.
func (r *reader) missing(p plan) error {
	if r.at < p.durable {
		return truncated(r.name, r.at, p.begin)
	}
	// The log was shortened because this is archived, or the replica is new; this replica has yet to hear where.
	return status.Errorf(codes.Unavailable, "safekeeper %d does not hold WAL of branch %s at %s yet; it holds it from %s on: another may", r.s.cfg.NodeID, r.name, r.at, p.begin)
}

func (r *reader) load(ctx context.Context, p plan) ([]*pb.SealedWAL, error) {
	if p.archived != nil {
		all, err := archive.Get(ctx, r.s.cfg.Blob, r.name, *p.archived)
		if err != nil {
			return nil, err
		}
		for len(all) > 0 && pg.LSN(all[0].EndLsn) <= r.at {
			all = all[1:]
		}
		return r.newest(all), nil
	}
	var chunks []*pb.SealedWAL
	for size, i := 0, 0; i < len(p.chunks) && size < readBytes; i++ {
		if r.until != 0 && p.chunks[i].Begin >= r.until {
			break
		}
		e, err := r.g.Store().Entry(p.chunks[i].Index)
		if err != nil {
			return nil, err
		}
		c, err := walstate.Decode(e.GetData())
		if err != nil {
			return nil, fmt.Errorf("entry %d: %w", p.chunks[i].Index, err)
		}
		chunks = append(chunks, archive.Chunk(&c))
		size += len(c.Ciphertext)
	}
	return r.newest(chunks), nil
}

// newest gives chunks the form of their DEK that a rotation of the KEK left.
func (r *reader) newest(chunks []*pb.SealedWAL) []*pb.SealedWAL {
	r.g.View(func(st *walstate.State) {
		b := st.Lookup(r.name)
		if b == nil {
			return
		}
		for _, c := range chunks {
			if wrapped := b.Wrapped(c.Object, pg.LSN(c.BeginLsn)); wrapped != nil {
				c.WrappedDek = wrapped // the state replaces it as a whole, and never changes its bytes
			}
		}
	})
	return chunks
}
