package revocation

import (
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/holdfastdb/holdfast/internal/rpc"
)

// link is the way from one role to the key manager. Cut, it swallows: what was sent is not refused,
// it is just never answered, as where a network drops packets.
type link struct {
	to string // the socket's path
	l  net.Listener

	mu    sync.Mutex
	calm  *sync.Cond
	cut   bool
	ended bool
	conns map[net.Conn]bool
}

// newLink listens at its own address and carries what comes to another.
func newLink(t *testing.T, addr, to string) *link {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(addr[len("unix:"):]), 0o700); err != nil {
		t.Fatal(err)
	}
	l, err := rpc.Listen(addr)
	if err != nil {
		t.Fatal(err)
	}
	k := &link{to: to[len("unix:"):], l: l, conns: make(map[net.Conn]bool)}
	k.calm = sync.NewCond(&k.mu)
	go k.accept()
	t.Cleanup(k.close)
	return k
}

func (k *link) accept() {
	for {
		c, err := k.l.Accept()
		if err != nil {
			return // closed
		}
		go k.carry(c)
	}
}

// pass waits while the link is cut; false: it has ended.
func (k *link) pass() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	for k.cut && !k.ended {
		k.calm.Wait()
	}
	return !k.ended
}

func (k *link) carry(near net.Conn) {
	defer near.Close()
	if !k.pass() {
		return
	}
	far, err := net.Dial("unix", k.to)
	if err != nil {
		return // the key manager does not run
	}
	defer far.Close()
	k.mu.Lock()
	k.conns[near], k.conns[far] = true, true
	k.mu.Unlock()
	done := make(chan struct{}, 2)
	one := func(dst, src net.Conn) {
		defer func() { done <- struct{}{} }()
		buf := make([]byte, 64<<10)
		for {
			n, err := src.Read(buf)
			if n > 0 {
				if !k.pass() {
					return
				}
				if _, err := dst.Write(buf[:n]); err != nil {
					return
				}
			}
			if err != nil {
				return
			}
		}
	}
	go one(near, far)
	go one(far, near)
	<-done
	k.mu.Lock()
	delete(k.conns, near)
	delete(k.conns, far)
	k.mu.Unlock()
}

func (k *link) set(cut bool) {
	k.mu.Lock()
	k.cut = cut
	k.mu.Unlock()
	k.calm.Broadcast()
}

func (k *link) close() {
	k.mu.Lock()
	k.ended = true
	for c := range k.conns {
		_ = c.Close()
	}
	k.mu.Unlock()
	k.calm.Broadcast()
	_ = k.l.Close()
}
