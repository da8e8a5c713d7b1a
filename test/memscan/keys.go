package memscan

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/blob"
	"github.com/holdfastdb/holdfast/internal/blob/dirblob"
	"github.com/holdfastdb/holdfast/internal/seal"
	"github.com/holdfastdb/holdfast/keymgr"
)

// Keys are the keys of a cluster, by names that tell what each is for.
type Keys struct {
	ByName map[string][]byte
	// Missing are objects whose key the audit log says was given out, of which no wrapped key
	// was found on any disk: an object that was not written in the end.
	Missing []string
}

// AddTo has a Set look for all of them.
func (k *Keys) AddTo(s *Set) error {
	for name, key := range k.ByName {
		if err := s.AddKey(name, key); err != nil {
			return err
		}
	}
	return nil
}

// Find finds the keys in use, as who has the CMK and everything that rests: the KEKs by unwrapping
// what the bucket (a directory bucket) keeps, and each DEK that the audit log knows by
// trying what looks like a wrapped one in any file below root. It relies on no format but the wrap's.
func Find(ctx context.Context, root, bucket string, provider keymgr.Provider) (*Keys, error) {
	f := &finder{keys: &Keys{ByName: make(map[string][]byte)}, kek: make(map[string]map[uint32]*seal.KEK), objects: make(map[seal.Context]bool)}
	if err := f.readFiles(root); err != nil {
		return nil, err
	}
	for _, key := range f.keysOf() {
		if err := f.findKEKs(ctx, bucket, provider, key); err != nil {
			return nil, err
		}
	}
	if len(f.kek) == 0 {
		return nil, fmt.Errorf("no audit log below %s tells of a key", root)
	}
	f.openAll()
	return f.keys, nil
}

type finder struct {
	keys       *Keys
	kek        map[string]map[uint32]*seal.KEK // by keyRef and version
	objects    map[seal.Context]bool
	candidates [][]byte // of wrapped DEKs
	seen       map[string]bool
}

// maxVersion bounds the versions of a KEK that are tried.
const maxVersion = 16

func (f *finder) readFiles(root string) error {
	f.seen = make(map[string]bool)
	return filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			if d != nil && d.IsDir() { // a mount that is gone
				return filepath.SkipDir
			}
			return err
		}
		if !d.Type().IsRegular() {
			return nil
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return nil // gone meanwhile, or of a mount
		}
		if strings.HasPrefix(d.Name(), "audit-") && strings.HasSuffix(d.Name(), ".jsonl") {
			return f.readAudit(data)
		}
		f.collect(data)
		return nil
	})
}

// readAudit notes the objects whose keys were given out.
func (f *finder) readAudit(data []byte) error {
	for line := range bytes.Lines(data) {
		var e keymgr.Event
		if err := json.Unmarshal(line, &e); err != nil {
			continue // the last line may be under way
		}
		for _, object := range e.Objects {
			parts := strings.SplitN(object, "/", 3)
			if len(parts) != 3 {
				return fmt.Errorf("the audit log names an object %q: want PURPOSE/BRANCH/OBJECT", object)
			}
			f.objects[seal.Context{Purpose: seal.Purpose(parts[0]), Project: e.Project, Branch: parts[1], Object: parts[2]}] = true
		}
	}
	return nil
}

// inJSON is a wrapped DEK of 65 bytes as JSON has it; it begins with its version, 1.
var inJSON = regexp.MustCompile(`"(AQ[A-Za-z0-9+/]{85}=)"`)

// collect keeps what may be a wrapped DEK.
func (f *finder) collect(data []byte) {
	for at := 0; ; at++ {
		i := bytes.Index(data[at:], []byte{0, 0}) // of the KEK's version, which is small
		if i < 0 {
			break
		}
		at += i
		if begin := at - 3; begin >= 0 && begin+seal.WrappedSize <= len(data) {
			f.consider(data[begin : begin+seal.WrappedSize])
		}
	}
	for _, m := range inJSON.FindAllSubmatch(data, -1) {
		if b, err := base64.StdEncoding.DecodeString(string(m[1])); err == nil {
			f.consider(b)
		}
	}
}

func (f *finder) consider(b []byte) {
	version, err := seal.KEKVersion(b)
	if err != nil || version == 0 || version > maxVersion {
		return
	}
	// Nonce, ciphertext and tag are random: six zeros among 60 bytes are not found by chance.
	if bytes.Count(b[5:], []byte{0}) >= 6 || f.seen[string(b)] {
		return
	}
	f.seen[string(b)] = true
	f.candidates = append(f.candidates, bytes.Clone(b))
}

// keysOf names the projects and branches that the audit log knows.
func (f *finder) keysOf() []seal.Context {
	var keys []seal.Context
	for o := range f.objects {
		for _, k := range []seal.Context{{Project: o.Project}, {Project: o.Project, Branch: o.Branch}} {
			if !slices.Contains(keys, k) {
				keys = append(keys, k)
			}
		}
	}
	return keys
}

// recorder is a provider that keeps what it unwrapped.
type recorder struct {
	keymgr.Provider
	mu   sync.Mutex
	keks map[uint32][]byte
}

func (r *recorder) Unwrap(ctx context.Context, cmk string, ec keymgr.EncryptionContext, wrapped []byte) (keymgr.Unwrapped, error) {
	u, err := r.Provider.Unwrap(ctx, cmk, ec, wrapped)
	if err == nil && len(u.Plaintext) > seal.KeySize {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.keks[ec.KEKVersion] = bytes.Clone(u.Plaintext[len(u.Plaintext)-seal.KeySize:])
	}
	return u, err
}

// findKEKs has a key manager of its own, over a copy of the key documents, unwrap each version.
func (f *finder) findKEKs(ctx context.Context, bucket string, provider keymgr.Provider, key seal.Context) error {
	dir, err := os.MkdirTemp("", "holdfast-memscan-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	store, err := copyKeyDocuments(ctx, bucket, dir)
	if err != nil {
		return err
	}
	r := &recorder{Provider: provider, keks: make(map[uint32][]byte)}
	audit := filepath.Join(dir, "audit")
	if err := os.Mkdir(audit, 0o700); err != nil {
		return err
	}
	s, err := keymgr.New(keymgr.Config{Dir: audit, BlobStore: store, Provider: r})
	if err != nil {
		return err
	}
	defer s.Close()
	if err := askForAll(ctx, s, key); err != nil {
		return fmt.Errorf("finding the KEKs of project %s, branch %q: %w", key.Project, key.Branch, err)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for version, raw := range r.keks {
		f.keep(key, version, raw)
	}
	return nil
}

// keep keeps a KEK once: a branch without a key of its own has its project's.
func (f *finder) keep(key seal.Context, version uint32, raw []byte) {
	name := fmt.Sprintf("KEK %d of project %s", version, key.Project)
	if have := f.keys.ByName[name]; have != nil && key.Branch != "" {
		if bytes.Equal(have, raw) {
			return
		}
		name += ", branch " + key.Branch
	}
	f.keys.ByName[name] = bytes.Clone(raw)
	k, err := seal.NewKEK(raw)
	if err != nil {
		panic(err) // of 32 bytes, as the recorder kept it
	}
	if f.kek[name] == nil {
		f.kek[name] = make(map[uint32]*seal.KEK)
	}
	f.kek[name][version] = k
}

// askForAll takes out a lease and asks for a DEK under each version there may be.
func askForAll(ctx context.Context, s *keymgr.Server, key seal.Context) error {
	l, err := s.Lease(ctx, &pb.LeaseRequest{Project: key.Project, Branch: key.Branch, Node: "memscan"})
	if err != nil {
		return err
	}
	for version := uint32(1); version <= maxVersion; version++ {
		forged := make([]byte, seal.WrappedSize)
		forged[0] = 1
		binary.LittleEndian.PutUint32(forged[1:], version)
		// It cannot open; that the KEK is asked for is the point.
		_, _ = s.UnwrapDEKs(ctx, &pb.UnwrapDEKsRequest{LeaseId: l.LeaseId, Deks: []*pb.WrappedDEK{{Wrapped: forged,
			Context: &pb.DEKContext{Purpose: "layer", Project: key.Project, Branch: key.Branch, Object: "none"}}}})
	}
	return nil
}

func copyKeyDocuments(ctx context.Context, bucket, dir string) (blob.Store, error) {
	from, err := dirblob.Open(bucket)
	if err != nil {
		return nil, err
	}
	to, err := dirblob.Open(filepath.Join(dir, "bucket"))
	if err != nil {
		return nil, err
	}
	return to, from.List(ctx, "projects/", func(i blob.Info) error {
		if !strings.HasSuffix(i.Key, "/keys.json") {
			return nil
		}
		data, _, err := from.Get(ctx, i.Key)
		if err != nil {
			return err
		}
		_, err = to.Create(ctx, i.Key, bytes.NewReader(data), int64(len(data)))
		return err
	})
}

// openAll tries each candidate as each object's key.
func (f *finder) openAll() {
	for object := range f.objects {
		found := false
		for _, wrapped := range f.candidates {
			version, _ := seal.KEKVersion(wrapped) // it was looked at before
			for name, keks := range f.kek {
				kek := keks[version]
				if kek == nil || !strings.Contains(name, "project "+object.Project) {
					continue
				}
				if raw, err := kek.Unwrap(object, wrapped); err == nil {
					found = true
					f.keys.ByName[fmt.Sprintf("DEK of %s", object)] = raw
				}
			}
		}
		if !found {
			f.keys.Missing = append(f.keys.Missing, object.String())
		}
	}
}
