package rpc

import (
	"context"
	"net"
	"strings"
	"sync"

	"google.golang.org/grpc/test/bufconn"
)

// pipeBuffer is how many bytes a connection within the process holds in each direction.
const pipeBuffer = 256 << 10

// inProcess has the listeners of this process by address. A connection to one of them goes
// through memory: the calls are the same, but a message costs no system call and no other
// process can be on the way.
var inProcess struct {
	sync.Mutex
	listeners map[string]*bufconn.Listener
}

// dualListener takes connections from its socket and from this process.
type dualListener struct {
	net.Listener
	addr    string
	memory  *bufconn.Listener
	conns   chan net.Conn
	failed  chan error
	closing chan struct{}
	once    sync.Once
}

// withInProcess makes l reachable from this process without its socket.
func withInProcess(addr string, l net.Listener) net.Listener {
	d := &dualListener{Listener: l, addr: addr, memory: bufconn.Listen(pipeBuffer),
		conns: make(chan net.Conn), failed: make(chan error, 1), closing: make(chan struct{})}
	inProcess.Lock()
	defer inProcess.Unlock()
	if inProcess.listeners == nil {
		inProcess.listeners = make(map[string]*bufconn.Listener)
	}
	inProcess.listeners[addr] = d.memory
	go d.accept(l)
	go d.accept(d.memory)
	return d
}

// accept passes a listener's connections on until that listener fails or is closed.
func (d *dualListener) accept(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			select {
			case d.failed <- err:
			default: // one error ends the server
			}
			return
		}
		select {
		case d.conns <- c:
		case <-d.closing:
			c.Close()
			return
		}
	}
}

// Accept waits for the next connection from either side.
func (d *dualListener) Accept() (net.Conn, error) {
	select {
	case c := <-d.conns:
		return c, nil
	case err := <-d.failed:
		return nil, err
	case <-d.closing:
		return nil, net.ErrClosed
	}
}

// Close ends both sides. Connections that were accepted go on.
func (d *dualListener) Close() error {
	d.once.Do(func() {
		close(d.closing)
		inProcess.Lock()
		if inProcess.listeners[d.addr] == d.memory {
			delete(inProcess.listeners, d.addr)
		}
		inProcess.Unlock()
		d.memory.Close() // it never fails
	})
	return d.Listener.Close()
}

// connect makes one connection to addr, through memory where this process listens there.
func connect(ctx context.Context, addr string) (net.Conn, error) {
	inProcess.Lock()
	l := inProcess.listeners[addr]
	inProcess.Unlock()
	if l != nil {
		return l.DialContext(ctx)
	}
	network := "tcp"
	path, isUnix := strings.CutPrefix(addr, "unix:")
	if isUnix {
		network, addr = "unix", path
	}
	var d net.Dialer
	return d.DialContext(ctx, network, addr)
}
