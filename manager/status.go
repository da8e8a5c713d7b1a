package manager

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/holdfastdb/holdfast/internal/api/pb"
)

const (
	// statusTimeout bounds what one silent part can cost a status call: parts are asked at once.
	statusTimeout = 2 * time.Second
	// keysTimeout is longer: the key manager may be waiting for a KMS that does not answer, which is what
	// there is to tell.
	keysTimeout = 6 * time.Second
)

// survey asks parts at once, and collects what those say that do not answer.
type survey struct {
	ctx  context.Context
	wg   sync.WaitGroup
	mu   sync.Mutex
	errs []string
}

// ask calls call on a goroutine of its own, and put, under a lock, with what came of it.
func ask[T any](s *survey, what string, limit time.Duration, call func(context.Context) (T, error), put func(T)) {
	s.wg.Go(func() {
		ctx, cancel := context.WithTimeout(s.ctx, limit)
		defer cancel()
		v, err := call(ctx)
		s.mu.Lock()
		defer s.mu.Unlock()
		if err != nil {
			s.errs = append(s.errs, fmt.Sprintf("%s: %v", what, err))
			return
		}
		put(v)
	})
}

// ClusterStatus asks every role how it is.
func (m *Manager) ClusterStatus(ctx context.Context, _ *pb.ClusterStatusRequest) (*pb.ClusterStatusResponse, error) {
	resp := &pb.ClusterStatusResponse{}
	s := &survey{ctx: ctx}
	for i, client := range m.safekeepers {
		ask(s, "safekeeper at "+m.cfg.Safekeepers[i], statusTimeout, func(ctx context.Context) (*pb.SafekeeperStatusResponse, error) {
			return client.Status(ctx, &pb.SafekeeperStatusRequest{})
		}, func(st *pb.SafekeeperStatusResponse) { resp.Safekeepers = append(resp.Safekeepers, st) })
	}
	ask(s, "pageserver", statusTimeout, func(ctx context.Context) (*pb.PageServerStatusResponse, error) {
		return m.pageserver.Status(ctx, &pb.PageServerStatusRequest{})
	}, func(st *pb.PageServerStatusResponse) { resp.Pageserver = st })
	ask(s, "key manager", keysTimeout, func(ctx context.Context) (*pb.ListKeysResponse, error) {
		return m.keyAdmin.ListKeys(ctx, &pb.ListKeysRequest{})
	}, func(list *pb.ListKeysResponse) {
		for _, k := range list.Keys {
			project, _, _ := strings.Cut(k.Key, "/")
			resp.Keys = append(resp.Keys, &pb.ProjectKeyStatus{Project: project, Status: k})
		}
	})
	list, err := m.ListEndpoints(ctx, nil)
	s.wg.Wait()
	if err != nil {
		return nil, err
	}
	slices.SortFunc(resp.Safekeepers, func(a, b *pb.SafekeeperStatusResponse) int { return cmp.Compare(a.NodeId, b.NodeId) })
	slices.Sort(s.errs)
	resp.Endpoints, resp.Errors = list.Endpoints, s.errs
	return resp, nil
}
