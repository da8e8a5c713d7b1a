package goodbye

import (
	"bytes"
	"io"
	"strings"
	"testing"

	"github.com/holdfastdb/holdfast/test/stock"
)

// idlePsql is a psql that has run one statement and waits for the next.
func idlePsql(t *testing.T, s *stock.Server) (next func() (shown string)) {
	t.Helper()
	cmd, err := s.Target().Command(t.Context(), "psql", "-X", "-A", "-t")
	if err != nil {
		t.Fatal(err)
	}
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	var errs bytes.Buffer
	cmd.Stderr = &errs
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(in, "SELECT 'ready';\n"); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(out, make([]byte, len("ready\n"))); err != nil {
		t.Fatal(err)
	}
	return func() string {
		if _, err := io.WriteString(in, "SELECT 1;\n"); err != nil {
			t.Fatal(err)
		}
		in.Close()
		_ = cmd.Wait() // it is to fail
		return errs.String()
	}
}

// Who looks at its connection only when it is used again hears it then.
func TestIdlePsqlHearsItWithItsNextStatement(t *testing.T) {
	s := server(t, nil)
	next := idlePsql(t, s)
	waiting(t, s, "ClientRead") // psql has its answer while the backend may still be within the write of it
	if told := say(s, nil); told.Ours != 1 {
		t.Errorf("told %+v, want one", told)
	}
	if shown := next(); !strings.Contains(shown, "FATAL:  "+notice.Message) || !strings.Contains(shown, notice.Hint) {
		t.Errorf("psql shows\n%s\nwant the FATAL and its hint", shown)
	}
}
