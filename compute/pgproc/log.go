package pgproc

import (
	"bytes"
	"sync"
)

const (
	// LogBytes is how much of Postgres's log is kept: its end.
	LogBytes = 256 << 10
	// startupBytes is how much of the log before readiness may be shown outside.
	startupBytes = 4 << 10
	maxLine      = 64 << 10 // a longer line is looked at in parts
)

// ready is what Postgres says when the first clients may come, unless log_min_messages keeps
// it from it or lc_messages has it say so in another language. What it logs until then is about
// its files and settings; later messages hold what users sent.
var ready = []byte("database system is ready to accept connections")

// A Log takes what Postgres writes on its standard error. Statements and error details hold
// users' data, so it keeps the text in memory only (K1).
type Log struct {
	// Panic, if set, is told of a PANIC of the server: its
	// SQLSTATE, or nothing, never the text. It must not block.
	Panic func(sqlstate string)

	mu      sync.Mutex
	kept    []byte // LogBytes to twice as many, or all
	line    []byte // an unfinished line
	startup []byte
	started bool
	version uint64
}

// Write takes a part of the log.
func (l *Log) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.version++
	l.kept = append(l.kept, p...)
	if len(l.kept) > 2*LogBytes {
		l.kept = append(l.kept[:0], l.kept[len(l.kept)-LogBytes:]...)
	}
	l.line = append(l.line, p...)
	for {
		i := bytes.IndexByte(l.line, '\n')
		if i < 0 && len(l.line) < maxLine {
			return len(p), nil
		}
		if i < 0 {
			i = len(l.line) - 1
		}
		l.lookLocked(l.line[:i+1])
		l.line = append(l.line[:0], l.line[i+1:]...)
	}
}

func (l *Log) lookLocked(line []byte) {
	if !l.started {
		if l.started = bytes.Contains(line, ready); !l.started {
			l.startup = append(l.startup, line...)
			if n := len(l.startup) - startupBytes; n > 0 {
				l.startup = append(l.startup[:0], l.startup[n:]...)
			}
		}
	}
	if i := bytes.Index(line, []byte(" PANIC:  ")); i >= 5 && l.Panic != nil {
		l.Panic(sqlstate(line[i-5 : i]))
	}
}

// sqlstate is the state that stands before the severity (log_line_prefix ends with %e), if
// that is what it is.
func sqlstate(b []byte) string {
	b = bytes.TrimSpace(b)
	for _, c := range b {
		if (c < '0' || c > '9') && (c < 'A' || c > 'Z') {
			return ""
		}
	}
	if len(b) != 5 {
		return ""
	}
	return string(b)
}

// Tail is the end of the log, at most LogBytes, and a number that changes with it.
func (l *Log) Tail() (text []byte, version uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return bytes.Clone(l.kept[max(0, len(l.kept)-LogBytes):]), l.version
}

// Version changes when the log does.
func (l *Log) Version() uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.version
}

// Ready tells that Postgres takes connections, whatever it says of that itself.
func (l *Log) Ready() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.started, l.startup = true, nil
}

// Startup is the end of what was logged before Postgres took connections; empty if it did:
// then nothing of the log is for outside.
func (l *Log) Startup() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.started {
		return ""
	}
	return string(bytes.TrimSpace(append(bytes.Clone(l.startup), l.line...)))
}
