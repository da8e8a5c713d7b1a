package safekeeper

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/rpc"
	"github.com/holdfastdb/holdfast/safekeeper/group"
)

const (
	maxQueued    = 64 << 20 // bytes to one peer; what is beyond is lost, and Raft sends it again
	reconnectMin = 20 * time.Millisecond
	reconnectMax = 500 * time.Millisecond
)

// transport carries Raft messages to the other safekeepers, on one stream to each.
type transport struct {
	self   uint64
	peers  map[uint64]*peer
	ctx    context.Context
	cancel context.CancelFunc
	done   sync.WaitGroup
}

// peer is the way to one safekeeper.
type peer struct {
	id    uint64
	conn  *grpc.ClientConn
	log   *slog.Logger
	wake  chan struct{}
	queue struct {
		sync.Mutex
		msgs  []queued
		bytes int
		up    bool // there is a stream
	}
}

type queued struct {
	group uint64
	from  uint64
	out   group.Outgoing
	size  int
}

func newTransport(self uint64, addrs map[uint64]string, log *slog.Logger) (*transport, error) {
	t := &transport{self: self, peers: map[uint64]*peer{}}
	t.ctx, t.cancel = context.WithCancel(context.Background())
	for id, addr := range addrs {
		if id == self {
			continue
		}
		conn, err := rpc.Dial(addr)
		if err != nil {
			t.close()
			return nil, fmt.Errorf("address of safekeeper %d: %w", id, err)
		}
		p := &peer{id: id, conn: conn, log: log, wake: make(chan struct{}, 1)}
		t.peers[id] = p
		t.done.Go(func() { p.run(t.ctx) })
	}
	return t, nil
}

func (t *transport) close() {
	t.cancel()
	t.done.Wait()
	for _, p := range t.peers {
		p.conn.Close() // its only error is that it was closed before
	}
}

// Send implements group.Transport.
func (t *transport) Send(g, from uint64, out group.Outgoing) {
	p := t.peers[out.To]
	if p == nil {
		return
	}
	size := 64
	for _, e := range out.Msg.GetEntries() {
		size += len(e.GetData())
	}
	p.queue.Lock()
	defer p.queue.Unlock()
	if !p.queue.up && len(p.queue.msgs) > 0 {
		// Nobody is there: only the newest message is of use when somebody is.
		clear(p.queue.msgs)
		p.queue.msgs, p.queue.bytes = p.queue.msgs[:0], 0
	}
	if p.queue.bytes+size > maxQueued && len(p.queue.msgs) > 0 {
		return
	}
	p.queue.msgs = append(p.queue.msgs, queued{g, from, out, size})
	p.queue.bytes += size
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

// run sends what is queued, over one stream after another.
func (p *peer) run(ctx context.Context) {
	pause := reconnectMin
	for ctx.Err() == nil {
		begun := time.Now()
		err := p.stream(ctx)
		p.setUp(false)
		if time.Since(begun) > 5*time.Second {
			pause = reconnectMin
		}
		if err != nil && ctx.Err() == nil {
			p.log.Debug("no stream to a peer", "peer", p.id, "err", err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(pause):
		}
		pause = min(pause*2, reconnectMax)
	}
}

func (p *peer) setUp(up bool) {
	p.queue.Lock()
	defer p.queue.Unlock()
	p.queue.up = up
}

func (p *peer) stream(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	s, err := pb.NewSafekeeperClient(p.conn).Raft(ctx)
	if err != nil {
		return err
	}
	p.setUp(true)
	var batch []queued
	for {
		select {
		case <-s.Context().Done():
			return s.Context().Err()
		case <-p.wake:
		}
		p.queue.Lock()
		batch, p.queue.msgs = p.queue.msgs, batch[:0]
		p.queue.bytes = 0
		p.queue.Unlock()
		for i := range batch {
			q := &batch[i]
			body, err := proto.Marshal(q.out.Msg)
			if err != nil {
				return err
			}
			err = s.Send(&pb.RaftMessage{Group: q.group, Message: body, FromIncarnation: q.from, ToIncarnation: q.out.ToIncarnation})
			if err != nil {
				return errors.Join(err, s.RecvMsg(&pb.RaftAck{})) // the second one says why
			}
		}
		clear(batch)
	}
}

// Hello implements group.Transport.
func (t *transport) Hello(ctx context.Context, to, g, incarnation uint64) (group.HelloInfo, error) {
	p := t.peers[to]
	if p == nil {
		return group.HelloInfo{}, fmt.Errorf("safekeeper %d is no peer", to)
	}
	r, err := pb.NewSafekeeperClient(p.conn).Hello(ctx, &pb.HelloRequest{Group: g, NodeId: t.self, Incarnation: incarnation})
	if err != nil {
		return group.HelloInfo{}, err
	}
	return group.HelloInfo{Incarnation: r.GetIncarnation(), Joined: r.GetJoined(), Term: r.GetTerm(), LastIndex: r.GetLastIndex()}, nil
}

// Raft implements pb.SafekeeperServer.
func (s *Server) Raft(stream pb.Safekeeper_RaftServer) error {
	for {
		in, err := stream.Recv()
		if err != nil {
			return err
		}
		m := new(raftpb.Message)
		if err := proto.Unmarshal(in.GetMessage(), m); err != nil {
			return status.Errorf(codes.InvalidArgument, "Raft message: %v", err)
		}
		if in.GetGroup() >= groups || s.cfg.Peers[m.GetFrom()] == "" {
			return status.Errorf(codes.InvalidArgument, "Raft message for group %d from safekeeper %d: no such group or peer", in.GetGroup(), m.GetFrom())
		}
		s.groups[in.GetGroup()].Deliver(m, in.GetFromIncarnation(), in.GetToIncarnation())
	}
}

// Hello implements pb.SafekeeperServer.
func (s *Server) Hello(ctx context.Context, req *pb.HelloRequest) (*pb.HelloResponse, error) {
	if req.GetGroup() >= groups || s.cfg.Peers[req.GetNodeId()] == "" || req.GetNodeId() == s.cfg.NodeID {
		return nil, status.Errorf(codes.InvalidArgument, "safekeeper %d, group %d: no such group or peer", req.GetNodeId(), req.GetGroup())
	}
	info, err := s.groups[req.GetGroup()].Hello(ctx, req.GetNodeId(), req.GetIncarnation())
	if err != nil {
		return nil, status.Error(codes.Unavailable, err.Error())
	}
	return &pb.HelloResponse{Incarnation: info.Incarnation, Joined: info.Joined, Term: info.Term, LastIndex: info.LastIndex}, nil
}
