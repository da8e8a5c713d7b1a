package keymgr

import (
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/boottime"
	"github.com/holdfastdb/holdfast/internal/rpc"
	"github.com/holdfastdb/holdfast/keymgr/lease"
)

// watchQueue bounds the notices that wait for one node. A node that is further behind is
// dropped; it comes back, and asks for what it holds.
const watchQueue = 1024

// watchers are the nodes that are told of keys whose state changes.
type watchers struct {
	sync.Mutex
	all map[*watcher]bool
}

type watcher struct {
	notices chan *pb.KeyNotice
	slow    chan struct{} // closed when it is dropped
}

func newWatchers() *watchers { return &watchers{all: make(map[*watcher]bool)} }

func (w *watchers) add() *watcher {
	n := &watcher{notices: make(chan *pb.KeyNotice, watchQueue), slow: make(chan struct{})}
	w.Lock()
	defer w.Unlock()
	w.all[n] = true
	return n
}

func (w *watchers) remove(n *watcher) {
	w.Lock()
	defer w.Unlock()
	delete(w.all, n)
}

// tell never waits.
func (w *watchers) tell(notice *pb.KeyNotice) {
	w.Lock()
	defer w.Unlock()
	for n := range w.all {
		select {
		case n.notices <- notice:
		default:
			close(n.slow)
			delete(w.all, n)
		}
	}
}

func (s *Server) noticeLocked(name string, state lease.State) *pb.KeyNotice {
	notice := &pb.KeyNotice{Key: name, State: string(state)}
	if k := s.mu.keys[parseKeyID(name)]; k != nil {
		if doc := k.known(); doc != nil {
			notice.KekVersion = doc.Current
		}
	}
	return notice
}

// announce tells all nodes of a key as it is now: its state, or its KEK's version, is another.
func (s *Server) announce(id keyID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := s.mu.machine.Status(boottime.Now(), id.String())
	s.watchers.tell(s.noticeLocked(id.String(), st.State))
}

// notActive gives notices of the keys that are in use and not as they should be.
func (s *Server) notActive() []*pb.KeyNotice {
	s.mu.Lock()
	defer s.mu.Unlock()
	var notices []*pb.KeyNotice
	for id := range s.mu.keys {
		if st := s.mu.machine.Status(boottime.Now(), id.String()); st.State != lease.Active {
			notices = append(notices, s.noticeLocked(id.String(), st.State))
		}
	}
	return notices
}

// Watch implements pb.KeyManagerServer.
func (s *Server) Watch(req *pb.WatchRequest, stream grpc.ServerStreamingServer[pb.KeyNotice]) error {
	if req.Node == "" || len(req.Node) > maxNode {
		return invalid("watching keys: the node's name has %d bytes, want 1..%d", len(req.Node), maxNode)
	}
	n := s.watchers.add() // before what is now is looked at, so that nothing is missed between
	defer s.watchers.remove(n)
	for _, notice := range s.notActive() {
		if err := stream.Send(notice); err != nil {
			return err
		}
	}
	for {
		select {
		case notice := <-n.notices:
			if err := stream.Send(notice); err != nil {
				return err
			}
		case <-n.slow:
			return rpc.Error(codes.Unavailable, nil, "node %.80q is %d notices behind: watch again", req.Node, watchQueue)
		case <-s.ctx.Done():
			return rpc.Error(codes.Unavailable, nil, "the key manager stops")
		case <-stream.Context().Done():
			return stream.Context().Err()
		}
	}
}
