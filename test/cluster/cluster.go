// Package cluster runs Holdfast as its users do: the binary, its command line and its
// configuration files, and nothing of its insides. A cluster is either one `holdfast up`,
// or every role in a process of its own, so that each can be killed alone.
package cluster

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/holdfastdb/holdfast/internal/config"
	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/test/pgtools"
	"github.com/holdfastdb/holdfast/test/proc"
)

// Password is the superuser's, in every cluster of this package. No part of it occurs
// anywhere else: it is searched for.
const Password = "kZ3vQ8mT1xW6yB4nR7cJ"

// Options is what a cluster is made of.
type Options struct {
	Dir string // an empty folder, or one of an earlier cluster
	// Separate runs each role in a process of its own.
	Separate bool
	// Settings are postgresql.conf settings of the endpoint.
	Settings map[string]string
	// CacheBytes is the size of the endpoint's local store; 0: the default.
	CacheBytes int64
	// HistoryBytes is the history window of the pageserver of a separate cluster; 0: the default.
	HistoryBytes int64
	// VerifyRedo has the pageserver of a separate cluster compare what redo makes with the
	// images of wal_consistency_checking.
	VerifyRedo bool
	// VerifyPages has the endpoint of a separate cluster compare the pages that it wrote with
	// the pageserver's: see PageChecks.
	VerifyPages bool
	// KMS are the services that a separate cluster's key manager asks, and CMK is the first
	// project's key; empty: the development KMS and its key.
	KMS config.KMS
	CMK string
	// KeymgrFor is the address by which a role of a separate cluster reaches the key manager, so that
	// a test can stand between them; nil: the key manager's own. Endpoints use the manager's.
	KeymgrFor func(role string) string
}

// Cluster is a cluster that runs or can run.
type Cluster struct {
	Data string // the data directory
	Port int    // of the endpoint
	opts Options
	bin  string

	procs map[string]*process // by role; "up" is the whole
}

type process struct {
	cmd  *exec.Cmd
	done chan struct{}
	err  error // valid once done is closed
}

// The roles of a separate cluster, in the order of their start.
const (
	Keymgr     = "keymgr"
	Pageserver = "pageserver"
	Manager    = "manager"
	up         = "up"
)

// Safekeeper names the safekeeper of an id.
func Safekeeper(id int) string { return fmt.Sprintf("safekeeper%d", id) }

// Roles lists the roles in the order in which they start.
func Roles() []string {
	return []string{Keymgr, Safekeeper(1), Safekeeper(2), Safekeeper(3), Pageserver, Manager}
}

// How long parts may take. None is a target: a loaded machine must not fail a test.
const (
	readyTimeout = 3 * time.Minute
	cliTimeout   = 3 * time.Minute
	stopTimeout  = 90 * time.Second
	leftTimeout  = 30 * time.Second
)

var build struct {
	sync.Once
	bin string
	err error
}

// Binary is the program under test: $HOLDFAST_BIN, or one built from this tree.
func Binary() (string, error) {
	if bin := os.Getenv("HOLDFAST_BIN"); bin != "" {
		return filepath.Abs(bin)
	}
	build.Do(func() {
		dir, err := os.MkdirTemp("", "holdfast-bin-")
		if err != nil {
			build.err = err
			return
		}
		build.bin = filepath.Join(dir, "holdfast")
		out, err := exec.Command("go", "build", "-o", build.bin, "github.com/holdfastdb/holdfast/cmd/holdfast").CombinedOutput()
		if err != nil {
			build.err = fmt.Errorf("building holdfast: %w\n%s", err, out)
		}
	})
	return build.bin, build.err
}

// New prepares a cluster; Start runs it.
func New(o Options) (*Cluster, error) {
	bin, err := Binary()
	if err != nil {
		return nil, err
	}
	port, err := pgtools.FreePort()
	if err != nil {
		return nil, err
	}
	c := &Cluster{Data: filepath.Join(o.Dir, "data"), Port: port, opts: o, bin: bin, procs: make(map[string]*process)}
	if err := os.MkdirAll(c.LogDir(), 0o700); err != nil {
		return nil, err
	}
	if err := os.Chmod(c.Data, 0o711); err != nil {
		return nil, err
	}
	if err := os.WriteFile(c.passwordFile(), []byte(Password+"\n"), 0o600); err != nil {
		return nil, err
	}
	if o.Separate {
		return c, c.prepareSeparate()
	}
	return c, nil
}

// passwordFile is outside the data directory: it is the user's.
func (c *Cluster) passwordFile() string { return filepath.Join(c.opts.Dir, "password") }

// LogDir is where the roles' own output goes.
func (c *Cluster) LogDir() string { return filepath.Join(c.Data, "log") }

// Socket is a role's address; tests' folders leave it short enough.
func (c *Cluster) Socket(role string) string { return "unix:" + filepath.Join(c.Data, "run", role) }

// Dir is a role's folder.
func (c *Cluster) Dir(role string) string { return filepath.Join(c.Data, role) }

// ConfigFile is a role's configuration in a separate cluster.
func (c *Cluster) ConfigFile(role string) string {
	return filepath.Join(c.opts.Dir, "config", role+".yaml")
}

// Target is how to reach the endpoint.
func (c *Cluster) Target() pgtools.Target {
	return pgtools.Target{Host: "127.0.0.1", Port: c.Port, User: "postgres", Password: Password, Database: "postgres"}
}

func (c *Cluster) prepareSeparate() error {
	if err := os.MkdirAll(filepath.Dir(c.ConfigFile("x")), 0o700); err != nil {
		return err
	}
	bucket, kms := filepath.Join(c.Data, "bucket"), filepath.Join(c.Data, "kms", "keys.json")
	localKMS := kms
	if c.opts.CMK != "" {
		localKMS = ""
	}
	keymgr := c.opts.KeymgrFor
	if keymgr == nil {
		keymgr = func(string) string { return c.Socket(Keymgr) }
	}
	peers := make(map[uint64]string)
	var addrs []string
	for id := 1; id <= 3; id++ {
		peers[uint64(id)] = c.Socket(Safekeeper(id))
		addrs = append(addrs, c.Socket(Safekeeper(id)))
	}
	configs := map[string]any{
		Keymgr: &config.Keymgr{Listen: c.Socket(Keymgr), Dir: c.Dir(Keymgr), Bucket: bucket, LocalKMS: localKMS, KMS: c.opts.KMS},
		Pageserver: &config.Pageserver{Node: Pageserver, Listen: c.Socket(Pageserver), Dir: c.Dir(Pageserver), Bucket: bucket,
			Keymgr: keymgr(Pageserver), Safekeepers: addrs, HistoryBytes: c.opts.HistoryBytes, VerifyRedo: c.opts.VerifyRedo},
		Manager: &config.Manager{Listen: c.Socket(Manager), Dir: c.Dir(Manager), ComputeDir: c.Dir("compute"), LogDir: c.LogDir(), Bucket: bucket,
			Keymgr: keymgr(Manager), Safekeepers: addrs, Pageserver: c.Socket(Pageserver), CMK: cmp.Or(c.opts.CMK, "dev"),
			EndpointListen: fmt.Sprintf("127.0.0.1:%d", c.Port), PasswordFile: c.passwordFile(),
			Settings: c.opts.Settings, CacheBytes: c.opts.CacheBytes, VerifyPages: c.opts.VerifyPages},
	}
	for id := 1; id <= 3; id++ {
		configs[Safekeeper(id)] = &config.Safekeeper{ID: uint64(id), Listen: c.Socket(Safekeeper(id)), Dir: c.Dir(Safekeeper(id)),
			Bucket: bucket, Keymgr: keymgr(Safekeeper(id)), Peers: peers}
	}
	for role, cfg := range configs {
		if err := config.Save(c.ConfigFile(role), cfg); err != nil {
			return err
		}
	}
	if _, err := os.Stat(kms); err == nil || localKMS == "" {
		return nil
	}
	if _, err := c.CLI(context.Background(), "kms", "create", "dev"); err != nil {
		return fmt.Errorf("making the development KMS's key: %w", err)
	}
	return nil
}

func (c *Cluster) command(name string, args ...string) (*process, error) {
	log, err := os.OpenFile(filepath.Join(c.LogDir(), name+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	p := &process{cmd: exec.Command(c.bin, args...), done: make(chan struct{})}
	p.cmd.Stdout, p.cmd.Stderr = log, log
	if err := proc.Start(p.cmd); err != nil {
		return nil, err
	}
	go func() { p.err = p.cmd.Wait(); close(p.done) }()
	return p, nil
}

// StartRole starts one process of a separate cluster; it does not wait until it serves.
func (c *Cluster) StartRole(role string) error {
	if p := c.procs[role]; p != nil {
		return fmt.Errorf("%s runs already, as process %d", role, p.cmd.Process.Pid)
	}
	kind := role
	if strings.HasPrefix(role, "safekeeper") {
		kind = "safekeeper"
	}
	p, err := c.command(role, kind, "--config", c.ConfigFile(role))
	if err != nil {
		return err
	}
	c.procs[role] = p
	return nil
}

// Launch starts the whole cluster and does not wait.
func (c *Cluster) Launch(args ...string) error {
	if !c.opts.Separate {
		base := []string{"up", "--data", c.Data, "--listen", fmt.Sprintf("127.0.0.1:%d", c.Port), "--password-file", c.passwordFile()}
		for _, k := range sortedKeys(c.opts.Settings) {
			base = append(base, "--set", k+"="+c.opts.Settings[k])
		}
		if c.opts.CacheBytes > 0 {
			base = append(base, "--cache-size", fmt.Sprint(c.opts.CacheBytes))
		}
		p, err := c.command(up, append(base, args...)...)
		if err != nil {
			return err
		}
		c.procs[up] = p
		return nil
	}
	for _, role := range Roles() {
		if c.procs[role] == nil {
			if err := c.StartRole(role); err != nil {
				return err
			}
		}
	}
	return nil
}

func sortedKeys(m map[string]string) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}

// Start starts the whole cluster and waits until SQL is answered.
func (c *Cluster) Start(ctx context.Context) error {
	if err := c.Launch(); err != nil {
		return err
	}
	return c.WaitReady(ctx)
}

// WaitReady waits until the endpoint answers SQL. It gives up when a process ends.
func (c *Cluster) WaitReady(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, readyTimeout)
	defer cancel()
	for {
		attempt, cancelAttempt := context.WithTimeout(ctx, 30*time.Second)
		err := c.Target().Exec(attempt, "SELECT 1")
		cancelAttempt()
		if err == nil {
			return nil
		}
		for role, p := range c.procs {
			select {
			case <-p.done:
				return fmt.Errorf("%s ended (%v); its log ends:\n%s", role, p.err, c.LogTail(role))
			default:
			}
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("the endpoint did not become ready: %w\n%s", errors.Join(err, ctx.Err()), c.Logs())
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// LogTail is the end of what a role has written.
func (c *Cluster) LogTail(role string) string {
	data, err := os.ReadFile(filepath.Join(c.LogDir(), role+".log"))
	if err != nil {
		return err.Error()
	}
	const most = 3000
	if len(data) > most {
		data = data[len(data)-most:]
	}
	return string(data)
}

// Log is all that has been written to every log file.
func (c *Cluster) Log() string {
	files, _ := filepath.Glob(filepath.Join(c.LogDir(), "*"))
	var b strings.Builder
	for _, f := range files {
		data, err := os.ReadFile(f)
		if err == nil {
			b.Write(data)
		}
	}
	return b.String()
}

// PageCheck is what one life of the endpoint compared with the pageserver.
type PageCheck struct {
	Whole                bool // it ended in order, and all that was left was compared
	Compared, Mismatched int64
	Left                 int64  // pages that left the local store
	Line                 string // as it is in the log
}

var pageCheck = regexp.MustCompile(`msg="pages were compared with the page server's" .*whole=(\w+) compared=(\d+) mismatched=(\d+) .*left=(\d+)`)

// PageChecks lists what the endpoint's lives that have ended compared (Options.VerifyPages).
func (c *Cluster) PageChecks() (list []PageCheck) {
	for line := range strings.Lines(c.Log()) {
		m := pageCheck.FindStringSubmatch(line)
		if m == nil {
			continue
		}
		p := PageCheck{Whole: m[1] == "true", Line: strings.TrimSpace(line)}
		p.Compared, _ = strconv.ParseInt(m[2], 10, 64) // digits
		p.Mismatched, _ = strconv.ParseInt(m[3], 10, 64)
		p.Left, _ = strconv.ParseInt(m[4], 10, 64)
		list = append(list, p)
	}
	return list
}

// Logs is the end of every log, for a failure's message.
func (c *Cluster) Logs() string {
	files, _ := filepath.Glob(filepath.Join(c.LogDir(), "*.log"))
	var b strings.Builder
	for _, f := range files {
		role := strings.TrimSuffix(filepath.Base(f), ".log")
		if t := c.LogTail(role); t != "" {
			fmt.Fprintf(&b, "--- %s\n%s", role, t)
		}
	}
	return b.String()
}

// CLI runs the operator's command line against the cluster.
func (c *Cluster) CLI(ctx context.Context, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, cliTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, c.bin, append([]string{"--data", c.Data}, args...)...)
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("holdfast %s: %w: %s", strings.Join(args, " "), errors.Join(err, ctx.Err()), strings.TrimSpace(errOut.String()))
	}
	return out.String(), nil
}

// Kill kills one role's process with SIGKILL and waits for its end.
func (c *Cluster) Kill(role string) error { return c.end(role, syscall.SIGKILL) }

// StopRole ends one role's process in order.
func (c *Cluster) StopRole(role string) error { return c.end(role, syscall.SIGTERM) }

func (c *Cluster) end(role string, sig syscall.Signal) error {
	p := c.procs[role]
	if p == nil {
		return fmt.Errorf("%s does not run", role)
	}
	delete(c.procs, role)
	_ = p.cmd.Process.Signal(sig) // it may be gone already: done tells
	select {
	case <-p.done:
		return nil
	case <-time.After(stopTimeout):
		_ = p.cmd.Process.Kill()
		return fmt.Errorf("%s did not end within %v of %v\n%s", role, stopTimeout, sig, c.LogTail(role))
	}
}

// KillAll kills every process with SIGKILL at once, and waits until nothing of the cluster
// is left: an agent's Postgres must not outlive it.
func (c *Cluster) KillAll() error {
	for _, p := range c.procs {
		_ = p.cmd.Process.Kill()
	}
	var errs []error
	for role := range c.procs {
		errs = append(errs, c.Kill(role))
	}
	return errors.Join(append(errs, c.waitNone())...)
}

func (c *Cluster) waitNone() error {
	if err := proc.WaitNone(c.opts.Dir, leftTimeout); err != nil {
		return fmt.Errorf("after the end of the cluster: %w", err)
	}
	return nil
}

// Stop ends the cluster in order.
func (c *Cluster) Stop() error {
	var errs []error
	for _, role := range slices.Backward(append(Roles(), up)) {
		if c.procs[role] != nil {
			errs = append(errs, c.StopRole(role))
		}
	}
	return errors.Join(append(errs, c.waitNone())...)
}

// Wait waits for the end of `holdfast up`, or of a role.
func (c *Cluster) Wait(ctx context.Context, role string) error {
	p := c.procs[role]
	if p == nil {
		return fmt.Errorf("%s does not run", role)
	}
	select {
	case <-p.done:
		delete(c.procs, role)
		return p.err
	case <-ctx.Done():
		return fmt.Errorf("waiting for the end of %s: %w", role, ctx.Err())
	}
}

// PID is a role's process, 0 if it does not run. In a single process every role is "up".
func (c *Cluster) PID(role string) int {
	p := c.procs[role]
	if p == nil {
		p = c.procs[up]
	}
	if p == nil {
		return 0
	}
	return p.cmd.Process.Pid
}

// Exited tells whether a role's process has ended by itself.
func (c *Cluster) Exited(role string) bool {
	p := c.procs[role]
	if p == nil {
		return false
	}
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

// Running tells whether a role's process runs.
func (c *Cluster) Running(role string) bool { return c.procs[role] != nil }

// Status is what `holdfast status --json` prints.
type Status struct {
	Endpoints []struct {
		Name, Project, Branch, State, URL, Epoch, PID, Error string
	}
	Safekeepers []struct {
		NodeID   string `json:"node_id"`
		Groups   []struct{ Group, Term, Leader, Commit, Applied string }
		Branches []struct {
			Branch     string
			StartLSN   pg.LSN `json:"start_lsn,string"`
			EndLSN     pg.LSN `json:"end_lsn,string"`
			DurableLSN pg.LSN `json:"durable_lsn,string"`
		}
		DiskBytes string `json:"disk_bytes"`
	}
	Pageserver struct {
		Branches []struct {
			Branch      string
			IngestedLSN pg.LSN `json:"ingested_lsn,string"`
			DurableLSN  pg.LSN `json:"durable_lsn,string"`
			Layers      string
			LayerBytes  string `json:"layer_bytes"`
			MemoryBytes string `json:"memory_bytes"`
			Error       string
			RedoChecks  []RedoCheck `json:"redo_checks"`
		}
	}
	Keys []struct {
		Project string
		Status  struct{ State string }
	}
	Errors []string
}

// RedoCheck is how often one kind of record was compared with what PostgreSQL made of it.
type RedoCheck struct {
	Record, First               string
	Checked, Mismatches, Failed uint64 `json:",string"`
}

// Status asks the cluster how it is.
func (c *Cluster) Status(ctx context.Context) (*Status, error) {
	out, err := c.CLI(ctx, "status", "--json")
	if err != nil {
		return nil, err
	}
	var s Status
	if err := json.Unmarshal([]byte(out), &s); err != nil {
		return nil, fmt.Errorf("holdfast status --json: %w", err)
	}
	return &s, nil
}

// Leader is the safekeeper that leads the branch's group. It waits until there is one.
func (c *Cluster) Leader(ctx context.Context) (string, error) {
	for {
		s, err := c.Status(ctx)
		if err == nil {
			for _, sk := range s.Safekeepers {
				for _, g := range sk.Groups {
					if g.Leader == sk.NodeID && g.Leader != "0" {
						return "safekeeper" + g.Leader, nil
					}
				}
			}
		}
		select {
		case <-ctx.Done():
			return "", fmt.Errorf("no safekeeper leads: %w", errors.Join(err, ctx.Err()))
		case <-time.After(50 * time.Millisecond):
		}
	}
}
