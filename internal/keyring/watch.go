package keyring

import (
	"context"
	"errors"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/holdfastdb/holdfast/internal/api/pb"
)

// Times between attempts to watch. A key manager of before there were notices is asked again now and
// then: it may have been replaced.
const (
	watchFirst = 50 * time.Millisecond
	watchMost  = 2 * time.Second
	watchOld   = time.Minute
)

// startWatch has the ring hear of keys whose state may have changed. Nothing depends on that: it
// makes things faster.
func (r *ring) startWatch() {
	r.watching.Do(func() { r.wg.Go(r.watch) })
}

func (r *ring) watch() {
	for wait := watchFirst; r.ctx.Err() == nil; wait = min(2*wait, watchMost) {
		heard, err := r.watchOnce()
		if heard {
			wait = watchFirst
		}
		if status.Code(err) == codes.Unimplemented {
			wait = watchOld
		}
		select {
		case <-time.After(wait):
		case <-r.ctx.Done():
		}
	}
}

// watchOnce follows one stream to its end.
func (r *ring) watchOnce() (heard bool, err error) {
	ctx, cancel := context.WithCancel(r.ctx)
	defer cancel()
	stream, err := r.client.Watch(ctx, &pb.WatchRequest{Node: r.cfg.Node}, grpc.WaitForReady(true))
	if err != nil {
		return false, err
	}
	for {
		n, err := stream.Recv()
		if err != nil {
			return heard, err
		}
		heard = true
		r.eachScope(func(p *scope) { p.noticed(n) })
	}
}

// noticed is told that the state of a key may have changed.
func (p *scope) noticed(n *pb.KeyNotice) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.concernsLocked(n.Key) {
		return
	}
	p.newsLocked()
	p.renewSoonLocked()
	// Who held the key when it was taken away takes it up again: "resuming" ends when all do.
	if back := n.State == pb.KeyResuming || n.State == pb.KeyActive; back && !p.mu.live && errors.Is(p.mu.why, ErrRevoked) {
		p.ring.wg.Go(func() { _ = p.ensureLease(p.ring.ctx) }) // who needs a key asks again, and is told why not
	}
}

// concernsLocked tells whether the key is, or may be, the scope's.
func (p *scope) concernsLocked(key string) bool {
	own := p.name.project + "/" + p.name.branch
	if p.mu.key != "" {
		return key == p.mu.key || key == own // the branch may have been given a key since
	}
	return key == p.name.project || key == own
}

// newsLocked wakes who waits for News.
func (p *scope) newsLocked() {
	close(p.mu.news)
	p.mu.news = make(chan struct{})
}

// tellOnce tells whether there is no more to do: the report was taken, or never will be.
func (r *ring) tellOnce(report *pb.ShredReport) (final bool) {
	ctx, cancel := context.WithTimeout(r.telling, reportTimeout)
	defer cancel()
	_, err := r.client.ReportShred(ctx, report, grpc.WaitForReady(true))
	switch status.Code(err) {
	case codes.OK, codes.InvalidArgument, codes.NotFound, codes.PermissionDenied, codes.Unimplemented:
		return true
	}
	return false
}
