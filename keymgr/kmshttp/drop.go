package kmshttp

import (
	"context"
	"net"
	"net/http"
	"sync"
)

// What a service answered stays in the buffers of the connection that it came by, in those of TLS as well,
// until other answers have overwritten it: a KEK too.
var open struct {
	sync.Mutex
	transports []*http.Transport // of this process's adapters, which live as long as it
	conns      map[*tracked]bool
}

func track(t *http.Transport) {
	open.Lock()
	defer open.Unlock()
	open.transports = append(open.transports, t)
}

// tracked is a connection that DropConnections closes.
type tracked struct{ net.Conn }

func (c *tracked) Close() error {
	open.Lock()
	delete(open.conns, c)
	open.Unlock()
	return c.Conn.Close()
}

// Dial connects to a service for a client that brings its own protocol, gRPC.
func Dial(ctx context.Context, addr string) (net.Conn, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, err
	}
	c := &tracked{conn}
	open.Lock()
	defer open.Unlock()
	if open.conns == nil {
		open.conns = make(map[*tracked]bool)
	}
	open.conns[c] = true
	return c, nil
}

// DropConnections closes the connections to all services, those of HTTP that have a call under way
// excepted: their buffers are then free, and overwritten as everything that is freed. Each client connects
// again by itself; a call over gRPC that was under way fails as one that was not answered.
func DropConnections() {
	open.Lock()
	conns := make([]*tracked, 0, len(open.conns))
	for c := range open.conns {
		conns = append(conns, c)
	}
	transports := open.transports[:len(open.transports):len(open.transports)]
	open.Unlock()
	for _, t := range transports {
		t.CloseIdleConnections()
	}
	for _, c := range conns {
		_ = c.Close() // it may have ended
	}
}
