package pageserver

import (
	"context"
	"sync"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/internal/seal"
	"github.com/holdfastdb/holdfast/pageserver/timeline"
)

// What a page server needs of the old versions of a KEK are the DEKs of layers, and those
// inside of WAL: a message of aux files is sealed under a DEK of its own, whose wrapped form is in
// the WAL record (package auxfile). Until what it says is in a layer, that WAL may have to be read
// again, and its wrapped form cannot be changed there.

const (
	useLayers   = "layers"
	useMessages = "messages in WAL that is not in layers yet"
)

// messageDEKs are the DEKs of the aux messages that were ingested, by the record's LSN.
type messageDEKs struct {
	sync.Mutex
	versions map[pg.LSN]uint32
}

// note remembers an opened message, and forgets those that are in layers.
func (m *messageDEKs) note(at, durable pg.LSN, sealed []byte) {
	version := uint32(0)
	if wrapped, err := seal.WrappedDEK(sealed); err == nil {
		version, _ = seal.KEKVersion(wrapped) // it opened, so it has one
	}
	m.Lock()
	defer m.Unlock()
	if m.versions == nil {
		m.versions = make(map[pg.LSN]uint32)
	}
	m.forgetLocked(durable)
	m.versions[at] = version
}

func (m *messageDEKs) forgetLocked(durable pg.LSN) {
	for at := range m.versions {
		if at < durable { // records are whole in layers or not at all
			delete(m.versions, at)
		}
	}
}

func (m *messageDEKs) use(durable pg.LSN) map[uint32]int {
	m.Lock()
	defer m.Unlock()
	m.forgetLocked(durable)
	uses := make(map[uint32]int)
	for _, v := range m.versions {
		uses[v]++
	}
	return uses
}

// KeyUse tells which versions of the KEK the layers' DEKs are under. Of messages in WAL that was
// not ingested yet it knows nothing: who asks sees to it that there is none that matters.
func (s *Server) KeyUse(ctx context.Context, r *pb.KeyUseRequest) (*pb.KeyUseResponse, error) {
	resp := &pb.KeyUseResponse{}
	for _, b := range s.matching(r.Project, r.Branch) {
		layers, messages, err := b.keyUse(ctx)
		if err != nil {
			return nil, b.status(err)
		}
		resp.Uses = appendUses(resp.Uses, b.name, useLayers, layers)
		resp.Uses = appendUses(resp.Uses, b.name, useMessages, messages)
	}
	if r.Branch != "" && len(resp.Uses) == 0 {
		if _, err := s.branch(r.Project, r.Branch); err != nil {
			return nil, err
		}
	}
	return resp, nil
}

// matching lists the attached branches of a project, or of all, or one branch.
func (s *Server) matching(project, id string) (list []*branch) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for name, b := range s.mu.branches {
		if (project == "" || name.project == project) && (id == "" || name.branch == id) {
			list = append(list, b)
		}
	}
	return list
}

func appendUses(list []*pb.KeyUse, name branchName, what string, uses map[uint32]int) []*pb.KeyUse {
	for version, n := range uses {
		list = append(list, &pb.KeyUse{Project: name.project, Branch: name.branch, What: what, KekVersion: version, Deks: int64(n)})
	}
	return list
}

// keyUse asks the open timeline or, under a key that cannot be used, the bucket.
func (b *branch) keyUse(ctx context.Context) (layers, messages map[uint32]int, err error) {
	b.mu.Lock()
	tl := b.mu.tl
	b.mu.Unlock()
	if tl != nil && tl.Err() == nil {
		// In this order: a message that is in a layer by now was made durable under its layer's DEK.
		return tl.KeyUse(), b.messages.use(tl.DurableLSN()), nil
	}
	layers, err = timeline.ReadKeyUse(ctx, b.srv.timelineConfig(b.name.project, b.name.branch))
	return layers, b.messages.use(pg.InvalidLSN), err
}

// RewrapBranch wraps the DEKs of a branch's layers again. If WAL holds messages under an older
// version of the KEK, what was ingested is put into a layer, as it would be within minutes.
func (s *Server) RewrapBranch(ctx context.Context, r *pb.RewrapBranchRequest) (*pb.RewrapBranchResponse, error) {
	b, err := s.branch(r.Project, r.Branch)
	if err != nil {
		return nil, err
	}
	tl, err := b.timeline(ctx)
	if err != nil {
		return nil, b.status(err)
	}
	done, err := tl.Rewrap(ctx)
	if err == nil && b.messages.older(done.KEKVersion, tl.DurableLSN()) {
		err = tl.Flush(ctx)
	}
	if err != nil {
		return nil, b.status(err)
	}
	if done.DEKs > 0 {
		b.log.Info("the keys of layers were wrapped again", "layers", done.DEKs, "version", done.KEKVersion)
	}
	return &pb.RewrapBranchResponse{Rewrapped: int64(done.DEKs), BytesWritten: done.Bytes, KekVersion: done.KEKVersion}, nil
}

// older tells whether there are messages under another version than the current one.
func (m *messageDEKs) older(current uint32, durable pg.LSN) bool {
	for v := range m.use(durable) {
		if v != current {
			return true
		}
	}
	return false
}
