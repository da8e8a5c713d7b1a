package keymgr

import (
	"context"
	"strings"
	"sync"
	"time"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/boottime"
	"github.com/holdfastdb/holdfast/keymgr/lease"
)

// KeyStatus implements pb.KeyManagerServer. It checks the key if what is known is old.
func (s *Server) KeyStatus(ctx context.Context, req *pb.KeyStatusRequest) (*pb.KeyStatusResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	id, err := s.resolve(ctx, req.Project, req.Branch)
	if err != nil {
		return nil, err
	}
	return s.keyStatus(ctx, id)
}

func (s *Server) keyStatus(ctx context.Context, id keyID) (*pb.KeyStatusResponse, error) {
	k, _, err := s.known(ctx, id)
	if err != nil {
		return nil, s.callError(err)
	}
	stale := func() bool { st, _ := s.look(id); return st.Stale }
	if stale() {
		if err := s.check(ctx, k, stale); err != nil {
			return nil, s.callError(err)
		}
	}
	return s.statusOf(k), nil
}

// look gives what the machine knows of a key.
func (s *Server) look(id keyID) (st lease.Status, leases []lease.Lease) {
	s.withMachine(func(m *lease.Machine) {
		now := boottime.Now()
		st, leases = m.Status(now, id.String()), m.Leases(now, id.String())
	})
	return st, leases
}

// wall is a moment of the leases' clock on that of the calendar, for people.
func wall(at lease.Instant) time.Time { return time.Now().Add(at - boottime.Now()) }

// statusOf tells what is known of a key whose document was read.
func (s *Server) statusOf(k *keyState) *pb.KeyStatusResponse {
	st, leases := s.look(k.id)
	k.mu.Lock()
	defer k.mu.Unlock()
	doc := k.mu.doc
	resp := &pb.KeyStatusResponse{
		Key: k.id.String(), Cmk: doc.CMK, KekVersion: doc.Current, State: string(st.State),
		ProviderError: k.mu.lastError, CheckedUnixMs: k.mu.checkedUnixMS,
		SinceUnixMs: wall(st.Since).UnixMilli(),
		GraceMs:     doc.graceMS(s.cfg.Grace.Milliseconds()),
		BoundMs:     (s.cfg.CheckInterval + s.cfg.LeaseTTL).Milliseconds(),
	}
	switch st.State {
	case lease.Grace:
		resp.UntilUnixMs = wall(st.Until).UnixMilli()
		resp.ControlledBy = doc.controlledBy()
	case lease.Revoked, lease.StateUnreachable:
		resp.ControlledBy = doc.controlledBy()
	}
	if doc.Hold != nil {
		resp.ControlledBy = doc.controlledBy()
		resp.ProviderError = "held back: " + doc.Hold.Reason
		resp.SinceUnixMs = doc.Hold.SinceUnixMS
	}
	for _, l := range leases {
		resp.Holders = append(resp.Holders, &pb.KeyHolder{Node: l.Node, LeaseId: l.ID, EndsUnixMs: wall(l.End).UnixMilli()})
	}
	return resp
}

// controlledBy says, for people, who decides whether the key may be used.
func (d *document) controlledBy() string {
	if d.Hold != nil {
		return "holdfast key resume"
	}
	return controller(d.CMK)
}

// controller names, for people, who decides over a CMK.
func controller(cmk string) string {
	kind, key, ok := strings.Cut(cmk, ":")
	if !ok {
		kind, key = "local", cmk
	}
	words := map[string]string{"local": "development KMS", "aws-kms": "AWS KMS", "gcp-kms": "Google Cloud KMS", "azure-kv": "Azure Key Vault",
		"pkcs11": "PKCS#11 token", "vault": "Vault transit"}[kind]
	if words == "" {
		return "KMS key " + cmk
	}
	return words + " key " + key
}

// atOnce bounds what is done at once for many keys: goroutines, and calls to the bucket.
const atOnce = 64

// ListKeys implements pb.KeyAdminServer. A key that cannot be looked at is listed with the error.
func (s *Server) ListKeys(ctx context.Context, _ *pb.ListKeysRequest) (*pb.ListKeysResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	ids, err := s.indexedKeys(ctx)
	if err != nil {
		return nil, s.callError(err)
	}
	resp := &pb.ListKeysResponse{Keys: make([]*pb.KeyStatusResponse, len(ids))}
	each(len(ids), func(i int) {
		st, err := s.keyStatus(ctx, ids[i])
		if err != nil {
			st = &pb.KeyStatusResponse{Key: ids[i].String(), State: string(lease.StateNone), ProviderError: err.Error()}
		}
		resp.Keys[i] = st
	})
	return resp, nil
}

// each calls fn, which takes a bounded time, for 0 to n-1, several at once.
func each(n int, fn func(i int)) {
	var wg sync.WaitGroup
	places := make(chan struct{}, atOnce)
	for i := range n {
		places <- struct{}{}
		wg.Go(func() {
			defer func() { <-places }()
			fn(i)
		})
	}
	wg.Wait()
}
