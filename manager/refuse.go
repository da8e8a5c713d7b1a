package manager

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"sync"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5/pgproto3"

	"github.com/holdfastdb/holdfast/internal/keyloss"
)

// Bounds of answers to clients of an endpoint that does not run.
const (
	refuseClients = 200                  // at a time; more are cut off
	refuseTime    = 5 * time.Second      // for one
	bindEvery     = 5 * time.Millisecond // while the endpoint's Postgres is on its way out
)

// refuser answers an endpoint's clients while its Postgres cannot run for the key: each gets, at
// once, a FATAL that says why. It knows no user and no password, so it tells nobody more than
// whose key it is.
type refuser struct {
	listen string
	tls    *tls.Config // nil: clients are on this machine, and are told that there is no TLS

	mu struct {
		sync.Mutex
		notice   keyloss.Notice
		listener net.Listener       // nil: not bound
		cancel   context.CancelFunc // of the binding; nil: not open
		done     chan struct{}
	}
}

// open binds the address as soon as it is free, and answers with the notice from then on.
func (r *refuser) open(n keyloss.Notice) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.mu.notice = n
	if r.mu.cancel != nil {
		return
	}
	ctx, cancel := context.WithCancel(context.Background())
	r.mu.cancel, r.mu.done = cancel, make(chan struct{})
	go r.run(ctx, r.mu.done)
}

// close gives the address up, and returns when it is free. Answers that are under way end by themselves.
func (r *refuser) close() {
	r.mu.Lock()
	cancel, done := r.mu.cancel, r.mu.done
	r.mu.cancel = nil
	if r.mu.listener != nil {
		r.mu.listener.Close()
		r.mu.listener = nil
	}
	r.mu.Unlock()
	if cancel != nil {
		cancel()
		<-done
	}
}

// bind listens, or gives nil when ctx has ended. An address that cannot be had for another reason
// than that somebody has it is not had later either, and the endpoint's own start will say so.
func (r *refuser) bind(ctx context.Context) net.Listener {
	for {
		l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", r.listen)
		if err == nil {
			return l
		}
		if !errors.Is(err, syscall.EADDRINUSE) {
			return nil
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(bindEvery):
		}
	}
}

func (r *refuser) run(ctx context.Context, done chan struct{}) {
	defer close(done)
	l := r.bind(ctx)
	if l == nil {
		return
	}
	r.mu.Lock()
	if ctx.Err() != nil {
		l.Close()
	}
	r.mu.listener = l
	r.mu.Unlock()
	places := make(chan struct{}, refuseClients)
	for {
		conn, err := l.Accept()
		if err != nil {
			if ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
				return
			}
			time.Sleep(bindEvery) // out of descriptors, perhaps
			continue
		}
		select {
		case places <- struct{}{}:
			go func() { defer func() { <-places }(); r.answer(conn) }()
		default:
			conn.Close()
		}
	}
}

// answer says no to one client.
func (r *refuser) answer(conn net.Conn) {
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(refuseTime)); err != nil {
		return
	}
	to, ok := r.startup(conn)
	if !ok {
		return
	}
	r.mu.Lock()
	message := r.mu.notice.Fatal(keyloss.CannotConnectNow)
	r.mu.Unlock()
	if _, err := to.Write(message); err != nil {
		return
	}
	// A close before the client's last bytes have come resets the connection, and may cost the
	// client the message.
	if half, ok := to.(interface{ CloseWrite() error }); ok && half.CloseWrite() == nil {
		_, _ = io.CopyN(io.Discard, to, 1<<20)
	}
}

// startup reads until the client has said who it is, and gives how to talk to it. A request
// to cancel has no answer.
func (r *refuser) startup(conn net.Conn) (to net.Conn, ok bool) {
	to = conn
	for range 3 { // at most: GSSAPI encryption, TLS, the startup message
		message, err := pgproto3.NewBackend(to, to).ReceiveStartupMessage()
		if err != nil {
			return nil, false
		}
		switch message.(type) {
		case *pgproto3.StartupMessage:
			return to, true
		case *pgproto3.SSLRequest:
			if to, err = r.secure(to); err != nil {
				return nil, false
			}
		case *pgproto3.GSSEncRequest:
			if _, err := to.Write([]byte("N")); err != nil {
				return nil, false
			}
		default:
			return nil, false
		}
	}
	return nil, false
}

// secure answers a request for TLS. The endpoint has a certificate of its own making, too, where
// clients come from elsewhere: one that insists on TLS must be able to hear us.
func (r *refuser) secure(conn net.Conn) (net.Conn, error) {
	answer := "N"
	if r.tls != nil {
		answer = "S"
	}
	if _, err := conn.Write([]byte(answer)); err != nil || r.tls == nil {
		return conn, err
	}
	secured := tls.Server(conn, r.tls)
	return secured, secured.Handshake()
}
