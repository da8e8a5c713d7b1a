// Package badinput damages what Holdfast reads, fills the disks it writes to and misuses its
// command line: each time there must be an error that names the object, nothing may be
// lost, and when the cause is gone everything must work again.
package badinput

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"sort"
	"strings"
	"testing"
	"time"

	"github.com/holdfastdb/holdfast/test/cluster"
	"github.com/holdfastdb/holdfast/test/ledger"
	"github.com/holdfastdb/holdfast/test/proc"
	"github.com/holdfastdb/holdfast/test/testenv"
)

const caseTimeout = 4 * time.Minute

func needCluster(t *testing.T) {
	t.Helper()
	testenv.NeedPostgres(t)
	testenv.NeedFUSE(t)
	if testing.Short() {
		t.Skip("runs a cluster")
	}
}

// filesBelow lists the regular files whose path below root matches, the largest first.
func filesBelow(t *testing.T, root, pattern string) []string {
	t.Helper()
	re := regexp.MustCompile(pattern)
	size := make(map[string]int64)
	var files []string
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		if !d.Type().IsRegular() || !re.MatchString(rel) {
			return nil
		}
		st, err := d.Info()
		if err == nil && st.Size() > 0 {
			size[path] = st.Size()
			files = append(files, path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(files) == 0 {
		t.Fatalf("no file below %s matches %s", root, pattern)
	}
	sort.Slice(files, func(i, j int) bool { return size[files[i]] > size[files[j]] })
	return files
}

// rewrite replaces a file's content. Files are replaced, not changed in place, since a
// backup may share them.
func rewrite(t *testing.T, path string, change func([]byte) []byte) {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	st, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, change(data), st.Mode().Perm()); err != nil {
		t.Fatal(err)
	}
}

func flipAt(share float64) func([]byte) []byte {
	return func(b []byte) []byte {
		b[int(float64(len(b)-1)*share)] ^= 0x10
		return b
	}
}

// flipEverywhere spoils every chunk, so that whatever is read is spoiled.
func flipEverywhere(b []byte) []byte {
	for i := 5000; i < len(b); i += 10000 {
		b[i] ^= 0x10
	}
	return b
}

// otherDEK replaces a layer's wrapped DEK in the manifest, under a checksum that is right.
func otherDEK(b []byte) []byte {
	head, body, _ := bytes.Cut(b, []byte("\n"))
	re := regexp.MustCompile(`("[Ww]rapped[^"]*":\s*")([^"]{20})`)
	body = re.ReplaceAllFunc(body, func(m []byte) []byte {
		last := &m[len(m)-1]
		if *last = 'A'; m[len(m)-2] == 'A' {
			*last = 'B'
		}
		m[len(m)-2] ^= 1
		if m[len(m)-2] < '0' || m[len(m)-2] > 'z' {
			m[len(m)-2] = 'C'
		}
		return m
	})
	sum := sha256.Sum256(body)
	head = append(head[:len(head)-64], hex.EncodeToString(sum[:])...)
	return append(append(head, '\n'), body...)
}

func truncate(b []byte) []byte { return b[:len(b)/2] }

// damage is one way to spoil a stopped cluster.
type damage struct {
	name string
	do   func(t *testing.T, c *cluster.Cluster)
	// says is what the logs or the failing query must say.
	says string
	// goesOn: the cluster must work in spite of it.
	goesOn bool
}

const layers = `^objects/projects/.*/layers/`

func eachLayer(change func([]byte) []byte) func(*testing.T, *cluster.Cluster) {
	return func(t *testing.T, c *cluster.Cluster) {
		for _, f := range filesBelow(t, c.Dir("bucket"), layers) {
			rewrite(t, f, change)
		}
		forgetLocalCopies(t, c)
	}
}

// forgetLocalCopies makes the pageserver read the bucket.
func forgetLocalCopies(t *testing.T, c *cluster.Cluster) {
	if err := os.RemoveAll(c.Dir(cluster.Pageserver)); err != nil {
		t.Fatal(err)
	}
}

func oneFile(root, pattern string, change func([]byte) []byte) func(*testing.T, *cluster.Cluster) {
	return func(t *testing.T, c *cluster.Cluster) {
		rewrite(t, filesBelow(t, c.Dir(root), pattern)[0], change)
	}
}

func raftLog(ids ...int) func(*testing.T, *cluster.Cluster) {
	return func(t *testing.T, c *cluster.Cluster) {
		for _, id := range ids {
			for _, f := range filesBelow(t, c.Dir(cluster.Safekeeper(id)), `.`) {
				rewrite(t, f, flipAt(0.3))
			}
		}
	}
}

var damages = []damage{
	{name: "a flipped bit in each chunk of each layer", do: eachLayer(flipEverywhere), says: `layers/[0-9a-f]`},
	{name: "a changed wrapped DEK of each layer", says: `(?i)DEK|key|manifest`, do: func(t *testing.T, c *cluster.Cluster) {
		rewrite(t, filesBelow(t, c.Dir("bucket"), `/manifest$`)[0], otherDEK)
		forgetLocalCopies(t, c)
	}},
	{name: "each layer truncated", do: eachLayer(truncate), says: `layers/[0-9a-f]`},
	{name: "two layers swapped", says: `layers/[0-9a-f]`, do: func(t *testing.T, c *cluster.Cluster) {
		files := filesBelow(t, c.Dir("bucket"), layers)
		if len(files) < 2 {
			t.Fatalf("there is only %v", files)
		}
		a, err := os.ReadFile(files[0])
		if err != nil {
			t.Fatal(err)
		}
		var b []byte
		rewrite(t, files[1], func(old []byte) []byte { b = old; return a })
		rewrite(t, files[0], func([]byte) []byte { return b })
		forgetLocalCopies(t, c)
	}},
	{name: "a flipped bit in the manifest", do: oneFile("bucket", `/manifest$`, flipAt(0.5)), says: `manifest`},
	{name: "the manifest truncated", do: oneFile("bucket", `/manifest$`, truncate), says: `manifest`},
	{name: "a flipped bit in the KEK's document", do: oneFile("bucket", `^objects/projects/[^/]+/keys\.json$`, flipAt(0.5)), says: `(?i)KEK|key`},
	{name: "the KMS's keys damaged", do: oneFile("kms", `keys\.json$`, truncate), says: `keys\.json`},
	{name: "the cluster's document damaged", do: oneFile("bucket", `manager/cluster\.json$`, truncate), says: `cluster\.json`},
	{name: "a flipped bit in every file of one safekeeper", do: raftLog(2), says: `safekeeper2`, goesOn: true},
	{name: "a flipped bit in every file of two safekeepers", do: raftLog(1, 3), says: `safekeeper[13]`},
}

// copyTree copies a stopped cluster's folder, modes and owners included.
func copyTree(t *testing.T, from, to string) {
	t.Helper()
	if err := proc.RemoveAll(to); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("cp", "-a", from, to).CombinedOutput(); err != nil {
		t.Fatalf("copying %s: %v: %s", from, err, out)
	}
}

func TestDamageIsNamedAndNothingIsLost(t *testing.T) {
	needCluster(t)
	ctx, cancel := context.WithTimeout(t.Context(), time.Duration(len(damages))*caseTimeout)
	defer cancel()
	dir := testenv.TempDir(t)
	c := cluster.ForTest(t, cluster.Options{Dir: dir, Separate: true})
	if err := c.Start(ctx); err != nil {
		t.Fatal(err)
	}
	l, err := ledger.New(ctx, ledger.Config{Target: c.Target(), Seed: 6})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	l.Start()
	for range 10 { // enough for more than one layer
		if err := l.Bulk(ctx); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.WaitAcked(ctx, 300); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Check(ctx); err != nil {
		t.Fatal(err)
	}
	if err := c.Stop(); err != nil {
		t.Fatal(err)
	}
	backup := filepath.Join(dir, "backup")
	copyTree(t, c.Data, backup)
	for _, d := range damages {
		t.Run(d.name, func(t *testing.T) {
			caseCtx, cancel := context.WithTimeout(ctx, caseTimeout)
			defer cancel()
			copyTree(t, backup, c.Data)
			if err := os.RemoveAll(c.LogDir()); err != nil {
				t.Fatal(err)
			}
			if err := os.MkdirAll(c.LogDir(), 0o700); err != nil {
				t.Fatal(err)
			}
			d.do(t, c)
			said := tryAll(caseCtx, t, c, l, d)
			if !regexp.MustCompile(d.says).MatchString(said) {
				t.Errorf("nothing said %q; what was said:\n%s", d.says, tail(said))
			}
			if strings.Contains(said, "panic:") || strings.Contains(said, "goroutine 1 [") {
				t.Errorf("a process panicked:\n%s", tail(said))
			}
			if err := c.KillAll(); err != nil {
				t.Error(err)
			}
			// The cause is gone.
			copyTree(t, backup, c.Data)
			if err := c.Start(caseCtx); err != nil {
				t.Fatalf("after the repair: %v", err)
			}
			if _, err := l.Check(caseCtx); err != nil {
				t.Errorf("after the repair: %v", err)
			}
			if err := c.KillAll(); err != nil {
				t.Error(err)
			}
		})
	}
}

// tryAll starts the damaged cluster and reads everything; it returns what was said.
func tryAll(ctx context.Context, t *testing.T, c *cluster.Cluster, l *ledger.Ledger, d damage) string {
	t.Helper()
	said := func(err error) string { return c.Log() + "\n" + err.Error() }
	if err := c.Launch(); err != nil {
		return said(err)
	}
	bounded, cancel := context.WithTimeout(ctx, 25*time.Second)
	defer cancel()
	if d.goesOn {
		bounded = ctx
	}
	err := waitReadyWithout(bounded, c)
	if err == nil {
		_, err = l.Check(bounded)
	}
	switch {
	case err != nil && d.goesOn:
		t.Errorf("the cluster did not go on: %v", err)
	case err == nil && !d.goesOn:
		t.Errorf("everything could be read in spite of the damage")
	}
	if status, statusErr := c.CLI(ctx, "status"); statusErr == nil {
		err = errors.Join(err, errors.New(status))
	} else {
		err = errors.Join(err, statusErr)
	}
	return said(errors.Join(err, errors.New("end")))
}

// waitReadyWithout waits for SQL even if some processes ended: one safekeeper may refuse
// to run on damaged files.
func waitReadyWithout(ctx context.Context, c *cluster.Cluster) error {
	for {
		conn, err := c.Target().Connect(ctx)
		if err == nil {
			return conn.Close(ctx)
		}
		select {
		case <-ctx.Done():
			return errors.Join(err, ctx.Err())
		case <-time.After(100 * time.Millisecond):
		}
	}
}

func tail(s string) string {
	const most = 6000
	if len(s) > most {
		return s[len(s)-most:]
	}
	return s
}
