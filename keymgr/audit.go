package keymgr

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"
)

// Event is one line of the audit log. It names things and holds no secrets.
//
// The log is files of JSON lines, audit-N.jsonl with N the number of its first event. A line is
//
//	{"hash":"H","prev":"P","seq":N,"time":...,"event":...,...}
//
// where H is the SHA-256, in hexadecimal, of the line's bytes without its hash member (that
// is, of "{" and everything from "prev" on, without the newline) and P is the H of the line
// before; the first has 64 zeros. So a line that was changed, left out, added or moved breaks the chain.
// Lines cut off the end are found by comparing with the KMS's own log, by request_id.
//
// Every use of the CMK and of KEKs, every lease granted, ended or refused is an event, on
// disk before its effect is given out; one whose sync failed has no effect, and may be there. Renewals are none: each rests on a cmk.unwrap that is.
type Event struct {
	Prev string    `json:"prev"`
	Seq  uint64    `json:"seq"`
	Time time.Time `json:"time"`
	// Event is one of: log.opened, log.recovered, project.created, branch.key.created, branch.key.destroyed, cmk.wrap,
	// cmk.unwrap, lease.granted, lease.refused, lease.expired, lease.revoked, kek.rotated, kek.retired, kek.forgotten,
	// dek.generated, dek.unwrapped, dek.rewrapped, key.held, key.released, key.grace, key.rewrap.begun, key.rewrapped,
	// kms.notice, receipt.opened, receipt.completed, shred.reported.
	Event      string   `json:"event"`
	Outcome    string   `json:"outcome"` // ok, denied, held, unreachable, unknown, destroyed, failed
	Project    string   `json:"project,omitempty"`
	Branch     string   `json:"branch,omitempty"` // of a key that is a branch's own
	Node       string   `json:"node,omitempty"`
	Lease      string   `json:"lease,omitempty"`
	CMK        string   `json:"cmk,omitempty"`
	CMKVersion string   `json:"cmk_version,omitempty"`
	KEKVersion uint32   `json:"kek_version,omitempty"`
	RequestID  string   `json:"request_id,omitempty"` // the KMS's, to find the call in its log
	Objects    []string `json:"objects,omitempty"`    // of DEKs: purpose/branch/object
	Detail     string   `json:"detail,omitempty"`
	// Instance tells logs of several key managers apart: with log.opened, random for each start of one.
	Instance string `json:"instance,omitempty"`
}

const (
	// auditFileSize begins a new file, in bytes.
	auditFileSize = 64 << 20
	auditPrefix   = "audit-"
	auditSuffix   = ".jsonl"

	hashField = `{"hash":"`
)

var zeroHash = hex.EncodeToString(make([]byte, sha256.Size))

// auditLog appends events. Calls that come together share one write and one sync.
type auditLog struct {
	dir      string
	maxFile  int64
	lock     *os.File // held: the log has one writer
	requests chan *auditRequest
	stop     chan struct{}
	stopped  sync.WaitGroup

	// Of the writing goroutine.
	f    *os.File // nil after an error: the next append opens it again
	size int64    // of what is known to be on disk
	seq  uint64   // of the last event on disk
	prev string   // its hash
}

type auditRequest struct {
	events []Event
	done   chan error
	last   uint64 // with done: the number of the last of the events
}

// openAudit verifies the last file of the log and continues it.
func openAudit(dir string) (*auditLog, error) {
	lock, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("audit log: %w", err)
	}
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		lock.Close()
		return nil, fmt.Errorf("audit log in %s: another key manager has it open (%w)", dir, err)
	}
	l := &auditLog{dir: dir, maxFile: auditFileSize, lock: lock, requests: make(chan *auditRequest), stop: make(chan struct{})}
	err = l.reopen()
	if err == nil {
		err = l.write([]Event{{Event: "log.opened", Outcome: "ok", Instance: newLeaseID()}})
	}
	if err != nil {
		return nil, errors.Join(err, l.closeFiles())
	}
	l.stopped.Add(1)
	go l.run()
	return l, nil
}

func (l *auditLog) Close() error {
	close(l.stop)
	l.stopped.Wait()
	return l.closeFiles()
}

func (l *auditLog) closeFiles() error {
	var err error
	if l.f != nil {
		err = l.f.Close()
	}
	return errors.Join(err, l.lock.Close())
}

var errAudit = errors.New("the audit log cannot be written, so nothing is given out")

// append returns once the events are on disk. If it fails, what they tell of must not
// happen.
func (l *auditLog) append(ctx context.Context, events ...Event) error {
	_, err := l.appendSeq(ctx, events...)
	return err
}

// appendSeq is append, and gives the number of the last of the events.
func (l *auditLog) appendSeq(ctx context.Context, events ...Event) (uint64, error) {
	r := &auditRequest{events: events, done: make(chan error, 1)}
	select {
	case l.requests <- r:
	case <-l.stop:
		return 0, fmt.Errorf("%w: it is closed", errAudit)
	case <-ctx.Done():
		return 0, ctx.Err()
	}
	select {
	case err := <-r.done:
		return r.last, err
	case <-ctx.Done():
		return 0, ctx.Err()
	}
}

func (l *auditLog) run() {
	defer l.stopped.Done()
	for {
		var batch []*auditRequest
		select {
		case r := <-l.requests:
			batch = append(batch, r)
		case <-l.stop:
			return
		}
		for more := true; more && len(batch) < 256; {
			select {
			case r := <-l.requests:
				batch = append(batch, r)
			default:
				more = false
			}
		}
		var events []Event
		for _, r := range batch {
			events = append(events, r.events...)
		}
		err := l.write(events)
		last := l.seq - uint64(len(events))
		for _, r := range batch {
			last += uint64(len(r.events))
			r.last = last
			r.done <- err
		}
	}
}

// write puts events on disk, or none of them as far as later calls are concerned.
func (l *auditLog) write(events []Event) error {
	err := l.tryWrite(events)
	if err == nil {
		return nil
	}
	// What of it is on disk is not known: look, before anything else is written.
	if l.f != nil {
		l.f.Close()
		l.f = nil
	}
	return fmt.Errorf("%w: %s: %w", errAudit, l.dir, err)
}

func (l *auditLog) tryWrite(events []Event) error {
	if l.f == nil {
		if err := l.reopen(); err != nil {
			return err
		}
	}
	if l.size >= l.maxFile {
		if err := l.rotate(); err != nil {
			return err
		}
	}
	seq, prev := l.seq, l.prev
	var b bytes.Buffer
	for _, e := range events {
		seq++
		e.Seq, e.Prev, e.Time = seq, prev, time.Now().UTC()
		body, err := json.Marshal(e)
		if err != nil {
			return err
		}
		sum := sha256.Sum256(body)
		prev = hex.EncodeToString(sum[:])
		b.WriteString(hashField + prev + `",`)
		b.Write(body[1:])
		b.WriteByte('\n')
	}
	if _, err := l.f.WriteAt(b.Bytes(), l.size); err != nil {
		return err
	}
	if err := l.f.Sync(); err != nil { // the commit point
		return err
	}
	l.size, l.seq, l.prev = l.size+int64(b.Len()), seq, prev
	return nil
}

func (l *auditLog) fileName(first uint64) string {
	return filepath.Join(l.dir, fmt.Sprintf("%s%012d%s", auditPrefix, first, auditSuffix))
}

// rotate begins a new file, whose first line continues the chain.
func (l *auditLog) rotate() error {
	f, err := os.OpenFile(l.fileName(l.seq+1), os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	if err := syncDir(l.dir); err != nil {
		f.Close()
		return err
	}
	l.f.Close()
	l.f, l.size = f, 0
	return nil
}

// reopen finds the end of the log. A last line without its newline was being written when
// the process or machine ended; nothing that it tells of was given out, since that waits for the
// sync. It is cut off, and an event says so.
func (l *auditLog) reopen() error {
	files, err := auditFiles(l.dir)
	if err != nil {
		return err
	}
	if len(files) == 0 {
		l.seq, l.prev = 0, zeroHash
		files = []string{l.fileName(1)}
	}
	last := files[len(files)-1]
	// The end of the file before the last one, if there is one, is where the last begins.
	sum := Summary{LastHash: zeroHash}
	if len(files) > 1 {
		if sum, err = verifyFile(files[len(files)-2], Summary{anyStart: true}); err != nil {
			return err
		}
		if sum.TornBytes > 0 {
			return fmt.Errorf("audit log %s: its last line is cut, and it is not the last file", files[len(files)-2])
		}
	}
	f, err := os.OpenFile(last, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	if sum, err = verifyFile(last, sum); err == nil {
		err = syncDir(l.dir)
	}
	if err == nil && sum.TornBytes > 0 {
		err = f.Truncate(sum.fileSize)
	}
	if err != nil {
		f.Close()
		return err
	}
	l.f, l.size, l.seq, l.prev = f, sum.fileSize, sum.LastSeq, sum.LastHash
	if sum.TornBytes > 0 {
		return l.tryWrite([]Event{{Event: "log.recovered", Outcome: "ok",
			Detail: fmt.Sprintf("cut off an unfinished line of %d bytes, SHA-256 %s", sum.TornBytes, sum.tornHash)}})
	}
	return nil
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
