package revocation

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/blob"
	"github.com/holdfastdb/holdfast/internal/blob/dirblob"
	"github.com/holdfastdb/holdfast/internal/rpc"
	"github.com/holdfastdb/holdfast/internal/seal"
	"github.com/holdfastdb/holdfast/keymgr"
	"github.com/holdfastdb/holdfast/keymgr/kmsopen"
	"github.com/holdfastdb/holdfast/test/cluster"
	"github.com/holdfastdb/holdfast/test/proc"
)

// plant writes a new canary, and has it read back through every layer that would keep it.
func (w *world) plant(ctx context.Context) error {
	raw := make([]byte, 20)
	rand.Read(raw) // never fails: crypto/rand
	canary := hex.EncodeToString(raw)
	w.canaries = append(w.canaries, canary)
	return w.c.Target().Exec(ctx, "INSERT INTO canaries VALUES ('"+canary+"')", "SELECT * FROM canaries")
}

// keys unwraps, with the customer's own CMK, the KEK and the DEKs that rest in the bucket: they are
// what is searched for. No lease is taken for it.
func (w *world) keys(ctx context.Context) (map[string][]byte, error) {
	found := make(map[string][]byte)
	bucket, err := dirblob.Open(filepath.Join(w.c.Data, "bucket"))
	if err != nil {
		return nil, err
	}
	var doc struct {
		CMK  string
		KEKs []struct {
			Version uint32
			Wrapped []byte
		}
	}
	data, _, err := bucket.Get(ctx, "projects/"+w.project+"/keys.json")
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(data, &doc); err != nil {
		return nil, err
	}
	local := ""
	if w.cust.cmk == "" {
		local = filepath.Join(w.c.Data, "kms", "keys.json")
	}
	provider, err := kmsopen.Open(ctx, local, w.cust.kms)
	if err != nil {
		return nil, err
	}
	keks := make(map[uint32]*seal.KEK)
	for _, k := range doc.KEKs {
		u, err := provider.Unwrap(ctx, doc.CMK, keymgr.EncryptionContext{Project: w.project, KEKVersion: k.Version}, k.Wrapped)
		if err != nil {
			return nil, err
		}
		raw := u.Plaintext[len(u.Plaintext)-seal.KeySize:]
		found[fmt.Sprintf("KEK %d", k.Version)] = bytes.Clone(raw)
		if keks[k.Version], err = seal.NewKEK(raw); err != nil {
			return nil, err
		}
	}
	return found, errors.Join(w.layerKeys(ctx, bucket, keks, found), w.walKeys(ctx, keks, found))
}

// walKeys opens the DEKs of all WAL that the safekeepers have.
func (w *world) walKeys(ctx context.Context, keks map[uint32]*seal.KEK, found map[string][]byte) error {
	conn, err := rpc.Dial(w.c.Socket(cluster.Safekeeper(1)))
	if err != nil {
		return err
	}
	defer conn.Close()
	client := pb.NewSafekeeperClient(conn)
	st, err := client.Status(ctx, &pb.SafekeeperStatusRequest{})
	if err != nil {
		return err
	}
	for _, b := range st.Branches {
		if b.Branch != w.branch {
			continue
		}
		stream, err := client.Read(ctx, &pb.ReadRequest{Project: w.project, Branch: w.branch, FromLsn: max(b.StartLsn, b.DurableLsn), UntilLsn: b.EndLsn})
		if err != nil {
			return err
		}
		if err := openWALKeys(w, stream, keks, found); err != nil {
			return err
		}
	}
	return nil
}

func openWALKeys(w *world, stream pb.Safekeeper_ReadClient, keks map[uint32]*seal.KEK, found map[string][]byte) error {
	for {
		resp, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		for _, c := range resp.Chunks {
			name := "DEK of WAL " + c.Object
			if found[name] != nil {
				continue
			}
			version, err := seal.KEKVersion(c.WrappedDek)
			if err != nil {
				return err
			}
			if found[name], err = keks[version].Unwrap(seal.Context{Purpose: seal.PurposeWAL, Project: w.project, Branch: w.branch, Object: c.Object}, c.WrappedDek); err != nil {
				return err
			}
		}
	}
}

// layerKeys opens the DEKs that the branch's manifest lists.
func (w *world) layerKeys(ctx context.Context, bucket blob.Store, keks map[uint32]*seal.KEK, found map[string][]byte) error {
	return bucket.List(ctx, "projects/"+w.project+"/", func(o blob.Info) error {
		if o.Size > 16<<20 || strings.Contains(o.Key, "/layers/") {
			return nil
		}
		data, _, err := bucket.Get(ctx, o.Key)
		if errors.Is(err, blob.ErrNotFound) || err == nil && !bytes.HasPrefix(data, []byte("holdfast timeline manifest")) {
			return nil
		}
		if err != nil {
			return err
		}
		_, body, _ := bytes.Cut(data, []byte("\n"))
		var m struct {
			Layers []struct {
				Object  string
				Wrapped []byte `json:"wrapped_dek"`
			}
		}
		if err := json.Unmarshal(body, &m); err != nil {
			return err
		}
		for _, l := range m.Layers {
			version, err := seal.KEKVersion(l.Wrapped)
			if err != nil {
				return err
			}
			c := seal.Context{Purpose: seal.PurposeLayer, Project: w.project, Branch: w.branch, Object: l.Object}
			if found["DEK of "+l.Object], err = keks[version].Unwrap(c, l.Wrapped); err != nil {
				return err
			}
		}
		return nil
	})
}

// hit is something in a process's memory that must not be there.
type hit struct {
	process proc.Process
	what    string
	where   string
}

func (h hit) String() string { return fmt.Sprintf("%s in %v at %s", h.what, h.process, h.where) }

// scan searches the memory of every process of the cluster.
func (w *world) scan(keys map[string][]byte) (hits []hit, err error) {
	needles := make(map[string][]byte)
	for i, c := range w.canaries {
		needles[fmt.Sprintf("canary %d", i)] = []byte(c)
	}
	for name, key := range keys {
		needles[name] = key[:16] // an expanded AES key begins with the key, round by round
	}
	for _, p := range proc.Using(w.dir) {
		found, err := scanProcess(p, needles)
		if err != nil && !os.IsNotExist(err) && !strings.Contains(err.Error(), syscall.ESRCH.Error()) {
			return nil, fmt.Errorf("searching the memory of %v: %w", p, err)
		}
		hits = append(hits, found...)
	}
	return hits, nil
}

// scanProcess reads all memory that a process has written to.
func scanProcess(p proc.Process, needles map[string][]byte) (hits []hit, err error) {
	maps, err := os.Open(fmt.Sprintf("/proc/%d/maps", p.PID))
	if err != nil {
		return nil, err
	}
	defer maps.Close()
	mem, err := os.Open(fmt.Sprintf("/proc/%d/mem", p.PID))
	if err != nil {
		return nil, err
	}
	defer mem.Close()
	lines := bufio.NewScanner(maps)
	for lines.Scan() {
		var from, to uint64
		var perms, offset, dev string
		var inode uint64
		if _, err := fmt.Sscanf(lines.Text(), "%x-%x %s %s %s %d", &from, &to, &perms, &offset, &dev, &inode); err != nil {
			continue
		}
		if perms[0] != 'r' || strings.HasSuffix(lines.Text(), "[vvar]") || strings.HasSuffix(lines.Text(), "[vsyscall]") {
			continue
		}
		if perms[1] != 'w' && inode != 0 {
			continue // a program's own text
		}
		hits = append(hits, scanRange(p, mem, from, to, needles)...)
	}
	return hits, lines.Err()
}

func scanRange(p proc.Process, mem *os.File, from, to uint64, needles map[string][]byte) (hits []hit) {
	const step, overlap = 4 << 20, 64
	buf := make([]byte, step+overlap)
	for at := from; at < to; at += step {
		n, err := mem.ReadAt(buf[:min(uint64(len(buf)), to-at)], int64(at))
		if n == 0 && err != nil {
			continue // reserved and never used, or gone meanwhile
		}
		for what, needle := range needles {
			if i := bytes.Index(buf[:n], needle); i >= 0 {
				hits = append(hits, hit{p, what, fmt.Sprintf("%#x", at+uint64(i))})
			}
		}
	}
	return hits
}
