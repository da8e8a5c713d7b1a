package manager

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
)

// maxChildLog is the size in bytes at which a log makes way for a new one at a child's
// start; the one before is kept.
const maxChildLog = 32 << 20

// childLog is the file that takes a child's standard error. The child writes to it
// without a pipe, so that neither end can block or outlive the other.
type childLog struct {
	path string
	from int64 // where the newest child began to write
}

// attach gives the log to a child that is about to start; done closes this end of it.
func (l *childLog) attach(cmd *exec.Cmd) (done func(), err error) {
	if st, err := os.Stat(l.path); err == nil && st.Size() > maxChildLog {
		if err := os.Rename(l.path, l.path+".old"); err != nil {
			return nil, fmt.Errorf("putting a full log aside: %w", err)
		}
	}
	f, err := os.OpenFile(l.path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, fmt.Errorf("opening the log of a child: %w", err)
	}
	if l.from, err = f.Seek(0, io.SeekEnd); err != nil {
		f.Close()
		return nil, fmt.Errorf("opening the log of a child: %w", err)
	}
	cmd.Stderr = f
	return func() { f.Close() }, nil
}

// maxTail bounds how much of a log is looked at for the reason of an end.
const maxTail = 8 << 10

// explain adds the last thing that the newest child said to the error it ended with.
func (l *childLog) explain(err error) error {
	f, openErr := os.Open(l.path)
	if openErr != nil {
		return errors.Join(err, openErr)
	}
	defer f.Close()
	st, statErr := f.Stat()
	if statErr != nil {
		return errors.Join(err, statErr)
	}
	start := max(l.from, st.Size()-maxTail)
	data, readErr := io.ReadAll(io.NewSectionReader(f, start, st.Size()-start))
	if readErr != nil {
		return errors.Join(err, readErr)
	}
	lines := strings.Split(strings.TrimSpace(string(data)), "\n")
	last := lines[len(lines)-1]
	for i, line := range lines {
		if said, ok := strings.CutPrefix(line, "holdfast: "); ok {
			last = oneLine(append([]string{said}, lines[i+1:]...))
		}
	}
	if last == "" {
		return fmt.Errorf("%w (its log: %s)", err, l.path)
	}
	return fmt.Errorf("%w: %s (its log: %s)", err, last, l.path)
}

// maxReason bounds what is shown of a reason.
const maxReason = 800

// oneLine joins the lines of a reason, such as what Postgres said before it ended, up to the next line of
// the log.
func oneLine(lines []string) string {
	for i, line := range lines {
		if lines[i] = strings.TrimSpace(line); i > 0 && strings.HasPrefix(line, "time=") {
			lines = lines[:i]
			break
		}
	}
	joined := strings.Join(lines, " ")
	if len(joined) > maxReason {
		joined = strings.ToValidUTF8(joined[:maxReason], "") + "…"
	}
	return joined
}
