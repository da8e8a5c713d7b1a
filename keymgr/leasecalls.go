package keymgr

import (
	"context"
	"crypto/ed25519"
	"time"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/boottime"
	"github.com/holdfastdb/holdfast/keymgr/lease"
)

// Lease implements pb.KeyManagerServer.
func (s *Server) Lease(ctx context.Context, req *pb.LeaseRequest) (*pb.LeaseResponse, error) {
	if err := checkLeaseRequest(req); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	id, err := s.resolve(ctx, req.Project, req.Branch)
	if err != nil {
		return nil, err
	}
	d, err := s.decide(ctx, id, req)
	if err != nil {
		return nil, s.callError(err)
	}
	if d.Kind != lease.Grant {
		return nil, s.refuse(ctx, id, req.Node, d.Why)
	}
	if d.New {
		err := s.audit.append(ctx, id.event(Event{Event: "lease.granted", Outcome: "ok", Node: req.Node, Lease: d.Lease}))
		if err != nil {
			return nil, s.callError(err) // the lease that nobody knows of runs out
		}
	}
	return &pb.LeaseResponse{LeaseId: d.Lease, TtlMs: d.TTL.Milliseconds(), Key: id.String()}, nil
}

func checkLeaseRequest(req *pb.LeaseRequest) error {
	if req.Node == "" || len(req.Node) > maxNode {
		return invalid("lease on project %.80q: the node's name has %d bytes, want 1..%d", req.Project, len(req.Node), maxNode)
	}
	if n := len(req.PublicKey); n != 0 && n != ed25519.PublicKeySize {
		return invalid("lease on project %.80q: the public key has %d bytes, want %d", req.Project, n, ed25519.PublicKeySize)
	}
	return nil
}

// decide asks the machine, and the KMS when the machine wants it.
func (s *Server) decide(ctx context.Context, id keyID, req *pb.LeaseRequest) (lease.Decision, error) {
	k, _, err := s.known(ctx, id)
	if err != nil {
		return lease.Decision{}, err
	}
	a := lease.Ask{Key: id.String(), Node: req.Node, ID: req.LeaseId, NewID: newLeaseID(), Branch: req.Branch, PublicKey: string(req.PublicKey)}
	ask := func() (d lease.Decision) {
		s.withMachine(func(m *lease.Machine) { d = m.Request(boottime.Now(), a) })
		return d
	}
	d := ask()
	if d.Kind != lease.Check {
		return d, nil
	}
	err = s.check(ctx, k, func() bool {
		d = ask() // a check that this one waited for may have decided
		return d.Kind == lease.Check
	})
	if err != nil || d.Kind != lease.Check {
		return d, err
	}
	if d = ask(); d.Kind == lease.Check {
		return d, refusal(lease.Unreachable, "%s: the KMS's answer took longer than the check interval of %v, for which it holds", id.words(), s.cfg.CheckInterval)
	}
	return d, nil
}

// refuse says why there is no lease; the audit log has it once per node and check.
func (s *Server) refuse(ctx context.Context, id keyID, node string, why lease.Outcome) error {
	s.mu.Lock()
	nodes := s.mu.refused[id]
	if nodes == nil {
		nodes = make(map[string]bool)
		s.mu.refused[id] = nodes
	}
	told := nodes[node]
	nodes[node] = true
	s.mu.Unlock()
	if !told {
		if err := s.audit.append(ctx, id.event(Event{Event: "lease.refused", Outcome: whyWords(why), Node: node})); err != nil {
			return s.callError(err)
		}
	}
	k := s.key(id)
	k.mu.Lock()
	defer k.mu.Unlock()
	doc := k.mu.doc
	switch {
	case doc == nil:
		return refusal(why, "%s: its key cannot be used: %s", id.words(), k.mu.lastError)
	case why == lease.Held && doc.Hold != nil:
		return refusalBy(doc.controlledBy(), why, "%s: its key is held back since %s (%s): holdfast key resume ends that", id.words(),
			time.UnixMilli(doc.Hold.SinceUnixMS).UTC().Format(time.RFC3339), doc.Hold.Reason)
	}
	return refusalBy(doc.controlledBy(), why, "%s: its key cannot be used: %s", id.words(), k.mu.lastError)
}

// whyWords is a refusal's reason in the audit log.
func whyWords(why lease.Outcome) string {
	switch why {
	case lease.Denied:
		return causeDenied
	case lease.Held:
		return causeHeld
	case lease.Unknown:
		return Unknown.String()
	}
	return causeUnreachable
}
