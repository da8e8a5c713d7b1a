package manager

import (
	"context"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// scripted is a supervisor whose agent is a shell script; told collects what users hear.
func scripted(t *testing.T, script string) (s *supervisor, dir string, told func() string) {
	t.Helper()
	dir = t.TempDir()
	var mu sync.Mutex
	var words []string
	s = newSupervisor(endpointDoc{Name: "main", Listen: "127.0.0.1:1"}, supervised{
		command: func([]string) (*exec.Cmd, error) {
			cmd := exec.Command("/bin/sh", "-c", script)
			cmd.Dir = dir
			return cmd, nil
		},
		log:    childLog{path: filepath.Join(t.TempDir(), "agent.log")},
		remove: func() error { return removeDir(dir) },
		tell:   func(w string) { mu.Lock(); words = append(words, w); mu.Unlock() },
	}, slog.New(slog.DiscardHandler))
	t.Cleanup(func() {
		if err := s.kill(context.Background()); err != nil {
			t.Error(err)
		}
	})
	return s, dir, func() string { mu.Lock(); defer mu.Unlock(); return strings.Join(words, "\n") }
}

const saysReady = `echo '{"event":"ready","epoch":7}'; `

func bounded(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func TestReadyThenStopped(t *testing.T) {
	s, _, _ := scripted(t, saysReady+"exec sleep 100")
	s.start()
	if err := s.waitReady(bounded(t), true); err != nil {
		t.Fatal(err)
	}
	if st := s.status(); st.State != stateRunning || st.Epoch != 7 || st.Pid == 0 {
		t.Errorf("status %v, want running in epoch 7 with a pid", st)
	}
	if err := s.stop(bounded(t)); err != nil {
		t.Fatal(err)
	}
	if st := s.status(); st.State != stateStopped || st.Pid != 0 {
		t.Errorf("status %v, want stopped without a pid", st)
	}
	s.start()
	if err := s.waitReady(bounded(t), true); err != nil {
		t.Errorf("a stopped endpoint did not start again: %v", err)
	}
}

func TestAnAgentThatEndsIsStartedAgainAndItsReasonTold(t *testing.T) {
	s, _, told := scripted(t, `if [ -e second ]; then `+saysReady+`exec sleep 100; fi; touch second; echo 'holdfast: no fuse here' >&2; echo noise >&2; exit 1`)
	s.start()
	if err := s.waitReady(bounded(t), true); err != nil {
		t.Fatal(err)
	}
	if got := told(); !strings.Contains(got, "no fuse here") || !strings.Contains(got, "agent.log") {
		t.Errorf("the user heard %q, want the agent's reason and its log", got)
	}
}

func TestAFencedAgentStaysDown(t *testing.T) {
	s, _, told := scripted(t, "exit 3")
	s.start()
	err := s.waitReady(bounded(t), true)
	if err == nil || !strings.Contains(err.Error(), "fenced") {
		t.Errorf("waitReady: %v, want fenced", err)
	}
	if st := s.status(); st.State != stateFailed {
		t.Errorf("state %s, want failed", st.State)
	}
	if !strings.Contains(told(), "fenced") {
		t.Errorf("the user heard %q", told())
	}
}

func TestKillRemovesTheLocalFolder(t *testing.T) {
	s, dir, _ := scripted(t, saysReady+"echo secret > local; exec sleep 100")
	s.start()
	if err := s.waitReady(bounded(t), true); err != nil {
		t.Fatal(err)
	}
	if err := s.kill(bounded(t)); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(dir); !os.IsNotExist(err) {
		t.Errorf("the endpoint's folder is still there: %v", err)
	}
}

func TestAFullLogIsPutAside(t *testing.T) {
	log := childLog{path: filepath.Join(t.TempDir(), "log")}
	if err := os.WriteFile(log.path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(log.path, maxChildLog+1); err != nil {
		t.Fatal(err)
	}
	done, err := log.attach(exec.Command("true"))
	if err != nil {
		t.Fatal(err)
	}
	done()
	for path, want := range map[string]int64{log.path: 0, log.path + ".old": maxChildLog + 1} {
		if st, err := os.Stat(path); err != nil || st.Size() != want {
			t.Errorf("%s: %v, %v; want %d bytes", path, st, err, want)
		}
	}
}

// What Postgres said is on the lines after the agent's own.
func TestAReasonOfSeveralLinesIsTold(t *testing.T) {
	s, _, told := scripted(t, `if [ -e second ]; then `+saysReady+`exec sleep 100; fi; touch second; printf 'holdfast: it said:\n\tFATAL:  no such thing\n\tHINT:  Make one.\ntime=1 level=INFO\n' >&2; exit 1`)
	s.start()
	if err := s.waitReady(bounded(t), true); err != nil {
		t.Fatal(err)
	}
	if got := told(); !strings.Contains(got, "it said: FATAL:  no such thing HINT:  Make one. (its log") {
		t.Errorf("the user heard %q", got)
	}
}
