// Package keycli uses the customer's key as its operators do: by the command line, against a cluster of `holdfast up`.
package keycli

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/holdfastdb/holdfast/test/cluster"
	"github.com/holdfastdb/holdfast/test/testenv"
)

func start(t *testing.T, ctx context.Context) *cluster.Cluster {
	t.Helper()
	testenv.NeedPostgres(t)
	testenv.NeedFUSE(t)
	if testing.Short() {
		t.Skip("runs a cluster")
	}
	c := cluster.ForTest(t, cluster.Options{Dir: testenv.TempDir(t)})
	if err := c.Start(ctx); err != nil {
		t.Fatal(err)
	}
	return c
}

// operator types commands.
type operator struct {
	t   *testing.T
	ctx context.Context
	c   *cluster.Cluster
}

// says runs a command that must succeed and print each of want.
func (o operator) says(command string, want ...string) string {
	o.t.Helper()
	out, err := o.c.CLI(o.ctx, strings.Fields(command)...)
	o.t.Logf("holdfast %s\n%s", command, out)
	if err != nil {
		o.t.Fatal(err)
	}
	for _, w := range want {
		if !strings.Contains(out, w) {
			o.t.Errorf("holdfast %s does not say %q", command, w)
		}
	}
	return out
}

// refuses runs a command that must fail and say each of want.
func (o operator) refuses(command string, want ...string) {
	o.t.Helper()
	out, err := o.c.CLI(o.ctx, strings.Fields(command)...)
	if err == nil {
		o.t.Errorf("holdfast %s succeeded:\n%s", command, out)
		return
	}
	o.t.Logf("holdfast %s\n%s%v", command, out, err)
	for _, w := range want {
		if !strings.Contains(err.Error(), w) {
			o.t.Errorf("holdfast %s: %v; want %q", command, err, w)
		}
	}
}

// sql runs a statement on a branch's endpoint, and gives what psql prints.
func (o operator) sql(endpoint, statement string) (string, error) {
	out, err := o.c.CLI(o.ctx, "psql", endpoint, "--", "-X", "-A", "-t", "-c", statement)
	return strings.TrimSpace(out), err
}

// answers runs a statement until it is answered: an endpoint comes back by itself.
func (o operator) answers(endpoint, statement, want string) {
	o.t.Helper()
	for {
		got, err := o.sql(endpoint, statement)
		switch {
		case err == nil && got == want:
			return
		case err == nil:
			o.t.Errorf("%s on %s: %q, want %q", statement, endpoint, got, want)
			return
		case o.ctx.Err() != nil:
			o.t.Fatalf("%s on %s: %v", statement, endpoint, err)
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// silent fails if an endpoint answers.
func (o operator) silent(endpoint string, words ...string) {
	o.t.Helper()
	got, err := o.sql(endpoint, "SELECT count(*) FROM pg_class")
	if err == nil {
		o.t.Errorf("endpoint %s answers %q under a revoked key", endpoint, got)
		return
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			o.t.Errorf("endpoint %s is refused with %v, want %q", endpoint, err, w)
		}
	}
}

// states reads `holdfast key status --json`, by key: "project" is the project's.
func (o operator) states() map[string]string {
	o.t.Helper()
	var list struct{ Keys []struct{ Key, State string } }
	out, err := o.c.CLI(o.ctx, "key", "status", "--json")
	if err == nil {
		err = json.Unmarshal([]byte(out), &list)
	}
	if err != nil {
		o.t.Fatal(err)
	}
	states := make(map[string]string)
	for _, k := range list.Keys {
		name := "project"
		if strings.Contains(k.Key, "/") {
			name = "branch"
		}
		states[name] = k.State
	}
	return states
}

func TestKeysByTheCommandLine(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	o := operator{t, ctx, start(t, ctx)}
	o.says("key status", "active since", "HELD BY", "pageserver", "compute/main", "bound")
	o.answers("main", "CREATE TABLE a AS SELECT generate_series(1, 1000) AS i; SELECT count(*) FROM a", "SELECT 1000\n1000")
	o.says("branch create reports --own-key", "reports (running)", "its own")
	o.answers("reports", "CREATE TABLE b AS SELECT generate_series(1, 500) AS i; SELECT count(*) FROM b", "SELECT 500\n500")

	t.Run("a branch alone", func(t *testing.T) {
		o := operator{t, ctx, o.c}
		o.says("key revoke --branch reports --reason audit", "is held back from now on", "receipt ", "held: audit", "compute/reports", "Postgres", "complete:")
		o.silent("reports")
		o.answers("main", "SELECT count(*) FROM a", "1000")
		if s := o.states(); s["project"] != "active" || s["branch"] != "revoked" {
			t.Errorf("states %v, want the branch's alone revoked", s)
		}
		o.says("key status --branch reports", "revoked since", "holdfast key resume", "no node")
		o.says("key receipts --branch reports --verify", "held", "yes", "verified: ")
		o.says("status", "revoked since", "active since")
		o.says("key resume --branch reports")
		o.answers("reports", "SELECT count(*) FROM b", "500")
	})
	t.Run("the project", func(t *testing.T) {
		o := operator{t, ctx, o.c}
		o.refuses("key revoke --branch main", "no key of its own")
		o.says("key revoke", "complete:", "compute/main")
		o.silent("main")
		o.answers("reports", "SELECT count(*) FROM b", "500") // its key is another
		o.says("key resume")
		o.answers("main", "SELECT count(*) FROM a", "1000")
		o.says("key receipts --verify", "verified: ")
	})
	t.Run("in the KMS", func(t *testing.T) {
		o := operator{t, ctx, o.c}
		o.says("kms disable dev", "disabled")
		for o.states()["project"] != "revoked" {
			time.Sleep(100 * time.Millisecond)
		}
		o.silent("main")
		o.says("key status", "development KMS key dev")
		o.says("kms enable dev", "enabled")
		o.answers("main", "SELECT count(*) FROM a", "1000")
		o.answers("reports", "SELECT count(*) FROM b", "500")
	})
	t.Run("grace", func(t *testing.T) {
		o := operator{t, ctx, o.c}
		o.says("key grace 90s", "1m30s")
		o.says("key grace", "1m30s")
	})
	t.Run("versions", func(t *testing.T) {
		o := operator{t, ctx, o.c}
		o.says("key versions", "DEKs of layers", "new DEKs", "dev version 1")
		o.refuses("key retire 1", "current one")
		o.says("key rotate", "wrapped again: ", "none of data", "holdfast key retire 1")
		o.refuses("key retire 2", "current one")
		for {
			out, err := o.c.CLI(ctx, "key", "retire", "1") // refused while what is under way may need it
			if err == nil {
				t.Log(out)
				break
			}
			if !strings.Contains(err.Error(), "try again") {
				t.Fatal(err)
			}
			time.Sleep(time.Second)
		}
		o.says("kms rotate dev", "2")
		o.says("key rotate-cmk", "calls of the KMS: ")
		o.says("kms create other", "other")
		o.says("key change --cmk other", "under CMK other")
		o.says("key versions", "other version 1")
		o.says("kms disable dev") // the project does not need it any more; the branch does
		for o.states()["branch"] != "revoked" {
			time.Sleep(100 * time.Millisecond)
		}
		o.answers("main", "INSERT INTO a VALUES (0); SELECT count(*) FROM a", "INSERT 0 1\n1001")
		o.says("kms enable dev")
		o.answers("reports", "SELECT count(*) FROM b", "500")
	})
	t.Run("deleted", func(t *testing.T) {
		o := operator{t, ctx, o.c}
		o.says("kms disable dev") // no key is needed for that
		o.says("branch delete reports", "is deleted")
		o.refuses("key status --branch reports", "no branch")
		if s := o.states(); len(s) != 1 || s["project"] != "active" {
			t.Errorf("states %v, want the project's alone", s)
		}
		o.answers("main", "SELECT count(*) FROM a", "1001")
	})
}

func TestRehearsal(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	o := operator{t, ctx, start(t, ctx)}
	o.answers("main", "CREATE TABLE a AS SELECT generate_series(1, 1000) AS i; SELECT count(*) FROM a", "SELECT 1000\n1000")
	before := len(o.says("branch list"))
	o.says("key rehearse", "FATAL", "acknowledged rows are there", "no other key and no other endpoint noticed", "revoke to all connections ended",
		"revoke to new connections refused", "receipt complete", "resume to the first rows", "published bound")
	o.refuses("key rehearse --wait-for-denial", "name a CMK")
	if after := len(o.says("branch list")); after != before {
		t.Error("a rehearsal left a branch")
	}
	o.nothingIsLeft()
	var doc struct {
		Events []struct {
			Measure string
			TookUS  int64 `json:"took_us,string"`
		}
	}
	if err := json.Unmarshal([]byte(o.says("key rehearse --json")), &doc); err != nil {
		t.Fatal(err)
	}
	measured := 0
	for _, e := range doc.Events {
		if e.Measure != "" && e.TookUS > 0 {
			measured++
		}
	}
	if measured != 5 {
		t.Errorf("%d times were measured, want 5", measured)
	}
	o.nothingIsLeft()
}

// A manager that is killed in the middle of a rehearsal removes the throwaway branch when it starts again.
func TestRehearsalThatIsCutShortLeavesNothing(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	o := operator{t, ctx, start(t, ctx)}
	done := make(chan error, 1)
	go func() {
		_, err := o.c.CLI(ctx, "key", "rehearse")
		done <- err
	}()
	for !strings.Contains(o.document(), "rehearsal-") || !strings.Contains(o.c.Log(), "rehearsal-") { // its endpoint has begun
		time.Sleep(20 * time.Millisecond)
	}
	if err := o.c.KillAll(); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err == nil {
		t.Error("the rehearsal succeeded although the cluster was killed")
	}
	if err := o.c.Start(ctx); err != nil {
		t.Fatal(err)
	}
	for strings.Contains(o.document(), "rehearsal-") { // the test's time bounds it
		time.Sleep(50 * time.Millisecond)
	}
	o.nothingIsLeft()
}

// document is the manager's.
func (o operator) document() string {
	o.t.Helper()
	data, err := os.ReadFile(filepath.Join(o.c.Data, "bucket", "objects", "manager", "cluster.json"))
	if err != nil {
		o.t.Fatal(err)
	}
	return string(data)
}

// nothingIsLeft sees that of other branches than the first there is no object, no key, no endpoint's file and no process.
func (o operator) nothingIsLeft() {
	o.t.Helper()
	s, err := o.c.Status(o.ctx)
	if err != nil {
		o.t.Fatal(err)
	}
	if len(s.Endpoints) != 1 || len(s.Keys) != 1 || len(s.Pageserver.Branches) != 1 {
		o.t.Errorf("left: endpoints %v, keys %v, %d branches at the page server", s.Endpoints, s.Keys, len(s.Pageserver.Branches))
	}
	for _, sk := range s.Safekeepers {
		if len(sk.Branches) != 1 {
			o.t.Errorf("left: %d branches at safekeeper %s", len(sk.Branches), sk.NodeID)
		}
	}
	first := s.Endpoints[0].Branch
	for _, dir := range []string{"bucket/objects", "compute", "manager", "pageserver"} {
		err := filepath.WalkDir(filepath.Join(o.c.Data, dir), func(path string, d os.DirEntry, err error) error {
			if err != nil {
				return err
			}
			if d.IsDir() && d.Name() == "mnt" {
				return filepath.SkipDir // the first endpoint's own
			}
			branch := strings.Contains(path, "/branches/") && !strings.Contains(path, first)
			if !d.IsDir() && branch || strings.Contains(path, "rehearsal") {
				o.t.Errorf("left: %s", path)
			}
			return nil
		})
		if err != nil {
			o.t.Error(err)
		}
	}
}
