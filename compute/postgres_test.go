package compute

import (
	"errors"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5/pgproto3"

	"github.com/holdfastdb/holdfast/compute/boot"
	"github.com/holdfastdb/holdfast/test/testenv"
)

// A server answers connections and messages with the errors it is told to, in their order; ""
// stands for none.
type server struct {
	mu      sync.Mutex
	connect []string
	message []string
	asked   []string // databases, and "message" for each message
}

func (s *server) next(what string, answers *[]string) (code string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.asked = append(s.asked, what)
	if len(*answers) > 0 {
		code, *answers = (*answers)[0], (*answers)[1:]
	}
	return code
}

// listen gives a postgres whose connections come to s.
func (s *server) listen(t *testing.T) *postgres {
	dir := testenv.TempDir(t)
	l, err := net.Listen("unix", filepath.Join(dir, ".s.PGSQL.5432"))
	if err != nil {
		t.Fatal(err)
	}
	var conns sync.WaitGroup
	conns.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			conns.Go(func() { s.serve(pgproto3.NewBackend(c, c)); c.Close() })
		}
	})
	t.Cleanup(func() { l.Close(); conns.Wait() })
	settings := &boot.Settings{Listen: "127.0.0.1:5432", SocketDir: dir, AgentUser: "agent"}
	if err := settings.Validate(); err != nil {
		t.Fatal(err)
	}
	return &postgres{settings: settings}
}

func (s *server) serve(b *pgproto3.Backend) {
	first, err := b.ReceiveStartupMessage()
	if err != nil {
		return
	}
	start, ok := first.(*pgproto3.StartupMessage)
	if !ok {
		return
	}
	if code := s.next(start.Parameters["database"], &s.connect); code != "" {
		b.Send(&pgproto3.ErrorResponse{Severity: "FATAL", Code: code})
		_ = b.Flush() // the client notices
		return
	}
	b.Send(&pgproto3.AuthenticationOk{})
	b.Send(&pgproto3.ReadyForQuery{TxStatus: 'I'})
	for b.Flush() == nil {
		m, err := b.Receive()
		if err != nil {
			return
		}
		switch m.(type) {
		case *pgproto3.Execute:
			if code := s.next("message", &s.message); code != "" {
				b.Send(&pgproto3.ErrorResponse{Severity: "FATAL", Code: code})
				_ = b.Flush()
				return
			}
			b.Send(&pgproto3.CommandComplete{CommandTag: []byte("SELECT 1")})
		case *pgproto3.Sync:
			b.Send(&pgproto3.ReadyForQuery{TxStatus: 'I'})
		case *pgproto3.Terminate:
			return
		}
	}
}

// What keeps the agent from the database that no slot decodes must be that database's own
// state; else a message would be shown to those who decode the other.
func TestMessagesAreForNobody(t *testing.T) {
	const broken = "XX000"
	for _, c := range []struct {
		connect []string
		asked   string
		code    string
	}{
		{nil, "template1 message", ""},
		{[]string{noSuchDatabase}, "template1 postgres message", ""},
		{[]string{notInThisState}, "template1 postgres message", ""},
		{[]string{broken}, "template1", broken},
	} {
		s := &server{connect: c.connect}
		err := s.listen(t).emit(t.Context(), "prefix", []byte("content"))
		if sqlState(err) != c.code || (err == nil) != (c.code == "") {
			t.Errorf("%v: error %v, want %q", c.connect, err, c.code)
		}
		if diff := cmp.Diff(c.asked, strings.Join(s.asked, " ")); diff != "" {
			t.Errorf("%v: asked (-want +got):\n%s", c.connect, diff)
		}
	}
}

// Somebody may end the agent's backend, which is no shutdown.
func TestMessagesAreTriedAgain(t *testing.T) {
	for _, c := range []struct {
		server *server
		asked  string
		code   string
	}{
		{&server{message: []string{adminShutdown}}, "template1 message template1 message", ""},
		{&server{message: []string{adminShutdown}, connect: []string{"", cannotConnectNow}}, "template1 message template1", cannotConnectNow},
		{&server{message: []string{adminShutdown, adminShutdown}}, "template1 message template1 message", adminShutdown},
	} {
		err := c.server.listen(t).emit(t.Context(), "prefix", []byte("content"))
		if sqlState(err) != c.code || (err == nil) != (c.code == "") || err != nil && !errors.Is(err, errNotServing) {
			t.Errorf("%s: error %v, want %q", c.asked, err, c.code)
		}
		if diff := cmp.Diff(c.asked, strings.Join(c.server.asked, " ")); diff != "" {
			t.Errorf("asked (-want +got):\n%s", diff)
		}
	}
}

// Users may have taken all connections but the one that stands.
func TestMessagesWithoutRoom(t *testing.T) {
	s := &server{connect: []string{"", tooManyConnections, tooManyConnections}}
	p := s.listen(t)
	conn, err := p.connect(t.Context(), "postgres")
	if err != nil {
		t.Fatal(err)
	}
	p.standing.conn = conn
	if err := p.emit(t.Context(), "prefix", []byte("content")); err != nil {
		t.Error(err)
	}
	p.endStanding()
	if err := p.emit(t.Context(), "prefix", []byte("content")); sqlState(err) != tooManyConnections {
		t.Errorf("without a connection that stands: %v", err)
	}
	if diff := cmp.Diff("postgres template1 message template1", strings.Join(s.asked, " ")); diff != "" {
		t.Errorf("asked (-want +got):\n%s", diff)
	}
}
