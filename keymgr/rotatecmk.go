package keymgr

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/blob"
	"github.com/holdfastdb/holdfast/internal/rpc"
	"github.com/holdfastdb/holdfast/internal/seal"
)

// A re-wrapping puts every version of the KEK under the current version of a CMK: of the key's own, or of
// another, of any provider. In order:
//
//  1. The CMK wraps and unwraps something: it can be used, or nothing happens.
//  2. A mark in the bucket, by which a key manager that starts finds what to finish.
//  3. The document names the CMK. From here on it wraps new versions of the KEK, and both
//     CMKs are needed.
//  4. For each version of the KEK one unwrap, one wrap, and one compare-and-swap of the document.
//  5. The document's note of the re-wrapping is taken away, then the mark. From here on the
//     former CMK is not needed.
//
// A crash after any of them is clean: the document says what is done.

// Rewrap implements pb.KeyAdminServer.
func (s *Server) Rewrap(ctx context.Context, req *pb.RewrapRequest) (*pb.KeyVersionsResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, rewrapTimeout)
	defer cancel()
	k, doc, err := s.usable(ctx, req.GetKey())
	if err != nil {
		return nil, err
	}
	target := cmp.Or(req.Cmk, doc.CMK)
	if len(target) > maxCMK {
		return nil, invalid("re-wrapping the key of %s: the CMK's name has %d bytes, the most is %d", k.id.words(), len(target), maxCMK)
	}
	if err := s.allowed(k.id, target); err != nil {
		return nil, err
	}
	leave, err := s.rewraps.enter(ctx, k.id)
	if err != nil {
		return nil, s.callError(err)
	}
	defer leave()
	if doc, err = s.document(ctx, k, true); err != nil { // another may have been finished meanwhile
		return nil, s.callError(err)
	}
	r := &rewrapping{s: s, k: k}
	if doc.Rewrap == nil || doc.Rewrap.CMK != target {
		if err := r.begin(ctx, target); err != nil {
			return nil, s.callError(err)
		}
	}
	if doc, err = r.finish(ctx); err != nil {
		return nil, s.callError(err)
	}
	return versionsOf(doc, r.calls), nil
}

// rewrapTimeout bounds a call of Rewrap: four calls to the KMS, and two for each of many KEKs.
const rewrapTimeout = 2 * time.Minute

// turns lets one re-wrapping at a time work on a key.
type turns struct{ sync.Map } // keyID to chan struct{} of one place

func (t *turns) of(id keyID) chan struct{} {
	turn, _ := t.LoadOrStore(id, make(chan struct{}, 1))
	return turn.(chan struct{})
}

func (t *turns) enter(ctx context.Context, id keyID) (leave func(), err error) {
	turn := t.of(id)
	select {
	case turn <- struct{}{}:
		return func() { <-turn }, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("waiting for another re-wrapping of the key of %s: %w", id.words(), ctx.Err())
	}
}

// rewrapping is one call's work on it.
type rewrapping struct {
	s     *Server
	k     *keyState
	calls int64 // to the KMS
}

// begin does steps 1 to 3.
func (r *rewrapping) begin(ctx context.Context, target string) error {
	s, id := r.s, r.k.id
	if err := r.try(ctx, target); err != nil {
		return fmt.Errorf("trying the CMK: %w", err)
	}
	if err := s.mark(ctx, id); err != nil {
		return fmt.Errorf("re-wrapping the key of %s: %w", id.words(), err)
	}
	began := nowUnixMS()
	doc, err := s.update(ctx, r.k, func(d *document) error {
		if d.Rewrap == nil || d.Rewrap.CMK != target {
			d.CMK, d.Rewrap = target, &rewrapTarget{CMK: target, SinceUnixMS: began}
		}
		return nil
	})
	if err != nil {
		return err
	}
	return s.audit.append(ctx, id.event(Event{Event: "key.rewrap.begun", Outcome: "ok", CMK: target, KEKVersion: doc.Current}))
}

// try has the CMK wrap and unwrap something that is no key.
func (r *rewrapping) try(ctx context.Context, cmk string) error {
	leave, err := r.k.enter(ctx)
	if err != nil {
		return err
	}
	defer leave()
	ec := r.k.id.context(0) // no KEK has this version
	raw := make([]byte, seal.KeySize)
	rand.Read(raw) // never fails: crypto/rand
	payload := kekPayload(ec, raw)
	r.calls++
	w, err := r.s.wrapPayload(ctx, r.k.id, ec, cmk, payload)
	if err != nil {
		return err
	}
	r.calls++
	back, err := r.s.unwrapPayload(ctx, r.k.id, &kekVersion{CMK: cmk, CMKVersion: w.Version, Wrapped: w.Ciphertext})
	if err == nil && !bytes.Equal(back, payload) {
		err = &ProviderError{Op: "unwrap", CMK: cmk, Err: errors.New("it gave back something else than it was given to wrap")}
	}
	return err
}

// finish does steps 4 and 5, from wherever the document is.
func (r *rewrapping) finish(ctx context.Context) (*document, error) {
	for {
		doc, err := r.s.document(ctx, r.k, true)
		if err != nil {
			return nil, err
		}
		if doc.Rewrap == nil {
			return doc, r.s.unmark(ctx, r.k.id)
		}
		next := doc.toRewrap()
		if next == nil {
			if doc, err = r.done(ctx, doc.Rewrap.CMK); err != nil {
				return nil, err
			}
			return doc, r.s.unmark(ctx, r.k.id)
		}
		if err := r.one(ctx, next, doc.Rewrap.CMK); err != nil {
			return nil, fmt.Errorf("re-wrapping version %d of the KEK: %w; it is tried again until it works", next.Version, err)
		}
	}
}

// toRewrap is a version of the KEK that was not wrapped again yet, or nil.
func (d *document) toRewrap() *kekVersion {
	for i := range d.KEKs {
		// One made since is under the new CMK's newest version already.
		if v := &d.KEKs[i]; !slices.Contains(d.Rewrap.Done, v.Version) && !(v.CMK == d.Rewrap.CMK && v.CreatedUnixMS > d.Rewrap.SinceUnixMS) {
			return v
		}
	}
	return nil
}

// one re-wraps one version of the KEK.
func (r *rewrapping) one(ctx context.Context, old *kekVersion, target string) error {
	fresh, err := r.wrapAgain(ctx, old, target)
	if err != nil {
		return err
	}
	_, err = r.s.update(ctx, r.k, func(d *document) error { return d.replaceKEK(old, fresh) })
	return err
}

// wrapAgain gives a version of the KEK under another CMK, or another version of its CMK.
func (r *rewrapping) wrapAgain(ctx context.Context, old *kekVersion, target string) (fresh kekVersion, err error) {
	leave, err := r.k.enter(ctx)
	if err != nil {
		return fresh, err
	}
	defer leave()
	r.calls++
	payload, err := r.s.unwrapPayload(ctx, r.k.id, old)
	if err != nil {
		return fresh, err
	}
	defer clear(payload)
	ec := r.k.id.context(old.Version)
	if _, err := parsePayload(ec, payload); err != nil {
		return fresh, err
	}
	r.calls++
	w, err := r.s.wrapPayload(ctx, r.k.id, ec, target, payload)
	if err != nil {
		return fresh, err
	}
	fresh = *old
	fresh.CMK, fresh.CMKVersion, fresh.Wrapped = target, w.Version, w.Ciphertext
	return fresh, nil
}

// replaceKEK puts a new form in place of the old one, unless that was done, or retired, meanwhile.
func (d *document) replaceKEK(old *kekVersion, fresh kekVersion) error {
	if d.Rewrap == nil || d.Rewrap.CMK != fresh.CMK {
		return rpc.Error(codes.Aborted, nil, "another re-wrapping of the key was begun meanwhile")
	}
	have := d.find(fresh.Version)
	if have == nil || !bytes.Equal(have.Wrapped, old.Wrapped) || slices.Contains(d.Rewrap.Done, fresh.Version) {
		return nil
	}
	*have = fresh
	d.Rewrap.Done = append(d.Rewrap.Done, fresh.Version)
	return nil
}

// done ends the re-wrapping in the document.
func (r *rewrapping) done(ctx context.Context, target string) (*document, error) {
	doc, err := r.s.update(ctx, r.k, func(d *document) error {
		if d.Rewrap != nil && d.Rewrap.CMK == target && d.toRewrap() == nil {
			d.Rewrap = nil
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return doc, r.s.audit.append(ctx, r.k.id.event(Event{Event: "key.rewrapped", Outcome: "ok", CMK: target, KEKVersion: doc.Current}))
}

// The marks of keys that are being re-wrapped have the names of the index's objects.
const rewrapPrefix = "rewrapping/"

func (id keyID) marked() string {
	return rewrapPrefix + strings.TrimPrefix(id.indexed(), indexPrefix)
}

func (s *Server) mark(ctx context.Context, id keyID) error {
	_, err := s.cfg.BlobStore.Create(ctx, id.marked(), strings.NewReader(""), 0)
	if errors.Is(err, blob.ErrExists) {
		return nil
	}
	return err
}

func (s *Server) unmark(ctx context.Context, id keyID) error {
	return s.cfg.BlobStore.Delete(ctx, id.marked())
}

// marked lists the keys whose re-wrapping may not be finished.
func (s *Server) marked(ctx context.Context) ([]keyID, error) { return s.keysBelow(ctx, rewrapPrefix) }

// keepRewrapping finishes what was interrupted: by a crash, by the KMS, or by a caller that went away.
func (s *Server) keepRewrapping() {
	defer s.wg.Done()
	every := time.NewTicker(max(s.cfg.CheckInterval, 10*time.Millisecond))
	defer every.Stop()
	for {
		if err := s.finishRewraps(s.ctx); err != nil && s.ctx.Err() == nil {
			s.cfg.Logger.Warn("keys that are to be under another CMK could not all be wrapped; it is tried again", "err", err)
		}
		select {
		case <-s.ctx.Done():
			return
		case <-every.C:
		}
	}
}

func (s *Server) finishRewraps(ctx context.Context) error {
	ids, err := s.marked(ctx)
	for _, id := range ids {
		err = errors.Join(err, s.finishRewrap(ctx, id))
	}
	return err
}

func (s *Server) finishRewrap(ctx context.Context, id keyID) error {
	ctx, cancel := context.WithTimeout(ctx, rewrapTimeout)
	defer cancel()
	turn := s.rewraps.of(id)
	select {
	case turn <- struct{}{}:
		defer func() { <-turn }()
	default: // a call is at it
		return nil
	}
	k, doc, err := s.known(ctx, id)
	switch {
	case errors.Is(err, blob.ErrNotFound): // a branch's key that was destroyed
		return s.unmark(ctx, id)
	case err != nil || doc.Hold != nil:
		return err
	}
	r := &rewrapping{s: s, k: k}
	_, err = r.finish(ctx)
	return err
}
