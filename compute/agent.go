package compute

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	"github.com/holdfastdb/holdfast/compute/boot"
	"github.com/holdfastdb/holdfast/compute/history"
	"github.com/holdfastdb/holdfast/compute/pageclient"
	"github.com/holdfastdb/holdfast/compute/pgfs"
	"github.com/holdfastdb/holdfast/compute/pgproc"
	"github.com/holdfastdb/holdfast/compute/scratch"
	"github.com/holdfastdb/holdfast/compute/wal"
	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/auxfile"
	"github.com/holdfastdb/holdfast/internal/dekwire"
	"github.com/holdfastdb/holdfast/internal/hardening"
	"github.com/holdfastdb/holdfast/internal/keyring"
	"github.com/holdfastdb/holdfast/internal/pg"
	"github.com/holdfastdb/holdfast/internal/rpc"
	"github.com/holdfastdb/holdfast/internal/seal"
	"github.com/holdfastdb/holdfast/internal/walclient"
)

// agent is one life of an endpoint. Its parts are opened in the order of the fields and
// closed by end.
type agent struct {
	cfg  Config
	log  *slog.Logger
	user pgproc.User

	// life ends when this compute must not go on, its cause saying why. stopped is the
	// cause when the agent was only asked to end.
	life context.Context
	kill context.CancelCauseFunc
	// dropped is what end has dropped, once shredded is closed.
	dropped  []string
	shredded chan struct{}

	folder   *Folder
	settings *boot.Settings
	keyConn  *grpc.ClientConn
	ring     keyring.Ring
	noShred  func()
	key      atomic.Pointer[pb.KeyStatusResponse] // as it was when the lease was taken
	pageConn *grpc.ClientConn
	pages    *pageclient.Client
	plan     *boot.Plan
	wal      *walclient.Client
	epoch    walclient.Epoch
	appender *walclient.Appender
	writer   *wal.Writer
	history  *history.History // nil: nobody needs WAL of before the start
	aux      auxKeeper
	auxLife  *auxfile.Life // under aux's lock
	fs       *pgfs.FS
	postgres *postgres
	serving  atomic.Pointer[postgres] // postgres, for the mount

	verified bool // all that Postgres left was compared (Config.VerifyPages)

	phases []any // name and duration of each phase of the start
	last   time.Time
}

// errStopped is the cause of a life's end that was asked for.
var errStopped = errors.New("stopped")

// Run runs the endpoint until ctx ends (then Postgres is shut down in order and the result
// is nil) or something ends it. It says on standard output when Postgres takes connections.
func Run(ctx context.Context, cfg Config) error {
	cfg.EnsureDefaults()
	if err := cfg.Validate(); err != nil {
		return err
	}
	hardening.Apply(cfg.Logger)
	a := &agent{cfg: cfg, log: cfg.Logger, last: time.Now()}
	a.aux.seal = func(_ context.Context, changes []auxfile.Change) ([]byte, error) {
		return a.auxLife.Seal(changes)
	}
	a.aux.emit = func(ctx context.Context, message []byte) error {
		if p := a.serving.Load(); p != nil {
			return p.emit(ctx, auxfile.Prefix, message)
		}
		return errNotServing
	}
	a.aux.show = func(name string) ([]byte, error) { return a.fs.ReadFile(name) }
	a.life, a.kill = context.WithCancelCause(context.Background())
	a.shredded = make(chan struct{})
	err := a.run(ctx)
	return errors.Join(err, a.end())
}

func (a *agent) run(ctx context.Context) error {
	// While the start is under way, to be asked to end is to give up.
	giveUp := context.AfterFunc(ctx, func() { a.kill(errStopped) })
	if err := a.start(a.life); err != nil {
		giveUp()
		switch cause := context.Cause(a.life); {
		case errors.Is(cause, errStopped):
			return nil
		case cause != nil:
			return cause
		}
		return err
	}
	if !giveUp() {
		return nil
	}
	if err := a.ready(); err != nil {
		return err
	}
	return a.supervise(ctx)
}

// phase notes how long the part of the start that has just ended took.
func (a *agent) phase(name string) {
	now := time.Now()
	a.phases = append(a.phases, name, now.Sub(a.last).Round(100*time.Microsecond).String())
	a.last = now
}

// start goes through the steps of the package's comment.
func (a *agent) start(ctx context.Context) error {
	for _, step := range []struct {
		name string
		do   func(context.Context) error
	}{
		{"prepare", a.prepare}, {"lease", a.lease}, {"epoch", a.openEpoch}, {"state", a.readState}, {"mount", a.mountAtEnd},
		{"address", a.address},
		{"postgres", a.startPostgres},
	} {
		if err := step.do(ctx); err != nil {
			return err
		}
		a.phase(step.name)
	}
	return nil
}

// address waits for the clients' address, which somebody may hold who answers in our place.
func (a *agent) address(ctx context.Context) error {
	if err := tell("address"); err != nil {
		return fmt.Errorf("telling that the address is needed: %w", err)
	}
	return awaitAddress(ctx, a.cfg.Listen)
}

func (a *agent) prepare(context.Context) (err error) {
	if a.user, err = pgproc.FindUser(); err != nil {
		return err
	}
	agentName, err := agentUser()
	if err != nil {
		return err
	}
	if a.folder, err = OpenFolder(a.cfg.Dir, a.user); err != nil {
		return err
	}
	a.settings = &boot.Settings{Listen: a.cfg.Listen, SocketDir: a.folder.Socket, AgentUser: agentName,
		PrivateShm: pgproc.Isolated(), Extra: a.cfg.ExtraSettings}
	return a.settings.Validate()
}

// lease takes the lease on the project's keys by asking for one; the key itself is not
// used: what this process seals, it seals under its per-boot key. From here on the lease's
// end is Postgres's end (K2).
func (a *agent) lease(ctx context.Context) (err error) {
	if a.keyConn, err = rpc.Dial(a.cfg.KeyManager); err != nil {
		return err
	}
	a.ring = keyring.Open(keyring.Config{Client: dekwire.Client(pb.NewKeyManagerClient(a.keyConn)), Node: "compute/" + a.cfg.Name, Guard: a.guard()})
	a.noShred = a.ring.OnShred(a.cfg.Project, a.cfg.Branch, a.shred)
	key, _, err := a.ring.Generate(ctx, seal.Context{Purpose: seal.PurposeSecret, Project: a.cfg.Project, Branch: a.cfg.Branch, Object: "compute/" + a.cfg.Name})
	if err != nil {
		return fmt.Errorf("taking a lease on the project's keys: %w", err)
	}
	key.Wipe()
	go a.learnKey(a.life)
	return nil
}

// openEpoch fences every older compute of the branch.
func (a *agent) openEpoch(ctx context.Context) (err error) {
	if a.wal, err = walclient.New(a.cfg.Project, a.cfg.Branch, a.cfg.Safekeepers, a.log); err != nil {
		return err
	}
	if a.epoch, err = a.wal.OpenEpoch(ctx, a.cfg.Name); err != nil {
		return fmt.Errorf("opening an epoch at the safekeepers: %w", err)
	}
	a.appender = a.wal.Append(a.epoch.Number, a.epoch.End)
	go func() {
		select {
		case <-a.appender.Done():
			a.kill(a.appendingEnded())
		case <-a.life.Done():
		}
	}()
	return nil
}

func (a *agent) appendingEnded() error {
	err := a.appender.Err()
	switch {
	case errors.Is(err, walclient.ErrFenced):
		return fmt.Errorf("%w: epoch %d: %w", ErrFenced, a.epoch.Number, err)
	case err == nil:
		return errors.New("the stream to the safekeepers was closed")
	}
	return fmt.Errorf("sending WAL to the safekeepers: %w", err)
}

// readState waits until the page server is where the log ends.
func (a *agent) readState(ctx context.Context) (err error) {
	if a.pageConn, err = rpc.Dial(a.cfg.PageServer); err != nil {
		return err
	}
	a.pages = pageclient.New(a.pageConn, a.cfg.Project, a.cfg.Branch, a.log)
	state, err := a.pages.StartupState(ctx, a.epoch.End)
	if err != nil {
		return err
	}
	// The first WAL of the epoch tells the key of this life's messages: before Postgres runs, so
	// that no user can tell another.
	life, key, err := auxfile.NewLife(ctx, a.ring, a.cfg.Project, a.cfg.Branch, a.epoch.Number)
	if err != nil {
		return err
	}
	a.auxLife = life
	in := boot.Input{End: a.epoch.End, State: state, Settings: a.settings, Reset: a.cfg.ResetSettings, First: auxfile.KeyRecord(key), Now: time.Now()}
	if oldest := boot.OldestNeeded(state); oldest != pg.InvalidLSN {
		if in.Page, err = a.openHistory(ctx, oldest, state); err != nil {
			return err
		}
	}
	if a.plan, err = boot.Make(in); err != nil {
		return err
	}
	for _, err := range a.plan.Broken {
		a.log.Error("a replication slot cannot be read, and is dropped: who uses it has to begin anew", "error", err)
	}
	a.aux.begin(state.Files, a.untold())
	return nil
}

// openHistory finds the WAL that replication slots need, and gives what of it stands on the
// page where the log ends.
func (a *agent) openHistory(ctx context.Context, oldest pg.LSN, state *pb.StartupStateResponse) (page []byte, err error) {
	control, err := pg.ParseControlFile(state.ControlFile)
	if err != nil {
		return nil, err
	}
	a.history, err = history.Open(ctx, history.Config{Source: a.wal, Unseal: a.unseal, Oldest: oldest, Start: a.epoch.Start, End: a.epoch.End,
		SystemID: control.SystemID})
	if err != nil {
		return nil, err
	}
	if begin := a.history.Begin(); begin > oldest {
		a.log.Error("a replication slot needs WAL that is held no longer: who uses it will be told that its segment was removed, and has to begin anew",
			"needed", oldest.String(), "held_from", begin.String())
	}
	return a.history.Prefix(ctx)
}

// unseal opens WAL of the branch.
func (a *agent) unseal(ctx context.Context, dst []byte, c *pb.SealedWAL) ([]byte, error) {
	sc := seal.Context{Purpose: seal.PurposeWAL, Project: a.cfg.Project, Branch: a.cfg.Branch, Object: c.Object}
	key, err := a.ring.Open(ctx, sc, c.WrappedDek)
	if err != nil {
		return dst, err
	}
	return seal.OpenWAL(dst, key, sc, pg.LSN(c.BeginLsn), pg.LSN(c.EndLsn), c.Counter, c.Ciphertext)
}

// mountAtEnd commits the fabricated checkpoint and, meanwhile, mounts the data directory.
func (a *agent) mountAtEnd(ctx context.Context) error {
	plan := a.plan
	w, err := wal.NewWriter(a.appender, plan.Begin, plan.Page)
	if err != nil {
		return err
	}
	a.writer = w
	if err := w.Write(plan.Begin, plan.WAL); err != nil {
		return err
	}
	store, err := scratch.Open(a.folder.Scratch, a.ring.Term(a.cfg.Project, a.cfg.Branch))
	if err != nil {
		return err
	}
	remote := a.pages.At(a.epoch.End, a.epoch.Number)
	cfg := pgfs.Config{Mountpoint: a.folder.Mount, Scratch: store, Remote: remote, WAL: w, Aux: a.aux.keep, Fail: a.storeFailed, StartLSN: a.epoch.End,
		UID: a.user.UID, GID: a.user.GID, CacheBytes: a.cfg.CacheBytes, Live: a.live, Log: a.log}
	if a.history != nil {
		cfg.History = a.history.Pages
	}
	if a.cfg.VerifyPages {
		cfg.Past = remote
	}
	a.fs, err = pgfs.New(cfg)
	if err != nil {
		return errors.Join(err, store.Wipe())
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		if err := w.Sync(ctx); err != nil {
			return fmt.Errorf("committing the checkpoint at %v: %w", plan.Checkpoint, err)
		}
		return nil
	})
	g.Go(func() error {
		if err := writePlan(a.fs, plan); err != nil {
			return err
		}
		if a.history != nil {
			if err := a.fs.AddHistory(a.history.Begin(), plan.Begin.PageStart()); err != nil {
				return fmt.Errorf("showing the WAL that replication slots need: %w", err)
			}
		}
		return a.fs.Mount()
	})
	return g.Wait()
}

// storeFailed ends the endpoint: the mount has already ended itself. The lease's end is known to the
// store at once, and to this process a moment later.
func (a *agent) storeFailed(err error) {
	if gone := a.live(); gone != nil {
		err = gone
	}
	a.kill(fmt.Errorf("the endpoint's local store failed: %w", err))
}

// logFolder and logFile are where a superuser finds Postgres's log, sealed like all else.
const (
	logFolder = "log"
	logFile   = logFolder + "/postgresql.log"
)

func writePlan(fs *pgfs.FS, plan *boot.Plan) error {
	for _, dir := range slices.Concat(plan.Dirs, pgfs.Dirs(), []string{logFolder}) {
		if err := fs.MkdirAll(dir); err != nil {
			return fmt.Errorf("making the data directory: %w", err)
		}
	}
	for _, f := range plan.Files {
		if err := fs.WriteFile(f.Path, f.Data); err != nil {
			return fmt.Errorf("making the data directory: %w", err)
		}
	}
	return nil
}

func (a *agent) startPostgres(ctx context.Context) (err error) {
	if a.postgres, err = startPostgres(a.life, a.folder.Mount, a.user, a.settings, a.log); err != nil {
		return err
	}
	a.serving.Store(a.postgres)
	if a.cfg.Guard != nil {
		a.cfg.Guard.Also(a.postgres.PID())
	}
	a.postgres.parting.why = a.keyNotice
	context.AfterFunc(a.life, func() { // at once, whatever else is under way
		if cause := context.Cause(a.life); KeyLost(cause) {
			a.postgres.goodbye(cause)
		}
		a.fs.Discard()
		a.postgres.Kill()
		a.appender.Close() // a write of WAL that waits for room cannot be killed
		if KeyLost(context.Cause(a.life)) {
			_ = tell("shut") // who started this process may answer clients
		}
	})
	if err := a.postgres.awaitReady(ctx); err != nil {
		return a.blameSettings(err)
	}
	return a.settleAux(ctx)
}

// blameSettings says what can be said about why Postgres did not come up.
func (a *agent) blameSettings(err error) error {
	said := a.postgres.log.Startup()
	if strings.Contains(said, "wal_level < logical") {
		return fmt.Errorf("%w: the branch has logical replication slots, which need wal_level=logical: `holdfast up --set wal_level=logical`, or settings in the manager's configuration: %w", ErrSetting, err)
	}
	suspects := boot.Suspects(a.plan.Auto, said)
	if said == "" || len(suspects) == 0 {
		return err
	}
	var names []string
	for _, s := range suspects {
		names = append(names, s.Name)
	}
	const way = "`holdfast endpoint start --reset-setting NAME` starts without it, as after ALTER SYSTEM RESET NAME"
	if suspects[0].Named {
		return fmt.Errorf("%w: %s, which was set by ALTER SYSTEM, keeps Postgres from starting; %s: %w", ErrSetting, strings.Join(names, ", "), way, err)
	}
	return fmt.Errorf("if a setting of ALTER SYSTEM is the reason (%s), %s: %w", strings.Join(names, ", "), way, err)
}

// ready tells the world: the log, and who started this process.
func (a *agent) ready() error {
	a.log.Info("the endpoint is ready", append([]any{"epoch", a.epoch.Number, "lsn", a.epoch.End.String(), "listen", a.cfg.Listen}, a.phases...)...)
	err := json.NewEncoder(os.Stdout).Encode(struct {
		Event string `json:"event"`
		Epoch uint64 `json:"epoch"`
	}{"ready", a.epoch.Number})
	if err != nil {
		return fmt.Errorf("telling that the endpoint is ready: %w", err)
	}
	return nil
}

// supervise holds Postgres and what it stands on together.
func (a *agent) supervise(ctx context.Context) error {
	work, cancel := context.WithCancel(a.life)
	var jobs sync.WaitGroup
	jobs.Go(func() { a.postgres.poll(work, a.fs, a.log) })
	jobs.Go(func() { a.keepLog(work) })
	jobs.Go(func() { a.flushAux(work) })
	endJobs := func() { cancel(); jobs.Wait() }
	defer endJobs()
	select {
	case <-a.life.Done():
		return context.Cause(a.life)
	case <-a.postgres.Done():
		if cause := a.fencedSoon(); cause != nil {
			return cause
		}
		a.sayLast() // a superuser may have stopped it
		return a.postgres.ended()
	case <-a.fs.Done():
		return errors.New("the mount has ended: somebody unmounted it, or its connection was aborted")
	case <-ctx.Done():
		a.log.Info("stopping Postgres")
		endJobs()
		a.postgres.stop(a.life.Done())
		if cause := context.Cause(a.life); cause != nil {
			return cause
		}
		a.sayLast()
		a.verifyAll(a.life)
		return context.Cause(a.life)
	}
}

// fencedSoon tells whether Postgres ended because its last flush failed: it can be faster
// than the news that this compute may not append any more.
func (a *agent) fencedSoon() error {
	select {
	case <-a.life.Done():
		return context.Cause(a.life)
	case <-time.After(100 * time.Millisecond):
		return nil
	}
}

// keepLog keeps the sealed file of Postgres's log up to date.
func (a *agent) keepLog(ctx context.Context) {
	var kept uint64
	for {
		if a.postgres.log.Version() != kept {
			text, version := a.postgres.log.Tail()
			if err := a.fs.WriteFile(logFile, text); err != nil {
				a.log.Warn("keeping Postgres's log", "error", err)
			}
			kept = version
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(time.Second):
		}
	}
}
