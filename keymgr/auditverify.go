package keymgr

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Summary is what VerifyAudit found.
type Summary struct {
	Events    uint64
	FirstSeq  uint64 // 1, unless only later files were given
	LastSeq   uint64
	LastHash  string
	FirstTime time.Time
	LastTime  time.Time
	ByEvent   map[string]uint64 // events by name and outcome, as "cmk.unwrap denied"
	Instances int               // of key managers that opened the log
	// TornBytes is the size of an unfinished last line: a crash while it was written.
	TornBytes int64

	tornHash string
	fileSize int64 // of the last file, without an unfinished line
	anyStart bool  // take the first line's seq and prev as given
	pin      *Head
	each     func(Event) error
}

// Head is a point of a log: an event's number and hash. One that was noted elsewhere
// proves later that the log still has what it had then: a log that was cut off or written anew has not.
type Head struct {
	Seq  uint64
	Hash string
}

func (h Head) String() string { return fmt.Sprintf("%d:%s", h.Seq, h.Hash) }

// ParseHead reads what Head.String gives.
func ParseHead(s string) (Head, error) {
	seq, hash, ok := strings.Cut(s, ":")
	n, err := strconv.ParseUint(seq, 10, 64)
	if raw, hexErr := hex.DecodeString(hash); !ok || err != nil || hexErr != nil || len(raw) != sha256.Size {
		return Head{}, fmt.Errorf("head %.100q: want NUMBER:HASH, as holdfast audit verify prints it", s)
	}
	return Head{n, strings.ToLower(hash)}, nil
}

// Head is the log's end.
func (s *Summary) Head() Head { return Head{s.LastSeq, s.LastHash} }

// maxAuditLine bounds a line, in bytes; a batch of DEKs has the longest.
const maxAuditLine = 16 << 20

// VerifyAudit checks the whole chain of an audit log, a folder or one of its files, with
// nothing but the files. An error names the file and line where the chain breaks.
func VerifyAudit(path string) (Summary, error) { return ReadAudit([]string{path}, nil, nil) }

// ReadAudit verifies a log and gives each of its events to each, if that is not nil. paths is one
// folder, or files in their order, which may begin anywhere. The log must have pin, if that is
// not nil. What each was given before an error is verified too, but is not all.
func ReadAudit(paths []string, pin *Head, each func(Event) error) (Summary, error) {
	files, whole, err := auditPaths(paths)
	sum := Summary{LastHash: zeroHash, anyStart: !whole, pin: pin, each: each, ByEvent: make(map[string]uint64)}
	if err != nil {
		return sum, err
	}
	for i, file := range files {
		if sum, err = verifyFile(file, sum); err != nil {
			return sum, err
		}
		if sum.TornBytes > 0 && i < len(files)-1 {
			return sum, fmt.Errorf("audit log %s: its last line is cut, and it is not the last file", file)
		}
	}
	if sum.pin != nil {
		return sum, fmt.Errorf("audit log %s ends at event %d: event %d, the head that it had once, is missing: the log was cut off, or this is another", strings.Join(paths, " "), sum.LastSeq, pin.Seq)
	}
	return sum, nil
}

// auditPaths gives the files of a folder, all of them, or those that are named.
func auditPaths(paths []string) (files []string, whole bool, err error) {
	if len(paths) != 1 {
		return paths, false, nil
	}
	st, err := os.Stat(paths[0])
	if err != nil {
		return nil, false, fmt.Errorf("audit log: %w", err)
	}
	if !st.IsDir() {
		return paths, false, nil
	}
	if files, err = auditFiles(paths[0]); err == nil && len(files) == 0 {
		err = fmt.Errorf("there is no audit log in %s: no file is named %sNUMBER%s", paths[0], auditPrefix, auditSuffix)
	}
	return files, true, err
}

// auditFiles are the log's files in order.
func auditFiles(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("audit log: %w", err)
	}
	var files []string
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), auditPrefix) && strings.HasSuffix(e.Name(), auditSuffix) {
			files = append(files, filepath.Join(dir, e.Name()))
		}
	}
	slices.Sort(files)
	return files, nil
}

// verifyFile checks one file that follows on after.
func verifyFile(path string, after Summary) (Summary, error) {
	f, err := os.Open(path)
	if err != nil {
		return after, err
	}
	defer f.Close()
	sum := after
	sum.fileSize = 0
	r := bufio.NewReaderSize(f, 1<<16)
	for n := 1; ; n++ {
		line, err := readLine(r)
		if errors.Is(err, io.EOF) {
			if len(line) > 0 {
				torn := sha256.Sum256(line)
				sum.TornBytes, sum.tornHash = int64(len(line)), hex.EncodeToString(torn[:])
			}
			return sum, nil
		}
		if err == nil {
			err = sum.next(line)
		}
		if err != nil {
			return sum, fmt.Errorf("audit log %s, line %d: %w", path, n, err)
		}
		sum.fileSize += int64(len(line))
	}
}

// readLine gives a line with its newline, or io.EOF with what is left.
func readLine(r *bufio.Reader) ([]byte, error) {
	var line []byte
	for {
		part, err := r.ReadSlice('\n')
		line = append(line, part...)
		if len(line) > maxAuditLine {
			return nil, fmt.Errorf("longer than %d bytes", maxAuditLine)
		}
		if !errors.Is(err, bufio.ErrBufferFull) {
			return line, err
		}
	}
}

// next checks that a line continues the chain.
func (s *Summary) next(line []byte) error {
	const hashEnd = len(hashField) + 2*sha256.Size
	line = bytes.TrimSuffix(line, []byte("\n"))
	if len(line) < hashEnd+3 || string(line[:len(hashField)]) != hashField || string(line[hashEnd:hashEnd+2]) != `",` {
		return errors.New("it does not begin with a hash")
	}
	hash := string(line[len(hashField):hashEnd])
	body := append([]byte{'{'}, line[hashEnd+2:]...)
	if sum := sha256.Sum256(body); hex.EncodeToString(sum[:]) != hash {
		return errors.New("it was changed: its hash is not that of its content")
	}
	var e Event
	if err := json.Unmarshal(body, &e); err != nil {
		return err
	}
	if s.anyStart {
		s.anyStart, s.LastSeq, s.LastHash = false, e.Seq-1, e.Prev
	}
	if e.Seq != s.LastSeq+1 || e.Prev != s.LastHash {
		return fmt.Errorf("the chain is broken: event %d after hash %.16s, want event %d after %.16s", e.Seq, e.Prev, s.LastSeq+1, s.LastHash)
	}
	s.count(e)
	s.LastSeq, s.LastHash = e.Seq, hash
	if s.pin != nil && s.pin.Seq == e.Seq {
		if s.pin.Hash != hash {
			return fmt.Errorf("event %d has hash %.16s, and had %.16s once: the log was written anew, or this is another", e.Seq, hash, s.pin.Hash)
		}
		s.pin = nil
	}
	if s.each != nil {
		return s.each(e)
	}
	return nil
}

func (s *Summary) count(e Event) {
	if s.Events == 0 {
		s.FirstSeq, s.FirstTime = e.Seq, e.Time
	}
	s.Events++
	s.LastTime = e.Time
	if s.ByEvent != nil {
		s.ByEvent[e.Event+" "+e.Outcome]++
	}
	if e.Event == "log.opened" {
		s.Instances++
	}
}
