package manager

import (
	"context"
	"errors"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/holdfastdb/holdfast/internal/api/pb"
	"github.com/holdfastdb/holdfast/internal/keyloss"
)

// keyStub is a key manager that says of a key what the test wants.
type keyStub struct {
	sync.Mutex
	st    *pb.KeyStatusResponse
	err   error
	asked int
}

func (k *keyStub) set(st *pb.KeyStatusResponse, err error) {
	k.Lock()
	defer k.Unlock()
	k.st, k.err = st, err
}

func (k *keyStub) ask(context.Context) (*pb.KeyStatusResponse, error) {
	k.Lock()
	defer k.Unlock()
	k.asked++
	return k.st, k.err
}

// keyed is a scripted supervisor with a key.
func keyed(t *testing.T, script string, key *keyStub) (s *supervisor, addr string, told func() string) {
	t.Helper()
	s, _, told = scripted(t, script)
	r, addr := refusing(t, "127.0.0.1")
	r.close()
	s.doc.Listen, s.doc.Project = addr, "p"
	s.child.key = keyWaiter{ask: key.ask, refuse: r}
	return s, addr, told
}

func stateOf(s *supervisor) string { return s.status().State }

func awaitState(t *testing.T, s *supervisor, want string) {
	t.Helper()
	for ctx := bounded(t); stateOf(s) != want; time.Sleep(5 * time.Millisecond) {
		if ctx.Err() != nil {
			t.Fatalf("state %q, want %q", stateOf(s), want)
		}
	}
}

// toldClient is what a new client is told.
func toldClient(t *testing.T, addr string) *pgconn.PgError {
	t.Helper()
	for ctx := bounded(t); ; time.Sleep(5 * time.Millisecond) {
		_, err := pgconn.Connect(ctx, "postgres://postgres@"+addr+"/postgres?sslmode=disable")
		if pg := (*pgconn.PgError)(nil); errors.As(err, &pg) {
			return pg
		}
		if ctx.Err() != nil {
			t.Fatalf("connecting: %v, want a FATAL", err)
		}
	}
}

// Revoked, then out of reach, then usable again: it waits without starting anything, says why to who
// asks and who connects, and starts by itself.
func TestAnEndpointWaitsForItsKey(t *testing.T) {
	key := &keyStub{st: &pb.KeyStatusResponse{State: pb.KeyRevoked, Cmk: "dev", ControlledBy: "AWS KMS key arn:x"}}
	s, addr, told := keyed(t, `exit 5`, key)
	s.start()
	err := s.waitReady(bounded(t), true)
	if !errors.Is(err, errWaitsForKey) || !strings.Contains(err.Error(), "arn:x") {
		t.Errorf("waitReady: %v, want that it waits, and for whom", err)
	}
	if st := s.status(); st.State != stateKeyRevoked || !strings.Contains(st.Error, "disabled") {
		t.Errorf("status %v", st)
	}
	if pg := toldClient(t, addr); pg.Code != keyloss.CannotConnectNow || !strings.Contains(pg.Hint, "AWS KMS key arn:x") {
		t.Errorf("a client is told %s %q %q", pg.Code, pg.Message, pg.Hint)
	}
	key.set(nil, errors.New("no key manager"))
	awaitState(t, s, stateKeyUnreachable)
	if pg := toldClient(t, addr); !strings.Contains(pg.Message, "cannot be checked") {
		t.Errorf("a client is told %q of a key that cannot be checked", pg.Message)
	}
	if got := told(); strings.Count(got, "waits") != 2 {
		t.Errorf("the user heard\n%s\nwant each reason once", got)
	}
}

// A key manager that hangs: clients are told at once, not when the patience with it is over.
func TestClientsAreToldOfAKeyManagerThatHangs(t *testing.T) {
	key := &keyStub{}
	s, addr, _ := keyed(t, `exit 5`, key)
	s.child.key.ask = func(ctx context.Context) (*pb.KeyStatusResponse, error) {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	began := time.Now()
	s.start()
	if pg := toldClient(t, addr); !strings.Contains(pg.Message, "cannot be checked") || time.Since(began) > askKeyTime-time.Second {
		t.Errorf("a client is told %q after %v", pg.Message, time.Since(began))
	}
	awaitState(t, s, stateKeyUnreachable)
}

func TestAnEndpointStartsWhenItsKeyCanBeUsed(t *testing.T) {
	key := &keyStub{st: &pb.KeyStatusResponse{State: pb.KeyRevoked}}
	s, addr, told := keyed(t, `if [ -e again ]; then echo '{"event":"address"}'; `+saysReady+`exec sleep 100; fi; touch again; exit 5`, key)
	ready := make(chan struct{}, 1)
	s.child.ready = func() { ready <- struct{}{} }
	s.start()
	awaitState(t, s, stateKeyRevoked)
	_ = toldClient(t, addr)
	key.set(&pb.KeyStatusResponse{State: pb.KeyActive}, nil)
	awaitState(t, s, stateRunning)
	select {
	case <-ready:
	case <-bounded(t).Done():
		t.Error("nobody was told that it is ready")
	}
	l, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatalf("the address is not free for Postgres: %v", err)
	}
	l.Close()
	if !strings.Contains(told(), "takes connections again") {
		t.Errorf("the user heard %q", told())
	}
}

// A page server whose lease comes later than the agent's must not make the supervisor spin.
func TestStartsThatFailUnderAGoodKeyAreSpaced(t *testing.T) {
	key := &keyStub{st: &pb.KeyStatusResponse{State: pb.KeyActive}}
	s, _, _ := keyed(t, `exit 5`, key)
	s.start()
	time.Sleep(1500 * time.Millisecond)
	key.Lock()
	asked := key.asked
	key.Unlock()
	if asked < 2 || asked > 4 {
		t.Errorf("%d starts in 1.5 s, want 2 to 4: at 0, 250, 750 and 1750 ms", asked)
	}
}

// Clients hear it from the moment that Postgres is gone, not when the agent has cleaned up.
func TestClientsAreToldWhileTheAgentEnds(t *testing.T) {
	key := &keyStub{st: &pb.KeyStatusResponse{State: pb.KeyRevoked}}
	s, addr, _ := keyed(t, saysReady+`echo '{"event":"shut"}'; exec sleep 100`, key)
	s.start()
	if pg := toldClient(t, addr); pg.Code != keyloss.CannotConnectNow {
		t.Errorf("a client is told %s", pg.Code)
	}
	if err := s.stop(bounded(t)); err != nil {
		t.Fatal(err)
	}
	if conn, err := net.Dial("tcp", addr); err == nil {
		conn.Close()
		t.Error("a stopped endpoint takes connections")
	}
}
