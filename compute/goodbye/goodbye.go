// Package goodbye tells the clients of a PostgreSQL server that is about to be killed why, without
// a server that could be asked to: it is stock PostgreSQL, and it has no words for it.
//
// A message of ours may be put only where one of PostgreSQL's has ended: in the middle of a row it
// would be taken for data. Where that is only the backend knows. So it is the backend that gets
// to a boundary, and the kernel that tells us that it has:
//
//  1. each backend's socket is duplicated (pidfd_getfd), and the backend stopped (SIGSTOP);
//  2. the kernel is asked how many bytes the backend has written so far;
//  3. the postmaster is told to shut down immediately (SIGQUIT). Each backend goes on in its handler
//     of that signal: unless it was interrupted within a message, it appends a WARNING, flushes
//     all that it had buffered, and exits; within a message it writes nothing more, and exits;
//  4. a backend that has exited by itself, and had written something after 2, has ended at a
//     boundary: there goes our message. All others are left as they are, to be cut off.
//
// From 2 on no backend executes anything but that handler: nothing is answered, acknowledged or
// reported that was not before.
//
// Connections under TLS, and sockets that may not be duplicated, cannot be written to. Their
// backends get SIGTERM, upon which PostgreSQL says in its own words that an administrator has ended
// the connection (with the same SQLSTATE).
package goodbye

import (
	"net/netip"
	"time"

	"golang.org/x/sys/unix"
)

// Server is what is to be known of a server.
type Server struct {
	PID  int // of the postmaster
	Port int // that clients connect to over TCP; others than these are not spoken to
	// Plain tells whether what goes over the connection of a client can be read as it is: it is
	// neither under TLS nor GSSAPI encryption. nil: all can.
	Plain func(client netip.AddrPort) bool

	dup func(pidfd, fd, flags int) (int, error) // nil: the kernel's
}

// Told counts what came of it.
type Told struct {
	Clients int // connections that were there
	Ours    int // of which so many were told in our words,
	Theirs  int // and so many in PostgreSQL's
}

// Ends of the steps, in eighths of the time that there is.
const (
	foundBy  = 2 // who is not found by then is cut off without words
	stopBy   = 3
	theirsBy = 4 // of those that speak for themselves
	quitBy   = 6
)

// Say tells the clients of a server and returns in time. The server does not serve after it: it is
// stopped, shutting down or gone, and is to be killed in any case.
func Say(s Server, message []byte, within time.Duration) Told {
	began := time.Now()
	if s.dup == nil {
		s.dup = unix.PidfdGetfd
	}
	by := func(eighths int) time.Time { return began.Add(within * time.Duration(eighths) / 8) }
	clients := s.find(by(foundBy))
	defer func() {
		for _, c := range clients {
			c.close()
		}
	}()
	var ours, theirs []*client
	for _, c := range clients {
		if c.plain {
			ours = append(ours, c)
		} else {
			theirs = append(theirs, c)
		}
	}
	signal(theirs, unix.SIGTERM)
	signal(ours, unix.SIGSTOP)
	ours = stopped(ours, by(stopBy))
	for _, c := range ours {
		c.before, c.known = written(c.socket)
	}
	told := Told{Clients: len(clients), Theirs: awaitExits(theirs, by(theirsBy))}
	_ = unix.Kill(s.PID, unix.SIGQUIT) // it may be gone
	awaitPending(ours, by(quitBy))
	signal(ours, unix.SIGCONT)
	awaitExits(ours, by(8))
	for _, c := range ours {
		if c.atBoundary() && c.say(message) {
			told.Ours++
		}
	}
	return told
}

// atBoundary tells whether the last byte that the backend has written ended a message.
func (c *client) atBoundary() bool {
	after, ok := written(c.socket)
	return c.exited && c.known && ok && after > c.before
}

func signal(clients []*client, sig unix.Signal) {
	for _, c := range clients {
		_ = unix.PidfdSendSignal(c.pidfd, sig, nil, 0) // it may be gone
	}
}
