package keymgr

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/holdfastdb/holdfast/internal/blob"
	"github.com/holdfastdb/holdfast/internal/boottime"
)

const (
	// noOwnKeyFor is how long it is remembered that a branch has no key of its own. A key is
	// given to a branch of which nothing is sealed yet, so before anybody asks for the branch's.
	noOwnKeyFor = 30 * time.Second
	// maxResolved bounds the branches that are remembered; past it all are asked for again.
	maxResolved = 100_000
)

// resolver knows which branches have keys of their own.
type resolver struct {
	sync.Mutex
	own   map[keyID]struct{}      // for good: a branch whose key was destroyed is not under its project's
	noOwn map[keyID]time.Duration // until when that is believed
}

func newResolver() *resolver {
	return &resolver{own: make(map[keyID]struct{}), noOwn: make(map[keyID]time.Duration)}
}

// known tells whether a branch has a key of its own, if that is remembered.
func (r *resolver) known(branch keyID) (own, ok bool) {
	r.Lock()
	defer r.Unlock()
	if _, own := r.own[branch]; own {
		return true, true
	}
	until, ok := r.noOwn[branch]
	return false, ok && boottime.Now() < until
}

func (r *resolver) learn(branch keyID, own bool) {
	r.Lock()
	defer r.Unlock()
	if len(r.own) >= maxResolved {
		clear(r.own)
	}
	if len(r.noOwn) >= maxResolved {
		clear(r.noOwn)
	}
	if own {
		r.own[branch] = struct{}{}
		delete(r.noOwn, branch)
	} else if _, has := r.own[branch]; !has {
		r.noOwn[branch] = boottime.Now() + noOwnKeyFor
	}
}

// resolve gives the key that a branch uses: its own or its project's. Without a branch it is
// the project's.
func (s *Server) resolve(ctx context.Context, project, branch string) (keyID, error) {
	id := keyID{project, branch}
	if err := id.check(); err != nil {
		return id, invalid("%v", err)
	}
	if branch == "" {
		return id, nil
	}
	own, ok := s.resolver.known(id)
	if !ok {
		_, err := s.cfg.BlobStore.Head(ctx, id.document())
		if err != nil && !errors.Is(err, blob.ErrNotFound) {
			return id, s.callError(err)
		}
		own = err == nil
		s.resolver.learn(id, own)
	}
	if own {
		return id, nil
	}
	return keyID{project: project}, nil
}
