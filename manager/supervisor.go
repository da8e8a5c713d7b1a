package manager

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"runtime"
	"sync"
	"syscall"
	"time"

	"github.com/holdfastdb/holdfast/internal/api/pb"
)

// States of an endpoint, as users see them.
const (
	stateStopped  = "stopped"
	stateStarting = "starting"
	stateRunning  = "running"
	stateFailed   = "failed"
)

// ExitFenced is the exit status of a compute that a higher epoch has fenced. It is not
// started again by itself: two computes would take the branch from each other for ever.
const ExitFenced = 3

// ExitSetting is the exit status of a compute whose Postgres does not start for a setting
// that ALTER SYSTEM made.
const ExitSetting = 4

// Bounds of a supervised child.
const (
	stopGrace      = 30 * time.Second // from SIGTERM to SIGKILL
	verifyGrace    = 10 * time.Minute // the same, where the agent compares all that it holds
	restartBackoff = 500 * time.Millisecond
	maxBackoff     = 15 * time.Second
)

// supervised is what a supervisor runs.
type supervised struct {
	command func(reset []string) (*exec.Cmd, error) // a fresh command for each start; reset: see start
	log     childLog                                // takes its standard error
	remove  func() error                            // deletes the endpoint's local folder
	tell    func(string)                            // is told, in words for the user, why it does not run
	grace   time.Duration                           // from SIGTERM to SIGKILL; 0: stopGrace
	ready   func()                                  // is told that it runs after a wait for the key; may be nil
	key     keyWaiter
}

// supervisor keeps one endpoint's agent running while it is wanted.
type supervisor struct {
	doc   endpointDoc
	child supervised
	log   *slog.Logger

	mu struct {
		sync.Mutex
		state   string
		err     string
		setting bool     // err is a setting's: trying again does not help
		waits   bool     // for the key: it goes on by itself when the customer lets it
		reset   []string // settings to take back at the next start
		epoch   uint64
		process *os.Process
		changed chan struct{}      // closed and replaced at each change of state
		cancel  context.CancelFunc // of the running loop; nil: none runs
		done    chan struct{}      // closed when that loop has ended
	}
}

func newSupervisor(doc endpointDoc, child supervised, log *slog.Logger) *supervisor {
	child.grace = cmp.Or(child.grace, stopGrace)
	if child.ready == nil {
		child.ready = func() {}
	}
	s := &supervisor{doc: doc, child: child, log: log.With("endpoint", doc.Name)}
	s.mu.state = stateStopped
	s.mu.changed = make(chan struct{})
	return s
}

func (s *supervisor) set(state, err string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mu.state, s.mu.err, s.mu.setting = state, err, false
	switch state {
	case stateKeyRevoked, stateKeyUnreachable:
		s.mu.waits = true
	case stateRunning, stateStopped, stateFailed:
		s.mu.waits = false
	}
	close(s.mu.changed)
	s.mu.changed = make(chan struct{})
}

// status is the endpoint as users see it.
func (s *supervisor) status() *pb.Endpoint {
	s.mu.Lock()
	defer s.mu.Unlock()
	e := &pb.Endpoint{Name: s.doc.Name, Project: s.doc.Project, Branch: s.doc.Branch, State: s.mu.state,
		Url: urlOf(s.doc), Epoch: s.mu.epoch, Error: s.mu.err}
	if s.mu.process != nil {
		e.Pid = int64(s.mu.process.Pid)
	}
	return e
}

// urlOf is where an endpoint takes connections.
func urlOf(doc endpointDoc) string { return "postgres://postgres@" + doc.Listen + "/postgres" }

// start begins to keep the endpoint running; it does nothing when that is so already. The
// settings in reset are taken back at the next start.
func (s *supervisor) start(reset ...string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mu.reset, s.mu.setting = reset, false
	if s.mu.cancel != nil {
		select {
		case <-s.mu.done: // the last loop gave up
		default:
			return
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	s.mu.cancel, s.mu.done = cancel, make(chan struct{})
	s.mu.state, s.mu.err = stateStarting, ""
	go s.loop(ctx, s.mu.done)
}

// stop ends the endpoint in order: SIGTERM, and SIGKILL after a while.
func (s *supervisor) stop(ctx context.Context) error { return s.end(ctx, syscall.SIGTERM) }

// kill ends the endpoint by SIGKILL and deletes its local folder.
func (s *supervisor) kill(ctx context.Context) error {
	if err := s.end(ctx, syscall.SIGKILL); err != nil {
		return err
	}
	return s.child.remove()
}

func (s *supervisor) end(ctx context.Context, sig syscall.Signal) error {
	s.mu.Lock()
	cancel, done, process := s.mu.cancel, s.mu.done, s.mu.process
	s.mu.Unlock()
	if cancel == nil {
		return nil
	}
	if process != nil && sig == syscall.SIGKILL {
		_ = process.Kill() // it may be gone already: done tells
	}
	cancel()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("waiting for endpoint %s to end: %w", s.doc.Name, ctx.Err())
	}
}

// errWaitsForKey is waitReady's of an endpoint that will run when its key can be used.
var errWaitsForKey = errors.New("the endpoint waits, and starts by itself when its key can be used")

// waitReady waits until the endpoint runs, has failed or waits for its key. Who is not patient is
// told at once of what only they can mend.
func (s *supervisor) waitReady(ctx context.Context, patient bool) error {
	for {
		s.mu.Lock()
		state, msg, setting, changed := s.mu.state, s.mu.err, s.mu.setting, s.mu.changed
		s.mu.Unlock()
		if setting && !patient {
			return fmt.Errorf("endpoint %s: %s", s.doc.Name, msg)
		}
		switch state {
		case stateRunning:
			return nil
		case stateFailed:
			return fmt.Errorf("endpoint %s: %s", s.doc.Name, msg)
		case stateStopped:
			return fmt.Errorf("endpoint %s was stopped", s.doc.Name)
		case stateKeyRevoked, stateKeyUnreachable:
			return fmt.Errorf("endpoint %s: %s: %w", s.doc.Name, msg, errWaitsForKey)
		}
		select {
		case <-changed:
		case <-ctx.Done():
			if msg != "" {
				return fmt.Errorf("endpoint %s is not ready: %s", s.doc.Name, msg)
			}
			return fmt.Errorf("endpoint %s is not ready: %w", s.doc.Name, ctx.Err())
		}
	}
}

// loop runs one agent after another until ctx ends or one is fenced.
func (s *supervisor) loop(ctx context.Context, done chan struct{}) {
	defer close(done)
	// A child's parent-death signal is tied to the thread that made it.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if s.child.key.refuse != nil {
		defer s.child.key.refuse.close()
	}
	backoff := restartBackoff
	for {
		began := time.Now()
		err := s.runOnce(ctx)
		if ctx.Err() != nil {
			s.set(stateStopped, "")
			return
		}
		var exit *exec.ExitError
		if errors.As(err, &exit) && exit.ExitCode() == ExitFenced {
			s.log.Error("fenced by a newer compute on the branch; not started again")
			s.child.tell(fmt.Sprintf("endpoint %s was fenced: a newer compute has opened its branch", s.doc.Name))
			s.set(stateFailed, "fenced: a newer compute has opened the branch")
			return
		}
		if exit != nil && exit.ExitCode() == ExitKey && s.child.key.ask != nil {
			s.log.Warn("the agent ended for its key", "error", err)
			s.waitForKey(ctx, time.Since(began))
			continue
		}
		if time.Since(began) > time.Minute {
			backoff = restartBackoff
		}
		s.log.Error("the agent ended; starting it again", "error", err, "after", backoff)
		s.child.tell(fmt.Sprintf("endpoint %s ended: %v; starting it again", s.doc.Name, err))
		s.set(stateStarting, err.Error())
		if exit != nil && exit.ExitCode() == ExitSetting {
			s.blameSetting()
		}
		select {
		case <-time.After(backoff):
		case <-ctx.Done():
			s.set(stateStopped, "")
			return
		}
		backoff = min(2*backoff, maxBackoff)
	}
}

func (s *supervisor) blameSetting() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mu.setting = true
	close(s.mu.changed)
	s.mu.changed = make(chan struct{})
}

// runOnce runs one agent to its end. It returns an error always: an agent that nobody
// stopped has no reason to end.
func (s *supervisor) runOnce(ctx context.Context) error {
	s.mu.Lock()
	reset := s.mu.reset
	s.mu.Unlock()
	cmd, err := s.child.command(reset)
	if err != nil {
		return err
	}
	closeLog, err := s.child.log.attach(cmd)
	if err != nil {
		return err
	}
	defer closeLog()
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("starting the agent: %w", err)
	}
	s.mu.Lock()
	s.mu.process = cmd.Process
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		s.mu.process = nil
		s.mu.Unlock()
	}()
	exited := make(chan struct{})
	go func() {
		select {
		case <-ctx.Done():
		case <-exited:
			return
		}
		_ = cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-time.After(s.child.grace):
			s.log.Warn("the agent did not end in time; killing it", "grace", s.child.grace)
			_ = cmd.Process.Kill()
		case <-exited:
		}
	}()
	s.readEvents(out)
	err = cmd.Wait()
	close(exited)
	if err == nil {
		return errors.New("the agent ended without being asked to")
	}
	return s.child.log.explain(err)
}

// event is a line that an agent writes on its standard output.
type event struct {
	Event string `json:"event"`
	Epoch uint64 `json:"epoch"`
}

func (s *supervisor) readEvents(out io.Reader) {
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		var e event
		if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
			s.log.Warn("the agent wrote a line that is no event", "line", lines.Text())
			continue
		}
		s.happened(e)
	}
	_, _ = io.Copy(io.Discard, out) // a line too long must not block the agent
}

func (s *supervisor) happened(e event) {
	switch refuse := s.child.key.refuse; {
	case e.Event == "ready":
		s.mu.Lock()
		s.mu.epoch, s.mu.reset = e.Epoch, nil
		waited := s.mu.waits
		s.mu.Unlock()
		s.set(stateRunning, "")
		if waited {
			s.child.tell("endpoint " + s.doc.Name + " takes connections again")
			s.child.ready()
		}
	case e.Event == "address" && refuse != nil: // Postgres is about to listen
		refuse.close()
	case e.Event == "shut" && refuse != nil: // Postgres is gone, the agent not yet
		s.showWait(s.askKey(context.Background(), askKeyTime))
	}
}
