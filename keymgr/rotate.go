package keymgr

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"

	"google.golang.org/grpc/codes"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/rpc"
	"github.com/holdfastdb/holdfast/internal/seal"
	"github.com/holdfastdb/holdfast/keymgr/lease"
)

// errRetired means that a version of the KEK was destroyed by RetireKEK.
var errRetired = errors.New("it was retired, and what it wraps does not open any more")

// RotateKEK implements pb.KeyAdminServer. It makes one call to wrap the new version and one to unwrap
// it, which proves that it can be had again before anything is wrapped under it.
func (s *Server) RotateKEK(ctx context.Context, ref *pb.KeyRef) (*pb.KeyVersionsResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	k, doc, err := s.usable(ctx, ref)
	if err != nil {
		return nil, err
	}
	leave, err := k.enter(ctx)
	if err != nil {
		return nil, s.callError(err)
	}
	defer leave()
	version := doc.KEKs[len(doc.KEKs)-1].Version + 1
	version = max(version, doc.Current+1) // numbers are never used again
	fresh, err := s.newKEK(ctx, k.id, version, doc.CMK)
	if err != nil {
		return nil, s.callError(err)
	}
	_, wipes := k.kek(version)
	kek, err := s.openFresh(ctx, k.id, &fresh)
	if err != nil {
		return nil, s.callError(err)
	}
	doc, err = s.update(ctx, k, func(d *document) error {
		if d.Hold != nil { // since it was looked at
			return heldBack(k.id)
		}
		return d.addKEK(fresh)
	})
	if err != nil {
		kek.Wipe() // if the document has it all the same, the KMS unwraps it
		return nil, s.callError(err)
	}
	if _, err := k.keep(version, kek, wipes); err != nil {
		return nil, s.callError(err)
	}
	event := k.id.event(Event{Event: "kek.rotated", Outcome: "ok", CMK: fresh.CMK, CMKVersion: fresh.CMKVersion, KEKVersion: version})
	if err := s.audit.append(context.WithoutCancel(ctx), event); err != nil {
		return nil, s.callError(err)
	}
	return versionsOf(doc, 2), nil
}

// errRaced is told to who rotates a key that somebody else rotates at that time.
var errRaced = rpc.Error(codes.Aborted, nil, "another version of the KEK was made at the same time: look at the versions before making one more")

// addKEK makes a new version the current one.
func (d *document) addKEK(fresh kekVersion) error {
	if have := d.find(fresh.Version); have != nil && bytes.Equal(have.Wrapped, fresh.Wrapped) {
		return nil // by a write that was reported to have failed
	}
	if fresh.Version <= d.Current || d.find(fresh.Version) != nil {
		return errRaced
	}
	d.KEKs = append(d.KEKs, fresh)
	d.Current = fresh.Version
	return nil
}

// openFresh has the KMS unwrap what it wrapped a moment ago.
func (s *Server) openFresh(ctx context.Context, id keyID, w *kekVersion) (*seal.KEK, error) {
	payload, err := s.unwrapPayload(ctx, id, w)
	if err != nil {
		return nil, err
	}
	defer clear(payload)
	raw, err := parsePayload(id.context(w.Version), payload)
	if err != nil {
		return nil, err
	}
	return seal.NewKEK(raw)
}

// usable gives the key that a reference names, unless it is held back.
func (s *Server) usable(ctx context.Context, ref *pb.KeyRef) (*keyState, *document, error) {
	k, doc, err := s.current(ctx, ref)
	if err == nil && doc.Hold != nil {
		err = heldBack(k.id)
	}
	return k, doc, err
}

func heldBack(id keyID) error {
	return refusal(lease.Denied, "the key of %s is held back by `holdfast key revoke`: end that with `holdfast key resume` first", id.words())
}

// current gives the key that a reference names, as the bucket has it now.
func (s *Server) current(ctx context.Context, ref *pb.KeyRef) (*keyState, *document, error) {
	id, err := s.resolve(ctx, ref.GetProject(), ref.GetBranch())
	if err != nil {
		return nil, nil, err
	}
	k, _, err := s.known(ctx, id)
	if err != nil {
		return nil, nil, s.callError(err)
	}
	doc, err := s.document(ctx, k, true)
	if err != nil {
		return nil, nil, s.callError(err)
	}
	return k, doc, nil
}

// RetireKEK implements pb.KeyAdminServer.
func (s *Server) RetireKEK(ctx context.Context, req *pb.RetireKEKRequest) (*pb.KeyVersionsResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	k, doc, err := s.current(ctx, req.GetKey())
	if err != nil {
		return nil, err
	}
	if err := s.mayRetire(k.id, doc, req.Version); err != nil {
		return nil, err
	}
	// Before it is done: what cannot be undone must not happen unseen.
	event := k.id.event(Event{Event: "kek.retired", Outcome: "ok", KEKVersion: req.Version})
	if err := s.audit.append(ctx, event); err != nil {
		return nil, s.callError(err)
	}
	doc, err = s.update(ctx, k, func(d *document) error {
		if err := s.mayRetire(k.id, d, req.Version); err != nil {
			return err
		}
		d.KEKs = slices.DeleteFunc(d.KEKs, func(v kekVersion) bool { return v.Version == req.Version })
		return nil
	})
	if err != nil {
		event.Outcome, event.Detail = "failed", err.Error()
		return nil, s.callError(errors.Join(err, s.audit.append(context.WithoutCancel(ctx), event)))
	}
	k.forget(req.Version)
	return versionsOf(doc, 0), nil
}

// settling is how long after a rotation nothing is retired, in check intervals: another key manager
// may wrap under the old version until it reads the document again, and what was wrapped is on its
// way to where it is counted.
const settling = 4

func (s *Server) mayRetire(id keyID, d *document, version uint32) error {
	refuse := func(format string, args ...any) error {
		return rpc.Error(codes.FailedPrecondition, nil, "retiring version %d of the KEK of %s: %s", version, id.words(), fmt.Sprintf(format, args...))
	}
	current := d.find(d.Current)
	age := nowUnixMS() - current.CreatedUnixMS
	wait := settling * s.cfg.CheckInterval.Milliseconds()
	switch {
	case version == 0 || version > d.Current:
		return refuse("there is no such version")
	case version == d.Current:
		return refuse("it is the current one; make another with `holdfast key rotate` first")
	case d.find(version) != nil && age < wait:
		return refuse("the current one was made %d s ago; what is under way may need the old one until it is %d s old: try again then", age/1000, (wait+999)/1000)
	}
	return nil
}

// forget wipes one version of the KEK.
func (k *keyState) forget(version uint32) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if kek := k.mu.keks[version]; kek != nil {
		kek.Wipe()
		delete(k.mu.keks, version)
	}
	k.mu.wipes++ // one that is being unwrapped now is not kept
}

// KeyVersions implements pb.KeyAdminServer.
func (s *Server) KeyVersions(ctx context.Context, ref *pb.KeyRef) (*pb.KeyVersionsResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	_, doc, err := s.current(ctx, ref)
	if err != nil {
		return nil, err
	}
	return versionsOf(doc, 0), nil
}

func versionsOf(d *document, calls int64) *pb.KeyVersionsResponse {
	resp := &pb.KeyVersionsResponse{Key: d.id().String(), Cmk: d.CMK, Current: d.Current, RotateEveryMs: d.RotateEveryMS, KmsCalls: calls}
	for _, v := range d.KEKs {
		resp.Keks = append(resp.Keks, &pb.KEKVersion{Version: v.Version, Cmk: v.CMK, CmkVersion: v.CMKVersion, CreatedUnixMs: v.CreatedUnixMS})
	}
	return resp
}

// RewrapDEKs implements pb.KeyManagerServer.
func (s *Server) RewrapDEKs(ctx context.Context, req *pb.UnwrapDEKsRequest) (*pb.RewrapDEKsResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	l, contexts, err := s.use(ctx, req.LeaseId, len(req.Deks), func(i int) *pb.DEKContext { return req.Deks[i].GetContext() })
	if err != nil {
		return nil, err
	}
	k := s.key(parseKeyID(l.Key))
	doc, err := s.document(ctx, k, false)
	if err != nil {
		return nil, s.callError(err)
	}
	kek, err := s.getKEK(ctx, k, doc.Current)
	if err != nil {
		return nil, s.callError(err)
	}
	resp := &pb.RewrapDEKsResponse{KekVersion: doc.Current}
	var objects []seal.Context
	for i, c := range contexts {
		wrapped := req.Deks[i].GetWrapped()
		if v, err := seal.KEKVersion(wrapped); err != nil || v != doc.Current {
			if wrapped, err = s.rewrapDEK(ctx, k, kek, doc.Current, c, wrapped); err != nil {
				return nil, s.callError(err)
			}
			objects = append(objects, c)
		}
		resp.Wrapped = append(resp.Wrapped, wrapped)
	}
	if len(objects) == 0 {
		return resp, nil
	}
	return resp, s.giveOut(ctx, l, Event{Event: "dek.rewrapped", KEKVersion: doc.Current, Objects: objectsOf(objects)})
}

// rewrapDEK wraps a DEK under another version of the KEK. It is in the clear here alone.
func (s *Server) rewrapDEK(ctx context.Context, k *keyState, kek *seal.KEK, version uint32, c seal.Context, wrapped []byte) ([]byte, error) {
	raw, err := s.unwrapDEK(ctx, k, c, wrapped)
	if err != nil {
		return nil, err
	}
	defer clear(raw)
	return kek.Wrap(version, c, raw)
}
