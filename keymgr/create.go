package keymgr

import (
	"context"
	"crypto/rand"
	"errors"
	"slices"
	"strings"

	"google.golang.org/grpc/codes"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/blob"
	"github.com/holdfastdb/holdfast/internal/rpc"
	"github.com/holdfastdb/holdfast/internal/seal"
)

const maxCMK = 2048

// CreateProject implements pb.KeyManagerServer.
func (s *Server) CreateProject(ctx context.Context, req *pb.CreateProjectRequest) (*pb.CreateProjectResponse, error) {
	id := keyID{project: req.Project}
	if err := id.check(); err != nil {
		return nil, invalid("%v", err)
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	doc, err := s.createKey(ctx, id, req.Cmk)
	if err != nil {
		return nil, err
	}
	return &pb.CreateProjectResponse{KekVersion: doc.Current}, nil
}

// CreateBranchKey implements pb.KeyManagerServer.
func (s *Server) CreateBranchKey(ctx context.Context, req *pb.CreateBranchKeyRequest) (*pb.CreateBranchKeyResponse, error) {
	id := keyID{req.Project, req.Branch}
	if err := id.check(); err != nil {
		return nil, invalid("%v", err)
	}
	if req.Branch == "" {
		return nil, invalid("a key for a branch of project %s: the branch is missing", req.Project)
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	_, project, err := s.known(ctx, keyID{project: req.Project})
	if err != nil {
		return nil, s.callError(err)
	}
	cmk := req.Cmk
	if cmk == "" {
		cmk = project.CMK
	}
	doc, err := s.createKey(ctx, id, cmk)
	if err != nil {
		return nil, err
	}
	s.resolver.learn(id, true)
	return &pb.CreateBranchKeyResponse{KekVersion: doc.Current}, nil
}

// createKey gives the key that there is, or makes it.
func (s *Server) createKey(ctx context.Context, id keyID, cmk string) (*document, error) {
	if cmk == "" || len(cmk) > maxCMK {
		return nil, invalid("making a key for %s: the CMK's name has %d bytes, want 1..%d", id.words(), len(cmk), maxCMK)
	}
	if err := s.allowed(id, cmk); err != nil {
		return nil, err
	}
	doc, err := loadDocument(ctx, s.cfg.BlobStore, id)
	if errors.Is(err, blob.ErrNotFound) {
		doc, err = s.newKey(ctx, id, cmk)
	}
	if err != nil {
		return nil, s.callError(err)
	}
	if doc.CMK != cmk {
		return nil, rpc.Error(codes.FailedPrecondition, nil, "%s exists under CMK %s, not %s", id.words(), doc.CMK, cmk)
	}
	return doc, nil
}

// allowed refuses a CMK that the configuration does not list.
func (s *Server) allowed(id keyID, cmk string) error {
	if len(s.cfg.CMKs) == 0 || slices.Contains(s.cfg.CMKs, cmk) {
		return nil
	}
	return rpc.Error(codes.PermissionDenied, nil, "%s under CMK %.200q: this key manager's configuration does not list that CMK", id.words(), cmk)
}

func (s *Server) newKey(ctx context.Context, id keyID, cmk string) (*document, error) {
	kek, err := s.newKEK(ctx, id, 1, cmk)
	if err != nil {
		return nil, err
	}
	// Before the key itself, so that no key is missing in the index.
	if err := s.index(ctx, id); err != nil {
		return nil, err
	}
	doc := &document{Project: id.project, Branch: id.branch, CMK: cmk, Current: kek.Version, KEKs: []kekVersion{kek}}
	if doc, err = createDocument(ctx, s.cfg.BlobStore, doc); err != nil {
		return nil, err
	}
	event := Event{Event: "project.created", Outcome: "ok", Project: id.project, Branch: id.branch, CMK: doc.CMK, KEKVersion: doc.Current}
	if id.branch != "" {
		event.Event = "branch.key.created"
	}
	return doc, s.audit.append(ctx, event)
}

// newKEK makes a KEK and has the CMK wrap it. Nothing keeps it but what is returned.
func (s *Server) newKEK(ctx context.Context, id keyID, version uint32, cmk string) (kekVersion, error) {
	ec := id.context(version)
	raw := make([]byte, seal.KeySize)
	rand.Read(raw) // never fails: crypto/rand
	payload := kekPayload(ec, raw)
	clear(raw)
	defer clear(payload)
	w, err := s.wrapPayload(ctx, id, ec, cmk, payload)
	if err != nil {
		return kekVersion{}, err
	}
	return kekVersion{Version: version, CreatedUnixMS: nowUnixMS(), CMK: cmk, CMKVersion: w.Version, Wrapped: w.Ciphertext}, nil
}

// wrapPayload has a CMK wrap a KEK's payload, in one audited call.
func (s *Server) wrapPayload(ctx context.Context, id keyID, ec EncryptionContext, cmk string, payload []byte) (Wrapped, error) {
	callCtx, cancel := context.WithTimeout(ctx, providerTimeout)
	defer cancel()
	w, err := s.cfg.Provider.Wrap(callCtx, cmk, ec, payload)
	event := Event{Event: "cmk.wrap", Project: id.project, Branch: id.branch, CMK: cmk, KEKVersion: ec.KEKVersion, CMKVersion: w.Version, RequestID: w.RequestID}
	return w, s.auditProvider(ctx, event, err)
}

// auditProvider records a call to the KMS and gives its error, or that of recording.
func (s *Server) auditProvider(ctx context.Context, e Event, err error) error {
	e.Outcome = "ok"
	if err != nil {
		outcome, id := outcomeOf(err)
		e.Outcome, e.RequestID, e.Detail = outcome.String(), id, err.Error()
	}
	// The KMS's log has the call, so this one has it even if the caller went away.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), callTimeout)
	defer cancel()
	if auditErr := s.audit.append(ctx, e); auditErr != nil {
		return auditErr
	}
	return err
}

// The index has an empty object for each key, so that keys can be listed without all of the
// bucket: keyindex/PROJECT/key and keyindex/PROJECT/branches/BRANCH.
const indexPrefix = "keyindex/"

func (id keyID) indexed() string {
	if id.branch == "" {
		return indexPrefix + id.project + "/key"
	}
	return indexPrefix + id.project + "/branches/" + id.branch
}

// index makes a key findable. Idempotent.
func (s *Server) index(ctx context.Context, id keyID) error {
	_, err := s.cfg.BlobStore.Create(ctx, id.indexed(), strings.NewReader(""), 0)
	if errors.Is(err, blob.ErrExists) {
		return nil
	}
	return err
}

// indexedKeys lists the keys; one whose making was interrupted may be among them.
func (s *Server) indexedKeys(ctx context.Context) ([]keyID, error) {
	return s.keysBelow(ctx, indexPrefix)
}

// keysBelow lists the keys that have an object below a prefix.
func (s *Server) keysBelow(ctx context.Context, prefix string) ([]keyID, error) {
	var ids []keyID
	err := s.cfg.BlobStore.List(ctx, prefix, func(i blob.Info) error {
		parts := strings.Split(strings.TrimPrefix(i.Key, prefix), "/")
		switch {
		case len(parts) == 2 && parts[1] == "key":
			ids = append(ids, keyID{project: parts[0]})
		case len(parts) == 3 && parts[1] == "branches":
			ids = append(ids, keyID{parts[0], parts[2]})
		}
		return nil
	})
	return ids, err
}
