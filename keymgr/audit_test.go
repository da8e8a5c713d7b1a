package keymgr

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

func openLog(t *testing.T, dir string) *auditLog {
	t.Helper()
	l, err := openAudit(dir)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// BreakAudit makes every write of the audit log fail until mend.
func BreakAudit(t *testing.T, s *Server) (mend func()) {
	t.Helper()
	s.audit.f.Close()
	dir := s.audit.dir
	if err := os.Rename(dir, dir+".away"); err != nil {
		t.Fatal(err)
	}
	return func() {
		if err := os.Rename(dir+".away", dir); err != nil {
			t.Fatal(err)
		}
	}
}

func verify(t *testing.T, path string, events uint64) Summary {
	t.Helper()
	sum, err := VerifyAudit(path)
	if err != nil || sum.Events != events {
		t.Fatalf("VerifyAudit = %+v, %v; want %d events", sum, err, events)
	}
	return sum
}

func appendEvents(t *testing.T, l *auditLog, n int) {
	t.Helper()
	for i := range n {
		if err := l.append(t.Context(), Event{Event: "cmk.unwrap", Outcome: "ok", Project: fmt.Sprint("p", i)}); err != nil {
			t.Fatal(err)
		}
	}
}

func TestAuditContinuesItsChain(t *testing.T) {
	dir := t.TempDir()
	for run := range 3 {
		l := openLog(t, dir)
		appendEvents(t, l, 4)
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		verify(t, dir, uint64(run+1)*5)
	}
	if err := openLog(t, dir).Close(); err != nil {
		t.Fatal(err)
	}
}

func TestAuditHasOneWriter(t *testing.T) {
	dir := t.TempDir()
	l := openLog(t, dir)
	if _, err := openAudit(dir); err == nil || !strings.Contains(err.Error(), "another key manager") {
		t.Errorf("second open: %v", err)
	}
	l.Close()
	openLog(t, dir).Close()
}

func TestAuditBatchesKeepOrder(t *testing.T) {
	dir := t.TempDir()
	l := openLog(t, dir)
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() { appendEvents(t, l, 10) })
	}
	wg.Wait()
	l.Close()
	verify(t, dir, 201)
	if err := l.append(context.Background(), Event{}); !errors.Is(err, errAudit) {
		t.Errorf("append after Close: %v", err)
	}
}

func TestAuditRotatesAndStaysOneChain(t *testing.T) {
	dir := t.TempDir()
	l := openLog(t, dir)
	l.maxFile = 1000
	appendEvents(t, l, 20)
	l.Close()
	files, err := auditFiles(dir)
	if err != nil || len(files) < 4 {
		t.Fatalf("%d files, %v", len(files), err)
	}
	verify(t, dir, 21)
	l = openLog(t, dir)
	l.Close()
	verify(t, dir, 22)
	if err := os.Remove(files[1]); err != nil {
		t.Fatal(err)
	}
	if _, err := VerifyAudit(dir); err == nil || !strings.Contains(err.Error(), "chain is broken") {
		t.Errorf("a file is missing: %v", err)
	}
}

func TestAuditTornLineIsCutAndTold(t *testing.T) {
	dir := t.TempDir()
	l := openLog(t, dir)
	appendEvents(t, l, 3)
	l.Close()
	file := l.fileName(1)
	whole, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	lastLine := bytes.LastIndexByte(whole[:len(whole)-1], '\n') + 1
	for cut := lastLine + 1; cut < len(whole); cut += 20 {
		if err := os.WriteFile(file, whole[:cut], 0o600); err != nil {
			t.Fatal(err)
		}
		if sum := verify(t, dir, 3); sum.TornBytes != int64(cut-lastLine) {
			t.Errorf("cut at %d: torn %d", cut, sum.TornBytes)
		}
		openLog(t, dir).Close()
		verify(t, dir, 5) // 3, log.recovered, log.opened
		if text, _ := os.ReadFile(file); !bytes.Contains(text, []byte("unfinished line")) {
			t.Error("nothing tells of the line that was cut off")
		}
	}
}

func TestAuditTamperingIsFound(t *testing.T) {
	dir := t.TempDir()
	l := openLog(t, dir)
	appendEvents(t, l, 4)
	l.Close()
	file := l.fileName(1)
	whole, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.SplitAfter(string(whole), "\n")
	join := func(parts ...string) []byte { return []byte(strings.Join(parts, "")) }
	cases := map[string][]byte{
		"line left out":  join(lines[0], lines[2], lines[3], lines[4]),
		"lines moved":    join(lines[0], lines[2], lines[1], lines[3], lines[4]),
		"line doubled":   join(lines[0], lines[1], lines[1], lines[2], lines[3], lines[4]),
		"first line cut": join(lines[1:]...),
		"changed":        []byte(strings.Replace(string(whole), `"p2"`, `"p9"`, 1)),
		"rubbish":        append(bytes.Clone(whole), "rubbish\n"...),
		"empty line":     append(bytes.Clone(whole), '\n'),
	}
	for i := 0; i < len(whole)-1; i += 7 {
		changed := bytes.Clone(whole)
		changed[i] ^= 2
		cases[fmt.Sprint("byte ", i)] = changed
	}
	for name, text := range cases {
		if err := os.WriteFile(file, text, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := VerifyAudit(dir); err == nil {
			t.Errorf("%s: not found", name)
		}
		if l, err := openAudit(dir); err == nil {
			l.Close()
			t.Errorf("%s: the log was continued", name)
		}
	}
}

func TestAuditFailsClosedAndRecovers(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "audit")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	l := openLog(t, dir)
	defer l.Close()
	appendEvents(t, l, 1)
	l.f.Close() // every write fails from here
	if err := l.append(t.Context(), Event{Event: "lost"}); !errors.Is(err, errAudit) {
		t.Errorf("append to a broken log: %v", err)
	}
	away := dir + ".away"
	if err := os.Rename(dir, away); err != nil {
		t.Fatal(err)
	}
	if err := l.append(t.Context(), Event{Event: "lost"}); !errors.Is(err, errAudit) {
		t.Errorf("append without a folder: %v", err)
	}
	if err := os.Rename(away, dir); err != nil {
		t.Fatal(err)
	}
	appendEvents(t, l, 1)
	verify(t, dir, 3)
	if text, _ := os.ReadFile(l.fileName(1)); bytes.Contains(text, []byte("lost")) {
		t.Error("an event that was refused is in the log")
	}
}

func FuzzVerifyAudit(f *testing.F) {
	dir := f.TempDir()
	l, err := openAudit(dir)
	if err != nil {
		f.Fatal(err)
	}
	l.Close()
	text, err := os.ReadFile(l.fileName(1))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(text)
	f.Fuzz(func(t *testing.T, text []byte) {
		file := filepath.Join(t.TempDir(), "audit-000000000001.jsonl")
		if err := os.WriteFile(file, text, 0o600); err != nil {
			t.Fatal(err)
		}
		VerifyAudit(file) // must not panic
	})
}

func BenchmarkAuditParallel(b *testing.B) {
	l, err := openAudit(b.TempDir())
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	b.SetParallelism(16)
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if err := l.append(context.Background(), Event{Event: "dek.unwrapped", Outcome: "ok"}); err != nil {
				b.Error(err)
			}
		}
	})
}
