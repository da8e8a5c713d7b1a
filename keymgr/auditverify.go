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
	"strings"
)

// Summary is what VerifyAudit found.
type Summary struct {
	Events   uint64
	LastSeq  uint64
	LastHash string
	// TornBytes is the size of an unfinished last line: a crash while it was written.
	TornBytes int64

	tornHash string
	fileSize int64 // of the last file, without an unfinished line
	anyStart bool  // take the first line's seq and prev as given
}

// maxAuditLine bounds a line, in bytes; a batch of DEKs has the longest.
const maxAuditLine = 16 << 20

// VerifyAudit checks the whole chain of an audit log, a folder or one of its files, with
// nothing but the files. An error names the file and line where the chain breaks.
func VerifyAudit(path string) (Summary, error) {
	st, err := os.Stat(path)
	if err != nil {
		return Summary{}, err
	}
	if !st.IsDir() {
		return verifyFile(path, Summary{anyStart: true})
	}
	files, err := auditFiles(path)
	if err != nil {
		return Summary{}, err
	}
	sum := Summary{LastHash: zeroHash}
	for i, file := range files {
		if sum, err = verifyFile(file, sum); err != nil {
			return sum, err
		}
		if sum.TornBytes > 0 && i < len(files)-1 {
			return sum, fmt.Errorf("audit log %s: its last line is cut, and it is not the last file", file)
		}
	}
	return sum, nil
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
	s.Events++
	s.LastSeq, s.LastHash = e.Seq, hash
	return nil
}
