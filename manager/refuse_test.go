package manager

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/holdfastdb/holdfast/internal/keyloss"
)

var refused = keyloss.Notice{Message: "the key of project p is disabled", Detail: "This is so now.", Hint: "Its owner controls it."}

// refusing is a refuser on a free port of an address.
func refusing(t *testing.T, host string) (*refuser, string) {
	t.Helper()
	l, err := net.Listen("tcp", host+":0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().String()
	r := &refuser{listen: addr}
	if r.tls, err = refuseTLS(addr); err != nil {
		t.Fatal(err)
	}
	r.open(refused) // the address is still taken, as by a Postgres on its way out
	time.Sleep(2 * bindEvery)
	l.Close()
	t.Cleanup(r.close)
	awaitBound(t, r)
	return r, addr
}

func awaitBound(t *testing.T, r *refuser) {
	t.Helper()
	for ctx := bounded(t); ; time.Sleep(time.Millisecond) {
		r.mu.Lock()
		bound := r.mu.listener != nil
		r.mu.Unlock()
		if bound {
			return
		}
		if ctx.Err() != nil {
			t.Fatal("the address was not bound")
		}
	}
}

func TestClientsAreToldWhyAndAtOnce(t *testing.T) {
	for _, tc := range []struct{ name, host, ssl string }{
		{"plain", "127.0.0.1", "disable"},
		{"that would like TLS", "127.0.0.1", "prefer"},
		{"over TLS", "0.0.0.0", "require"},
		{"plain, from here, where others have TLS", "0.0.0.0", "disable"},
	} {
		_, addr := refusing(t, tc.host)
		_, port, _ := net.SplitHostPort(addr)
		_, err := pgconn.Connect(bounded(t), "postgres://postgres:wrong@127.0.0.1:"+port+"/postgres?sslmode="+tc.ssl)
		var pg *pgconn.PgError
		if !errors.As(err, &pg) {
			t.Errorf("a client %s: %v, want the FATAL", tc.name, err)
			continue
		}
		if pg.Severity != "FATAL" || pg.Code != keyloss.CannotConnectNow || pg.Message != refused.Message || pg.Detail != refused.Detail || pg.Hint != refused.Hint {
			t.Errorf("a client %s: %s %s %q %q %q", tc.name, pg.Severity, pg.Code, pg.Message, pg.Detail, pg.Hint)
		}
	}
}

// startupMessage is one as a client of version 3.0 sends it, of a length that may be a lie.
func startupMessage(length uint32, rest ...byte) []byte {
	return append(binary.BigEndian.AppendUint32(nil, length), rest...)
}

// Nothing that a stranger sends is answered but a startup message, and nobody can stay.
func TestStrangersAreCutOff(t *testing.T) {
	_, addr := refusing(t, "127.0.0.1")
	cancel := startupMessage(16, 4, 210, 22, 46, 0, 0, 0, 1, 0, 0, 0, 2)
	for what, send := range map[string][]byte{
		"a request to cancel":    cancel,
		"a length of gigabytes":  startupMessage(1<<31, 0, 3, 0, 0),
		"a length below its own": startupMessage(3, 0, 3, 0, 0),
		"a web browser's":        []byte("GET / HTTP/1.1\r\nHost: x\r\n\r\n"),
		"TLS asked for for ever": bytes.Repeat(startupMessage(8, 4, 210, 22, 47), 4),
		"an unknown version":     startupMessage(9, 0, 9, 0, 0, 0),
	} {
		conn, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := conn.Write(send); err != nil {
			t.Fatal(err)
		}
		if err := conn.SetReadDeadline(time.Now().Add(30 * time.Second)); err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(conn)
		if bytes.Contains(got, []byte(refused.Message)) {
			t.Errorf("%s was answered with the notice", what)
		}
		if nerr := net.Error(nil); errors.As(err, &nerr) && nerr.Timeout() {
			t.Errorf("%s: the connection stays", what)
		}
		conn.Close()
	}
}

// The address is free when close returns: the endpoint's Postgres binds it next.
func TestTheAddressIsGivenUpAndTakenBack(t *testing.T) {
	r, addr := refusing(t, "127.0.0.1")
	for range 20 {
		r.close()
		l, err := net.Listen("tcp", addr)
		if err != nil {
			t.Fatalf("after close: %v", err)
		}
		r.open(refused)
		l.Close()
		awaitBound(t, r)
	}
	r.close()
	r.close()
	if _, err := (&net.Dialer{}).DialContext(context.Background(), "tcp", addr); err == nil {
		t.Error("a closed refuser takes connections")
	}
}

// Whoever opens connections and says nothing cannot keep others from their answer for long.
func TestManySilentClients(t *testing.T) {
	_, addr := refusing(t, "127.0.0.1")
	for range refuseClients {
		conn, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
	}
	for ctx := bounded(t); ; time.Sleep(100 * time.Millisecond) {
		_, err := pgconn.Connect(ctx, "postgres://postgres@"+addr+"/postgres?sslmode=disable")
		if pg := (*pgconn.PgError)(nil); errors.As(err, &pg) {
			return
		}
		if ctx.Err() != nil {
			t.Fatalf("no answer: %v", err)
		}
	}
}
