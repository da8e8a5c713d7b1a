package keymgr

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/boottime"
	"github.com/holdfastdb/holdfast/keymgr/lease"
)

const (
	maxReason = 1024
	maxGrace  = 7 * 24 * time.Hour
)

// named gives the key that a call of KeyAdmin is about.
func (s *Server) named(ctx context.Context, ref *pb.KeyRef) (*keyState, error) {
	id, err := s.resolve(ctx, ref.GetProject(), ref.GetBranch())
	if err != nil {
		return nil, err
	}
	k, _, err := s.known(ctx, id)
	if err != nil {
		return nil, s.callError(err)
	}
	return k, nil
}

// RevokeKey implements pb.KeyAdminServer. It goes on if the audit log cannot be written: taking
// a key away gives nothing out.
func (s *Server) RevokeKey(ctx context.Context, req *pb.RevokeKeyRequest) (*pb.KeyStatusResponse, error) {
	if len(req.Reason) > maxReason {
		return nil, invalid("revoking a key: the reason has %d bytes, the most is %d", len(req.Reason), maxReason)
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	k, err := s.named(ctx, req.Key)
	if err != nil {
		return nil, err
	}
	now := nowUnixMS()
	_, err = s.update(ctx, k, func(d *document) error {
		if d.Hold == nil {
			d.Hold = &hold{SinceUnixMS: now, Reason: req.Reason}
		}
		return nil
	})
	if auditErr := s.audit.append(ctx, k.id.event(Event{Event: "key.held", Outcome: outcomeWord(err), Detail: req.Reason})); err == nil {
		err = auditErr
	}
	if err != nil {
		return nil, s.callError(err)
	}
	return s.statusOf(k), nil
}

func outcomeWord(err error) string {
	if err != nil {
		return "failed"
	}
	return "ok"
}

// ResumeKey implements pb.KeyAdminServer. Whether the key may then be used the KMS says, which is
// asked at once.
func (s *Server) ResumeKey(ctx context.Context, req *pb.KeyRef) (*pb.KeyStatusResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	k, err := s.named(ctx, req)
	if err != nil {
		return nil, err
	}
	if err := s.audit.append(ctx, k.id.event(Event{Event: "key.released", Outcome: "ok"})); err != nil {
		return nil, s.callError(err)
	}
	if _, err := s.update(ctx, k, func(d *document) error { d.Hold = nil; return nil }); err != nil {
		return nil, s.callError(err)
	}
	return s.keyStatus(ctx, k.id)
}

// SetGrace implements pb.KeyAdminServer.
func (s *Server) SetGrace(ctx context.Context, req *pb.SetGraceRequest) (*pb.KeyStatusResponse, error) {
	if req.GraceMs < 0 || req.GraceMs > maxGrace.Milliseconds() {
		return nil, invalid("a grace of %d ms: want 0..%d, which is %v", req.GraceMs, maxGrace.Milliseconds(), maxGrace)
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	k, err := s.named(ctx, req.Key)
	if err != nil {
		return nil, err
	}
	detail := fmt.Sprint(time.Duration(req.GraceMs) * time.Millisecond)
	if err := s.audit.append(ctx, k.id.event(Event{Event: "key.grace", Outcome: "ok", Detail: detail})); err != nil {
		return nil, s.callError(err)
	}
	if _, err := s.update(ctx, k, func(d *document) error { d.GraceMS = &req.GraceMs; return nil }); err != nil {
		return nil, s.callError(err)
	}
	return s.statusOf(k), nil
}

// CheckKeys implements pb.KeyAdminServer. Keys that nobody holds are not checked: they are before
// anybody gets them.
func (s *Server) CheckKeys(ctx context.Context, req *pb.CheckKeysRequest) (*pb.CheckKeysResponse, error) {
	if len(req.Cmk) > maxCMK {
		return nil, invalid("checking keys: the CMK's name has %d bytes, the most is %d", len(req.Cmk), maxCMK)
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	keys, err := s.CheckCMK(ctx, func(cmk string) bool { return req.Cmk == "" || sameCMK(cmk, req.Cmk) })
	if err != nil {
		return nil, s.callError(err)
	}
	return &pb.CheckKeysResponse{Keys: keys}, nil
}

// sameCMK tells whether name is a CMK's, with or without its kind.
func sameCMK(cmk, name string) bool {
	if !strings.Contains(cmk, ":") {
		cmk = "local:" + cmk // which may be left out
	}
	_, bare, _ := strings.Cut(cmk, ":")
	return cmk == name || bare == name
}

// CheckCMK checks the keys in use whose CMK matches. It returns when each has been checked by an
// attempt that began after the call, so that calls that come together share one.
func (s *Server) CheckCMK(ctx context.Context, matches func(cmk string) bool) ([]string, error) {
	called := boottime.Now()
	s.mu.Lock()
	var ids []keyID
	for id, k := range s.mu.keys {
		doc := k.known()
		if doc != nil && (matches(doc.CMK) || slices.ContainsFunc(doc.KEKs, func(v kekVersion) bool { return matches(v.CMK) })) {
			ids = append(ids, id)
		}
	}
	s.mu.Unlock()
	slices.SortFunc(ids, func(a, b keyID) int { return strings.Compare(a.String(), b.String()) })
	names := make([]string, len(ids))
	var failed struct {
		sync.Mutex
		err error
	}
	each(len(ids), func(i int) {
		names[i] = ids[i].String()
		err := s.check(ctx, s.key(ids[i]), func() (older bool) {
			s.withMachine(func(m *lease.Machine) { older = m.CheckedBefore(called, names[i]) })
			return older
		})
		if err != nil {
			failed.Lock()
			failed.err = err
			failed.Unlock()
		}
	})
	return names, failed.err
}

// Notified checks the keys that a notice of their KMS is of. The audit log says why they were checked then.
func (s *Server) Notified(ctx context.Context, source, what string, names []string, matches func(cmk string) bool) ([]string, error) {
	detail := fmt.Sprintf("%.40s: %.200s of %.400s", source, what, strings.Join(names, ", "))
	if err := s.audit.append(ctx, Event{Event: "kms.notice", Outcome: "ok", Detail: detail}); err != nil {
		return nil, err
	}
	return s.CheckCMK(ctx, matches)
}
