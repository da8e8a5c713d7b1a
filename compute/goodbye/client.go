package goodbye

import (
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// client is a connection, as its backend has it.
type client struct {
	pid    int
	pidfd  int
	socket int // a duplicate of the backend's; -1: it could not be had
	plain  bool
	before uint64 // bytes that were written when the backend was stopped,
	known  bool   // if that is known
	exited bool   // the backend, by itself
}

func (c *client) close() {
	if c.socket >= 0 {
		unix.Close(c.socket)
	}
	unix.Close(c.pidfd)
}

// find lists the clients that are connected, as far as it gets in time.
func (s *Server) find(until time.Time) (list []*client) {
	for _, pid := range children(s.PID) {
		if !time.Now().Before(until) {
			return list
		}
		if c := s.open(pid); c != nil {
			list = append(list, c)
		}
	}
	return list
}

// open gives the client of a process; nil if it has none.
func (s *Server) open(pid int) *client {
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return nil
	}
	c := &client{pid: pid, pidfd: pidfd, socket: -1}
	sockets, err := sockets(pid)
	for _, fd := range sockets {
		var dup int
		if dup, err = s.dup(pidfd, fd, 0); err != nil {
			break
		}
		if peer, ok := clientOf(dup, s.Port); ok {
			c.socket, c.plain = dup, s.Plain == nil || s.Plain(peer)
			return c
		}
		unix.Close(dup)
	}
	if err != nil && servesClient(pid) { // not ours to look into
		return c
	}
	unix.Close(pidfd)
	return nil
}

// children lists a process's children.
func children(pid int) (list []int) {
	p := strconv.Itoa(pid)
	data, err := os.ReadFile("/proc/" + p + "/task/" + p + "/children")
	if err != nil {
		return nil
	}
	for f := range strings.FieldsSeq(string(data)) {
		if child, err := strconv.Atoi(f); err == nil {
			list = append(list, child)
		}
	}
	return list
}

// maxFiles bounds how many of a backend's files are looked at. The socket is one of the first, the
// files of tables come later.
const maxFiles = 64

// sockets lists a process's lowest descriptors that are sockets.
func sockets(pid int) (list []int, err error) {
	dir := "/proc/" + strconv.Itoa(pid) + "/fd"
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	names, err := f.Readdirnames(maxFiles)
	if err != nil {
		return nil, err
	}
	for _, name := range names {
		to, err := os.Readlink(dir + "/" + name)
		if err != nil || !strings.HasPrefix(to, "socket:") {
			continue
		}
		if fd, err := strconv.Atoi(name); err == nil {
			list = append(list, fd)
		}
	}
	slices.Sort(list)
	return list, nil
}

// clientOf gives the address of the client that is connected to a port over a socket, if it is such a
// socket: a backend may itself be a client of its own server.
func clientOf(socket, port int) (netip.AddrPort, bool) {
	local, err := unix.Getsockname(socket)
	if err != nil {
		return netip.AddrPort{}, false
	}
	if at, ok := addrPort(local); !ok || int(at.Port()) != port {
		return netip.AddrPort{}, false
	}
	remote, err := unix.Getpeername(socket)
	if err != nil {
		return netip.AddrPort{}, false // it listens, or the client is gone
	}
	return addrPort(remote)
}

func addrPort(sa unix.Sockaddr) (netip.AddrPort, bool) {
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port)), true
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr).Unmap(), uint16(sa.Port)), true
	}
	return netip.AddrPort{}, false
}

// clientTitle is how the title of a backend begins that serves a client over TCP: it has the client's
// address and port. Those of other processes have nothing of the kind.
var clientTitle = regexp.MustCompile(`^postgres: .* \S+\(\d+\)`)

func servesClient(pid int) bool {
	title, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/cmdline")
	return err == nil && clientTitle.Match(title)
}

// written is how many bytes were ever written to a socket: acknowledged, under way or waiting. The
// kernel gives the numbers of one moment.
func written(socket int) (uint64, bool) {
	if socket < 0 {
		return 0, false
	}
	info, err := unix.GetsockoptTCPInfo(socket, unix.IPPROTO_TCP, unix.TCP_INFO)
	if err != nil {
		return 0, false
	}
	return info.Bytes_sent - info.Bytes_retrans + uint64(info.Notsent_bytes), true
}

// say writes the message and ends the connection. It does not wait: what a client that does not read
// has no room for it does not get.
func (c *client) say(message []byte) bool {
	n, err := unix.SendmsgN(c.socket, message, nil, nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
	// What the client sent and nobody read would, at the close, have the kernel reset the
	// connection, and the message be lost on its way.
	_ = unix.Shutdown(c.socket, unix.SHUT_WR)
	c.drain()
	return err == nil && n == len(message)
}

// drain throws away what the client has sent, without a look at it.
func (c *client) drain() {
	buf := make([]byte, 64<<10)
	for range 64 {
		if n, _, err := unix.Recvfrom(c.socket, buf, unix.MSG_DONTWAIT|unix.MSG_TRUNC); err != nil || n <= 0 {
			return
		}
	}
}
