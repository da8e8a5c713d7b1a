package revocation

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"google.golang.org/grpc"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/rpc"
	"github.com/holdfastdb/holdfast/keymgr/kmsopen"
	"github.com/holdfastdb/holdfast/test/cluster"
	"github.com/holdfastdb/holdfast/test/memscan"
)

// plant writes a new canary, and has it read back through every layer that would keep it.
func (w *world) plant(ctx context.Context) error {
	raw := make([]byte, 20)
	rand.Read(raw) // never fails: crypto/rand
	canary := hex.EncodeToString(raw)
	w.canaries = append(w.canaries, canary)
	return w.c.Target().Exec(ctx, "INSERT INTO canaries VALUES ('"+canary+"')", "SELECT * FROM canaries")
}

// provider asks the customer's KMS, as the key manager does.
func (w *world) provider(ctx context.Context) (*kmsopen.Providers, error) {
	local := ""
	if w.cust.cmk == "" {
		local = w.localKMS()
	}
	return kmsopen.Open(ctx, local, w.cust.kms)
}

func (w *world) localKMS() string { return filepath.Join(w.c.Data, "kms", "keys.json") }

// wanted is what memory is searched for: the canaries, and every key in use, which who has the CMK
// finds on the disks.
func (w *world) wanted(ctx context.Context) (*memscan.Set, error) {
	provider, err := w.provider(ctx)
	if err != nil {
		return nil, err
	}
	stage := w.t.TempDir()
	if err := errors.Join(w.stageFiles(stage), w.stageWAL(ctx, stage)); err != nil {
		return nil, err
	}
	keys, err := memscan.Find(ctx, stage, filepath.Join(w.c.Data, "bucket"), provider)
	if err != nil {
		return nil, fmt.Errorf("finding the keys that are searched for: %w", err)
	}
	set := &memscan.Set{}
	for i, c := range w.canaries {
		if err := set.AddCanary(fmt.Sprintf("canary %d", i), c); err != nil {
			return nil, err
		}
	}
	return set, keys.AddTo(set)
}

// maxDocument is more than any document has; what is larger is data, whose keys a document has too.
const maxDocument = 1 << 20

// stageFiles copies the audit log and the bucket's documents to where keys are looked for: in all that a
// cluster has on its disks that would take minutes.
func (w *world) stageFiles(stage string) error {
	n := 0
	for _, root := range []string{w.c.Dir(cluster.Keymgr), filepath.Join(w.c.Data, "bucket", "objects")} {
		err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
			if err != nil || !d.Type().IsRegular() {
				return ignoreGone(err)
			}
			info, err := d.Info()
			isAudit := strings.HasPrefix(d.Name(), "audit-")
			if err != nil || info.Size() > maxDocument && !isAudit {
				return ignoreGone(err)
			}
			data, err := os.ReadFile(path)
			if err != nil {
				return ignoreGone(err)
			}
			dir := filepath.Join(stage, fmt.Sprint(n))
			n++
			return errors.Join(os.Mkdir(dir, 0o700), os.WriteFile(filepath.Join(dir, d.Name()), data, 0o600))
		})
		if err != nil {
			return err
		}
	}
	return nil
}

func ignoreGone(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// stageWAL adds the wrapped DEKs of all WAL that the safekeepers have.
func (w *world) stageWAL(ctx context.Context, stage string) error {
	conn, err := rpc.Dial(w.c.Socket(cluster.Safekeeper(1)))
	if err != nil {
		return err
	}
	defer conn.Close()
	client := pb.NewSafekeeperClient(conn)
	st, err := client.Status(ctx, &pb.SafekeeperStatusRequest{}, grpc.WaitForReady(true))
	if err != nil {
		return err
	}
	var wrapped []byte
	for _, b := range st.Branches {
		stream, err := client.Read(ctx, &pb.ReadRequest{Project: b.Project, Branch: b.Branch, FromLsn: max(b.StartLsn, b.DurableLsn), UntilLsn: b.EndLsn})
		if err != nil {
			return err
		}
		for {
			resp, err := stream.Recv()
			if err != nil {
				break // the end; history that went to the bucket meanwhile is under other keys
			}
			for _, c := range resp.Chunks {
				wrapped = append(append(wrapped, c.WrappedDek...), "between two"...)
			}
		}
	}
	return os.WriteFile(filepath.Join(stage, "wal"), wrapped, 0o600)
}

// scan searches the memory of every process of the cluster that is not stopped.
func (w *world) scan(set *memscan.Set) (*memscan.Scanner, error) {
	s := &memscan.Scanner{Set: set}
	for _, p := range memscan.Processes(w.dir) {
		if w.stopped[p.PID] != "" {
			continue // it is searched when it goes on
		}
		if err := s.Scan(p); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// scannerFinds shows that the search works: it finds canaries and keys while they may be there.
func (w *world) scannerFinds(set *memscan.Set) error {
	s, err := w.scan(set)
	if err != nil {
		return err
	}
	canaries, keys := 0, 0
	for name := range s.Found() {
		if strings.HasPrefix(name, "canary") {
			canaries++
		} else {
			keys++
		}
	}
	w.logf("before: of %d canaries and keys the search of memory finds %d canaries and %d keys (%d processes, %d MiB)",
		len(set.Names()), canaries, keys, s.Processes, s.Bytes>>20)
	if canaries == 0 || keys == 0 {
		return fmt.Errorf("the search of memory does not work: %d canaries and %d keys found while the key is enabled", canaries, keys)
	}
	return nil
}

// memoryIsClean searches until nothing is found; there must be nothing after the bound.
func (w *world) memoryIsClean(ctx context.Context, set *memscan.Set, since time.Time) error {
	for {
		began := time.Since(since)
		s, err := w.scan(set)
		if err != nil {
			return err
		}
		if len(s.Hits) == 0 && len(s.Unread) == 0 {
			w.logf("memory is clean, %.1fs after", began.Seconds())
			return nil
		}
		if began > bound+slack {
			// The round goes on: that the data comes back is worth knowing all the same.
			w.t.Errorf("%.1fs after the key was taken away, memory still holds %d things:\n%v", began.Seconds(), len(s.Hits), firstOf(s))
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(300 * time.Millisecond):
		}
	}
}

// firstOf shows one hit of each name and process.
func firstOf(s *memscan.Scanner) string {
	var b strings.Builder
	seen := make(map[string]bool)
	for _, h := range s.Hits {
		if who := fmt.Sprint(h.Name, h.PID); !seen[who] {
			seen[who] = true
			fmt.Fprintf(&b, "\t%v\n", h)
		}
	}
	for _, u := range s.Unread {
		fmt.Fprintf(&b, "\tnot searched: %s\n", u)
	}
	return b.String()
}
